"""Sentiment, learned in one domain and tested in four: every method on the same grid, chosen by validation in it alone.

About an hour on one core; it can be stopped at any time, and goes on where it was.

    python -m examples.sentiment.run
    python -m examples.sentiment.run --budget quick    # one seed, one strength each
    python -m examples.sentiment.run --help
"""

import argparse
import copy
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

import robustft_kernels as rft
from examples.emoji.run import make_runs, read_runs

from . import report
from .data import DOMAINS
from .methods import ALPHAS, METHODS, optimizer_of
from .model import Classifier, Task, batches, evaluate, features, padded, prepare
from .report import ORIGINS, ZERO_SHOT, Row

LRS = {"all": (2e-4, 8e-4), "lora": (1e-3, 4e-3), "head": (0.0,)}  # the head's own rate is fixed
SEEDS = {"quick": (1, 1), "full": (3, 5)}  # of the grid, and of what is chosen from it
BATCH, WARMUP = 32, 0.1


@dataclass(frozen=True)
class Setting:
    """One run: it is fine-tuned once, and gives one row, or more where WiSE-FT goes on from it."""

    method: str
    lr: float
    strength: float
    seed: int


def settings(seeds: int, quick: bool) -> list[Setting]:
    """Seed by seed, every method at each learning rate and strength; if quick, at the larger rate and one strength."""
    grid = []
    for seed in range(seeds):
        grid.append(Setting(ZERO_SHOT, 0.0, 0.0, seed))
        for name, method in METHODS.items():
            lrs, strengths = LRS[method.trains], method.strengths
            if quick:
                lrs, strengths = lrs[-1:], strengths[len(strengths) // 2 :][:1]
            grid += [Setting(name, lr, strength, seed) for lr in lrs for strength in strengths]
    return grid


def finetune(task: Task, setting: Setting, epochs: int) -> Classifier:
    """The fine-tuned model: batches of 32, learning rates warmed up over a tenth of the steps, then a cosine."""
    method = METHODS[setting.method]
    torch.manual_seed(setting.seed)
    model = copy.deepcopy(task.start)
    optimizer = optimizer_of(model, method, setting.lr, setting.strength)
    known = features(model, task.train.tokens) if method.trains == "head" else None
    # Computed once, the features make steps of the head nearly free: it is trained to the end.
    steps = (epochs if known is None else 20 * epochs) * max(1, len(task.train.tokens) // BATCH)
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min((t + 1) / warmup, (1 + math.cos(math.pi * max(0, t - warmup) / max(1, steps - warmup))) / 2),
    )
    picks = batches(task.train.tokens, BATCH, setting.seed)
    for _ in range(steps):
        pick = next(picks)
        logits = model(*padded([task.train.tokens[k] for k in pick])) if known is None else model.head(known[pick])
        loss = F.cross_entropy(logits, task.train.labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def deviation(model: Classifier, start: Classifier) -> float:
    """‖θ − θ₀‖ of the encoder; under LoRA, of the weights as they would be merged."""
    deltas = [m.get_delta_weight("default") for m in model.encoder.modules() if hasattr(m, "get_delta_weight")]
    if not deltas:
        pairs = zip(model.encoder.parameters(), start.encoder.parameters(), strict=True)
        deltas = [after - before for after, before in pairs]
    return math.hypot(*(float(delta.norm()) for delta in deltas))


task_of = lru_cache(maxsize=1)(prepare)


def rows_of(setting: Setting, domain: str, epochs: int, cache: Path) -> list[Row]:
    task = task_of(setting.seed, domain, cache)
    fresh = setting.method == ZERO_SHOT
    model = task.start if fresh else finetune(task, setting, epochs)
    outcomes = [(setting.method, setting.strength, 0.0, model)]
    if not fresh and (wise := METHODS[setting.method].wise):
        for alpha in ALPHAS:
            between = copy.deepcopy(model)
            rft.wise_ft_(between, task.start.state_dict(), alpha, exclude="head")
            outcomes.append((wise, alpha, setting.strength, between))
    return [
        {
            **vars(setting), "method": name, "strength": strength, "base": base,
            **evaluate(found, task, zero_shot=fresh), "deviation": 0.0 if fresh else deviation(found, task.start),
            "tests": len(task.test[task.domain].labels), "others": sum(len(of.labels) for of in task.test.values()),
        }
        for name, strength, base, found in outcomes
    ]  # fmt: skip


def collect(grid: list[Setting], domain: str, epochs: int, cache: Path, workers: int) -> list[Row]:
    """The rows of all settings: those of earlier runs from the cache, the others made and added to it one by one.

    Runs are known by setting, domain and epochs; after a change to the code, delete the file.
    """
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / f"runs-{domain}-{epochs}.jsonl"
    known = read_runs(file, Setting)
    missing = [setting for setting in grid if setting not in known]
    if missing:
        task_of(missing[0].seed, domain, cache)  # fetched here, so that every worker finds it
    known |= make_runs(file, missing, partial(rows_of, domain=domain, epochs=epochs, cache=cache), workers)
    return [row for setting in grid for row in known[setting]]


def repeats(rows: list[Row], seeds: range) -> list[Setting]:
    """What validation chose from the grid, and from its larger rate, at further seeds; of WiSE-FT, the run that it goes
    on from."""
    found = []
    for choose in (report.chosen, report.at_larger_rate):
        for seed in seeds:
            for config in choose(report.by_config(rows)).values():
                wise = config.method in ORIGINS
                name = ORIGINS[config.method] if wise else config.method
                found.append(Setting(name, config.lr, config.base if wise else config.strength, seed))
    return list(dict.fromkeys(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=("quick", "full"), default="full")
    parser.add_argument("--domain", choices=DOMAINS, default=DOMAINS[0], help="the one fine-tuned in")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--cache", type=Path, default=Path(".cache/sentiment"), help="the archive and the runs")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the tables and the picture go")
    args = parser.parse_args()
    of_grid, of_chosen = SEEDS[args.budget]
    rows = collect(settings(of_grid, args.budget == "quick"), args.domain, args.epochs, args.cache, args.workers)
    more = repeats(rows, range(of_grid, of_chosen))
    further = collect(more, args.domain, args.epochs, args.cache, args.workers) if more else []
    print("\n" + report.write(rows, further, args.domain, args.out))


if __name__ == "__main__":
    main()
