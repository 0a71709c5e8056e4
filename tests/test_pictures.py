"""Pictures tell the methods apart, also for the colour-blind, and no name covers another."""

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from benchmarks import contenders
from benchmarks.pictures import PICTURES, is_ours
from benchmarks.results import Results, read
from examples import pictures, redraw
from examples.digits.methods import METHODS as DIGITS
from examples.digits.model import LAYERS
from examples.digits.report import draw_accuracies, draw_layers
from examples.emoji.methods import METHODS as EMOJI
from examples.emoji.pictures import draw_deviation, draw_id_ood
from examples.emoji.report import CURVES
from examples.pictures import COLOURS, FAMILIES, THEIRS, WIDTH, apart, blank, look, name_ends, name_points
from examples.sentiment.methods import METHODS as SENTIMENT
from examples.sentiment.report import draw as draw_sentiment

ROOT = Path(__file__).parent.parent
SENTIMENT_NAMES = [*SENTIMENT, *(row.wise for row in SENTIMENT.values() if row.wise)]
EMOJI_NAMES = [*(of for name, row in EMOJI.items() for of in row.joined or [name]), *CURVES]
NAMES = {"digits": [*DIGITS], "emoji": EMOJI_NAMES, "sentiment": SENTIMENT_NAMES}

# What a dichromat sees of linear RGB. Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of
# color vision deficiency", IEEE TVCG 15(6), 2009: the matrices of severity 1.
SEEN = {
    "all": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour, seen):
    """CIELAB of a colour "#rrggbb" of sRGB, as these eyes see it."""
    srgb = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    x, y, z = XYZ @ np.clip(np.array(seen) @ linear, 0, 1) / XYZ.sum(1)
    x, y, z = (np.cbrt(v) if v > (6 / 29) ** 3 else v * 841 / 108 + 4 / 29 for v in (x, y, z))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def nearest(colours, seen):
    return min(np.linalg.norm(lab(a, seen) - lab(b, seen)) for a, b in combinations(colours, 2))


@pytest.mark.parametrize("eyes", SEEN)
def test_families_differ_to_all_eyes(eyes):
    """By 15 of CIELAB, where 2 can just be seen side by side. Matplotlib's first seven do not pass."""
    assert len(COLOURS) == 7
    assert nearest(COLOURS.values(), SEEN[eyes]) > 15
    usual = [to_hex(colour) for colour in colormaps["tab10"].colors[:7]]
    assert (nearest(usual, SEEN[eyes]) > 15) == (eyes in ("all", "tritanopia"))


@pytest.mark.parametrize("example", NAMES)
def test_every_method_has_a_look_of_its_own(example):
    looks = [look(name) for name in [*NAMES[example], "zero-shot"]]
    assert len(set(looks)) == len(looks)


def test_families_are_whole():
    """Ours in the benchmarks have the colours of the examples, and each colour is that of one family."""
    assert COLOURS.keys() == FAMILIES.keys()
    assert len(set(pictures.LOOKS.values())) == sum(map(len, FAMILIES.values()))
    for name in contenders.METHODS:
        assert look(name).color in COLOURS.values()
    assert look("AdamPGM, mars_rows").color == look("TPGM, once").color == COLOURS["projection"]
    assert not is_ours("optimi")
    assert THEIRS not in COLOURS.values()
    with pytest.raises(KeyError):
        look("optimi")


def texts(figure):
    """The boxes of all that is written, and what."""
    figure.draw_without_rendering()
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    hidden = {
        tick
        for axis in figure.axes
        for line in (axis.xaxis, axis.yaxis)
        for tick in [*line.get_ticklabels(), *line.get_ticklabels(minor=True)]
        if not within(axis, tick, line is axis.xaxis)
    }
    return [(text.get_text(), Text.get_window_extent(text)) for text in found if text not in hidden]


def within(axis, tick, across):
    low, high = sorted(axis.get_xlim() if across else axis.get_ylim())
    return low <= tick.get_position()[0 if across else 1] <= high


def overlaps(figure):
    return [(a, b) for (a, box), (b, other) in combinations(texts(figure), 2) if box.padded(-1).overlaps(other)]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, and gives the figure in place of a file."""

    def drawn(draw, *args):
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
        monkeypatch.setattr(pictures.Image, "open", lambda _: pictures.Image.new("RGB", (1, 1)))
        draw(*args, tmp_path / "picture.png")
        (figure,) = figures
        return figure

    return drawn


RESULTS = read(ROOT / "benchmarks" / "results" / "cpu.json")
DRAWN = {
    "digits": (draw_accuracies, redraw.digits()),
    "emoji": (draw_id_ood, redraw.grid("emoji.md")),
    "emoji, deviation": (draw_deviation, redraw.grid("emoji.md")),
    "sentiment": (draw_sentiment, redraw.grid("sentiment.md")),
    **{name: (draw, RESULTS) for name, draw in PICTURES.items()},
}


@pytest.mark.parametrize("name", DRAWN)
def test_no_text_covers_another_or_is_cut_off(drawn, name):
    figure = drawn(*DRAWN[name])
    assert figure.get_figwidth() == WIDTH
    assert not overlaps(figure)
    for text, box in texts(figure):
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width, text
        assert 0 <= box.y0 < box.y1 <= figure.bbox.height, text
    assert all(text.get_fontsize() >= pictures.SMALL for text in figure.findobj(Text))
    assert all(axis.has_data() for axis in figure.axes)  # no panel is empty


def test_a_name_that_covers_another_is_found():
    figure, (axis,) = blank(1, 1, 3)
    axis.annotate("one", (0.5, 0.5))
    assert not overlaps(figure)
    axis.annotate("other", (0.51, 0.5))
    assert overlaps(figure) == [("one", "other")]


def test_every_method_is_named_once_a_panel(drawn):
    digits = drawn(*DRAWN["digits"])
    for axis in digits.axes:
        assert sorted(text.get_text() for text in axis.texts) == sorted(DIGITS)
    for axis in drawn(*DRAWN["sentiment"]).axes:
        assert sorted(text.get_text() for text in axis.texts) == sorted([*SENTIMENT_NAMES, "zero-shot"])
    rows = [
        {"method": method, "lr": lr, "layers": dict.fromkeys(LAYERS, lr * k)}
        for k, method in enumerate(DIGITS)
        for lr in (1e-3, 3e-3)
    ]
    layers = drawn(draw_layers, rows)
    assert not overlaps(layers)
    for axis in layers.axes:
        assert [text.get_text() for text in axis.texts] == [*DIGITS][1:]  # by height; the first does not move


def test_names_of_near_ends_stand_apart():
    figure, (axis,) = blank(1, 1, 3)
    for k in range(8):
        axis.plot([0, 1], [k, 1 + k / 1000], label=f"line {k}")
    name_ends(figure)
    assert not overlaps(figure)
    heights = apart([0, 0.1, 0.2, 5], 1)
    assert heights == pytest.approx([-0.9, 0.1, 1.1, 5], abs=0.2)  # about their middle
    assert all(high - low > 0.99 for low, high in pairwise(heights))
    assert apart([0, 1, 2], 1) == [0, 1, 2]


def test_names_in_a_crowd_stand_apart():
    figure, (axis,) = blank(1, 1, 4)
    for k in range(16):
        axis.plot(0.5 + k / 1000, 0.5, "o", label=f"method {k}")
    axis.set(xlim=(0, 1), ylim=(0, 1))
    name_points(figure)
    assert not overlaps(figure)


def test_what_is_redrawn_is_what_the_pages_tell():
    assert redraw.digits()[1e-3]["AdamW"] == (99.1, 0.5, 88.0, 1.9)
    assert all(methods.keys() == DIGITS.keys() for methods in redraw.digits().values())
    emoji = redraw.grid("emoji.md")
    assert len(emoji) == (ROOT / "docs" / "emoji.md").read_text().split("## The whole grid")[1].count("\n| ") - 1
    assert emoji["WISE-SPD", 3e-4, 0.75, 2.0] == [{"val": 49.7, "id": 50.2, "ood": 46.2, "deviation": 1.68}]
    assert redraw.grid("sentiment.md")["zero-shot", 0.0, 0.0, 0.0][0]["ood"] == 68.8


def test_pictures_of_docs_are_small():
    for file in (ROOT / "docs").glob("*.png"):
        assert file.stat().st_size <= 150_000, file.name


def test_benchmarks_without_results_draw_no_empty_panel(drawn):
    part = Results(RESULTS.machine, [row for row in RESULTS.rows if row.question in ("eager", "tensors")])
    assert len(drawn(PICTURES["eager"], part).axes) == 1
    assert len(drawn(PICTURES["growth"], part).axes) == 1
