"""Example images of a label set: adding, listing and deleting them, and the method they select."""

import asyncio
from typing import Annotated, Any

from fastapi import Query, Request, Response

from app.api.auth.access import Caller, CallerDependency, LabelSetName
from app.api.class_fields import read_classes
from app.api.deadline import restart_deadline
from app.api.dependencies import (
    ExamplesDependency,
    ImageCountLimitsDependency,
    ImportJobsDependency,
    LabelSetsDependency,
    SelectionReaderDependency,
    SelectMethodJobsDependency,
)
from app.api.forms import (
    IMAGE_FILES,
    check_field_names,
    media_type_of,
    parse_json,
    read_form,
)
from app.api.routing import guarded_router
from app.api.schemas._base import ModelName
from app.api.schemas.examples import (
    AddedExamplesResponse,
    DeletedExamplesResponse,
    ExampleBody,
    ExampleCountsBody,
    ExampleList,
    ImportBody,
)
from app.api.schemas.jobs import JobBody
from app.api.schemas.selection import SelectionResponse
from app.errors import ClientError, InvalidFieldError, UnknownNameError, UnsupportedMediaTypeError
from app.fewshot.examples import ExampleImages
from app.jobs.handlers import SelectMethodJobs
from app.names.class_names import indices_of
from app.store.examples import Deleted, NewExample
from app.types import LabelSet, Scope

router = guarded_router(tags=["example images"])

_PATH = "/v1/label-sets/{name}/images"
_ENCODED_AT_ONCE = 16

_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "additionalProperties": False,
                    "properties": {
                        "image": IMAGE_FILES,
                        "class": {
                            "type": "array",
                            "items": {"type": "string"},
                            "description": "Omitted: the images are unlabelled. Once: the class of all images. Once"
                            " per image: the class of each, in the same order; empty for an unlabelled image. Several"
                            ' classes are a JSON array, such as `["cat", "sofa"]`; for a single image, the field may'
                            " be repeated instead.",
                        },
                    },
                }
            },
            "application/json": {"schema": ImportBody.model_json_schema()},
        },
    }
}


@router.post(
    _PATH,
    status_code=201,
    response_model=AddedExamplesResponse,
    responses={202: {"model": JobBody, "description": "The import of a folder has started."}},
    openapi_extra=_BODY,
)
async def add_images(
    name: LabelSetName,
    request: Request,
    label_sets: LabelSetsDependency,
    examples: ExamplesDependency,
    importing: ImportJobsDependency,
    select_method: SelectMethodJobsDependency,
    limits: ImageCountLimitsDependency,
    caller: CallerDependency,
) -> AddedExamplesResponse | Response:
    """Add the images of a form, or start a job that imports a folder on the server (JSON).

    The service stores their features and digests, and their files only with `DEIXIS_KEEP_IMAGES`. An image that is
    stored already is not added again, but takes the given class. Images that cannot be read are skipped. All others are
    stored durably before the response. A job then compares the methods and selects one.
    """
    label_set = await label_sets.get(name)
    match media_type_of(request):
        case "multipart/form-data":
            return await _add_form(label_set, request, examples, select_method, limits.max_evaluation_images, caller)
        case "application/json":
            caller.require(Scope.ADMIN, "importing a folder on the server")
            body = parse_json(ImportBody, await request.body())
            if [body.by_subfolder, body.class_ is not None, body.classes is not None].count(True) > 1:
                raise InvalidFieldError.of("class", "give one of class, classes and by_subfolder")
            given = [] if body.class_ is None else [body.class_]
            given = given if body.classes is None else body.classes
            indices = indices_of(given, label_set.classnames)
            classnames = tuple(label_set.classnames[index] for index in indices)
            job = await importing.add(
                label_set.name, body.folder, by_subfolder=body.by_subfolder, classnames=classnames
            )
            return Response(
                JobBody.of(job).model_dump_json(),
                202,
                headers={"Location": f"/v1/jobs/{job.id}"},
                media_type="application/json",
            )
        case other:
            raise UnsupportedMediaTypeError(
                f"content type '{other}' is not supported; send multipart/form-data with parts named image, or JSON to"
                " import a folder on the server"
            )


async def _add_form(
    label_set: LabelSet,
    request: Request,
    examples: ExampleImages,
    select_method: SelectMethodJobs,
    max_images: int,
    caller: Caller,
) -> AddedExamplesResponse:
    form, fields = await read_form(request, max_images, max_images + 1, "")
    check_field_names(list(fields), ("image", "class"))
    count = len(form.images)
    classnames = await asyncio.to_thread(read_classes, fields.get("class", []), count, label_set.classnames)
    await caller.spend_images(count)
    prepared: list[NewExample | ClientError] = []
    while form.images:
        restart_deadline(request)
        images, first = form.take_images(_ENCODED_AT_ONCE), len(prepared)
        # Once its first batch is admitted, the request waits if other requests fill the queue.
        prepared += await examples.prepare(
            label_set.name,
            images,
            classnames[first : first + len(images)],
            wait=first > 0,
            is_request=True,
        )
    items = [example for example in prepared if isinstance(example, NewExample)]
    if not items:
        assert isinstance(prepared[0], ClientError)
        raise prepared[0]
    before = await examples.repository.revision(label_set.name)
    added = await examples.add(label_set.name, items)
    job = None if added.revision == before else (await select_method.add(label_set.name)).id
    return AddedExamplesResponse.of(added, prepared, await examples.counts(label_set.name), job)


@router.get(_PATH)
async def list_images(
    name: LabelSetName,
    label_sets: LabelSetsDependency,
    examples: ExamplesDependency,
    class_: Annotated[str | None, Query(alias="class", description="Only images of this class.")] = None,
    unlabelled: Annotated[bool, Query(description="Only unlabelled images.")] = False,  # noqa: FBT002 - a query field
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[int, Query(ge=0, le=2**63 - 1, description="`next_after` of the previous page.")] = 0,
) -> ExampleList:
    """List example images one page at a time, with the counts of all."""
    if class_ is not None:
        class_ = await examples.find_class(await label_sets.get(name), class_)
    found = await examples.repository.list(name, limit=limit + 1, after=after, classname=class_, unlabelled=unlabelled)
    page = found[:limit]
    return ExampleList(
        images=[ExampleBody.of(example) for example in page],
        counts=ExampleCountsBody.of(await examples.counts(name)),
        next_after=page[-1].id if len(found) > limit else None,
    )


@router.delete(_PATH)
async def delete_images(
    name: LabelSetName,
    request: Request,
    label_sets: LabelSetsDependency,
    examples: ExamplesDependency,
    select_method: SelectMethodJobsDependency,
    class_: Annotated[str | None, Query(alias="class", description="Delete all images of this class.")] = None,
    unlabelled: Annotated[bool, Query(description="Delete all unlabelled images.")] = False,  # noqa: FBT002 - a query field
    everything: Annotated[bool, Query(alias="all", description="Delete all images.")] = False,  # noqa: FBT002 - a query field
) -> DeletedExamplesResponse:
    """Delete the images of a class, the unlabelled images, or all, with everything that was fitted on them."""
    # A deletion cannot be undone, so a misspelled or repeated field must not be ignored.
    check_field_names(list(request.query_params), ("class", "unlabelled", "all"))
    if len(request.query_params.multi_items()) > 1:
        raise InvalidFieldError.of("class", "give one class, unlabelled=true or all=true at a time")
    if [class_ is not None, unlabelled, everything].count(True) != 1:
        raise InvalidFieldError.of("class", "give exactly one of class, unlabelled=true and all=true")
    if class_ is not None:
        class_ = await examples.find_class(await label_sets.get(name), class_)
    deleted = await examples.delete(name, classname=class_, unlabelled=unlabelled, everything=everything)
    return await _deleted(name, deleted, examples, select_method)


@router.get(_PATH + "/{image_id}")
async def get_image(name: LabelSetName, image_id: int, examples: ExamplesDependency) -> ExampleBody:
    """Return an example image, without its file."""
    return ExampleBody.of(await examples.repository.get(name, image_id))


@router.get(
    _PATH + "/{image_id}/content",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}, "description": "The file as it was uploaded."}},
)
async def get_image_content(name: LabelSetName, image_id: int, examples: ExamplesDependency) -> Response:
    """Return the file of an example image, if files are stored (`DEIXIS_KEEP_IMAGES`)."""
    content = await examples.repository.content(name, image_id)
    if content is None:
        raise UnknownNameError(
            "file of example image",
            str(image_id),
            way_out="only its features are stored; set DEIXIS_KEEP_IMAGES to store files too",
        )
    # As an attachment of unspecified type, so that a browser never renders an uploaded file.
    return Response(
        content,
        media_type="application/octet-stream",
        headers={"Content-Disposition": "attachment"},
    )


@router.delete(_PATH + "/{image_id}")
async def delete_image(
    name: LabelSetName, image_id: int, examples: ExamplesDependency, select_method: SelectMethodJobsDependency
) -> DeletedExamplesResponse:
    """Delete one example image, with everything that was fitted on it."""
    await examples.repository.get(name, image_id)
    return await _deleted(name, await examples.delete(name, ids=[image_id]), examples, select_method)


@router.get("/v1/label-sets/{name}/selection")
async def get_selection(
    name: LabelSetName,
    label_sets: LabelSetsDependency,
    selections: SelectionReaderDependency,
    model: Annotated[ModelName | None, Query(description="A model of `GET /v1/models`; by default the first.")] = None,
) -> SelectionResponse:
    """Return the method selected on the example images, with the cross-validated measures of every method."""
    return SelectionResponse.of(await selections.stored(await label_sets.get(name), model))


async def _deleted(
    name: LabelSetName, deleted: Deleted, examples: ExampleImages, select_method: SelectMethodJobs
) -> DeletedExamplesResponse:
    return DeletedExamplesResponse(
        deleted=deleted.deleted,
        counts=ExampleCountsBody.of(await examples.counts(name)),
        job=(await select_method.add(name)).id if deleted.deleted else None,
    )
