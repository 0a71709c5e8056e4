"""What came out: tables in Markdown, and pictures. Choices are made by in-distribution validation only."""

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import correlation, mean, stdev
from typing import Any, NamedTuple

import torch

import robustft_kernels as rft

from .data import STYLES
from .methods import METHODS

Row = dict[str, Any]
BASELINE, ZERO_SHOT, LEARNED = "AdamW", "zero-shot", "TPGM"
T_QUANTILE = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # two-sided 95 %, for 2 to 10 seeds


class Config(NamedTuple):
    """strength: the method's one knob. base: that of the method it goes on from, for WISE-SPD the λ of SPD."""

    method: str
    lr: float
    strength: float
    base: float = 0.0


Runs = dict[Config, list[Row]]  # the rows of each seed
CURVES = {name: origin for origin, method in METHODS.items() for name in method.afterwards}
FIXED = {of for name, method in METHODS.items() if len(method.strengths) == 1 for of in (name, *method.joined)}
FIXED |= {LEARNED, ZERO_SHOT}


def write(rows: list[Row], style: str, folder: Path) -> str:
    """The report, as printed; `folder` gets it as emoji.md, with the pictures beside it."""
    from .pictures import draw

    runs, swept, tenth = by_config(rows), by_config(rows, sweep=True), by_config(rows, share=0.1)
    best = chosen(runs)
    lrs = sorted({config.lr for config in runs if config.lr})
    by_lr = [at_lr(runs, lr) for lr in lrs]
    seeds = len({row["seed"] for row in rows})
    sections = [
        f"# Emoji: fine-tuned in the style {style}, {seeds} seeds",
        f"Made with torch {torch.__version__} and robustft_kernels {rft.__version__}.\n"
        "Accuracies are in percent, as mean ± standard deviation over seeds.\n"
        f"ID is the style {style}. OOD is the mean of the other five.\n{noise(rows)}",
        "## Each method at the setting that in-distribution validation chose",
        "The differences are taken seed by seed, with a 95% interval (t). If it holds 0, the difference is noise.",
        table([differences(runs, best, method) for method in best]),
        "## The same, style by style",
        table([styles(method, runs[config]) for method, config in best.items()]),
        "## At each learning rate, strength chosen by validation",
        table([differences(runs, at, method) for at in by_lr for method in at if method != ZERO_SHOT]),
        "## Deviation and OOD accuracy over the strengths",
        sweeps(runs | swept, lrs[-1]) or "No method was run at more strengths than the grid's.",
        "## Where the learned radii hold back",
        f"Deviations are ‖θ − θ₀‖ of the convolutions' weights at learning rate {lrs[-1]:g}.\n"
        f"They are means over tensors and seeds. α is the share of {BASELINE}'s deviation that {LEARNED} keeps.",
        table(depths(runs, tenth, lrs[-1])) or f"{LEARNED} was not run.",
        "## The whole grid",
        table([line(config, group) for config, group in runs.items()]),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    names = draw(runs, tenth, folder)
    text = "\n\n".join(sections)
    (folder / "emoji.md").write_text(text + "\n\n" + "\n".join(f"![{name}]({name})" for name in names) + "\n")
    return text + "\n\npictures: " + " ".join(str(folder / name) for name in names)


def by_config(rows: list[Row], sweep: bool = False, share: float = 1.0) -> Runs:
    runs: Runs = {}
    for row in rows:
        if row["sweep"] == sweep and row["share"] == share:
            runs.setdefault(Config(*(row[key] for key in Config._fields)), []).append(row)
    return {config: sorted(group, key=lambda row: row["seed"]) for config, group in runs.items()}


def average(group: Iterable[Row], key: str) -> float:
    return mean(row[key] for row in group)


def chosen(runs: Runs) -> dict[str, Config]:
    """Of every method, the configuration with the best mean validation accuracy; of equals, the first of the grid."""
    best: dict[str, Config] = {}
    for config, group in runs.items():
        method = config.method
        if method not in best or average(group, "val") > average(runs[best[method]], "val"):
            best[method] = config
    return best


def at_lr(runs: Runs, lr: float) -> dict[str, Config]:
    return chosen({config: group for config, group in runs.items() if config.lr in (0.0, lr)})


def noise(rows: list[Row]) -> str:
    """How far chance alone moves an accuracy: the 95 % half-width of a binomial."""
    tests, seeds = rows[0]["tests"], len({row["seed"] for row in rows})
    p = average(rows, "id") / 100
    one = 196 * math.sqrt(p * (1 - p) / tests)
    return (
        f"ID is measured on {tests} images a seed. Chance moves it by ±{one:.1f} in one seed, and by "
        f"±{one / math.sqrt(seeds):.1f} in the mean of {seeds}.\nID differences below that are noise."
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
    origin = f" (of λ={config.base:g})" if config.base else ""
    return {
        "method": config.method + origin,
        "lr": f"{config.lr:g}" if config.lr else "–",
        "strength": "–" if config.method in FIXED else f"{config.strength:g}",
    }


def differences(runs: Runs, best: dict[str, Config], method: str) -> dict[str, str]:
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
    return out | {"deviation": f"{average(group, 'deviation'):.2f}"}


def sweeps(runs: Runs, lr: float) -> str:
    """A table a method that has a sweep, at `lr`, from AdamW (strength 0) on, with Pearson's r of deviation and OOD."""
    parts = []
    for method in (name for name, row in METHODS.items() if row.sweep):
        found = sorted(config for config in runs if config.method == method and config.lr == lr)
        if not set(METHODS[method].sweep) & {config.strength for config in found}:
            continue
        found = [config for config in runs if config[:2] == (BASELINE, lr)] + found
        deviation, ood = ([average(runs[config], key) for config in found] for key in ("deviation", "ood"))
        parts.append(
            f"This is {method} at learning rate {lr:g}; the first row is {BASELINE}.\n"
            f"Over the strengths, Pearson's r of deviation and OOD accuracy is {correlation(deviation, ood):+.2f}."
        )
        parts.append(table([line(config, runs[config]) | {"method": method} for config in found]))
    return "\n\n".join(parts)


def weights(group: list[Row]) -> dict[str, float]:
    """Mean deviation of each convolution's weight, from the input to the output."""
    names = [name for name in group[0]["tensors"] if name.endswith(".weight") and not name.startswith("projection")]
    return {name: mean(row["tensors"][name] for row in group) for name in names}


def depths(runs: Runs, tenth: Runs, lr: float) -> list[dict[str, str]]:
    """By thirds of the depth, for all images and a tenth: deviation of AdamW, of TPGM, and what it keeps of the one."""
    out = []
    for images, found in (("all", runs), ("a tenth", tenth)):
        pair = [found.get(Config(method, lr, 0.0)) for method in (BASELINE, LEARNED)]
        if not all(pair):
            continue
        free, learned = (list(weights(group).values()) for group in pair)
        third = -(-len(free) // 3)
        for k, part in enumerate(("lower", "middle", "upper")):
            x, y = (values[k * third : (k + 1) * third] for values in (free, learned))
            kept = mean(b / a for a, b in zip(x, y, strict=True))
            out.append({
                "images": images, "third of the layers": part, BASELINE: f"{mean(x):.3f}",
                LEARNED: f"{mean(y):.3f}", "α": f"{kept:.2f}",
            })  # fmt: skip
    return out


def table(lines: list[dict[str, str]]) -> str:
    if not lines:
        return ""
    head = list(lines[0])
    body = [f"| {' | '.join(cells)} |" for cells in (head, *(list(line.values()) for line in lines))]
    return "\n".join([body[0], "|" + "---|" * len(head), *body[1:]])
