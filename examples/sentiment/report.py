"""What came out: tables in Markdown and a picture. Choices are made by validation in the domain fine-tuned in only."""

import math
from pathlib import Path

import torch

import robustft_kernels as rft
from examples.emoji.report import Config, Row, Runs, average, chosen, paired, spread, table
from examples.pictures import blank, dots, name_points, save

from .data import DOMAINS
from .methods import METHODS

ZERO_SHOT, PROBE = "zero-shot", "LP"
ORIGINS = {method.wise: name for name, method in METHODS.items() if method.wise}


def by_config(rows: list[Row]) -> Runs:
    runs: Runs = {}
    for row in rows:
        runs.setdefault(Config(*(row[key] for key in Config._fields)), []).append(row)
    return {config: sorted(group, key=lambda row: row["seed"]) for config, group in runs.items()}


def at_larger_rate(runs: Runs) -> dict[str, Config]:
    """`chosen`, of the larger learning rate alone."""
    largest = {config.method: max(c.lr for c in runs if c.method == config.method) for config in runs}
    return chosen({config: group for config, group in runs.items() if config.lr == largest[config.method]})


def baseline_of(name: str) -> str:
    """AdamW with the same parameters."""
    return "LoRA, AdamW" if name.startswith("LoRA") else "AdamW"


def write(rows: list[Row], further: list[Row], domain: str, folder: Path) -> str:
    """The report, as printed; `folder` gets it as sentiment.md, with the picture beside it.

    rows: of the grid. further: of what was chosen from it, at more seeds.
    """
    grid, every = by_config(rows), by_config(rows + further)
    best = chosen(grid)
    few, many = (len({row["seed"] for row in found}) for found in (rows, rows + further))
    larger = at_larger_rate(grid)
    sections = [
        f"# Sentiment: fine-tuned on {domain}",
        f"Made with torch {torch.__version__} and robustft_kernels {rft.__version__}.\n"
        "Accuracies are in percent, as mean ± standard deviation over seeds.\n"
        f"ID is {domain}. OOD is the mean of the other three.\n{noise(rows, many)}",
        f"## Each method at the setting that validation on {domain} chose, {many} seeds",
        "The differences are to AdamW on the same parameters (all, or LoRA's). They are taken seed by seed, with a\n"
        "95% interval (t). If it holds 0, the difference is noise.",
        table([differences(every, best, method) for method in best]),
        "## The same, domain by domain",
        table([
            {"method": method, **{key: spread([row[key] for row in every[config]]) for key in DOMAINS}}
            for method, config in best.items()
        ]),
        f"## At the larger learning rate, strength chosen by validation, {many} seeds",
        table([differences(every, larger, method) for method in larger if method not in (ZERO_SHOT, PROBE)]),
        f"## The whole grid, {few} seeds",
        table([line(config, group) for config, group in grid.items()]),
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    picture = draw(grid, folder / "sentiment-id-ood.png")
    text = "\n\n".join(sections)
    (folder / "sentiment.md").write_text(f"{text}\n\n![ID and OOD against deviation]({picture.name})\n")
    return f"{text}\n\npicture: {picture}"


def noise(rows: list[Row], seeds: int) -> str:
    """How far chance alone moves an accuracy: the 95% half-width of a binomial."""
    found = []
    for key, count in (("id", rows[0]["tests"]), ("ood", rows[0]["others"] - rows[0]["tests"])):
        p = average(rows, key) / 100
        found.append(f"{key.upper()} by ±{196 * math.sqrt(p * (1 - p) / (count * seeds)):.1f} ({count} a seed)")
    return f"Chance in the choice of test sentences moves a mean of {seeds} seeds: {', '.join(found)}."


def name_of(config: Config) -> dict[str, str]:
    origin = METHODS.get(ORIGINS.get(config.method, ""))
    of = f" (of λ={config.base:g})" if origin and len(origin.strengths) > 1 else ""
    knobs = 2 if origin else len(METHODS[config.method].strengths) if config.method in METHODS else 1
    return {
        "method": config.method + of,
        "lr": f"{config.lr:g}" if config.lr else "–",
        "strength": f"{config.strength:g}" if knobs > 1 else "–",
    }


def differences(runs: Runs, best: dict[str, Config], method: str) -> dict[str, str]:
    group, other = runs[best[method]], baseline_of(method)
    out = name_of(best[method]) | {"validation": f"{average(group, 'val'):.1f}"}
    out |= {key.upper(): spread([row[key] for row in group]) for key in ("id", "ood")}
    for key in ("id", "ood"):
        known = other in best and other != method
        out[f"{key.upper()} over AdamW"] = paired(group, runs[best[other]], key) if known else "–"
    return out | {"deviation": f"{average(group, 'deviation'):.2f}"}


def line(config: Config, group: list[Row]) -> dict[str, str]:
    out = name_of(config) | {key: spread([row[key] for row in group]) for key in ("val", "id", "ood")}
    return out | {"deviation": f"{average(group, 'deviation'):.2f}"}


def draw(runs: Runs, path: Path) -> Path:
    """ID and OOD accuracy against deviation, a point a configuration."""
    figure, axes = blank(2, 1, 8, sharex=True)
    for axis, key, title in zip(axes, ("id", "ood"), ("in distribution (%)", "out of distribution (%)"), strict=True):
        for config, group in runs.items():
            dots(axis, average(group, "deviation"), average(group, key), config.method)
        axis.set_ylabel(title)
    axes[-1].set_xlabel("deviation ‖θ − θ₀‖ of the encoder")
    name_points(figure)
    return save(figure, path)
