"""Draws the pictures of docs/ again, as far as the tables there have their numbers. No experiment is run.

    python -m examples.redraw            # to docs/
    python -m examples.redraw --out DIR

The tables are rounded, to 0.1 for accuracies. Pictures of single layers or blocks need a run: `make demo` and
`make experiment-emoji` draw those.
"""

import argparse
from pathlib import Path

from .digits.report import Accuracy, draw_accuracies
from .emoji.pictures import draw_deviation, draw_id_ood
from .emoji.report import Config, Runs
from .sentiment.report import draw as draw_sentiment

DOCS = Path(__file__).parent.parent / "docs"
Table = list[dict[str, str]]


def table(page: str, *columns: str) -> Table:
    """The last table of a page of docs/ that has these columns, a dict a row."""
    found: list[Table] = []
    head: list[str] = []
    for line in (DOCS / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")] if line.startswith("| ") else []
        if cells and not head:
            head = cells
            found.append([])
        elif cells:
            found[-1].append(dict(zip(head, cells, strict=True)))
        elif not line.startswith("|"):
            head = []
    return [of for of in found if of and of[0].keys() >= set(columns)][-1]


def numbers(cell: str) -> list[float]:
    """Of "99.2 ± 0.4" both, and of "–" 0."""
    return [0.0 if part == "–" else float(part) for part in cell.split(" ± ")]


def digits() -> dict[float, dict[str, Accuracy]]:
    out: dict[float, dict[str, Accuracy]] = {}
    for row in table("digits.md", "lr", "ID", "OOD mean"):
        found = Accuracy(*numbers(row["ID"]), *numbers(row["OOD mean"]))
        out.setdefault(float(row["lr"]), {})[row["method"]] = found
    return out


def grid(page: str) -> Runs:
    """The whole grid, its mean over seeds as the row of one seed."""
    out: Runs = {}
    for row in table(page, "lr", "val", "id", "ood"):
        method, _, base = row["method"].rstrip(")").partition(" (of λ=")
        config = Config(method, *numbers(row["lr"]), *numbers(row["strength"]), float(base or 0))
        out[config] = [{key: numbers(row[key])[0] for key in ("val", "id", "ood", "deviation")}]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS)
    out = parser.parse_args().out
    emoji = grid("emoji.md")
    draw_accuracies(digits(), out / "digits-id-ood.png")
    draw_id_ood(emoji, out / "emoji-id-ood.png")
    draw_deviation(emoji, out / "emoji-deviation.png")
    draw_sentiment(grid("sentiment.md"), out / "sentiment-id-ood.png")


if __name__ == "__main__":
    main()
