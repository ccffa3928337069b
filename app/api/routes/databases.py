"""Caption databases: listing, searching, building and deleting them."""

from typing import Any

from fastapi import Request, Response

from app.api.auth.access import CallerDependency
from app.api.dependencies import BuildCaptionsJobsDependency, CaptionSearchDependency, ModelsDependency
from app.api.disconnects import unless_disconnected
from app.api.forms import IMAGE_FILES, read_search_input
from app.api.routing import guarded_router
from app.api.schemas.databases import BuildDatabaseBody, DatabaseBody, DatabaseList, SearchFields, SearchResponse
from app.api.schemas.images import ImageBody
from app.api.schemas.jobs import JobBody
from app.captions.catalogue import DatabaseState
from app.captions.query import CaptionQuery
from app.captions.search import CaptionSearch
from app.types import Scope

router = guarded_router(prefix="/v1/databases", tags=["caption databases"])

_FIELDS = SearchFields.model_json_schema()["properties"]
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        # Generators of clients take the first; with the form, they take files and know all types.
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "additionalProperties": False,
                    "properties": {**_FIELDS, "image": {**IMAGE_FILES, "description": "One image file."}},
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    # Inlined, because FastAPI collects no definitions from a body that the route parses itself.
                    "properties": {**_FIELDS, "image": {"anyOf": [ImageBody.model_json_schema(), {"type": "null"}]}},
                }
            },
            "image/*": {
                "schema": {"type": "string", "format": "binary", "description": "Send the fields in the query string."}
            },
        },
    }
}


@router.get("")
async def list_databases(captions: CaptionSearchDependency, caller: CallerDependency) -> DatabaseList:
    """List the caption databases, sorted by name."""
    states = await captions.catalogue.states(caller.namespace)
    return DatabaseList(databases=[await _database_body(state, captions) for state in states])


@router.get("/{name}")
async def get_database(name: str, captions: CaptionSearchDependency, caller: CallerDependency) -> DatabaseBody:
    """Return a caption database."""
    catalogue = captions.catalogue
    return await _database_body(await catalogue.state(catalogue.qualified_name(name, caller.namespace)), captions)


@router.put("/{name}", status_code=202)
async def build_database(
    name: str,
    body: BuildDatabaseBody,
    captions: CaptionSearchDependency,
    models: ModelsDependency,
    jobs: BuildCaptionsJobsDependency,
    caller: CallerDependency,
    response: Response,
) -> JobBody:
    """Start a job that builds a caption database. When it is finished, it replaces a database of the same name."""
    if body.files:
        caller.require(Scope.ADMIN, "reading files on the server")
    name = captions.catalogue.writable_name(name, caller.namespace)
    job = await jobs.add(name, body.plan(models.default))
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return JobBody.of(job)


@router.delete("/{name}", status_code=204, response_class=Response)
async def delete_database(name: str, captions: CaptionSearchDependency, caller: CallerDependency) -> None:
    """Delete a caption database. Running requests that use it are completed."""
    catalogue = captions.catalogue
    await catalogue.delete(catalogue.writable_name(name, caller.namespace))


@router.post("/{name}/search", response_model=SearchResponse, openapi_extra=_BODY)
async def search_database(
    name: str, request: Request, captions: CaptionSearchDependency, caller: CallerDependency
) -> SearchResponse:
    """Return the captions most similar to a text or an image, one page at a time."""
    fields, image = await read_search_input(request)
    query = CaptionQuery(captions.catalogue.qualified_name(name, caller.namespace), image=image, **fields.model_dump())
    await caller.spend_images(0 if image is None else 1)
    return SearchResponse.of(await unless_disconnected(request, captions.search(query)))


async def _database_body(state: DatabaseState, captions: CaptionSearch) -> DatabaseBody:
    models = [] if state.manifest is None else await captions.models_of(state.manifest)
    return DatabaseBody.of(state, models, default=state.name == captions.catalogue.default)
