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
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import report
from .data import STYLES
from .methods import HEAD, METHODS
from .model import Encoder
from .report import BASELINE, ZERO_SHOT
from .task import Task, evaluate, prepare

LRS = {"quick": (2e-4, 1e-3), "full": (1e-4, 3e-4, 1e-3)}
SEEDS = {"quick": 2, "full": 5}
BATCH, WARMUP = 48, 0.1


@dataclass(frozen=True)
class Setting:
    """One run: it is fine-tuned once, and gives one row, or more where other methods go on from it.

    share: of the images to fine-tune on; the steps stay as many. sweep: whether it is no choice of the grid.
    """

    method: str
    lr: float
    strength: float
    seed: int
    share: float = 1.0
    sweep: bool = False


def settings(methods: list[str], lrs: tuple[float, ...], seeds: int, budget: str) -> list[Setting]:
    """Seed by seed, every method at the same learning rates. The quick budget takes the middle strength alone.

    The full one adds, at the largest rate, the sweeps of strengths, and AdamW (so TPGM too) on a tenth of the images.
    """
    grid = []
    for seed in range(seeds):
        grid.append(Setting(ZERO_SHOT, 0.0, 0.0, seed))
        for name in methods:
            strengths = METHODS[name].strengths
            if budget == "quick":
                strengths = strengths[len(strengths) // 2 :][:1]
            grid += [Setting(name, lr, strength, seed) for lr in lrs for strength in strengths]
            if budget == "full":
                grid += [Setting(name, max(lrs), strength, seed, sweep=True) for strength in METHODS[name].sweep]
        if budget == "full" and BASELINE in methods:
            grid.append(Setting(BASELINE, max(lrs), 0.0, seed, share=0.1))
    return grid


def finetune(task: Task, setting: Setting, epochs: int, more: int = 0) -> Encoder:
    """The fine-tuned encoder: batches of 48, the learning rate warmed up over a tenth of the steps, then a cosine.

    `more` is added to the seed of the order in which the data come.
    """
    method = METHODS[setting.method]
    torch.manual_seed(setting.seed)
    encoder = copy.deepcopy(task.start)
    steps = epochs * (len(task.images) // BATCH)
    images = task.images[: round(setting.share * len(task.images))]
    phases = [(HEAD, steps // 2), (method.trains, steps - steps // 2)] if method.probe else [(method.trains, steps)]
    hook = method.around(encoder, task) if method.around else None
    picks = order(len(images), setting.seed + more)
    for trains, count in phases:
        named = [(name, p) for name, p in encoder.named_parameters() if name.endswith(trains)]
        encoder.requires_grad_(False)
        for _, param in named:
            param.requires_grad_(True)
        optimizer = method.optimizer(named, setting.lr, setting.strength)
        warmup = max(1, round(WARMUP * count))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda t, w=warmup, n=count: min((t + 1) / w, (1 + math.cos(math.pi * max(0, t - w) / max(1, n - w))) / 2),
        )
        with torch.no_grad():  # what does not change is computed once
            features = torch.cat([encoder.features(x) for x in images.split(128)]) if trains == HEAD else None
        for _ in range(count):
            pick = next(picks)
            embedded = encoder(images[pick]) if features is None else encoder.head(features[pick])
            loss = task.loss(embedded, task.labels[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if hook:
                hook()
    return encoder


def order(images: int, seed: int) -> Iterator[Tensor]:
    """Batches without end: each epoch a new permutation, its incomplete last batch dropped."""
    g = torch.Generator().manual_seed(seed)
    batch = min(BATCH, images)
    while True:
        yield from torch.randperm(images, generator=g).split(batch)[: images // batch]


@torch.no_grad()
def deviations(encoder: Encoder, start: Encoder) -> dict[str, float]:
    """‖θ − θ₀‖ of each parameter, from the input to the output."""
    pairs = zip(encoder.named_parameters(), start.parameters(), strict=True)
    return {name: float((p - q).norm()) for (name, p), q in pairs}


task_of = lru_cache(maxsize=1)(prepare)


def rows_of(setting: Setting, style: str, epochs: int, cache: Path) -> list[dict]:
    task = task_of(setting.seed, style, cache)
    method = METHODS.get(setting.method)
    encoder = finetune(task, setting, epochs) if method else task.start
    outcomes = [(setting.method, setting.strength, encoder)]
    if method and method.joined:
        outcomes, models = [], [encoder, *(finetune(task, setting, epochs, more) for more in (100, 200))]
        for name, join in method.joined.items():
            joint = copy.deepcopy(encoder)
            joint.load_state_dict(join(task.start, models))
            outcomes.append((name, setting.strength, joint))
    for name, further in method.afterwards.items() if method and not setting.sweep else ():
        for strength in further.strengths:
            changed = copy.deepcopy(encoder)
            further.change(changed, task, strength)
            outcomes.append((name, strength, changed))
    rows = []
    for name, strength, model in outcomes:
        moved = deviations(model, task.start)
        rows.append({
            **vars(setting), "method": name, "strength": strength, **evaluate(model, task),
            "base": 0.0 if name == setting.method else setting.strength,
            "tests": len(task.test_labels), "deviation": math.hypot(*moved.values()), "tensors": moved,
        })  # fmt: skip
    return rows


def collect(grid: list[Setting], style: str, epochs: int, cache: Path, workers: int) -> list[dict]:
    """The rows of all settings: those of earlier runs from the cache, the others made and added to it one by one.

    Each is made by one process on one thread, so that its bits do not depend on how many there are.

    Runs are known by setting, style and epochs; after a change to the code, delete the file.
    """
    file = cache / f"runs-{style}-{epochs}.jsonl"
    known = read_runs(file, Setting)
    missing = [setting for setting in grid if setting not in known]
    for seed in sorted({setting.seed for setting in missing}):
        prepare(seed, style, cache)  # pre-trained here, so that every worker finds it
    known |= make_runs(file, missing, partial(rows_of, style=style, epochs=epochs, cache=cache), workers)
    return [row for setting in grid for row in known[setting]]


def read_runs(file: Path, kind: type) -> dict[Any, list[dict]]:
    """The rows of earlier runs by setting, of the dataclass `kind`."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {kind(**run["setting"]): run["rows"] for run in map(json.loads, lines)}


def make_runs(
    file: Path, missing: list[Any], rows_of: Callable[[Any], list[dict]], workers: int
) -> dict[Any, list[dict]]:
    """The rows of these settings, made by processes of one thread each, and added to the file one by one."""
    made = {}
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=alone) as pool, file.open("a") as out:
        runs = {pool.submit(rows_of, setting): setting for setting in missing}
        try:
            for run in tqdm(as_completed(runs), desc="fine-tune", unit="run", total=len(runs), smoothing=0.05):
                made[runs[run]] = run.result()
                out.write(json.dumps({"setting": vars(runs[run]), "rows": run.result()}) + "\n")
                out.flush()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return made


def alone() -> None:
    """A worker has one thread. glibc is to keep what is freed: faulting it in again takes a tenth of the time."""
    torch.set_num_threads(1)
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
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"), help="packages, images, encoders, runs")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the tables and pictures go")
    args = parser.parse_args()
    grid = settings(args.methods, tuple(args.lr or LRS[args.budget]), args.seeds or SEEDS[args.budget], args.budget)
    rows = collect(grid, args.style, args.epochs, args.cache, args.workers)
    print("\n" + report.write(rows, args.style, args.out))


if __name__ == "__main__":
    main()
