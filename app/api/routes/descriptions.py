"""Generated class descriptions: a job writes drafts, which are reviewed and accepted into a new version."""

from typing import Annotated

from fastapi import Query, Response

from app.api.auth.access import LabelSetName
from app.api.dependencies import (
    DescribeJobsDependency,
    DescriberDependency,
    DraftsDependency,
    LabelSetsDependency,
)
from app.api.routes.label_sets import IfMatchHeader, etag_of, parse_if_match
from app.api.routing import guarded_router
from app.api.schemas.descriptions import (
    AcceptedResponse,
    DecisionBody,
    DescribeBody,
    DraftBody,
    DraftList,
    EstimateBody,
    GenerateBody,
    QuestionSetBody,
    QuestionSetList,
    RejectedResponse,
)
from app.api.schemas.jobs import JobBody
from app.api.schemas.label_sets import LabelSetResponse
from app.types import DraftStatus

router = guarded_router(tags=["descriptions"])

_PATH = "/v1/label-sets/{name}/descriptions"


@router.get("/v1/question-sets")
async def list_question_sets(describer: DescriberDependency) -> QuestionSetList:
    """List the question sets for a language model."""
    return QuestionSetList(
        question_sets=[
            QuestionSetBody(
                name=questions.name, summary=questions.summary, base=list(questions.base), full=list(questions.full)
            )
            for questions in describer.question_sets.values()
        ]
    )


@router.post(f"{_PATH}:estimate")
async def estimate_descriptions(
    name: LabelSetName, body: DescribeBody, describer: DescriberDependency, label_sets: LabelSetsDependency
) -> EstimateBody:
    """Estimate the maximum cost of `descriptions:generate`, without sending any request to the language model."""
    estimate = await describer.estimate(await label_sets.find(name), body.request())
    return EstimateBody(
        requests=estimate.requests, prompt_tokens=estimate.prompt_tokens, completion_tokens=estimate.completion_tokens
    )


@router.post(f"{_PATH}:generate", status_code=202)
async def generate_descriptions(
    name: LabelSetName, body: GenerateBody, jobs: DescribeJobsDependency, response: Response
) -> JobBody:
    """Start a job that asks the configured language model about the classes.

    Answers are cached: a question that an earlier or an interrupted job has asked is not asked again.
    """
    job = await jobs.add(name, body.request(), accept=body.accept)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return JobBody.of(job)


@router.get(_PATH)
async def list_drafts(
    name: LabelSetName,
    label_sets: LabelSetsDependency,
    drafts: DraftsDependency,
    status: DraftStatus | None = None,
    class_: Annotated[str | None, Query(alias="class", description="Only drafts of this class.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="`next_after` of the previous page.")] = 0,
) -> DraftList:
    """List the drafts with their question, model and time, one page at a time."""
    classname = None if class_ is None else label_sets.clean_classname(class_)
    found = await drafts.list(name, limit=limit + 1, after=after, status=status, classname=classname)
    page = found[:limit]
    return DraftList(
        drafts=[DraftBody.of(draft) for draft in page], next_after=page[-1].id if len(found) > limit else None
    )


@router.post(f"{_PATH}:accept")
async def accept_drafts(
    name: LabelSetName,
    body: DecisionBody,
    label_sets: LabelSetsDependency,
    response: Response,
    if_match: IfMatchHeader = None,
) -> AcceptedResponse:
    """Append drafts to the texts of their classes, in a new version of the label set."""
    label_set, accepted = await label_sets.accept_drafts(name, body.ids, if_match=parse_if_match(if_match))
    response.headers["ETag"] = etag_of(label_set)
    return AcceptedResponse(accepted=accepted, label_set=LabelSetResponse.of(label_set))


@router.post(f"{_PATH}:reject")
async def reject_drafts(name: LabelSetName, body: DecisionBody, drafts: DraftsDependency) -> RejectedResponse:
    """Reject drafts. Rejected texts are not generated again."""
    return RejectedResponse(rejected=await drafts.reject(name, body.ids))
