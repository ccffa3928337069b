"""Label sets: register class names once, refer to them by name ever after."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from app.api.auth.access import CallerDependency, GuardedRoute, LabelSetName
from app.api.dependencies import LabelSetsDependency
from app.api.forms import media_type_of
from app.api.schemas.label_sets import ClassesBody, LabelSetBody, LabelSetList, LabelSetResponse, LabelSetSummaryBody
from app.errors import InvalidFieldError, UnsupportedMediaTypeError
from app.names.namespaces import own_name
from app.store.label_sets import ANY, IfMatch
from app.types import LabelSet

router = APIRouter(prefix="/v1/label-sets", tags=["label sets"], route_class=GuardedRoute)


def _require_json(request: Request) -> None:
    """Refuse other content types, such as the one that curl sends by itself."""
    content_type = media_type_of(request)
    if content_type != "application/json":
        raise UnsupportedMediaTypeError(
            f"content type '{content_type}' is not supported; send JSON with 'Content-Type: application/json'"
        )


JSON_ONLY = [Depends(_require_json)]

IfMatchHeader = Annotated[str | None, Header(alias="If-Match", description="Write only if the ETag is this one.")]


@router.get("")
async def list_label_sets(
    label_sets: LabelSetsDependency,
    caller: CallerDependency,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(description="`next_after` of the page before.")] = None,
) -> LabelSetList:
    """List the label sets by name, a page at a time."""
    # One more than the page holds tells whether it is the last.
    found = await label_sets.list(
        limit=limit + 1, after=None if after is None else caller.namespace.qualify(after), namespace=caller.namespace
    )
    page = found[:limit]
    return LabelSetList(
        label_sets=[LabelSetSummaryBody.of(each) for each in page],
        next_after=own_name(page[-1].name) if len(found) > limit else None,
    )


@router.get("/{name}", response_model=LabelSetResponse, responses={304: {"description": "It is the version you have."}})
async def get_label_set(
    name: LabelSetName,
    label_sets: LabelSetsDependency,
    response: Response,
    version: Annotated[int | None, Query(ge=1, le=2**31 - 1, description="The latest by default.")] = None,
    if_none_match: Annotated[str | None, Header(alias="If-None-Match")] = None,
) -> LabelSetResponse | Response:
    """Return a label set, in its latest version or the one asked for."""
    label_set = await label_sets.get(name, version)
    etag = etag_of(label_set)
    had = {each.strip().removeprefix("W/") for each in (if_none_match or "").split(",")}
    if had & {etag, "*"}:
        return Response(status_code=304, headers={"ETag": etag})
    return _told(label_set, response)


@router.put(
    "/{name}", dependencies=JSON_ONLY, responses={201: {"model": LabelSetResponse, "description": "The name is new."}}
)
async def put_label_set(
    name: LabelSetName,
    body: LabelSetBody,
    label_sets: LabelSetsDependency,
    response: Response,
    if_match: IfMatchHeader = None,
    if_none_match: Annotated[
        str | None, Header(alias="If-None-Match", description="`*`: write only if the name is new.")
    ] = None,
) -> LabelSetResponse:
    """Make a new immutable version of a label set, which becomes the latest."""
    if if_none_match not in {None, "*"}:
        raise InvalidFieldError.of("If-None-Match", f"only * is possible here, not '{if_none_match}'")
    label_set, created = await label_sets.put(
        name,
        body.entries(),
        body.templates,
        merge_synonyms=body.merge_synonyms,
        if_match=parse_if_match(if_match),
        if_none_match_any=if_none_match == "*",
    )
    if created:
        response.status_code = 201
    return _told(label_set, response)


@router.delete("/{name}", status_code=204, response_class=Response)
async def delete_label_set(name: LabelSetName, label_sets: LabelSetsDependency, if_match: IfMatchHeader = None) -> None:
    """Delete a label set with all its versions and example images; version numbers are never given again."""
    await label_sets.delete(name, if_match=parse_if_match(if_match))


@router.post("/{name}/classes", dependencies=JSON_ONLY)
async def add_classes(
    name: LabelSetName,
    body: ClassesBody,
    label_sets: LabelSetsDependency,
    response: Response,
    if_match: IfMatchHeader = None,
) -> LabelSetResponse:
    """Add classes at the end, as a new version."""
    label_set = await label_sets.add_classes(name, body.entries(), if_match=parse_if_match(if_match))
    return _told(label_set, response)


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
    return _told(label_set, response)


def etag_of(label_set: LabelSet) -> str:
    """Return the version as a strong entity tag; a version's content never changes."""
    return f'"{label_set.version}"'


def parse_if_match(header: str | None) -> IfMatch:
    """Return the versions that a write may replace; None where the caller does not mind.

    Raises:
        InvalidFieldError: neither ``*`` nor a list of this service's entity tags.
    """
    if header is None:
        return None
    if header.strip() == "*":
        return ANY
    versions = []
    for tag in header.split(","):
        digits = tag.strip().removeprefix('"').removesuffix('"')
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 9):
            raise InvalidFieldError.of("If-Match", f"'{tag.strip()}' is no ETag of a label set; those look like \"3\"")
        versions.append(int(digits))
    return frozenset(versions)


def _told(label_set: LabelSet, response: Response) -> LabelSetResponse:
    response.headers["ETag"] = etag_of(label_set)
    return LabelSetResponse.of(label_set)
