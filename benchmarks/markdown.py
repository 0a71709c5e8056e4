"""Numbers and tables as the pages of results have them."""

from math import isnan


def told(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.2g} ({low:.2g}–{high:.2g})" if middle >= 10 else f"{middle:.2f} ({low:.2f}–{high:.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def number(value: float, form: str = "{:.2f}") -> str:
    return "–" if isnan(value) else form.format(value)
