"""The picture of a comparison."""

from math import isfinite
from pathlib import Path

from .report import Row

_MOST = 80  # tensors that are legible


def check() -> None:
    """Raises ImportError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("--picture needs matplotlib: pip install matplotlib") from error


def draw(rows: list[Row], norm: str, path: Path) -> None:
    """Bars of n / ‖θ₀‖, in the order of `rows` from above. Of more than 80 tensors, it has the first.

    rows: in the order in which they are to be seen. Those without a finite relative deviation are left out.

    Raises ImportError without matplotlib.
    """
    check()
    from matplotlib.figure import Figure

    shown = [row for row in rows if isfinite(row.relative)][:_MOST]
    figure = Figure(figsize=(9, 1.5 + 0.2 * len(shown)), layout="constrained")
    axes = figure.subplots()
    places = range(len(shown))
    axes.barh(places, [row.relative for row in shown], color="#0072B2")
    axes.set_yticks(places, [row.name for row in shown], fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlabel(f"‖θ − θ₀‖ / ‖θ₀‖, {norm}")
    axes.margins(y=0.01)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
