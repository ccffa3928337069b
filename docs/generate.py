"""Write what the guide takes from code and data: `python docs/generate.py`, or `make docs`.

docs/models.md, docs/settings.md and the pages of docs/methods/ get a table between two markers each; docs/openapi.json,
and the references of routes and of commands under docs/reference/, are written whole.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from app.classification.methods import CASED, METHODS, Option
from app.cli import cli
from app.encoders.catalogue import ModelCard, load_catalogue
from app.main import create_app
from app.settings import Settings

ROOT = Path(__file__).parents[1]

# What a default computed on this machine is called, so that every machine writes the same table.
_COMPUTED = {"data_dir": "the platform's data folder", "decode_threads": "one per core"}


def fresh() -> dict[Path, str]:
    """Return what each generated file should hold, by path."""
    models_page, settings_page = ROOT / "docs" / "models.md", ROOT / "docs" / "settings.md"
    models = models_table(load_catalogue(ROOT / "models"))
    return {
        models_page: with_table(models_page.read_text(encoding="utf-8"), "models", models),
        settings_page: with_table(
            settings_page.read_text(encoding="utf-8"), "settings", settings_table(Settings.model_fields)
        ),
        ROOT / "docs" / "openapi.json": openapi(),
        **{page: with_table(page.read_text("utf-8"), "options", told) for page, told in options_tables().items()},
        ROOT / "docs" / "reference" / "api.md": api_reference(json.loads(openapi())),
        ROOT / "docs" / "reference" / "cli.md": cli_reference(),
    }


def options_tables() -> dict[Path, str]:
    """Return for the page of each method the table of its options."""
    folder = ROOT / "docs" / "methods"
    return {
        folder / f"{name.replace('+', '-')}.md": options_table(method.options)
        for name, method in {**METHODS, CASED.name: CASED}.items()
    }


def options_table(options: Mapping[str, Option]) -> str:
    """Return options as Markdown."""
    if not options:
        return "None."
    lines = ["| option | default | from | to | |", "|---|--:|--:|--:|---|"]
    for name, option in options.items():
        lines.append(f"| `{name}` | {option.default:g} | {option.least:g} | {option.most:g} | {option.description} |")
    return "\n".join(lines)


def stale() -> list[str]:
    """Return the generated files that are not what they should be, as paths within the repository."""
    return [
        str(file.relative_to(ROOT))
        for file, content in fresh().items()
        if not file.exists() or file.read_text(encoding="utf-8") != content
    ]


def with_table(page: str, name: str, table: str) -> str:
    """Return the page with what stands between the two markers of a table replaced.

    Raises:
        ValueError: the page has not each marker once.
    """
    begin, end = f"<!-- table of {name}: begin (made by docs/generate.py) -->", f"<!-- table of {name}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must have once each: {begin} and {end}")
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def models_table(cards: Mapping[str, ModelCard]) -> str:
    """Return the catalogue as Markdown, smallest model first."""
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


def settings_table(fields: Mapping[str, FieldInfo]) -> str:
    """Return the settings as Markdown, in the order of ``Settings``."""
    lines = ["| variable | flag | default | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `DEIXIS_{name.upper()}` | `--{name.replace('_', '-')}` | {_default(name, field)} | {field.description} |"
        for name, field in fields.items()
    ]
    return "\n".join(lines)


def _default(name: str, field: FieldInfo) -> str:
    if name in _COMPUTED:
        return _COMPUTED[name]
    if field.default is None:
        return ""
    return f"`{','.join(field.default)}`" if isinstance(field.default, tuple) else f"`{field.default}`"


def openapi() -> str:
    """Return the description of the HTTP API as the service tells it at /openapi.json, in a stable order."""
    # No model is loaded and no database opened: both happen when the application starts.
    app = create_app(Settings.model_construct(max_request_bytes=Settings.model_fields["max_request_bytes"].default))
    return json.dumps(app.openapi(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def cli_reference() -> str:
    """Return every command with its arguments and options, as the commands themselves describe them."""
    command = get_command(cli)
    told = get_docs_for_click(obj=command, ctx=Context(command, info_name="deixis"), name="deixis")
    lines = [line.rstrip() for line in told.splitlines() if not line.startswith(("* `--install-", "* `--show-comp"))]
    return (
        "# Commands\n\nMade from the commands; [cli.md](../cli.md) is the guide.\n\n#" + "\n".join(lines).strip() + "\n"
    )


def api_reference(description: Mapping[str, Any]) -> str:
    """Return every route with its parameters, bodies and answers, and every form of these with its fields."""
    parts = ["# Routes", "Made from [openapi.json](../openapi.json); [http-api.md](../http-api.md) is the guide."]
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            parts += _route(f"{method.upper()} {path}", operation)
    parts.append("## Forms")
    for name, schema in description["components"]["schemas"].items():
        parts += [f"### {name}", schema.get("description", "")]
        parts += [_fields(schema)] if "properties" in schema else [f"One of {_kind(schema)}."]
    return "\n\n".join(part for part in parts if part) + "\n"


def _route(title: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {title}"
    yield operation.get("description", operation.get("summary", ""))
    rows = [
        f"| `{each['name']}` | {each['in']} | {_kind(each['schema'])} | {_sentence(each)} |"
        for each in operation.get("parameters", ())
    ]
    if rows:
        yield "\n".join(["| parameter | in | | |", "|---|---|---|---|", *rows])
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = content["schema"]
        yield f"Body as `{kind}`: {_kind(schema)}." if "properties" not in schema else f"Body as `{kind}`:"
        if "properties" in schema:
            yield _fields(schema)
    answers = [
        f"- {status}: {_kind(next(iter(answer['content'].values())).get('schema', {}))}"
        for status, answer in operation["responses"].items()
        if status.startswith("2") and answer.get("content")
    ]
    yield "\n".join(["Answers:", "", *answers]) if answers else "Answers: nothing but the status."


def _fields(schema: Mapping[str, Any]) -> str:
    needed = schema.get("required", [])
    rows = [
        f"| `{name}`{' (needed)' if name in needed else ''} | {_kind(field)} | {_sentence(field)} |"
        for name, field in schema["properties"].items()
    ]
    return "\n".join(["| field | | |", "|---|---|---|", *rows])


def _sentence(field: Mapping[str, Any]) -> str:
    return str(field.get("description", "")).replace("|", "\\|").replace("\n", " ")


def _kind(schema: Mapping[str, Any]) -> str:
    """Return what a value may be, in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{each}`" for each in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    least, most = schema.get("minimum"), schema.get("maximum")
    bounds = f" from {least:g} to {most:g}" if least is not None and most is not None else ""
    default = f", by default `{json.dumps(schema['default'])}`" if schema.get("default") is not None else ""
    return f"{schema.get('format', schema.get('type', 'text'))}{bounds}{default}"


def main() -> None:
    """Bring every generated file up to date, or with --check only tell which are not."""
    if sys.argv[1:] == ["--check"]:
        if found := stale():
            sys.exit(f"stale: {', '.join(found)}; run: make docs")
        return
    for file, content in fresh().items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
