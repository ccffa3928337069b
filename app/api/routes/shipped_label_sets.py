"""The label sets that come with the installation, to be read and written as label sets of one's own."""

import asyncio

from app.api.routing import guarded_router
from app.api.schemas.label_sets import LabelSetBody
from app.api.schemas.shipped_label_sets import ShippedLabelSet, ShippedLabelSetList, ShippedLabelSetSummary
from app.label_sets.shipped import shipped_file, shipped_files

router = guarded_router(prefix="/v1/shipped-label-sets", tags=["label sets"])


@router.get("")
async def list_shipped_label_sets() -> ShippedLabelSetList:
    """List the label sets with descriptions that come with Deixis, sorted by name."""
    return await asyncio.to_thread(_list)


def _list() -> ShippedLabelSetList:
    contents = {name: LabelSetBody.model_validate_json(file.read_bytes()) for name, file in shipped_files().items()}
    return ShippedLabelSetList(
        label_sets=[ShippedLabelSetSummary.of(name, content) for name, content in contents.items()]
    )


@router.get("/{name}")
async def get_shipped_label_set(name: str) -> ShippedLabelSet:
    """Return the content of a label set that comes with Deixis; `PUT /v1/label-sets/{name}` accepts it as its body."""
    return ShippedLabelSet.model_validate_json(await asyncio.to_thread(shipped_file(name).read_bytes))
