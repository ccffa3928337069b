"""Write what the guide takes from code and data: `python docs/generate.py`, or `make docs`.

docs/models.md and docs/settings.md get a table between two markers each, docs/openapi.json is written whole.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic.fields import FieldInfo

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
    }


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


def main() -> None:
    """Bring every generated file up to date, or with --check only tell which are not."""
    if sys.argv[1:] == ["--check"]:
        if found := stale():
            sys.exit(f"stale: {', '.join(found)}; run: make docs")
        return
    for file, content in fresh().items():
        file.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
