"""Label sets: named, versioned lists of classes."""

from typing import Annotated

from fastapi import Header, Query, Response

from app.api.auth.access import CallerDependency, LabelSetName
from app.api.dependencies import LabelSetsDependency
from app.api.routing import guarded_router
from app.api.schemas.label_sets import ClassesBody, LabelSetBody, LabelSetList, LabelSetResponse, LabelSetSummaryBody
from app.errors import InvalidFieldError
from app.names.namespaces import own_name
from app.store.label_sets import ANY, IfMatch
from app.types import LabelSet

router = guarded_router(prefix="/v1/label-sets", tags=["label sets"])


IfMatchHeader = Annotated[
    str | None, Header(alias="If-Match", description="Write only if the current ETag is one of these.")
]


@router.get("")
async def list_label_sets(
    label_sets: LabelSetsDependency,
    caller: CallerDependency,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(description="`next_after` of the previous page.")] = None,
) -> LabelSetList:
    """List the label sets sorted by name, one page at a time."""
    # One more than the page size shows whether another page follows.
    found = await label_sets.list(
        limit=limit + 1, after=None if after is None else caller.namespace.qualify(after), namespace=caller.namespace
    )
    page = found[:limit]
    return LabelSetList(
        label_sets=[LabelSetSummaryBody.of(summary) for summary in page],
        next_after=own_name(page[-1].name) if len(found) > limit else None,
    )


@router.get(
    "/{name}",
    response_model=LabelSetResponse,
    responses={304: {"description": "The version in `If-None-Match` is current."}},
)
async def get_label_set(
    name: LabelSetName,
    label_sets: LabelSetsDependency,
    response: Response,
    version: Annotated[int | None, Query(ge=1, le=2**31 - 1, description="By default the latest version.")] = None,
    if_none_match: Annotated[str | None, Header(alias="If-None-Match")] = None,
) -> LabelSetResponse | Response:
    """Return a label set in the given version, by default the latest."""
    label_set = await label_sets.get(name, version)
    etag = etag_of(label_set)
    known_etags = {tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")}
    if known_etags & {etag, "*"}:
        return Response(status_code=304, headers={"ETag": etag})
    return with_etag(label_set, response)


@router.put(
    "/{name}",
    responses={201: {"model": LabelSetResponse, "description": "The label set was created."}},
)
async def put_label_set(
    name: LabelSetName,
    body: LabelSetBody,
    label_sets: LabelSetsDependency,
    response: Response,
    if_match: IfMatchHeader = None,
    if_none_match: Annotated[
        str | None, Header(alias="If-None-Match", description="`*`: write only if no label set has this name.")
    ] = None,
) -> LabelSetResponse:
    """Create a label set, or a new version of it. Versions are immutable."""
    if if_none_match not in {None, "*"}:
        raise InvalidFieldError.of("If-None-Match", f"'{if_none_match}' is not supported here; use *")
    label_set, created = await label_sets.put(
        name,
        body.entries(),
        body.templates,
        merge_synonyms=body.merge_synonyms,
        multi_label=body.multi_label,
        priors=body.priors,
        if_match=parse_if_match(if_match),
        if_none_match_any=if_none_match == "*",
    )
    if created:
        response.status_code = 201
    return with_etag(label_set, response)


@router.delete("/{name}", status_code=204, response_class=Response)
async def delete_label_set(name: LabelSetName, label_sets: LabelSetsDependency, if_match: IfMatchHeader = None) -> None:
    """Delete a label set with all its versions and example images. Version numbers are never reused."""
    await label_sets.delete(name, if_match=parse_if_match(if_match))


@router.post("/{name}/classes")
async def add_classes(
    name: LabelSetName,
    body: ClassesBody,
    label_sets: LabelSetsDependency,
    response: Response,
    if_match: IfMatchHeader = None,
) -> LabelSetResponse:
    """Append classes, as a new version."""
    label_set = await label_sets.add_classes(
        name, body.entries(), priors=body.priors, if_match=parse_if_match(if_match)
    )
    return with_etag(label_set, response)


@router.delete("/{name}/classes/{classname:path}")
async def remove_class(
    name: LabelSetName,
    classname: str,
    label_sets: LabelSetsDependency,
    response: Response,
    if_match: IfMatchHeader = None,
) -> LabelSetResponse:
    """Remove one class, as a new version."""
    label_set = await label_sets.remove_class(name, classname, if_match=parse_if_match(if_match))
    return with_etag(label_set, response)


def etag_of(label_set: LabelSet) -> str:
    """Return the version as a strong entity tag; the content of a version never changes."""
    return f'"{label_set.version}"'


def parse_if_match(header: str | None) -> IfMatch:
    """Return the versions that a write may replace; None without a condition.

    Raises:
        InvalidFieldError: the header is neither ``*`` nor a list of entity tags of this service.
    """
    if header is None:
        return None
    if header.strip() == "*":
        return ANY
    versions = []
    for tag in header.split(","):
        digits = tag.strip().removeprefix('"').removesuffix('"')
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 9):
            raise InvalidFieldError.of(
                "If-Match", f"'{tag.strip()}' is not an ETag of a label set; these look like \"3\""
            )
        versions.append(int(digits))
    return frozenset(versions)


def with_etag(label_set: LabelSet, response: Response) -> LabelSetResponse:
    """Return the body of a response with a label set, and set its entity tag."""
    response.headers["ETag"] = etag_of(label_set)
    return LabelSetResponse.of(label_set)
