"""The pictures of docs/benchmarks.md."""

from pathlib import Path

from matplotlib.figure import Figure

from .contenders import BASELINE, CHOICES, FORMS, METHODS
from .contest import COPY
from .results import Results, Row, eager_over_ours

OURS, THEIRS = "#1b6ca8", "#9a9a9a"
PARTS = ("whole step", "backend", "backend, none fires")


def is_ours(contender: str) -> bool:
    return contender in {*METHODS, *(name for of in CHOICES.values() for name in of), *FORMS.values()}


def draw_peers(results: Results, file: Path) -> None:
    """A panel for each model and dtype: the time of everyone over that of torch fused."""
    rows = results.of("peers")
    names = list(dict.fromkeys(n for row in rows for n in row.contenders if n not in (COPY, BASELINE)))
    names.sort(key=is_ours)
    across = 4
    down = max(1, -(-len(rows) // across))
    figure = Figure(figsize=(3.6 * across, 0.7 + 0.26 * len(names) * down), layout="constrained")
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axis, row in zip(axes.flat, rows, strict=False):
        for place, name in enumerate(names):
            if name in row.contenders:
                low, middle, high = row.ratio(name)
                axis.plot([low, high], [place] * 2, color=_colour(name), linewidth=2)
                axis.plot(middle, place, "o", color=_colour(name), markersize=5)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", title=f"{row['model']}, {row['dtype']}")
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks(range(len(names)), names)
    for axis in list(axes.flat)[len(rows) :]:
        axis.set_visible(False)
    figure.supxlabel(f"time of a step over {BASELINE} (dot: median, line: quartiles)")
    figure.savefig(file, dpi=90)


def draw_methods(results: Results, file: Path) -> None:
    rows = results.of("methods", "precision")
    figure = Figure(figsize=(8, 1 + 0.3 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        low, middle, high = row.ratio()
        axis.barh(place, middle, xerr=[[middle - low], [high - middle]], color=OURS, alpha=0.8)
        axis.plot([row.bytes_say(row["watched"])] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
    axis.set_yticks(range(len(rows)), [f"{row['watched']} ({row['dtype']})" for row in reversed(rows)])
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlabel(f"time of a step over {BASELINE}, ViT-B/16 (black: what the bytes say)")
    figure.savefig(file, dpi=90)


def draw_growth(results: Results, file: Path) -> None:
    """Four panels: parameters, tensors, the share that fires, threads."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    panels = figure.subplots(1, 4)
    for dtype in ("float32", "bfloat16"):
        rows = [row for row in results.of("parameters") if row["dtype"] == dtype]
        _line(panels[0], rows, [row["parameters"] for row in rows], dtype)
    panels[0].set(xscale="log", xlabel="parameters", ylabel=f"AdamSPD over {BASELINE}")
    panels[0].legend()
    rows = results.of("tensors")
    for name in ("torch foreach", "AdamSPD, eager", "AdamSPD"):
        _line(panels[1], rows, [row["tensors"] for row in rows], name, name)
    panels[1].set(xscale="log", yscale="log", xlabel="tensors, 10 million parameters", ylabel=f"over {BASELINE}")
    panels[1].legend()
    for panel, question, key, label in (
        (panels[2], "fire", "fired", "share of the elements that fire"),
        (panels[3], "threads", "threads", "threads"),
    ):
        rows = list(results.of(question))
        _line(panel, rows, [row[key] for row in rows], "AdamSPD")
        panel.set_xlabel(label)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.axhline(1, color="black", linewidth=0.8)
    figure.savefig(file, dpi=90)


def _line(axis, rows: list[Row], places: list[float], label: str, name: str = "") -> None:
    quartiles = [row.ratio(name) for row in rows]
    (line,) = axis.plot(places, [q[1] for q in quartiles], ".-", label=label)
    axis.fill_between(places, [q[0] for q in quartiles], [q[2] for q in quartiles], alpha=0.2, color=line.get_color())


def draw_parts(results: Results, file: Path) -> None:
    rows = results.of("parts")
    figure = Figure(figsize=(8, 1 + 0.5 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(rows):
        whole, backend, one = (row.contenders[name]["seconds"] for name in PARTS)
        left = 0.0
        for part, colour in ((whole - backend, "#d08c3f"), (one, OURS), (backend - one, "#74b3de")):
            axis.barh(place, max(part, 0) / whole, left=left, color=colour)
            left += max(part, 0) / whole
    axis.set_yticks(range(len(rows)), [row["model"] for row in rows])
    axis.set_xlabel("share of a step: before the backend (orange), sweep 1 (dark), sweep 2 (light)")
    figure.savefig(file, dpi=90)


def draw_eager(results: Results, file: Path) -> None:
    """What the eager code costs: its step over ours, and its whole iteration and ours over AdamW's."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    steps, iterations = figure.subplots(1, 2)
    rows = results.of("eager", "tpgm")
    for place, row in enumerate(reversed(rows)):
        low, middle, high = eager_over_ours(row)
        steps.barh(place, middle, xerr=[[middle - low], [high - middle]], color=THEIRS)
    steps.set_yticks(range(len(rows)), [f"{row['watched']}, {row['model']}" for row in reversed(rows)])
    steps.axvline(1, color=OURS, linewidth=2)
    steps.set(xlabel="time of a step of the eager code over ours")
    rows = results.of("end_to_end")
    for place, row in enumerate(reversed(rows)):
        for height, name in ((0.2, "AdamSPD"), (-0.2, "AdamSPD, eager")):
            low, middle, high = row.ratio(name)
            error = [[middle - low], [high - middle]]
            iterations.barh(place + height, middle, 0.4, xerr=error, color=_colour(name))
    iterations.set_yticks(range(len(rows)), [row["model"] for row in reversed(rows)])
    iterations.axvline(1, color="black", linewidth=0.8)
    iterations.set(xlabel=f"time of forward, backward and step over {BASELINE} (blue: ours, grey: eager)")
    figure.savefig(file, dpi=90)


def _colour(name: str) -> str:
    return OURS if is_ours(name) else THEIRS


PICTURES = {
    "peers": draw_peers, "methods": draw_methods, "eager": draw_eager, "growth": draw_growth, "parts": draw_parts,
}  # fmt: skip
