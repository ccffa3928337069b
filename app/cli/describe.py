"""`deixis describe` and `deixis drafts ...`: class descriptions by a language model, and their review."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.markup import escape

from app.cli.backends import Backend
from app.cli.common import NOTHING_DONE, err, make_table, out, progress_bar, report_errors, with_backend, write_json
from app.cli.options import ServerOption
from app.describing.questions import load_question_sets
from app.describing.request import DescribeRequest, Questions
from app.runtime.data_files import resources
from app.types import DraftStatus

drafts_cli = typer.Typer(no_args_is_help=True)


def describe_command(
    label_set: Annotated[str, typer.Argument(help="Name of the label set whose classes are described.")],
    question_set: Annotated[
        str, typer.Option("--questions", "-q", help="A question set; `deixis drafts questions` lists them.")
    ] = "general",
    which: Annotated[
        Questions, typer.Option("--which", "-w", help="The general questions of the set, those of its domain, or both.")
    ] = Questions.BASE,
    sentences: Annotated[bool, typer.Option(help="Request sentences, which `cupl` uses.")] = True,  # noqa: FBT002 - a flag
    features: Annotated[bool, typer.Option(help="Request features, which `dclip` uses.")] = True,  # noqa: FBT002 - a flag
    answers: Annotated[int, typer.Option(min=1, max=50, help="Answers to each question for sentences.")] = 10,
    classes: Annotated[
        list[str] | None, typer.Option("--class", "-c", help="Describe only this class. Repeatable.")
    ] = None,
    accept: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--accept", help="Accept all drafts into a new version without a review.")
    ] = False,
    estimate: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--estimate", help="Only print an upper bound of the requests and tokens.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Start without confirmation.")] = False,  # noqa: FBT002 - a flag
    server: ServerOption = None,
) -> None:
    """Describe the classes of a label set by a language model.

    The language model is that of DEIXIS_LLM_BASE_URL, DEIXIS_LLM_MODEL and DEIXIS_LLM_API_KEY, or that of the server
    with `--server`. The descriptions are drafts until `deixis drafts accept`. To resume an interrupted run, start it
    again: answered questions are not sent again.
    """
    request = DescribeRequest(
        question_set=question_set,
        questions=which,
        sentences=sentences,
        features=features,
        answers=answers,
        classes=tuple(classes) if classes else None,
    )
    expected = with_backend(server, lambda backend: backend.estimate_descriptions(label_set, request))
    bound = (
        f"at most {expected.requests:,} requests, {expected.prompt_tokens:,} tokens of questions and"
        f" {expected.completion_tokens:,} tokens of answers"
    )
    err.print(bound if expected.requests else "all questions are answered already", highlight=False)
    if estimate:
        return
    if expected.requests and not yes and not typer.confirm("Start?", err=True):
        raise typer.Exit(NOTHING_DONE)

    async def describe(backend: Backend) -> Mapping[str, Any]:
        with progress_bar("Describing") as on_progress:
            return await backend.describe(label_set, request, on_progress, accept=accept)

    try:
        result = with_backend(server, describe)
    except KeyboardInterrupt:
        kept = "the answers so far are saved; run the command again to resume"
        err.print(kept if server is None else f"the job continues on the server; see {server}/v1/jobs")
        raise
    out.print(
        f"{result['questions']} questions, {result['answered_before']} of them answered earlier:"
        f" {result['new_drafts']} new drafts for {result['prompt_tokens']:,} + {result['completion_tokens']:,} tokens",
        highlight=False,
    )
    if result["label_set"] is not None:
        out.print(f"accepted {result['accepted']} into {escape(result['label_set'])}", highlight=False)
    elif result["new_drafts"]:
        name = escape(label_set)
        out.print(f"review them: deixis drafts list {name}; then: deixis drafts accept {name}", highlight=False)


IdsOption = Annotated[
    list[int] | None,
    typer.Option("--id", "-i", help="An id of `drafts list`; by default all undecided drafts. Repeatable."),
]


@drafts_cli.command("list")
def list_drafts(
    label_set: Annotated[str, typer.Argument(help="Name of the label set.")],
    every: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--all", "-a", help="Also list accepted and rejected drafts.")
    ] = False,
    classname: Annotated[str | None, typer.Option("--class", "-c", help="Only list the drafts of this class.")] = None,
    json_output: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--json", help="Print all fields as JSON.")
    ] = False,
    server: ServerOption = None,
) -> None:
    """List the drafts of a label set."""
    status = None if every else DraftStatus.DRAFT
    drafts = with_backend(server, lambda backend: backend.drafts(label_set, status, classname))
    if json_output:
        write_json([draft.model_dump(mode="json", by_alias=True) for draft in drafts])
        return
    rows = [
        (
            *(str(draft.id), draft.label, draft.kind, draft.status, draft.text, draft.model),
            f"{draft.asked_at:%Y-%m-%d}",
        )
        for draft in drafts
    ]
    out.print(make_table(("id", "class", "kind", "status", "text", "model", "asked"), rows, right=("id",)))


@drafts_cli.command("accept")
def accept_drafts(
    label_set: Annotated[str, typer.Argument(help="Name of the label set.")],
    ids: IdsOption = None,
    server: ServerOption = None,
) -> None:
    """Accept drafts into a new version of the label set."""
    accepted = with_backend(server, lambda backend: backend.accept_drafts(label_set, ids))
    written = accepted.label_set
    out.print(f"accepted {accepted.accepted} into {escape(written.name)}@{written.version}", highlight=False)


@drafts_cli.command("reject")
def reject_drafts(
    label_set: Annotated[str, typer.Argument(help="Name of the label set.")],
    ids: IdsOption = None,
    server: ServerOption = None,
) -> None:
    """Reject drafts: they are not used, and not requested again."""
    rejected = with_backend(server, lambda backend: backend.reject_drafts(label_set, ids))
    out.print(f"rejected {rejected}", highlight=False)


@drafts_cli.command("questions")
def list_questions() -> None:
    """List the question sets of `deixis describe`."""
    with report_errors():
        sets = load_question_sets(resources("prompts") / "questions")
    rows = [(found.name, found.summary, f"{len(found.base)} + {len(found.full)}") for found in sets.values()]
    out.print(make_table(("name", "for", "base + full"), rows, right=("base + full",)))
