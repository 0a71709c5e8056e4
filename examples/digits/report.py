"""What came out: a table and two pictures."""

from pathlib import Path
from statistics import mean, stdev

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


def pictures(rows: list[dict], folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lrs = list(dict.fromkeys(row["lr"] for row in rows))
    folder.mkdir(parents=True, exist_ok=True)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colours = dict(zip(methods, plt.get_cmap("tab20").colors, strict=False))
    markers = dict(zip(methods, "oPXsD^v<>phH*d8." * 2, strict=False))

    def panels() -> tuple[plt.Figure, list[plt.Axes]]:
        size = (5.5 * len(lrs) + 2.2, 5)
        figure, axes = plt.subplots(1, len(lrs), figsize=size, sharey=True, squeeze=False, layout="constrained")
        return figure, axes[0]

    def of(method: str, lr: float) -> list[dict]:
        return [r for r in rows if r["method"] == method and r["lr"] == lr]

    figure, axes = panels()
    for axis, lr in zip(axes, lrs, strict=True):
        for method, colour in colours.items():
            x, y = ([r[key] for r in of(method, lr)] for key in ("id", "ood"))
            axis.scatter(x, y, color=colour, s=12, alpha=0.5)
            axis.scatter(mean(x), mean(y), color=colour, s=90, marker=markers[method], edgecolor="black", label=method)
        axis.set(title=f"learning rate {lr:g}", xlabel="in distribution: clean (%)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("out of distribution: seven domains (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", title="large: mean over seeds")
    scatter = folder / "digits-id-ood.png"
    figure.savefig(scatter, dpi=110)
    plt.close(figure)

    figure, axes = panels()
    layers = dict(zip(LAYERS, ("conv 1", "conv 2", "conv 3", "linear"), strict=True))
    for axis, lr in zip(axes, lrs, strict=True):
        for method, colour in colours.items():
            heights = [mean(r["layers"][name] for r in of(method, lr)) for name in layers]
            if max(heights) > 0:
                axis.plot(list(layers.values()), heights, color=colour, marker=markers[method], label=method)
        axis.set(title=f"learning rate {lr:g}", xlabel="weights, from input to output")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("deviation ‖θ − θ₀‖, mean over seeds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    depth = folder / "digits-layers.png"
    figure.savefig(depth, dpi=110)
    plt.close(figure)
    return [scatter, depth]
