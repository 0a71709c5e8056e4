"""Robust fine-tuning on real data: scikit-learn's handwritten digits, in eight domains.

A small convolutional net is pre-trained on 900 scans under every domain (clean, noise, brightness, blur, fog, rotation,
inversion, translation): the robust foundation model. It is then fine-tuned for a new task on 400 CLEAN scans, and
tested on the 497 that are left, clean (in distribution) and in the other seven domains (out of distribution).

The new task is "does the digit have a loop or a stem alone": {1, 4, 6, 8, 9} against the rest. It needs features of the
ten-class net but not its head, both classes hold five digits each, and no single stroke decides it.

    python examples/digits.py            # about three minutes on two cores; pictures go to results/
    python examples/digits.py --help
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import robustft_kernels as rft

PRETRAIN, FINETUNE = 900, 400  # of 1,797 scans; the rest is for testing
TASK = (1, 4, 6, 8, 9)
LAYERS = ("0.0.weight", "1.0.weight", "3.0.weight", "6.weight")  # of Net.features: all but norms and biases


# ---- data: images (n, 1, 8, 8) in [0, 1], and what a domain does to them


def noise(x: Tensor, g: torch.Generator) -> Tensor:
    return x + 0.3 * torch.randn(x.shape, generator=g)


def brightness(x: Tensor, g: torch.Generator) -> Tensor:
    return x + 0.5


def defocus(x: Tensor, g: torch.Generator) -> Tensor:
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def fog(x: Tensor, g: torch.Generator) -> Tensor:
    coarse = torch.rand(x.shape[0], 1, 3, 3, generator=g)
    return 0.5 * x + 0.5 * F.interpolate(coarse, size=(8, 8), mode="bilinear", align_corners=True)


def warp(x: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    return F.grid_sample(x, F.affine_grid(matrix, list(x.shape), align_corners=False), align_corners=False)


def rotation(x: Tensor, g: torch.Generator) -> Tensor:
    angle = (torch.rand(len(x), generator=g) * 2 - 1) * math.radians(40)
    return warp(x, angle, torch.zeros(len(x), 2))


def inversion(x: Tensor, g: torch.Generator) -> Tensor:
    return 1 - x


def translation(x: Tensor, g: torch.Generator) -> Tensor:
    return warp(x, torch.zeros(len(x)), torch.randint(-1, 2, (len(x), 2), generator=g) * 0.25)


Domain = Callable[[Tensor, torch.Generator], Tensor]
SHIFTED: dict[str, Domain] = {
    f.__name__: f for f in (noise, brightness, defocus, fog, rotation, inversion, translation)
}
DOMAINS: dict[str, Domain] = {"clean": lambda x, g: x, **SHIFTED}


def load(seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts = order.split([PRETRAIN, FINETUNE, len(images) - PRETRAIN - FINETUNE])
    return images, torch.from_numpy(digits.target), dict(zip(("pretrain", "finetune", "test"), parts, strict=True))


# ---- the net


def conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU())


class Net(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(1, 32), conv(32, 32), nn.MaxPool2d(2), conv(32, 64), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(256, 128), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Percent correct in each domain; a domain's randomness is the same for every model."""
    model.eval()
    out = {}
    for name, domain in DOMAINS.items():
        x = domain(images, torch.Generator().manual_seed(7))
        out[name] = 100 * float((model(x).argmax(1) == labels).float().mean())
    model.train()
    return out


def pretrain(images: Tensor, labels: Tensor, steps: int, cache: Path, seed: int) -> Net:
    file = cache / f"digits-{steps}-{seed}.pt"
    torch.manual_seed(seed)
    model = Net(10)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    optimizer = rft.AnchoredAdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    g = torch.Generator().manual_seed(seed)
    domains = list(DOMAINS.values())
    for t in tqdm(range(steps), desc=f"pre-train, seed {seed}", unit="step", mininterval=0.5):
        pick = torch.randint(len(images), (128,), generator=g)
        x = domains[t % len(domains)](images[pick], g)
        loss = F.cross_entropy(model(x), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model


# ---- fine-tuning: the methods under comparison, each one line

Groups = list[dict[str, object]]
METHODS: dict[str, Callable[[Groups, float], torch.optim.Optimizer]] = {
    "AdamW": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=True),
    "L2-SP, λ=10": lambda groups, lr: rft.AdamL2SP(groups, lr=lr, strength=10.0),
    "AdamSPD, λ=1": lambda groups, lr: rft.AdamSPD(groups, lr=lr, strength=1.0),
    "AdamSPD, λ=2": lambda groups, lr: rft.AdamSPD(groups, lr=lr, strength=2.0),
}


def finetune(
    start: Net, images: Tensor, labels: Tensor, method: str, lr: float, steps: int, seed: int, bar: tqdm
) -> tuple[Net, float]:
    """The fine-tuned model, and the median time of an optimizer step in microseconds."""
    torch.manual_seed(seed)
    model = Net(2)
    model.features.load_state_dict(start.features.state_dict())
    head = {"params": list(model.head.parameters())}
    if method != "AdamW":
        head["method"] = "none"  # a fresh head has nothing to stay near
    optimizer = METHODS[method]([{"params": list(model.features.parameters())}, head], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    g = torch.Generator().manual_seed(seed)
    times = []
    for _ in range(steps):
        pick = torch.randint(len(images), (64,), generator=g)
        loss = F.cross_entropy(model(images[pick]), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        began = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - began)
        schedule.step()
        bar.update()
    return model, 1e6 * median(times)


@torch.no_grad()
def deviations(model: Net, start: Net) -> dict[str, float]:
    pairs = zip(model.features.named_parameters(), start.features.parameters(), strict=True)
    return {name: float((p - q).norm()) for (name, p), q in pairs}


def compare(seeds: int, lrs: list[float], steps: int, pretrain_steps: int, cache: Path) -> tuple[list[dict], dict]:
    """One row for each method, learning rate and seed; and the pre-trained nets' own scores on their ten classes."""
    rows, before, starts = [], [], []
    for seed in range(seeds):
        images, digits, parts = load(seed)
        starts.append(pretrain(images[parts["pretrain"]], digits[parts["pretrain"]], pretrain_steps, cache, seed))
        before.append(accuracy(starts[-1], images[parts["test"]], digits[parts["test"]]))
    bar = tqdm(total=seeds * len(lrs) * len(METHODS) * steps, desc="fine-tune", unit="step", mininterval=0.5)
    for seed, start in enumerate(starts):
        images, digits, parts = load(seed)
        labels = torch.isin(digits, torch.tensor(TASK)).long()
        for lr in lrs:
            for method in METHODS:
                bar.set_postfix_str(f"{method}, lr {lr:g}, seed {seed}", refresh=False)
                tune = parts["finetune"]
                model, microseconds = finetune(start, images[tune], labels[tune], method, lr, steps, seed, bar)
                scores = accuracy(model, images[parts["test"]], labels[parts["test"]])
                layers = deviations(model, start)
                rows.append({
                    "method": method, "lr": lr, "seed": seed, "scores": scores, "id": scores["clean"],
                    "ood": mean(scores[d] for d in SHIFTED), "layers": layers,
                    "deviation": math.hypot(*layers.values()), "time": microseconds,
                })  # fmt: skip
    bar.close()
    return rows, {d: mean(b[d] for b in before) for d in DOMAINS}


# ---- what came out: a table and two pictures


def spread(values: list[float]) -> str:
    return f"{mean(values):5.1f} ± {stdev(values) if len(values) > 1 else 0:3.1f}"


def table(rows: list[dict], before: dict[str, float]) -> str:
    """Markdown. Mean ± standard deviation over seeds; accuracies in percent; the difference to AdamW seed by seed."""
    lines = [
        f"| lr | method | ID | OOD mean | OOD over AdamW | {' | '.join(SHIFTED)} | deviation | optimizer µs/step |",
        "|" + "---|" * (7 + len(SHIFTED)),
    ]
    for lr in dict.fromkeys(row["lr"] for row in rows):
        for method in METHODS:
            runs, plain = ([r for r in rows if r["method"] == m and r["lr"] == lr] for m in (method, "AdamW"))
            cells = [spread([r[k] for r in runs]) for k in ("id", "ood")]
            cells.append(spread([r["ood"] - p["ood"] for r, p in zip(runs, plain, strict=True)]))
            cells += [f"{mean(r['scores'][d] for r in runs):.1f}" for d in SHIFTED]
            cells += [f"{mean(r['deviation'] for r in runs):.2f}", f"{median(r['time'] for r in runs):.0f}"]
            lines.append(f"| {lr:g} | {method} | {' | '.join(cells)} |")
    ood = mean(before[d] for d in SHIFTED)
    lines.append(f"\nBefore fine-tuning, on its ten classes: {before['clean']:.1f} ID, {ood:.1f} OOD mean.")
    return "\n".join(lines)


def pictures(rows: list[dict], folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lrs = list(dict.fromkeys(row["lr"] for row in rows))
    folder.mkdir(parents=True, exist_ok=True)
    colours = dict(zip(METHODS, ("#777777", "#e69f00", "#56b4e9", "#0072b2"), strict=True))

    figure, axes = plt.subplots(
        1, len(lrs), figsize=(5.5 * len(lrs), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, lr in zip(axes[0], lrs, strict=True):
        for method, colour in colours.items():
            runs = [r for r in rows if r["method"] == method and r["lr"] == lr]
            x, y = [r["id"] for r in runs], [r["ood"] for r in runs]
            axis.scatter(x, y, color=colour, s=30, alpha=0.6)
            axis.scatter(mean(x), mean(y), color=colour, s=160, marker="P", edgecolor="white", label=method)
        axis.set(title=f"learning rate {lr:g}", xlabel="in distribution: clean (%)")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("out of distribution: seven domains (%)")
    axes[0][0].legend(title="a dot a seed, a cross their mean")
    scatter = folder / "digits-id-ood.png"
    figure.savefig(scatter, dpi=110)
    plt.close(figure)

    figure, axes = plt.subplots(
        1, len(lrs), figsize=(5.5 * len(lrs), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    layers = dict(zip(LAYERS, ("conv 1", "conv 2", "conv 3", "linear"), strict=True))
    for axis, lr in zip(axes[0], lrs, strict=True):
        for k, (method, colour) in enumerate(colours.items()):
            runs = [r for r in rows if r["method"] == method and r["lr"] == lr]
            heights = [mean(r["layers"][name] for r in runs) for name in layers]
            axis.bar([i + 0.2 * k for i in range(len(layers))], heights, 0.19, color=colour, label=method)
        axis.set_xticks([i + 0.3 for i in range(len(layers))], layers.values())
        axis.set(title=f"learning rate {lr:g}", xlabel="weights, from input to output")
        axis.grid(alpha=0.3, axis="y")
    axes[0][0].set_ylabel("deviation ‖θ − θ₀‖, mean over seeds")
    axes[0][0].legend()
    bars = folder / "digits-layers.png"
    figure.savefig(bars, dpi=110)
    plt.close(figure)
    return [scatter, bars]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning")
    parser.add_argument("--pretrain-steps", type=int, default=1200)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where pre-trained nets are kept")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the table and the pictures go")
    args = parser.parse_args()
    rows, before = compare(args.seeds, args.lr, args.steps, args.pretrain_steps, args.cache)
    text = table(rows, before)
    print(f"\n{text}\n")
    files = pictures(rows, args.out)
    made = f"torch {torch.__version__}, robustft_kernels {rft.__version__}, {torch.get_num_threads()} threads"
    (args.out / "digits.md").write_text(
        f"# Digits: {args.seeds} seeds, {args.steps} steps\n\n"
        f"Written by `python examples/digits.py --out {args.out}` with {made}. Accuracies in percent, mean ± standard "
        f"deviation over seeds; the optimizer's time is the median step.\n\n{text}\n"
    )
    print("pictures:", *files)


if __name__ == "__main__":
    main()
