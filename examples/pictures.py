"""How pictures look here: a colour for each family of methods, a marker for each of its methods, and names beside what
they name instead of a legend.

Draw lines and points with `axis.plot(..., label=name)`, and call `name_points` or `name_ends` at the end.
"""

from collections.abc import Iterable
from io import BytesIO
from itertools import pairwise, product
from math import cos, pi, sin
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.path import Path as Curve
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from PIL import Image

WIDTH, DPI, SMALL = 8.4, 110, 8.5  # inches, and points of a name: README shows it at nine tenths of its pixels

# The colours of Okabe and Ito, "Color Universal Design" (2008). Their yellow is too faint on white.
COLOURS = {
    "free": "#000000", "in part": "#E69F00", "penalty": "#56B4E9", "projection": "#009E73", "SPD": "#D55E00",
    "interpolation": "#CC79A7", "LoRA": "#0072B2",
}  # fmt: skip
THEIRS = "#8c8c8c"  # other packages
FAMILIES = {
    "free": ("AdamW", "zero-shot"),
    "in part": ("LP", "LP-FT", "BitFit", "Partial fusion"),
    "penalty": ("L2-SP", "MARS-SP"),
    "projection": ("PGM", "TPGM", "TPGM-C", "TPGM, each step", "FTP"),
    "SPD": ("SPD", "AdamSPD, λ=1", "AdamSPD, λ=2"),
    "interpolation": ("WiSE-FT", "WISE-SPD"),
    "LoRA": ("LoRA, AdamW", "LoRA, SPD"),
}
MARKERS = "oX^Dv"  # by place in the family
REACHES = (5, 9, 15, 23, 33, 46, 62, 82, 107, 137)  # from a point to its name
Place = tuple[float, float]
HALO = [withStroke(linewidth=2.5, foreground="white")]
CLASSES = {"AdamW (none)": "AdamW", "AdamSPD": "SPD", "AdamL2SP": "L2-SP", "AdamPGM": "PGM", "AdamFTP": "FTP"}


class Look(NamedTuple):
    color: str
    marker: str


LOOKS = {
    name: Look(COLOURS[family], MARKERS[place])
    for family, names in FAMILIES.items()
    for place, name in enumerate(names)
}


def look(name: str) -> Look:
    """Of a method by its name. What stands after a comma ("PGM, γ=0.3") counts only if FAMILIES has it."""
    first = name.split(", ")[0]
    return LOOKS[name if name in LOOKS else CLASSES.get(first, first)]


def blank(down: int, across: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure as wide as README, and its panels."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False, **options).flat)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    return figure, axes


def dots(axis: Axes, x: Any, y: Any, name: str, size: float = 7) -> None:
    """The points of a method, by its marker in its colour."""
    colour, marker = look(name)
    axis.plot(x, y, marker, color=colour, markersize=size, markeredgecolor="white", markeredgewidth=0.6, label=name)


def save(figure: Figure, path: Path) -> Path:
    """As PNG of 128 colours, which is a third of the bytes."""
    figure.savefig(whole := BytesIO(), dpi=DPI)
    Image.open(whole).convert("RGB").quantize(128).save(path, "PNG", optimize=True)
    return path


def name_ends(figure: Figure) -> None:
    """Writes the label of each line to the right of its panel, at the height of the line's end or near it."""
    ends: list[list[Annotation]] = []
    for axis in figure.axes:
        of_axis = axis.get_yaxis_transform()
        ends.append([
            axis.annotate(
                str(line.get_label()), line.get_xydata()[-1], xytext=(1.05, line.get_ydata()[-1]), textcoords=of_axis,
                annotation_clip=False, va="center", fontsize=SMALL,
                arrowprops=_leader(line.get_color()) | {"relpos": (0, 0.5)},
            )
            for line in _named(axis)
        ])  # fmt: skip
    _settle(figure)
    for axis, notes in zip(figure.axes, ends, strict=True):
        notes.sort(key=lambda note: axis.transData.transform((0, note.xyann[1]))[1])
        heights = [axis.transData.transform((0, note.xyann[1]))[1] for note in notes]
        for note, height in zip(notes, apart(heights, 1.35 * SMALL * figure.dpi / 72), strict=True):
            note.xyann = (note.xyann[0], axis.transData.inverted().transform((0, height))[1])


def apart(heights: Iterable[float], gap: float) -> list[float]:
    """Ascending heights, with those that are too near each other moved until they are `gap` apart."""
    out = list(heights)
    for _ in range(500):
        for k, (low, high) in enumerate(pairwise(out)):
            if (short := gap - (high - low)) > 1e-3:
                out[k : k + 2] = low - short / 2, high + short / 2
    return out


def name_points(figure: Figure) -> None:
    """Writes each label beside one of the points that have it, as near as it covers no point, line or other name."""
    _settle(figure)
    for axis in figure.axes:
        named: dict[str, list[Place]] = {}
        colours = {}
        for line in _named(axis):
            named.setdefault(str(line.get_label()), []).extend(map(tuple, line.get_xydata()))
            colours[str(line.get_label())] = line.get_color()
        free = _Free(axis)
        for name in sorted(named, key=lambda name: free.lonely(named[name])):  # the hardest first
            free.place(name, sorted(named[name], key=lambda place: -free.lonely([place])), colours[name])


class _Free:
    """The space of a panel that is still free. All of it is in pixels."""

    def __init__(self, axis: Axes):
        self.axis, self.unit, self.panel = axis, axis.figure.dpi / 72, axis.get_window_extent()
        curves = [line.get_transform().transform_path(line.get_path()) for line in axis.lines]
        self.points = np.concatenate([curve.vertices for curve in curves])
        self.lines = [curve for curve, line in zip(curves, axis.lines, strict=True) if line.get_linestyle() != "None"]
        self.boxes: list[Bbox] = []
        self.leaders: list[Curve] = []

    def lonely(self, places: list[Place]) -> float:
        """How far the fourth neighbour is from the one of these points that has most room."""
        there = self.axis.transData.transform(places)
        apart = np.abs(there[:, None] - self.points).max(2)
        return float(np.sort(apart)[:, :5].max())

    def place(self, name: str, places: list[Place], colour: str) -> None:
        note = self.axis.annotate(
            name, places[0], (0, 0), textcoords="offset points", ha="center", va="center", fontsize=SMALL,
            arrowprops=_leader(colour), annotation_clip=False, path_effects=HALO,
        )  # fmt: skip
        size = Text.get_window_extent(note)
        least = float("inf")
        for reach, place, turn in product(REACHES, places, range(16)):
            way = np.array([cos(turn * pi / 8), sin(turn * pi / 8)])
            step = way * (reach * self.unit + np.array([size.width, size.height]) / 2)
            point = self.axis.transData.transform(place)
            box = Bbox.from_bounds(*(point + step - np.array([size.width, size.height]) / 2), size.width, size.height)
            leader = Curve([point, point + step])
            if (cost := self._cost(box, leader)) < least:
                least, best = cost, (box, leader)
                note.xy, note.xyann = place, tuple(step / self.unit)
            if not cost:
                break
        self.boxes.append(best[0])
        self.leaders.append(best[1])

    def _cost(self, box: Bbox, leader: Curve) -> float:
        """Counts what a name in this box would cover or leave, and what the line that leads to it would cross."""
        wide = box.padded(4 * self.unit)
        outside = (wide.min < self.panel.min).any() or (wide.max > self.panel.max).any()
        covered = ((self.points > wide.min) & (self.points < wide.max)).all(1).sum()
        cost = 100 * outside + 2 * covered + 100 * sum(map(box.padded(self.unit).overlaps, self.boxes))
        cost += sum(line.intersects_bbox(box, filled=False) for line in self.lines)
        cost += 5 * sum(other.intersects_bbox(box) for other in self.leaders)
        cost += 5 * sum(leader.intersects_bbox(other) for other in self.boxes)
        return cost + 3 * sum(leader.intersects_path(other) for other in self.leaders) + self._met(leader)

    def _met(self, leader: Curve) -> int:
        """How many points other than its own a leader goes through."""
        (x, y), (to_x, to_y) = leader.vertices
        way, to = np.array([to_x - x, to_y - y]), self.points - np.array([x, y])
        along = (to @ way / max(way @ way, 1e-9)).clip(0, 1)
        far = np.abs(to).max(1) > 1
        return int(((np.linalg.norm(to - along[:, None] * way, axis=1) < 3 * self.unit) & far).sum())


def _named(axis: Axes) -> list[Any]:
    return [line for line in axis.lines if not str(line.get_label()).startswith("_")]


def _leader(colour: Any) -> dict[str, Any]:
    return {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 2}


def _settle(figure: Figure) -> None:
    """Lays the panels out for good: what comes later does not move them."""
    figure.set_dpi(DPI)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
