"""Write the tables of the guide that are made from data files: `python docs/build_tables.py`."""

from pathlib import Path

from app.encoders.catalogue import ModelCard, load_catalogue

ROOT = Path(__file__).parents[1]
MODELS_PAGE = ROOT / "docs" / "models.md"
BEGIN = "<!-- table of models: begin (made by docs/build_tables.py from models/*.toml) -->"
END = "<!-- table of models: end -->"


def models_table(cards: dict[str, ModelCard]) -> str:
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


def with_table(page: str, table: str) -> str:
    """Return the page with what stands between the two markers replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main() -> None:
    """Bring docs/models.md up to date with models/*.toml."""
    page = MODELS_PAGE.read_text(encoding="utf-8")
    MODELS_PAGE.write_text(with_table(page, models_table(load_catalogue(ROOT / "models"))), encoding="utf-8")


if __name__ == "__main__":
    main()
