"""The query of a bulk run: resolved once, stored as JSON, and compared by every worker.

Workers get the resolved ``Task``, so a change of the label set, its examples or its method does not change the rows of
a run that has started.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from app.classification.methods import METHODS
from app.classification.request import ClassifyRequest
from app.errors import ConflictError, InvalidFieldError
from app.main import Service
from app.types import RejectBy, Task

# Fields of a task that do not change the rows, or that the query stores in another form.
_OMITTED = ("classes", "explain", "reason", "together")


@dataclass(frozen=True, slots=True)
class RunSpec:
    """The part of a run that every worker needs.

    Args:
        task: the resolved request.
        query: the same as JSON; see ``query_of``.
        folder: of the parts.
        part_images: maximum number of rows in a part.
        max_image_bytes: larger images are not read.
    """

    task: Task
    query: Mapping[str, Any]
    folder: Path
    part_images: int
    max_image_bytes: int


async def resolve_task(service: Service, request: ClassifyRequest) -> Task:
    """Look up every name of a request.

    Raises:
        InvalidFieldError: the results would depend on the other images of a batch, or on earlier images.
        DeixisError: as ``Resolver.resolve``.
    """
    task = await service.resolver.resolve(request)
    if task.database is not None:
        return task
    if METHODS[task.method].stateful:
        raise InvalidFieldError.of(
            "method",
            f"'{task.method}' adapts to earlier images, so its results depend on their order; name another method",
        )
    classifier = await service.classifiers.get(task)
    if classifier.transductive:
        raise InvalidFieldError.of(
            "method",
            f"'{task.method}' classifies the images of a request jointly, and a bulk run forms batches arbitrarily; add"
            " example images that it can learn from to the label set, or name another method",
        )
    # With the weights of now, which do not change with the example images.
    return replace(task, priors=classifier.priors)


async def query_of(service: Service, task: Task) -> dict[str, Any]:
    """Return everything that the rows of a task depend on, as JSON without nulls.

    These are the fields of the task, the label set and the caption database by version, and the model's fingerprint.
    """
    fields = asdict(replace(task, label_set=None))
    for name in _OMITTED:
        del fields[name]
    query = {
        **fields,
        "model_fingerprint": await service.models.get(task.model).image_fingerprint(),
        "options": dict(task.options) or None,
        "merge_synonyms": task.merge_synonyms,
    }
    if task.label_set is not None:
        query["label_set"] = task.label_set.reference
        query["examples_revision"] = task.examples_revision or None
        # Another database may have another label set of the same name and version.
        query["classes_sha256"] = _sha256([asdict(entry) for entry in task.classes])
    elif task.database is not None:
        query["database"] = await _generation(service, task.database)
    else:
        query["labels"] = task.classnames
    stored: dict[str, Any] = json.loads(json.dumps(_without_none(query)))
    return stored


def _sha256(value: object) -> str:
    return sha256(json.dumps(value).encode()).hexdigest()


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_none(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None
    }


async def _generation(service: Service, database: str) -> str:
    return f"{database}@{(await service.caption_search.catalogue.state(database)).generation}"


async def verify_worker(service: Service, spec: RunSpec) -> None:
    """Check that this process would produce the same rows as the process that resolved the query, and prepare it.

    Raises:
        ConflictError: other weights of the model, other examples, or another caption database.
        UnknownNameError: the model, label set or caption database does not exist here.
    """
    task, query = spec.task, spec.query
    if task.label_set is not None and METHODS[task.method].learns:
        revision = (await service.label_sets.find(task.label_set.reference)).examples_revision
        if revision != task.examples_revision:
            raise ConflictError(
                f"label set '{task.label_set.reference}' has revision {revision} of its examples here, and the run uses"
                f" revision {task.examples_revision}; set DEIXIS_DATABASE_URL to the same database for all workers"
            )
    here = await query_of(service, task)
    for name in ("model_fingerprint", "database"):
        if here.get(name) != query.get(name):
            raise ConflictError(
                f"the {name.replace('_', ' ')} is {here.get(name)} here, and the run uses {query.get(name)}; give all"
                " workers the same models and caption databases"
            )
    if task.scoring.reject_by is RejectBy.IN_VOCABULARY:
        await service.negative_words.prepare(task.model)
