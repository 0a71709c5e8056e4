"""Four pictures of a report: ID against OOD, OOD against deviation, deviation by block, and the learned radii."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from .report import BASELINE, CURVES, LEARNED, ZERO_SHOT, Config, Row, Runs, at_lr, average, weights

OOD = "out of distribution: five styles (%)"


def draw(runs: Runs, tenth: Runs, folder: Path) -> list[str]:
    """The names of the files, written to `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = list(dict.fromkeys(config.method for config in runs if config.method != ZERO_SHOT))
    colours = dict(zip(methods, plt.get_cmap("tab20").colors, strict=False))
    lrs = sorted({config.lr for config in runs if config.lr})
    zero = runs[Config(ZERO_SHOT, 0.0, 0.0)]

    def save(name: str, panels: int, panel: Callable, ylabel: str, width: float = 4.2, sharey: bool = True) -> str:
        size = (width * panels + 2.2, 4.8)
        figure, axes = plt.subplots(1, panels, figsize=size, sharey=sharey, squeeze=False, layout="constrained")
        for k, axis in enumerate(axes[0]):
            panel(axis, k)
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel(ylabel)
        known = {}
        for axis in axes[0]:
            handles, labels = axis.get_legend_handles_labels()
            known |= dict(zip(labels, handles, strict=True))
        figure.legend(known.values(), known.keys(), loc="outside right upper")
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)
        return name

    def id_ood(axis, k: int) -> None:
        axis.scatter(average(zero, "id"), average(zero, "ood"), marker="*", s=160, color="black", label=ZERO_SHOT)
        for method in methods:
            found = sorted(config for config in runs if config.method == method and config.lr == lrs[k])
            for base in sorted({config.base for config in found}):
                x, y = curve(method, [config for config in found if config.base == base], base)
                style = ".-" if method in CURVES else "o"
                axis.plot(x, y, style, color=colours[method], label=method, linewidth=1)
        axis.set(title=f"learning rate {lrs[k]:g}", xlabel="in distribution (%)")

    def curve(method: str, found: list[Config], base: float) -> tuple[list[float], list[float]]:
        """The points of one method; those of an interpolation lie between the pre-trained and the fine-tuned model."""
        groups = [runs[config] for config in found]
        if method.lower().startswith("wise"):
            groups = [zero, *groups, runs[Config(CURVES[method], found[0].lr, base)]]
        x, y = ([average(group, key) for group in groups] for key in ("id", "ood"))
        return x, y

    def deviation_ood(axis, k: int) -> None:
        axis.axhline(average(zero, "ood"), color="black", linestyle=":", label=ZERO_SHOT)
        for method in methods:
            found = [config for config in runs if config.method == method]
            x, y = ([average(runs[config], key) for config in found] for key in ("deviation", "ood"))
            axis.scatter(x, y, s=28, color=colours[method], label=method)
        axis.set(xlabel="deviation ‖θ − θ₀‖")

    def blocks(axis, k: int) -> None:
        for method, config in at_lr(runs, lrs[k]).items():
            if method != ZERO_SHOT:
                heights = list(by_block(runs[config]).values())
                axis.plot(range(len(heights)), heights, ".-", color=colours[method], label=method)
        axis.set(title=f"learning rate {lrs[k]:g}", xlabel="block, from input to output", yscale="log")

    def radii(axis, k: int) -> None:
        for images, found, style in (("all images", runs, "-"), ("a tenth", tenth, "--")):
            if Config(LEARNED, lrs[-1], 0.0) not in found:
                continue
            free, learned = (list(weights(found[Config(m, lrs[-1], 0.0)]).values()) for m in (BASELINE, LEARNED))
            if k == 0:
                axis.plot(free, style, color=colours[BASELINE], label=f"{BASELINE}, {images}")
                axis.plot(learned, style, color=colours[LEARNED], label=f"{LEARNED}, {images}")
            else:
                kept = [b / a for a, b in zip(free, learned, strict=True)]
                axis.plot(kept, style, color=colours[LEARNED])
        axis.set(xlabel="convolution, from input to output", title=("‖θ − θ₀‖", f"as a share of {BASELINE}'s")[k])

    names = [
        save("emoji-id-ood.png", len(lrs), id_ood, OOD),
        save("emoji-deviation.png", 1, deviation_ood, OOD, width=7.0),
        save("emoji-blocks.png", len(lrs), blocks, "deviation ‖θ − θ₀‖ of the block"),
    ]
    if Config(LEARNED, lrs[-1], 0.0) in runs:
        names.append(save("emoji-radii.png", 2, radii, "deviation, mean over seeds", sharey=False))
    return names


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
