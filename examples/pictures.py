"""How pictures look here: a colour for each family of methods, a marker for each of its methods, and names beside what
they name instead of a legend.

Draw lines and points with `axis.plot(..., label=name)`, and call `name_points` or `name_ends` at the end.
"""

from collections.abc import Iterable
from io import BytesIO
from itertools import pairwise, product
from math import cos, pi, sin
from pathlib import Path
from random import Random
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
    "penalty": ("L2-SP", "MARS-SP", "Cautious L2-SP", "L2-SP, λ from 20 to 0", "RecAdam"),
    "projection": ("PGM", "TPGM", "TPGM-C", "TPGM, each step", "FTP"),
    "SPD": ("SPD", "AdamSPD, λ=1", "AdamSPD, λ=2", "SPD, gate away", "DiGraP"),
    "interpolation": ("WiSE-FT", "WISE-SPD", "Soup", "Model Stock"),
    "LoRA": ("LoRA, AdamW", "LoRA, SPD"),
}
MARKERS = "oX^Dv"  # by place in the family
REACHES = (5, 9, 15, 23, 33, 46, 62, 82, 107, 137)  # from a point to its name
ORDERS = 8  # in which names are put down; the one that costs least is taken
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
    """Of a method by its name. What stands after a comma ("PGM, γ=0.3") counts only as far as FAMILIES has it."""
    first = max((known for known in LOOKS if name.startswith(f"{known}, ")), key=len, default=name.split(", ")[0])
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
        for line in _named(axis):
            named.setdefault(str(line.get_label()), []).extend(map(tuple, line.get_xydata()))
        notes = {
            name: axis.annotate(
                name, places[0], (0, 0), textcoords="offset points", ha="center", va="center", fontsize=SMALL,
                arrowprops=_leader("black"), annotation_clip=False, path_effects=HALO,
            )
            for name, places in named.items()
        }  # fmt: skip
        orders = [Random(seed).sample(list(named), len(named)) for seed in range(ORDERS)]
        fits = [_Fit(axis, named, notes, order) for order in orders]
        for name, (place, step) in min(fits, key=lambda fit: fit.cost).spots.items():
            notes[name].xy, notes[name].xyann = place, step
        for line in _named(axis):
            notes[str(line.get_label())].arrow_patch.set_color(line.get_color())


class _Fit:
    """Names put down one after the other, each where it costs least then. All is in pixels, but for `spots`."""

    def __init__(self, axis: Axes, named: dict[str, list[Place]], notes: dict[str, Annotation], order: list[str]):
        self.unit, self.panel = axis.figure.dpi / 72, axis.get_window_extent()
        curves = [line.get_transform().transform_path(line.get_path()) for line in axis.lines]
        self.points = np.unique(np.concatenate([curve.vertices for curve in curves]), axis=0)
        self.lines = [curve for curve, line in zip(curves, axis.lines, strict=True) if line.get_linestyle() != "None"]
        self.boxes: list[Bbox] = []
        self.leaders: list[Curve] = []
        self.spots: dict[str, tuple[Place, Place]] = {}  # the point, and how far from it the name is, in points
        self.cost = 0.0
        for name in order:
            places = dict(zip(named[name], axis.transData.transform(named[name]), strict=True))
            self._put(name, places, Text.get_window_extent(notes[name]).size)

    def _put(self, name: str, places: dict[Place, Any], size: Any) -> None:
        least = float("inf")
        for reach, (place, point), turn in product(REACHES, self._lonely_first(places), range(16)):
            if least <= reach / 30:
                break
            step = np.array([cos(turn * pi / 8), sin(turn * pi / 8)]) * (reach * self.unit + size / 2)
            box, leader = Bbox([point + step - size / 2, point + step + size / 2]), Curve([point, point + step])
            if (cost := reach / 30 + self._rivals(box, reach) / 2 + self._cost(box, leader, least)) < least:
                least, best = cost, (box, leader)
                self.spots[name] = place, tuple(step / self.unit)
        self.boxes.append(best[0])
        self.leaders.append(best[1])
        self.cost += least

    def _lonely_first(self, places: dict[Place, Any]) -> list[tuple[Place, Any]]:
        def room(point: Any) -> float:
            return float(np.sort(np.abs(self.points - point).max(1))[:5][-1])

        return sorted(places.items(), key=lambda item: -room(item[1]))

    def _cost(self, box: Bbox, leader: Curve, enough: float) -> float:
        """What a name in this box would cover or leave, and what its leader would cross. Counts no further than
        `enough`."""
        wide = box.padded(4 * self.unit)
        cost = 100.0 * ((wide.min < self.panel.min).any() or (wide.max > self.panel.max).any())
        cost += 100 * sum(map(box.padded(5 * self.unit, self.unit).overlaps, self.boxes))
        if cost < enough:
            cost += 2 * ((self.points > wide.min) & (self.points < wide.max)).all(1).sum() + self._met(leader)
        if cost < enough:
            cost += 5 * sum(other.intersects_bbox(box) for other in self.leaders)
            cost += 5 * sum(leader.intersects_bbox(other) for other in self.boxes)
            cost += 5 * sum(leader.intersects_path(other) for other in self.leaders)
        return cost + sum(line.intersects_bbox(box, filled=False) for line in self.lines) if cost < enough else cost

    def _rivals(self, box: Bbox, reach: float) -> int:
        """How many other points are about as near to a name as its own. A long leader tells which one is meant."""
        away = np.maximum(box.min - self.points, self.points - box.max).clip(0)
        return max(0, int((np.linalg.norm(away, axis=1) < (min(reach, 9) + 3) * self.unit).sum()) - 1)

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
