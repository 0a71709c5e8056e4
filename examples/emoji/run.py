"""Robust fine-tuning of a small CLIP on emoji: every method on the same grid, chosen by in-distribution validation.

The whole grid takes hours; it can be stopped at any time, and goes on where it was.

    python -m examples.emoji.run
    python -m examples.emoji.run --budget quick    # two seeds, a small grid
    python -m examples.emoji.run --help
"""

import argparse
import copy
import ctypes
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import report
from .data import STYLES
from .methods import ALPHAS, HEAD, METHODS
from .model import Encoder
from .report import ZERO_SHOT
from .task import Task, evaluate, prepare

LRS = {"quick": (2e-4, 1e-3), "full": (1e-4, 2e-4, 5e-4, 1e-3)}
SEEDS = {"quick": 2, "full": 5}
BATCH, WARMUP = 48, 0.1


@dataclass(frozen=True)
class Setting:
    """One run: it is fine-tuned once, and gives one row, or more where WiSE-FT follows."""

    method: str
    lr: float
    strength: float
    seed: int


def settings(methods: list[str], lrs: tuple[float, ...], seeds: int, budget: str) -> list[Setting]:
    """The same learning rates for every method; the quick budget takes the middle strength. Seed by seed."""
    grid = []
    for seed in range(seeds):
        grid.append(Setting(ZERO_SHOT, 0.0, 0.0, seed))
        for name in methods:
            strengths = METHODS[name].strengths
            if budget == "quick":
                strengths = strengths[len(strengths) // 2 :][:1]
            grid += [Setting(name, lr, strength, seed) for lr in lrs for strength in strengths]
    return grid


def finetune(task: Task, setting: Setting, epochs: int) -> Encoder:
    """The fine-tuned encoder: batches of 48, the learning rate warmed up over a tenth of the steps, then a cosine."""
    method = METHODS[setting.method]
    torch.manual_seed(setting.seed)
    encoder = copy.deepcopy(task.start)
    steps = epochs * (len(task.images) // BATCH)
    phases = [(HEAD, steps // 2), (method.trains, steps - steps // 2)] if method.probe else [(method.trains, steps)]
    hook = method.around(encoder, task, setting.strength) if method.around else None
    picks = order(len(task.images), setting.seed)
    done = 0
    for trains, count in phases:
        named = [(name, p) for name, p in encoder.named_parameters() if name.endswith(trains)]
        encoder.requires_grad_(False)
        for _, param in named:
            param.requires_grad_(True)
        optimizer = method.optimizer(named, setting.lr, setting.strength)
        warmup = max(1, round(WARMUP * count))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda t, n=count, w=warmup: min((t + 1) / w, (1 + math.cos(math.pi * max(0, t - w) / (n - w))) / 2),
        )
        with torch.no_grad():  # what does not change is computed once
            features = torch.cat([encoder.features(x) for x in task.images.split(128)]) if trains == HEAD else None
        for _ in range(count):
            pick = next(picks)
            embedded = encoder(task.images[pick]) if features is None else encoder.head(features[pick])
            loss = task.loss(embedded, task.labels[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if hook:
                hook(done, steps)
    return encoder


def order(images: int, seed: int) -> Iterator[Tensor]:
    """Batches without end: each epoch a new permutation, its incomplete last batch dropped."""
    g = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(images, generator=g).split(BATCH)[: images // BATCH]


@torch.no_grad()
def deviations(encoder: Encoder, start: Encoder) -> dict[str, float]:
    """‖θ − θ₀‖ of each block, from the input to the output, over all its parameters."""
    squares: dict[str, float] = {}
    for (name, p), q in zip(encoder.named_parameters(), start.parameters(), strict=True):
        block = ".".join(name.split(".")[:2]) if name.startswith("blocks") else name.split(".")[0]
        squares[block] = squares.get(block, 0.0) + float((p - q).square().sum())
    return {block: math.sqrt(square) for block, square in squares.items()}


@torch.no_grad()
def interpolated(encoder: Encoder, start: Encoder, alpha: float) -> Encoder:
    mixed = copy.deepcopy(start)
    for p, q in zip(mixed.parameters(), encoder.parameters(), strict=True):
        p.lerp_(q, alpha)
    return mixed


def rows_of(task: Task, setting: Setting, epochs: int) -> list[dict]:
    began = time.perf_counter()
    encoder = task.start if setting.method == ZERO_SHOT else finetune(task, setting, epochs)
    seconds = time.perf_counter() - began
    outcomes = [(setting.method, 1.0, encoder)]
    if setting.method != ZERO_SHOT and (wise := METHODS[setting.method].wise):
        outcomes += [(wise, alpha, interpolated(encoder, task.start, alpha)) for alpha in ALPHAS]
    rows = []
    for name, alpha, model in outcomes:
        blocks = deviations(model, task.start)
        rows.append({
            "method": name, "lr": setting.lr, "strength": setting.strength, "alpha": alpha, "seed": setting.seed,
            **evaluate(model, task), "tests": len(task.test_labels), "seconds": seconds,
            "deviation": math.hypot(*blocks.values()), "blocks": blocks,
        })  # fmt: skip
    return rows


def collect(grid: list[Setting], style: str, epochs: int, cache: Path) -> list[dict]:
    """The rows of all settings: those of earlier runs from the cache, the others made and added to it one by one.

    Runs are known by setting, style and epochs; after a change to the code, delete the file.
    """
    file = cache / f"runs-{style}-{epochs}.jsonl"
    known: dict[Setting, list[dict]] = {}
    if file.exists():
        for line in file.read_text().splitlines():
            run = json.loads(line)
            known[Setting(**run["setting"])] = run["rows"]
    missing = [setting for setting in grid if setting not in known]
    tasks = {seed: prepare(seed, style, cache) for seed in sorted({setting.seed for setting in missing})}
    bar = tqdm(missing, desc="fine-tune", unit="run", mininterval=0.5)
    for setting in bar:
        bar.set_postfix_str(f"{setting.method}, lr {setting.lr:g}, λ {setting.strength:g}, seed {setting.seed}")
        known[setting] = rows_of(tasks[setting.seed], setting, epochs)
        with file.open("a") as out:
            out.write(json.dumps({"setting": vars(setting), "rows": known[setting]}) + "\n")
    return [row for setting in grid for row in known[setting]]


def keep_memory() -> None:
    """Lets glibc keep what is freed: giving activations back and faulting them in again takes a tenth of the time."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=("quick", "full"), default="full")
    parser.add_argument("--seeds", type=int, help="5 in full, 2 if quick")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--lr", type=float, nargs="+", help="the grid of learning rates")
    parser.add_argument("--style", choices=STYLES, default=STYLES[0], help="the one fine-tuned in")
    parser.add_argument("--epochs", type=int, default=6, help="of fine-tuning")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="a run's bits depend on it")
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"), help="packages, images, encoders, runs")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the tables and pictures go")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_memory()
    grid = settings(args.methods, tuple(args.lr or LRS[args.budget]), args.seeds or SEEDS[args.budget], args.budget)
    rows = collect(grid, args.style, args.epochs, args.cache)
    print("\n" + report.write(rows, args.style, args.out))


if __name__ == "__main__":
    main()
