"""The options that several commands share, and the request that they describe."""

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args

import typer

from app.classification.method_names import PRIOR_NAMES
from app.classification.request import ClassifyRequest
from app.cli.common import Engine, read_lines, report_errors
from app.encoders.model_names import catalogue_name
from app.errors import InvalidFieldError, did_you_mean
from app.names.labels import split_labels
from app.names.text import quoted
from app.types import Reject

EngineOption = Annotated[
    Engine,
    typer.Option(
        "--engine",
        help="Where images are encoded: in this process, or by replicas on Ray (DEIXIS_RAY_LAYOUT, RAY_ADDRESS).",
    ),
]


def _not_with_local(context: typer.Context, url: str | None) -> str | None:
    if url is not None and context.meta.get("deixis.local"):
        raise typer.BadParameter("excludes --local; pass one of them")
    return url


ServerOption = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        callback=_not_with_local,
        help="Use a running server, with the API key in DEIXIS_API_KEY; by default that of DEIXIS_SERVER, or one that"
        " answers on this machine.",
        rich_help_panel="Where the command runs",
    ),
]
ImageLabelsOption = Annotated[
    Path | None,
    typer.Option(
        "--image-labels",
        metavar="FILE",
        help="The labels of each image of the folder, of which there may be several: CSV, JSON or COCO annotations.",
    ),
]

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A model in service; by default the first of DEIXIS_MODELS.",
        callback=lambda name: name and catalogue_name(name),
    ),
]

# The options of a classification request, by parameter: their annotation and default value.
_REQUEST_OPTIONS: dict[str, tuple[Any, Any]] = {
    "labels": (
        Annotated[
            list[str] | None,
            typer.Option(
                "--labels",
                "-l",
                help="Labels: separated by commas or new lines, a JSON array, or @FILE with one per line. Repeatable.",
            ),
        ],
        None,
    ),
    "label_set": (
        Annotated[str | None, typer.Option("--label-set", "-s", help="A stored label set: NAME or NAME@VERSION.")],
        None,
    ),
    "model": (ModelOption, None),
    "method": (
        Annotated[
            str | None,
            typer.Option(
                "--method",
                help="The method; by default `auto` if the label set has example images, `cased` without labels, else"
                " `zero-shot`.",
            ),
        ],
        None,
    ),
    "template": (
        Annotated[
            str | None,
            typer.Option("--template", "-t", help="A template set, or one template with {} for the class name."),
        ],
        None,
    ),
    "database": (
        Annotated[
            str | None,
            typer.Option(
                "--database", "-d", help="Without labels: the caption database in which labels are discovered."
            ),
        ],
        None,
    ),
    "group": (
        Annotated[
            bool, typer.Option("--group", "-g", help="Without labels: discover few labels that the images share.")
        ],
        False,
    ),
    "option": (
        Annotated[
            list[str] | None,
            typer.Option(
                "--option", "-o", metavar="NAME=NUMBER", help="An option of the method, such as beta=0.7. Repeatable."
            ),
        ],
        None,
    ),
    "priors": (
        Annotated[
            str | None,
            typer.Option(
                "--priors",
                metavar="FILE|estimate|uniform",
                help="How often the images show each label: a JSON file with a number for each; `estimate` counts the"
                " labelled example images, `uniform` ignores the priors of the label set.",
            ),
        ],
        None,
    ),
    "reject_below": (
        Annotated[
            float | None,
            typer.Option(
                "--reject-below",
                min=0,
                max=1,
                help="Reject images whose best score is lower: they show none of the labels.",
            ),
        ],
        None,
    ),
    "false_rejection_rate": (
        Annotated[
            float | None,
            typer.Option(
                "--false-rejection-rate",
                help="Choose the threshold so that at most this share of the images of all labels is rejected; needs"
                " labelled example images.",
            ),
        ],
        None,
    ),
    "reject": (
        Annotated[
            Reject | None,
            typer.Option(
                "--reject",
                help="`auto` rejects images that probably show none of the labels, without a threshold of yours.",
            ),
        ],
        None,
    ),
    "coverage": (
        Annotated[
            float | None,
            typer.Option(
                "--coverage",
                help="Also return a set of labels that includes the true label with this probability; needs labelled"
                " example images.",
            ),
        ],
        None,
    ),
    "multi_label": (
        Annotated[
            bool | None,
            typer.Option(
                "--multi-label/--one-label",
                help="Images may have several of the labels, or none.",
                show_default="what the label set says",
            ),
        ],
        None,
    ),
    "min_score": (
        Annotated[
            float | None,
            typer.Option(
                "--min-score",
                min=0,
                max=1,
                help="With parents of classes: show the lowest label of the hierarchy that has this score.",
            ),
        ],
        None,
    ),
    "top_k": (
        Annotated[
            int | None,
            typer.Option(
                "--top-k", "-k", min=1, help="Predictions per image.", show_default="1; 2 in a table: the runner-up"
            ),
        ],
        None,
    ),
    "explain": (
        Annotated[
            bool,
            typer.Option(
                "--explain",
                "-x",
                help="Also show the prompts for and against each label; without labels, the nearest captions.",
            ),
        ],
        False,
    ),
}


# The panels of the help with these options.
_PANELS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "Labels": frozenset({"labels", "label_set", "database", "group"}),
        "Model and method": frozenset({"model", "method", "template", "option", "priors"}),
        "Unknown images, and sets of labels": frozenset(
            {"multi_label", "reject_below", "false_rejection_rate", "reject", "coverage", "min_score"}
        ),
        "Results": frozenset({"top_k", "explain"}),
    }
)


def takes_request(*options: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the parameter ``request`` of a command by options, from which the request is built.

    Args:
        options: names of ``_REQUEST_OPTIONS``.
        defaults: default values that differ from those of ``_REQUEST_OPTIONS``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            with report_errors():
                request = build_request(**{name: values.pop(name) for name in options})
            command(request=request, **values)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == "request":
                parameters += [_parameter(name, defaults) for name in options]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        run.__doc__, run.__name__, run.__module__ = command.__doc__, command.__name__, command.__module__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(name: str, defaults: dict[str, Any]) -> inspect.Parameter:
    annotation, default = _REQUEST_OPTIONS[name]
    kind, option = get_args(annotation)
    option = copy(option)
    if name in defaults:
        option.show_default = True
    option.rich_help_panel = next(panel for panel, names in _PANELS.items() if name in names)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name, default), annotation=Annotated[kind, option]
    )


def build_request(
    *,
    labels: Sequence[str] | None = None,
    option: Sequence[str] | None = None,
    priors: str | None = None,
    false_rejection_rate: float | None = None,
    coverage: float | None = None,
    **fields: Any,
) -> ClassifyRequest:
    """Return the request that the options of a command describe.

    Raises:
        InvalidFieldError: a file of labels cannot be read, or an option has an invalid value.
    """
    return ClassifyRequest(
        labels=read_labels(labels),
        options=_read_method_options(option),
        priors=priors if priors is None or priors in PRIOR_NAMES else read_priors_file(priors, PRIOR_NAMES),
        false_rejection_rate=_checked_share(false_rejection_rate, "--false-rejection-rate"),
        coverage=_checked_share(coverage, "--coverage"),
        **fields,
    )


def read_labels(values: Sequence[str] | None) -> list[str] | None:
    """Return the labels of all ``--labels``, including those in files; None without the option."""
    if values is None:
        return None
    texts: list[str] = []
    for value in values:
        lines = read_lines(Path(value[1:])) if value.startswith("@") else [value]
        # One label per line, which may contain commas; a single line lists all labels.
        texts += [json.dumps(lines)] if len(lines) > 1 else lines
    return split_labels(*texts)


def read_priors_file(value: str, names: Sequence[str] = ()) -> dict[str, float]:
    """Return the number of each label in a JSON file, or in the JSON object that the value itself is.

    Args:
        value: of the option.
        names: what it may be instead, for the message if there is no such file.

    Raises:
        InvalidFieldError: the file cannot be read, or is not an object of numbers.
    """
    is_object = value.lstrip().startswith("{")
    where = "--priors" if is_object else value
    if not is_object and names and not os.path.lexists(value):
        known = " or ".join(f"'{name}'" for name in names)
        problem = f"{quoted(value)} is neither a file, nor a JSON object, nor {known}"
        raise InvalidFieldError.of("--priors", f"{problem}{did_you_mean(value, names)}")
    lines = [value] if is_object else read_lines(Path(value))
    try:
        numbers = json.loads("\n".join(lines))
    except (ValueError, RecursionError) as error:
        raise InvalidFieldError.of(where, f"is not JSON: {error}") from error
    if not isinstance(numbers, dict):
        raise InvalidFieldError.of(where, 'is not an object of numbers such as {"cat": 120, "dog": 40}')
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            problem = f"has {json.dumps(number)[:40]} for {quoted(name)}, which is not a number"
            raise InvalidFieldError.of(where, f'{problem}; give an object such as {{"cat": 120, "dog": 40}}')
    return numbers


def _read_method_options(pairs: Sequence[str] | None) -> dict[str, float]:
    options = {}
    for pair in pairs or ():
        name, _, number = pair.partition("=")
        try:
            options[name.strip()] = float(number)
        except ValueError as error:
            raise InvalidFieldError.of("--option", f"'{pair}' is not of the form NAME=NUMBER") from error
    return options


def _checked_share(share: float | None, option: str) -> float | None:
    if share is not None and not 0 < share < 1:
        raise InvalidFieldError.of(option, f"{share:g} is not between 0 and 1")
    return share
