"""Four pictures of a report: ID against OOD, OOD against deviation, deviation by block, and the learned radii."""

import math
from pathlib import Path
from statistics import mean

from examples.pictures import blank, dots, look, name_ends, name_points, save

from .report import BASELINE, CURVES, LEARNED, ZERO_SHOT, Config, Row, Runs, at_lr, average, weights

OOD = "out of distribution (%)"


def draw(runs: Runs, tenth: Runs, folder: Path) -> list[str]:
    """The names of the files, written to `folder`."""
    files = [
        draw_id_ood(runs, folder / "emoji-id-ood.png"),
        draw_deviation(runs, folder / "emoji-deviation.png"),
        draw_blocks(runs, folder / "emoji-blocks.png"),
    ]
    if Config(LEARNED, max(rates(runs)), 0.0) in runs:
        files.append(draw_radii(runs, tenth, folder / "emoji-radii.png"))
    return [file.name for file in files]


def rates(runs: Runs) -> list[float]:
    return sorted({config.lr for config in runs if config.lr})


def draw_id_ood(runs: Runs, path: Path) -> Path:
    """A panel for each learning rate; the settings of what interpolates or sweeps are joined."""
    lrs = rates(runs)
    figure, axes = blank(len(lrs), 1, 0.3 + 3.6 * len(lrs), sharex=True)
    zero = runs[Config(ZERO_SHOT, 0.0, 0.0)]
    for axis, lr in zip(axes, lrs, strict=True):
        for method, base in dict.fromkeys((c.method, c.base) for c in sorted(runs) if c.lr in (0.0, lr)):
            found = [c for c in sorted(runs) if (c.method, c.base) == (method, base) and c.lr in (0.0, lr)]
            groups = [runs[config] for config in found]
            dots(axis, *places(groups), method)
            if method.lower().startswith("wise"):  # it lies between the pre-trained and the fine-tuned model
                groups = [zero, *groups, runs[Config(CURVES[method], lr, base)]]
            if method in CURVES:
                axis.plot(*places(groups), color=look(method).color, linewidth=0.8, zorder=1)
        axis.set(title=f"learning rate {lr:g}", ylabel=OOD)
    axes[-1].set_xlabel("in distribution (%)")
    name_points(figure)
    return save(figure, path)


def places(groups: list[list[Row]], x: str = "id", y: str = "ood") -> list[list[float]]:
    return [[average(group, key) for group in groups] for key in (x, y)]


def draw_deviation(runs: Runs, path: Path) -> Path:
    figure, (axis,) = blank(1, 1, 6)
    axis.axhline(average(runs[Config(ZERO_SHOT, 0.0, 0.0)], "ood"), color="black", linestyle=":", linewidth=0.8)
    for config, group in runs.items():
        dots(axis, *places([group], "deviation"), config.method)
    axis.set(xlabel="deviation ‖θ − θ₀‖; dotted: the height of zero-shot", ylabel=OOD)
    name_points(figure)
    return save(figure, path)


def draw_blocks(runs: Runs, path: Path) -> Path:
    lrs = rates(runs)
    figure, axes = blank(len(lrs), 1, 0.3 + 4 * len(lrs), sharex=True, sharey=True)
    for axis, lr in zip(axes, lrs, strict=True):
        for method, config in at_lr(runs, lr).items():
            heights = list(by_block(runs[config]).values()) if method != ZERO_SHOT else []
            if any(heights):
                colour, marker = look(method)
                axis.plot(range(len(heights)), heights, marker=marker, color=colour, linewidth=1, label=method)
        axis.set(title=f"learning rate {lr:g}", ylabel="deviation ‖θ − θ₀‖", yscale="log")
    axes[-1].set_xlabel("block, from input to output")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    name_ends(figure)
    return save(figure, path)


def draw_radii(runs: Runs, tenth: Runs, path: Path) -> Path:
    """Of the convolutions, and as a share of what AdamW deviates; dashed for a tenth of the images."""
    lr = max(rates(runs))
    figure, axes = blank(2, 1, 7, sharex=True)
    for images, found, style in (("", runs, "-"), (", a tenth", tenth, "--")):
        if Config(LEARNED, lr, 0.0) not in found:
            continue
        free, learned = (list(weights(found[Config(m, lr, 0.0)]).values()) for m in (BASELINE, LEARNED))
        kept = [b / a for a, b in zip(free, learned, strict=True)]
        for axis, method, heights in ((axes[0], BASELINE, free), (axes[0], LEARNED, learned), (axes[1], LEARNED, kept)):
            axis.plot(heights, style, color=look(method).color, linewidth=1.2, label=method + images)
    axes[0].set(ylabel="deviation ‖θ − θ₀‖")
    axes[1].set(ylabel=f"as a share of {BASELINE}'s", xlabel="convolution, from input to output")
    name_ends(figure)
    return save(figure, path)


def by_block(group: list[Row]) -> dict[str, float]:
    """Mean deviation of each block over all its parameters, from the input to the output."""
    out: dict[str, list[float]] = {}
    for row in group:
        blocks: dict[str, list[float]] = {}
        for name, deviation in row["tensors"].items():
            block = ".".join(name.split(".")[:2]) if name.startswith("blocks") else name.split(".")[0]
            blocks.setdefault(block, []).append(deviation)
        for block, parts in blocks.items():
            out.setdefault(block, []).append(math.hypot(*parts))
    return {block: mean(values) for block, values in out.items()}
