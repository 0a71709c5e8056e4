"""What came out: a table and two pictures."""

from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from examples.pictures import blank, dots, look, name_ends, name_points, save

from .data import SHIFTED
from .model import LAYERS


def spread(values: list[float]) -> str:
    return f"{mean(values):5.1f} ± {stdev(values) if len(values) > 1 else 0:3.1f}"


def table(rows: list[dict], before: dict[str, float]) -> str:
    """Markdown. Mean ± standard deviation over seeds; accuracies in percent; the difference to AdamW seed by seed."""
    lines = [
        f"| lr | method | ID | OOD mean | OOD over AdamW | {' | '.join(SHIFTED)} | deviation |",
        "|" + "---|" * (6 + len(SHIFTED)),
    ]
    for lr in dict.fromkeys(row["lr"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            runs, plain = ([r for r in rows if r["method"] == m and r["lr"] == lr] for m in (method, "AdamW"))
            cells = [spread([r[k] for r in runs]) for k in ("id", "ood")]
            cells.append(spread([r["ood"] - p["ood"] for r, p in zip(runs, plain, strict=True)]) if plain else "–")
            cells += [f"{mean(r['scores'][d] for r in runs):.1f}" for d in SHIFTED]
            cells.append(f"{mean(r['deviation'] for r in runs):.2f}")
            lines.append(f"| {lr:g} | {method} | {' | '.join(cells)} |")
    ood = mean(before[d] for d in SHIFTED)
    known = f"Before fine-tuning, the net has {before['clean']:.1f} ID on its ten classes."
    lines.append(f"\n{known} Its OOD mean is {ood:.1f}.")
    return "\n".join(lines)


class Accuracy(NamedTuple):
    """Mean and standard deviation over seeds, in percent."""

    id: float
    id_spread: float
    ood: float
    ood_spread: float


def accuracies(rows: list[dict]) -> dict[float, dict[str, Accuracy]]:
    """By learning rate and method."""
    found: dict[float, dict[str, list[dict]]] = {}
    for row in rows:
        found.setdefault(row["lr"], {}).setdefault(row["method"], []).append(row)

    def of(runs: list[dict]) -> Accuracy:
        values = ([run[key] for run in runs] for key in ("id", "ood"))
        return Accuracy(*(number for v in values for number in (mean(v), stdev(v) if len(v) > 1 else 0.0)))

    return {lr: {method: of(runs) for method, runs in methods.items()} for lr, methods in found.items()}


def draw_accuracies(found: dict[float, dict[str, Accuracy]], path: Path) -> Path:
    """A panel for each learning rate, a point a method: means over seeds. The axes say how far seeds spread."""
    figure, axes = blank(len(found), 1, 0.3 + 4.2 * len(found), sharex=True)
    for axis, (lr, methods) in zip(axes, found.items(), strict=True):
        for method, of in methods.items():
            dots(axis, of.id, of.ood, method, size=9)
        axis.set(title=f"learning rate {lr:g}", ylabel="out of distribution (%)")
        axis.margins(0.09)
    every = [of for methods in found.values() for of in methods.values()]
    ranges = [[end(getattr(of, f"{key}_spread") for of in every) for end in (min, max)] for key in ("id", "ood")]
    told = ", ".join(f"{key} {low:.1f} to {high:.1f}" for key, (low, high) in zip(("ID", "OOD"), ranges, strict=True))
    axes[-1].set_xlabel(f"in distribution (%). Standard deviation over seeds: {told}")
    name_points(figure)
    return save(figure, path)


def draw_layers(rows: list[dict], path: Path) -> Path:
    """A panel for each learning rate: the deviation of each weight from input to output, but for what does not move."""
    lrs = list(dict.fromkeys(row["lr"] for row in rows))
    figure, axes = blank(1, len(lrs), 5, sharey=True)
    layers = dict(zip(LAYERS, ("conv 1", "conv 2", "conv 3", "linear"), strict=True))
    for axis, lr in zip(axes, lrs, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            found = [row["layers"] for row in rows if row["method"] == method and row["lr"] == lr]
            heights = [mean(of[name] for of in found) for name in layers]
            if max(heights) > 0:
                colour, marker = look(method)
                axis.plot(list(layers.values()), heights, marker=marker, color=colour, label=method)
        axis.set(title=f"learning rate {lr:g}")
    axes[0].set_ylabel("deviation ‖θ − θ₀‖, mean over seeds")
    name_ends(figure)
    return save(figure, path)


def pictures(rows: list[dict], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [
        draw_accuracies(accuracies(rows), folder / "digits-id-ood.png"),
        draw_layers(rows, folder / "digits-layers.png"),
    ]
