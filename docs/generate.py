"""Generate the parts of the documentation that come from code and data: `python docs/generate.py`, or `make docs`.

It rewrites docs/openapi.json, the pages of docs/reference/, and the tables between two markers in docs/models.md,
docs/methods.md, docs/settings.md, docs/http-api.md and the pages of docs/methods/. With `--check` it only reports which
files are stale.
"""

import ast
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer import Context
from typer.cli import get_docs_for_click

from app.api.schemas.classification import ClassifyFields
from app.api.schemas.databases import BuildDatabaseBody, SearchFields
from app.classification.method_names import DEFAULT_METHOD
from app.classification.methods import CASED, METHODS, Method, VocabularyFree
from app.cli import command_tree
from app.encoders.catalogue import ModelCard, load_catalogue
from app.encoders.model_names import HUB_IDS
from app.main import create_app
from app.names.text import MAX_TEXT_CHARS
from app.settings import SETTING_GROUPS, Settings
from app.types import Option

ROOT = Path(__file__).parents[1]

# Defaults that depend on the machine, in words: the table must be the same on every machine.
_COMPUTED_DEFAULTS = {"data_dir": "the platform's data folder", "decode_threads": "one per core"}


def generated_files() -> dict[Path, str]:
    """Return the up-to-date content of each generated file, by path."""
    models_page, settings_page = ROOT / "docs" / "models.md", ROOT / "docs" / "settings.md"
    models = models_table(load_catalogue(ROOT / "models"))
    return {
        models_page: with_table(
            with_table(models_page.read_text(encoding="utf-8"), "models", models), "hub ids", hub_ids_table()
        ),
        settings_page: with_table(
            settings_page.read_text(encoding="utf-8"), "settings", settings_table(Settings.model_fields)
        ),
        ROOT / "docs" / "methods.md": with_table(
            (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), "methods", methods_table()
        ),
        ROOT / "docs" / "http-api.md": http_api_page(),
        ROOT / "docs" / "openapi.json": openapi(),
        **{page: with_table(page.read_text("utf-8"), "options", table) for page, table in options_tables().items()},
        ROOT / "docs" / "reference" / "cli.md": cli_reference(),
        ROOT / "docs" / "reference" / "field-reports.md": field_reports(),
    }


def http_api_page() -> str:
    """Return docs/http-api.md with the fields of requests up to date."""
    page = (ROOT / "docs" / "http-api.md").read_text(encoding="utf-8")
    bodies = {"classify fields": ClassifyFields, "build fields": BuildDatabaseBody, "search fields": SearchFields}
    for name, body in bodies.items():
        page = with_table(page, name, fields_table(body))
    return page


def fields_table(body: type[BaseModel]) -> str:
    """Return the fields of a request as a Markdown table, made from its JSON schema."""
    lines = ["| field | type | default | description |", "|---|---|---|---|"]
    for name, schema in body.model_json_schema()["properties"].items():
        default = schema.get("default")
        shown = "" if default in (None, "", {}) else f"`{json.dumps(default)}`"
        lines.append(f"| `{name}` | {_type_of(schema)} | {shown} | {schema['description']} |")
    return "\n".join(lines)


def _type_of(schema: Mapping[str, Any]) -> str:
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    if len(kinds) > 1:
        return " or ".join(_type_of(kind) for kind in kinds)
    (kind,) = kinds
    if "enum" in kind:
        return " or ".join(f"`{json.dumps(value)}`" for value in kind["enum"])
    if kind["type"] == "array":
        return "array of strings"
    if "const" in kind:
        return f"`{json.dumps(kind['const'])}`"
    bounds = [
        f"{sign} {kind[key]:,}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in kind
    ]
    if "maxLength" in kind and kind["maxLength"] < MAX_TEXT_CHARS:  # the table of limits has the general one
        bounds.append(f"at most {kind['maxLength']:,} characters")
    return ", ".join([kind["type"], *bounds])


def options_tables() -> dict[Path, str]:
    """Return the options table of each method, by the path of the method's page."""
    folder = ROOT / "docs" / "methods"
    return {
        folder / page_of(name): options_table(method.options) for name, method in {**METHODS, CASED.name: CASED}.items()
    }


def page_of(method: str) -> str:
    """Return the file name of a method's page in docs/methods/."""
    return f"{method.replace('+', '-')}.md"


def methods_table() -> str:
    """Return the methods as a Markdown table, with links to their pages."""
    lines = ["| method | | learns from | options |", "|---|---|---|---|"]
    for name, method in {**METHODS, CASED.name: CASED}.items():
        options = ", ".join(f"`{option}`" for option in method.options)
        default = ", the default" if name == DEFAULT_METHOD else ""
        lines.append(
            f"| [`{name}`](methods/{page_of(name)}){default} | {method.summary} | {_learns_from(method)} | {options} |"
        )
    return "\n".join(lines)


def _learns_from(method: Method | VocabularyFree) -> str:
    if not isinstance(method, Method) or method.learner is None:
        return ""
    kinds = sorted(method.learns) or ["images of earlier requests"]
    return ", ".join(kinds) + (", balanced" if method.learner.balanced else "")


def options_table(options: Mapping[str, Option]) -> str:
    """Return a method's options as a Markdown table."""
    if not options:
        return "None."
    lines = ["| option | default | from | to | |", "|---|--:|--:|--:|---|"]
    for name, option in options.items():
        lines.append(
            f"| `{name}` | {option.default:g} | {option.minimum:g} | {option.maximum:g} | {option.description} |"
        )
    return "\n".join(lines)


def stale() -> list[str]:
    """Return the generated files that are missing or out of date, as paths relative to the repository."""
    return [
        str(file.relative_to(ROOT))
        for file, content in generated_files().items()
        if not file.exists() or file.read_text(encoding="utf-8") != content
    ]


def with_table(page: str, name: str, table: str) -> str:
    """Return the page with the text between the two markers of a table replaced.

    Raises:
        ValueError: the page does not contain each marker exactly once.
    """
    begin, end = f"<!-- table of {name}: begin (made by docs/generate.py) -->", f"<!-- table of {name}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must contain each of these markers exactly once: {begin} and {end}")
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def models_table(cards: Mapping[str, ModelCard]) -> str:
    """Return the model catalogue as a Markdown table, smallest model first."""
    lines = [
        "| name | year | million parameters | GB | px | d | ImageNet | scores | languages | licence | commercial use |",
        "|---|--:|--:|--:|--:|--:|--:|---|---|---|---|",
    ]
    for card in sorted(cards.values(), key=lambda card: (card.params_millions, card.name)):
        accuracy = "" if card.imagenet_zero_shot_top1 is None else f"{card.imagenet_zero_shot_top1:.1f}"
        lines.append(
            f"| `{card.name}` | {card.year} | {card.params_millions:.0f} | {card.float32_bytes / 1e9:.1f}"
            f" | {card.image_size_px} | {card.embed_dim} | {accuracy} | {card.probability} | {card.languages}"
            f" | [{card.licence}]({card.licence_url}) | {'yes' if card.commercial_use else '**no**'} |"
        )
    return "\n".join(lines)


def hub_ids_table() -> str:
    """Return the hub ids of models of the catalogue as a Markdown table."""
    rows = [f"| `{hub_id}` | `{name}` |" for hub_id, name in HUB_IDS.items()]
    return "\n".join(["| hub id | model |", "|---|---|", *rows])


def settings_table(fields: Mapping[str, FieldInfo]) -> str:
    """Return the settings as a Markdown table for each group, in the order of ``Settings``."""
    lines: list[str] = []
    for name, field in fields.items():
        if name in SETTING_GROUPS:
            lines += [
                "",
                f"### {SETTING_GROUPS[name]}",
                "",
                "| variable | flag | default | meaning |",
                "|---|---|---|---|",
            ]
        flag = f"--{name.replace('_', '-')}"
        lines.append(f"| `DEIXIS_{name.upper()}` | `{flag}` | {_default(name, field)} | {field.description} |")
    return "\n".join(lines[1:])


def _default(name: str, field: FieldInfo) -> str:
    if name in _COMPUTED_DEFAULTS:
        return _COMPUTED_DEFAULTS[name]
    if field.default is None:
        return ""
    default = ",".join(field.default) if isinstance(field.default, tuple) else str(field.default)
    return f"`{default}`" if default else ""


def openapi() -> str:
    """Return the OpenAPI description that the service serves at /openapi.json.

    Its order is kept: client generators take the first media type of a body.
    """
    # Creating the application loads no model and opens no database; starting it does.
    app = create_app(Settings.model_construct(max_request_bytes=Settings.model_fields["max_request_bytes"].default))
    return json.dumps(app.openapi(), indent=2, ensure_ascii=False) + "\n"


def cli_reference() -> str:
    """Return the reference of all commands, made from their help texts."""
    command = command_tree()
    markdown = get_docs_for_click(obj=command, ctx=Context(command, info_name="deixis"), name="deixis")
    lines = [
        line.rstrip() for line in markdown.splitlines() if not line.startswith(("* `--install-", "* `--show-comp"))
    ]
    return (
        "# Commands\n\nGenerated from the help texts of the commands. The guide is [cli.md](../cli.md).\n\n#"
        + "\n".join(lines).strip()
        + "\n"
    )


def field_reports() -> str:
    """Return the list of the public bug reports that tests/field/ repeats."""
    sections = []
    for file in sorted((ROOT / "tests" / "field").glob("test_*.py")):
        if rows := _reports_in(file):
            table = "\n".join(["| report | what happened to its user |", "|---|---|", *rows])
            sections.append(f"## {file.stem.removeprefix('test_').capitalize()}\n\n{table}\n")
    introduction = """# Field reports

Public bug reports of other programs of this field. A test in `tests/field/` does on Deixis what each user did, and
checks that the outcome is right. Generated from these tests; [CONTRIBUTING.md](../../CONTRIBUTING.md) says how to add a
report.

"""
    return introduction + "\n".join(sections)


def _reports_in(file: Path) -> list[str]:
    """Return a row for each test of a file, read from its source, because the tests import much."""
    rows = []
    for test in ast.parse(file.read_text(encoding="utf-8")).body:
        for mark in test.decorator_list if isinstance(test, ast.FunctionDef) else ():
            if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "report":
                thread, happened = (ast.literal_eval(argument) for argument in mark.args)
                repository, _, number = thread.partition("#")
                rows.append(f"| [{thread}](https://github.com/{repository}/issues/{number}) | {happened} |")
    return rows


def main() -> None:
    """Rewrite every generated file; with --check, exit with an error if any is stale."""
    if sys.argv[1:] == ["--check"]:
        if found := stale():
            sys.exit(f"stale: {', '.join(found)}; run: make docs")
        return
    for file, content in generated_files().items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
