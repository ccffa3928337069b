"""`deixis describe` and `deixis drafts ...`: descriptions by a language model, and their review."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.markup import escape

from app.api.schemas.descriptions import DecisionBody, DescribeBody, GenerateBody
from app.cli.backends import Backend
from app.cli.common import (
    NOTHING_DONE,
    ServerOption,
    err,
    out,
    progress_bar,
    table_of,
    told_plainly,
    with_backend,
    write_json,
)
from app.describing.describer import Questions
from app.describing.questions import load_question_sets
from app.runtime.data_files import resources
from app.store.drafts import DraftStatus

drafts_cli = typer.Typer(help="What a language model wrote about classes, to be reviewed.", no_args_is_help=True)


def describe_command(
    label_set: Annotated[str, typer.Argument(help="The label set whose classes are described.")],
    question_set: Annotated[
        str, typer.Option("--questions", "-q", help="A set of questions; `deixis drafts questions` lists them.")
    ] = "general",
    which: Annotated[
        Questions, typer.Option("--which", "-w", help="Those that suit every class, those of the domain, or both.")
    ] = Questions.BASE,
    sentences: Annotated[bool, typer.Option(help="Ask for sentences, for `cupl`.")] = True,  # noqa: FBT002 - a flag
    features: Annotated[bool, typer.Option(help="Ask for features, for `dclip`.")] = True,  # noqa: FBT002 - a flag
    answers: Annotated[int, typer.Option(min=1, max=50, help="To each question for sentences.")] = 10,
    classes: Annotated[
        list[str] | None, typer.Option("--class", "-c", help="Only this class of the label set. Repeatable.")
    ] = None,
    accept: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--accept", help="Put every draft into a new version, without a review.")
    ] = False,
    estimate: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--estimate", help="Only tell what it would take.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Begin without asking.")] = False,  # noqa: FBT002 - a flag
    server: ServerOption = None,
) -> None:
    """Ask a language model how the classes of a label set look.

    The endpoint is that of DEIXIS_LLM_BASE_URL, DEIXIS_LLM_MODEL and DEIXIS_LLM_API_KEY, or the server's with
    `--server`. What it writes is kept as drafts until `deixis drafts accept`. A command that was interrupted is gone on
    with by giving it again: what was answered is not asked again.
    """
    body = GenerateBody(
        question_set=question_set,
        questions=which,
        sentences=sentences,
        features=features,
        answers=answers,
        classes=classes,
        accept=accept,
    )
    expected = with_backend(
        server,
        lambda backend: backend.estimate_descriptions(
            label_set, DescribeBody.model_validate(body.model_dump(exclude={"accept"}))
        ),
    )
    told = (
        f"at most {expected.requests:,} requests, {expected.prompt_tokens:,} tokens of questions and"
        f" {expected.completion_tokens:,} tokens of answers"
    )
    err.print(told if expected.requests else "every question is answered already", highlight=False)
    if estimate:
        return
    if expected.requests and not yes and not typer.confirm("Begin?", err=True):
        raise typer.Exit(NOTHING_DONE)

    async def described(backend: Backend) -> Mapping[str, Any]:
        with progress_bar() as bar:
            line = bar.add_task("Asking", total=None)

            async def advance(done: int, total: int) -> None:
                bar.update(line, completed=done, total=total)

            return await backend.describe(label_set, body, advance)

    try:
        result = with_backend(server, described)
    except KeyboardInterrupt:
        rest = "what was answered is kept; give the command again to go on"
        err.print(rest if server is None else f"the server goes on; {server}/v1/jobs tells how far it is")
        raise
    out.print(
        f"{result['questions']} questions, {result['answered_before']} of them answered before:"
        f" {result['new_drafts']} new drafts for {result['prompt_tokens']:,} + {result['completion_tokens']:,} tokens",
        highlight=False,
    )
    if result["label_set"] is not None:
        out.print(f"accepted {result['accepted']} into {escape(result['label_set'])}", highlight=False)
    elif result["new_drafts"]:
        name = escape(label_set)
        out.print(f"review them: deixis drafts list {name}; then: deixis drafts accept {name}", highlight=False)


IdsOption = Annotated[
    list[int] | None, typer.Option("--id", "-i", help="One of `drafts list`; all that are undecided by default.")
]


@drafts_cli.command("list")
def list_drafts(
    label_set: Annotated[str, typer.Argument(help="Its name.")],
    every: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--all", "-a", help="Also those that were accepted or rejected.")
    ] = False,
    classname: Annotated[str | None, typer.Option("--class", "-c", help="Of this class only.")] = None,
    json_output: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--json", help="Everything that is known of each, as JSON.")
    ] = False,
    server: ServerOption = None,
) -> None:
    """List what a language model wrote about the classes of a label set."""
    found = with_backend(
        server, lambda backend: backend.drafts(label_set, None if every else DraftStatus.DRAFT, classname)
    )
    if json_output:
        write_json([each.model_dump(mode="json", by_alias=True) for each in found])
        return
    rows = [
        (str(each.id), each.class_, each.kind, each.status, each.text, each.model, f"{each.asked_at:%Y-%m-%d}")
        for each in found
    ]
    out.print(table_of(("id", "class", "kind", "status", "text", "model", "asked"), rows, right=("id",)))


@drafts_cli.command("accept")
def accept_drafts(
    label_set: Annotated[str, typer.Argument(help="Its name.")], ids: IdsOption = None, server: ServerOption = None
) -> None:
    """Put drafts into a new version of the label set."""
    accepted = with_backend(server, lambda backend: backend.accept_drafts(label_set, DecisionBody(ids=ids)))
    written = accepted.label_set
    out.print(f"accepted {accepted.accepted} into {escape(written.name)}@{written.version}", highlight=False)


@drafts_cli.command("reject")
def reject_drafts(
    label_set: Annotated[str, typer.Argument(help="Its name.")], ids: IdsOption = None, server: ServerOption = None
) -> None:
    """Keep drafts from being used, and from being made again."""
    rejected = with_backend(server, lambda backend: backend.reject_drafts(label_set, DecisionBody(ids=ids)))
    out.print(f"rejected {rejected.rejected}", highlight=False)


@drafts_cli.command("questions")
def list_questions() -> None:
    """List the sets of questions that `deixis describe` can ask."""
    with told_plainly():
        sets = load_question_sets(resources("prompts") / "questions")
    rows = [(each.name, each.summary, f"{len(each.base)} + {len(each.full)}") for each in sets.values()]
    out.print(table_of(("name", "for", "base + full"), rows, right=("base + full",)))
