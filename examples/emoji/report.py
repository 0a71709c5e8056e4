"""What came out: tables in Markdown, and three pictures. Choices are made by in-distribution validation only."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import correlation, mean, stdev
from typing import Any

import torch

import robustft_kernels as rft

from .data import STYLES
from .methods import ALPHAS, METHODS

Row = dict[str, Any]
Config = tuple[str, float, float, float]  # method, learning rate, strength, α of WiSE-FT
BASELINE, ZERO_SHOT = "AdamW", "zero-shot"
T_QUANTILE = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # two-sided 95 %, for 2 to 10 seeds


def write(rows: list[Row], style: str, folder: Path) -> str:
    """The report, as printed; `folder` gets it as emoji.md, with the pictures beside it."""
    runs = by_config(rows)
    seeds = len({row["seed"] for row in rows})
    best = chosen(runs)
    lrs = sorted({config[1] for config in runs if config[1]})
    sections = [
        f"# Emoji: fine-tuned in the style {style}, {seeds} seeds",
        f"Made with torch {torch.__version__}, robustft_kernels {rft.__version__}. Accuracies in percent, mean ± "
        f"standard deviation over seeds. ID is the style {style}, OOD the mean of the other five. {noise(rows)}",
        "## Each method at the setting that in-distribution validation chose",
        "The differences are taken seed by seed, with a 95% interval (t); one that holds 0 is noise.",
        table([differences(runs, best, method) for method in best]),
        "## The same, style by style",
        table([styles(method, runs[config]) for method, config in best.items()]),
        "## At each learning rate, strength and α chosen by validation",
        table([differences(runs, at_lr(runs, lr), method) for lr in lrs for method in best if method != ZERO_SHOT]),
        "## Deviation and OOD accuracy over the strengths",
        table(sweeps(runs)) or "No method was run at several strengths.",
        "## The whole grid",
        table([line(config, group) for config, group in runs.items()]),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    names = pictures(runs, best, folder)
    text = "\n\n".join(sections)
    (folder / "emoji.md").write_text(text + "\n\n" + "\n".join(f"![{name}]({name})" for name in names) + "\n")
    return text + "\n\npictures: " + " ".join(str(folder / name) for name in names)


def by_config(rows: list[Row]) -> dict[Config, list[Row]]:
    runs: dict[Config, list[Row]] = {}
    for row in rows:
        runs.setdefault((row["method"], row["lr"], row["strength"], row["alpha"]), []).append(row)
    return {config: sorted(group, key=lambda row: row["seed"]) for config, group in runs.items()}


def average(group: Iterable[Row], key: str) -> float:
    return mean(row[key] for row in group)


def chosen(runs: dict[Config, list[Row]]) -> dict[str, Config]:
    """Of every method, the configuration with the best mean validation accuracy; of equals, the first of the grid."""
    best: dict[str, Config] = {}
    for config, group in runs.items():
        method = config[0]
        if method not in best or average(group, "val") > average(runs[best[method]], "val"):
            best[method] = config
    return best


def at_lr(runs: dict[Config, list[Row]], lr: float) -> dict[str, Config]:
    return chosen({config: group for config, group in runs.items() if config[1] in (0.0, lr)})


def noise(rows: list[Row]) -> str:
    """How far chance alone moves an accuracy: the 95 % half-width of a binomial."""
    tests, seeds = rows[0]["tests"], len({row["seed"] for row in rows})
    p = average(rows, "id") / 100
    one = 196 * math.sqrt(p * (1 - p) / tests)
    return (
        f"ID is measured on {tests} images a seed: chance moves it by ±{one:.1f} in one seed and "
        f"±{one / math.sqrt(seeds):.1f} in the mean of {seeds}; ID differences below that are noise."
    )


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values) if len(values) > 1 else 0:.1f}"


def paired(group: list[Row], other: list[Row], key: str) -> str:
    """Mean difference over the seeds that both have, and its 95 % interval."""
    theirs = {row["seed"]: row[key] for row in other}
    gaps = [row[key] - theirs[row["seed"]] for row in group if row["seed"] in theirs]
    if len(gaps) < 2:
        return f"{mean(gaps):+.1f}" if gaps else "–"
    half = T_QUANTILE[min(len(gaps) - 2, len(T_QUANTILE) - 1)] * stdev(gaps) / math.sqrt(len(gaps))
    return f"{mean(gaps):+.1f} [{mean(gaps) - half:+.1f}, {mean(gaps) + half:+.1f}]"


def name_of(config: Config) -> dict[str, str]:
    method, lr, strength, alpha = config
    return {
        "method": method,
        "lr": f"{lr:g}" if lr else "–",
        "strength": f"{strength:g}" if strength else "–",
        "α": f"{alpha:g}" if alpha != 1 else "–",
    }


def differences(runs: dict[Config, list[Row]], best: dict[str, Config], method: str) -> dict[str, str]:
    group = runs[best[method]]
    out = name_of(best[method]) | {"validation": f"{average(group, 'val'):.1f}"}
    out |= {key.upper(): spread([row[key] for row in group]) for key in ("id", "ood")}
    for other in (BASELINE, ZERO_SHOT):
        for key in ("id", "ood"):
            known = other in best and other != method
            out[f"{key.upper()} over {other}"] = paired(group, runs[best[other]], key) if known else "–"
    return out | {"deviation": f"{average(group, 'deviation'):.2f}"}


def styles(method: str, group: list[Row]) -> dict[str, str]:
    return {"method": method, **{style: spread([row[style] for row in group]) for style in STYLES}}


def line(config: Config, group: list[Row]) -> dict[str, str]:
    out = name_of(config) | {key: spread([row[key] for row in group]) for key in ("val", "id", "ood")}
    return out | {
        "deviation": f"{average(group, 'deviation'):.2f}",
        "seconds": f"{average(group, 'seconds'):.0f}",
    }


def sweeps(runs: dict[Config, list[Row]]) -> list[dict[str, str]]:
    """Of methods with several strengths, at each learning rate: deviation and OOD accuracy, and Pearson's r of the two.

    AdamW is strength 0.
    """
    lines = []
    for method in dict.fromkeys(config[0] for config in runs):
        for lr in dict.fromkeys(config[1] for config in runs if config[0] == method):
            found = [config for config in runs if config[:2] == (method, lr) and config[3] == 1]
            if len(found) < 2:
                continue
            found = [config for config in runs if config == (BASELINE, lr, 0.0, 1.0)] + found
            points = [(average(runs[c], "deviation"), average(runs[c], "ood")) for c in found]
            lines.append({
                "method": method,
                "lr": f"{lr:g}",
                "strength: deviation, OOD": "; ".join(
                    f"{c[2]:g}: {x:.2f}, {y:.1f}" for c, (x, y) in zip(found, points, strict=True)
                ),
                "r": f"{correlation(*zip(*points, strict=True)):+.2f}" if len(points) > 2 else "–",
            })  # fmt: skip
    return lines


def table(lines: list[dict[str, str]]) -> str:
    if not lines:
        return ""
    head = list(lines[0])
    body = [f"| {' | '.join(cells)} |" for cells in (head, *(list(line.values()) for line in lines))]
    return "\n".join([body[0], "|" + "---|" * len(head), *body[1:]])


def pictures(runs: dict[Config, list[Row]], best: dict[str, Config], folder: Path) -> list[str]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = [method for method in best if method != ZERO_SHOT]
    colours = dict(zip(methods, plt.get_cmap("tab20").colors, strict=False))
    lrs = sorted({config[1] for config in runs if config[1]})
    zero = runs[best[ZERO_SHOT]]
    bases = {method.wise: name for name, method in METHODS.items() if method.wise}

    def save(name: str, panels: int, draw: Callable, ylabel: str, width: float = 4.2) -> str:
        figure, axes = plt.subplots(
            1, panels, figsize=(width * panels + 2.2, 4.4), sharey=True, squeeze=False, layout="constrained"
        )
        for k, axis in enumerate(axes[0]):
            draw(axis, k)
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel(ylabel)
        handles, labels = axes[0][0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), loc="outside right upper")
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)
        return name

    def id_ood(axis, k: int) -> None:
        axis.scatter(average(zero, "id"), average(zero, "ood"), marker="*", s=160, color="black", label=ZERO_SHOT)
        for config in (config for config in runs if config[1] == lrs[k]):
            method, lr, strength, alpha = config
            if alpha == 1:
                point = [average(runs[config], key) for key in ("id", "ood")]
                axis.scatter(*point, s=40, color=colours[method], label=method, zorder=3)
            elif alpha == ALPHAS[0]:  # a curve: from the pre-trained model over the αs to the fine-tuned one
                mixed = [runs[method, lr, strength, a] for a in ALPHAS]
                curve = [zero, *mixed, runs[bases[method], lr, strength, 1.0]]
                x, y = ([average(group, key) for group in curve] for key in ("id", "ood"))
                axis.plot(x, y, ".-", color=colours[method], label=method, linewidth=1)
        axis.set(title=f"learning rate {lrs[k]:g}", xlabel="in distribution (%)")

    def deviation_ood(axis, k: int) -> None:
        axis.axhline(average(zero, "ood"), color="black", linestyle=":", label=ZERO_SHOT)
        for method in methods:
            found = [c for c in runs if c[0] == method]
            x, y = ([average(runs[c], key) for c in found] for key in ("deviation", "ood"))
            axis.scatter(x, y, s=28, color=colours[method], label=method)
        axis.set(xlabel="deviation ‖θ − θ₀‖")

    def depth(axis, k: int) -> None:
        for method, config in at_lr(runs, lrs[k]).items():
            if method == ZERO_SHOT:
                continue
            blocks = list(runs[config][0]["blocks"])
            heights = [mean(row["blocks"][block] for row in runs[config]) for block in blocks]
            axis.plot(range(len(blocks)), heights, ".-", color=colours[method], label=method)
        axis.set(title=f"learning rate {lrs[k]:g}", xlabel="block, from input to output", yscale="log")
        axis.set_xticks(range(0, len(blocks), 3))

    ood = "out of distribution: five styles (%)"
    return [
        save("emoji-id-ood.png", len(lrs), id_ood, ood),
        save("emoji-deviation.png", 1, deviation_ood, ood, width=7.0),
        save("emoji-blocks.png", len(lrs), depth, "deviation ‖θ − θ₀‖ of the block"),
    ]
