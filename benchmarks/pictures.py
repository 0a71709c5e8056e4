"""The pictures of docs/benchmarks.md."""

from pathlib import Path

from matplotlib.axes import Axes

from examples.pictures import COLOURS, SMALL, THEIRS, blank, look, name_ends, save

from .contenders import BASELINE, CHOICES, FORMS, METHODS
from .contest import COPY
from .results import Results, Row, eager_over_ours

PARTS = ("whole step", "backend", "backend, none fires")
DTYPES = {"float32": ("o", 0.15), "bfloat16": ("D", -0.15)}  # a marker, and how far above its place it is


def is_ours(contender: str) -> bool:
    return contender in {*METHODS, *(name for of in CHOICES.values() for name in of), *FORMS.values()}


def draw_peers(results: Results, file: Path) -> None:
    """A panel for each model: the time of everyone over that of torch fused. Models without peers are in the table."""
    models: dict[str, list[Row]] = {}
    for row in results.of("peers", "others"):
        if any(not is_ours(name) for name in row.contenders if name not in (COPY, BASELINE)):
            models.setdefault(row["model"], []).append(row)
    names = {
        model: sorted({n: 0 for row in rows for n in row.contenders if n not in (COPY, BASELINE)}, key=is_ours)
        for model, rows in models.items()
    }
    heights = [max(map(len, list(names.values())[k : k + 2])) for k in range(0, len(names), 2)] or [1]
    down, across = len(heights), min(2, max(1, len(names)))
    figure, axes = blank(down, across, 1 + 0.27 * sum(heights), sharex=True, height_ratios=heights)
    for axis in axes[len(models) :]:
        axis.remove()
    for axis, (model, rows) in zip(axes, models.items(), strict=False):
        for row in rows:
            marker, above = DTYPES[row["dtype"]]
            for place, name in enumerate(names[model]):
                twice = row.question == "others" and is_ours(name)  # also measured beside those of "peers"
                if name in row.contenders and not twice:
                    low, middle, high = row.ratio(name)
                    axis.plot([low, high], [place + above] * 2, color=_colour(name), linewidth=2)
                    axis.plot(middle, place + above, marker, color=_colour(name), markersize=5)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", title=model)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_yticks(range(len(names[model])), names[model], fontsize=SMALL)
    figure.supxlabel(
        f"time of a step over {BASELINE}; line: range\ncircle: float32, diamond: bfloat16; grey: other packages",
        fontsize="medium",
    )
    save(figure, file)


def draw_methods(results: Results, file: Path) -> None:
    bars = [
        (row, name)
        for row in results.of("methods", "precision")
        for name in row.contenders
        if name not in (COPY, row["baseline"])
    ][::-1]
    figure, (axis,) = blank(1, 1, 1 + 0.28 * len(bars))
    for place, (row, name) in enumerate(bars):
        _bar(axis, place, row.ratio(name), look(name).color)
        axis.plot([row.bytes_say(name)] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2.5)
    axis.margins(y=0.02)
    axis.set_yticks(range(len(bars)), [f"{name} ({row['dtype']})" for row, name in bars])
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlabel(f"time of a step over {BASELINE} (black: what the bytes say)")
    save(figure, file)


def draw_growth(results: Results, file: Path) -> None:
    """Four panels: parameters, tensors, the share that fires, threads. What was not measured has none."""
    by_dtype = {
        dtype: [row for row in results.of("parameters") if row["dtype"] == dtype] for dtype in ("float32", "bfloat16")
    }
    panels = {
        "parameters": ("parameters", [(rows, dtype, "") for dtype, rows in by_dtype.items() if rows]),
        "tensors": (
            "tensors, 10 million parameters",
            [
                ([row for row in results.of("tensors") if name in row.contenders], name, name)
                for name in ("torch foreach", "AdamSPD, eager", "AdamSPD")
            ],
        ),
        "fired": ("share of the elements that fire", [(results.of("fire"), "AdamSPD", "")]),
        "threads": ("threads", [(results.of("threads"), "AdamSPD", "")]),
    }
    figure, axes = blank(2, 2, 6.4)
    colours = {"bfloat16": COLOURS["LoRA"], "torch foreach": THEIRS, "AdamSPD, eager": COLOURS["in part"]}
    for axis, (key, (label, lines)) in zip(axes, panels.items(), strict=True):
        if not any(rows for rows, *_ in lines):
            axis.remove()
            continue
        for rows, name, of in lines:
            _line(
                axis,
                [row[key] for row in rows],
                [row.ratio(of) for row in rows],
                name,
                colours.get(name, COLOURS["SPD"]),
            )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xlabel(label)
        if key in ("parameters", "tensors"):
            axis.set_xscale("log")
    axes[1].set_yscale("log")
    axes[1].set_yticks(TIMES := (0.3, 0.5, 1, 2, 3, 5, 8), map(str, TIMES))
    axes[1].minorticks_off()
    axes[3].set_xticks(sorted({row["threads"] for row in results.of("threads")}))
    figure.supylabel(f"time of a step over {BASELINE}; shaded: range", fontsize="medium")
    name_ends(figure)
    save(figure, file)


def _line(axis: Axes, places: list[float], quartiles: list[list[float]], name: str, colour: str) -> None:
    axis.plot(places, [q[1] for q in quartiles], ".-", label=name, color=colour)
    axis.fill_between(places, [q[0] for q in quartiles], [q[2] for q in quartiles], alpha=0.2, color=colour)


def _bar(axis: Axes, place: float, quartiles: list[float], colour: str, height: float = 0.8) -> None:
    low, middle, high = quartiles
    axis.barh(place, middle, height, xerr=[[middle - low], [high - middle]], color=colour, alpha=0.85)


def draw_parts(results: Results, file: Path) -> None:
    rows = results.of("parts")
    figure, (axis,) = blank(1, 1, 1.2 + 0.5 * len(rows))
    looks = {
        "before the backend": (COLOURS["in part"], "black"),
        "sweep 1": (COLOURS["LoRA"], "white"),
        "sweep 2": (COLOURS["penalty"], "black"),
    }
    for place, row in enumerate(rows):
        whole, backend, one = (row.contenders[name]["seconds"] for name in PARTS)
        left = 0.0
        for (part, (colour, ink)), seconds in zip(looks.items(), (whole - backend, one, backend - one), strict=True):
            share = max(seconds, 0) / whole
            axis.barh(place, share, left=left, color=colour)
            if share > len(part) / 60:  # there is room
                axis.text(left + share / 2, place, part, ha="center", va="center", fontsize=SMALL, color=ink)
            left += share
    axis.set_yticks(range(len(rows)), [row["model"] for row in rows])
    axis.set_xlabel("share of a step")
    save(figure, file)


def draw_eager(results: Results, file: Path) -> None:
    """What the eager code costs: its step over ours, and its whole iteration and ours over AdamW's."""
    both = ("AdamSPD, eager", "AdamSPD")
    panels = [
        ("a step of the eager code over ours", results.of("eager", "tpgm"), "{watched}, {model}", None),
        (f"forward, backward and step over {BASELINE}", results.of("end_to_end"), "{model}", both),
    ]
    panels = [panel for panel in panels if panel[1]]
    heights = [len(rows) * (2 if names else 1) for _, rows, _, names in panels]
    figure, axes = blank(len(panels) or 1, 1, 1.2 + 0.33 * sum(heights), height_ratios=heights or None)
    for axis, (what, rows, told, names) in zip(axes, panels, strict=False):
        for place, row in enumerate(rows[::-1]):
            if not names:
                _bar(axis, place, eager_over_ours(row), THEIRS)
            for name, above in zip(names or (), (-0.2, 0.2), strict=False):
                _bar(axis, place + above, row.ratio(name), _colour(name), 0.4)
                axis.text(0.02, place + above, name, va="center", fontsize=SMALL)
        axis.set_yticks(range(len(rows)), [told.format(**row.told) for row in rows[::-1]])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlabel(f"time of {what}")
    save(figure, file)


def _colour(name: str) -> str:
    return look(name).color if is_ours(name) else THEIRS


PICTURES = {
    "peers": draw_peers, "methods": draw_methods, "eager": draw_eager, "growth": draw_growth, "parts": draw_parts,
}  # fmt: skip
