"""Robust fine-tuning on real data: scikit-learn's handwritten digits, in eight domains, by every method.

A small convolutional net is pre-trained on 900 scans under every domain (clean, noise, brightness, blur, fog, rotation,
inversion, translation): the robust foundation model. It is then fine-tuned for a new task on 320 CLEAN scans, and
tested on the 497 that are left, clean (in distribution) and in the other seven domains (out of distribution). TPGM
learns its radii on 80 more.

The new task is "does the digit have a loop or a stem alone": {1, 4, 6, 8, 9} against the rest. It needs features of the
ten-class net but not its head, both classes hold five digits each, and no single stroke decides it.

    python -m examples.digits.run            # some 20 minutes; pictures go to results/
    python -m examples.digits.run --help
"""

import argparse
import copy
import math
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import robustft_kernels as rft

from .data import DOMAINS, SHIFTED, TASK, load
from .methods import METHODS, MORE, Method
from .model import Net, accuracy, pretrain
from .report import pictures, table

Data = dict[str, tuple[Tensor, Tensor]]


def finetune(start: Net, data: Data, method: Method, lr: float, steps: int, seed: int, bar: tqdm) -> Net:
    torch.manual_seed(seed)
    model = Net(2)
    model.features.load_state_dict(start.features.state_dict())
    if method.fraction:
        free = train(copy.deepcopy(model), data, METHODS["AdamW"], lr, steps, seed, bar)
        method = method.with_radii_of(free, model)
    if not method.joined:
        return train(model, data, method, lr, steps, seed, bar)
    models = [train(copy.deepcopy(model), data, method, lr, steps, seed + 100 * k, bar) for k in range(method.models)]
    model.load_state_dict(method.joined(model, models))
    return model


def train(model: Net, data: Data, method: Method, lr: float, steps: int, order: int, bar: tqdm) -> Net:
    """In place. `order` is the seed of the order in which the data come."""
    start = copy.deepcopy(model.features.state_dict(prefix="features."))
    images, labels = data["finetune"]
    g = torch.Generator().manual_seed(order)
    after = method.around(model, data["validate"]) if method.around else None
    for build in method.phases:
        with rft.keep_requires_grad(model):
            optimizer = build(model, lr)
            share = steps // len(method.phases)
            schedules = [schedule(optimizer, share) for schedule in method.schedules]
            for t in range(1, share + 1):
                pick = torch.randint(len(images), (64,), generator=g)
                loss = F.cross_entropy(model(images[pick]), labels[pick])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if after:
                    after(t, share)
                for schedule in schedules:
                    schedule.step()
                bar.update()
    if method.wise < 1:
        rft.wise_ft_(model, start, method.wise, exclude="head")
    return model


@torch.no_grad()
def deviations(model: Net, start: Net) -> dict[str, float]:
    pairs = zip(model.features.named_parameters(), start.features.parameters(), strict=True)
    return {name: float((p - q).norm()) for (name, p), q in pairs}


def compare(
    methods: list[str], seeds: int, lrs: list[float], steps: int, pretrain_steps: int, cache: Path
) -> tuple[list[dict], dict]:
    """One row for each method, learning rate and seed; and the pre-trained nets' own scores on their ten classes."""
    rows, before, starts = [], [], []
    for seed in range(seeds):
        images, digits, parts = load(seed)
        starts.append(pretrain(images[parts["pretrain"]], digits[parts["pretrain"]], pretrain_steps, cache, seed))
        before.append(accuracy(starts[-1], images[parts["test"]], digits[parts["test"]]))
    known = METHODS | MORE
    total = seeds * len(lrs) * sum(known[method].models for method in methods) * steps
    bar = tqdm(total=total, desc="fine-tune", unit="step", mininterval=0.5)
    for seed, start in enumerate(starts):
        images, digits, parts = load(seed)
        labels = torch.isin(digits, torch.tensor(TASK)).long()
        for lr in lrs:
            for method in methods:
                bar.set_postfix_str(f"{method}, lr {lr:g}, seed {seed}", refresh=False)
                data = {part: (images[of], labels[of]) for part, of in parts.items()}
                model = finetune(start, data, known[method], lr, steps, seed, bar)
                scores = accuracy(model, images[parts["test"]], labels[parts["test"]])
                layers = deviations(model, start)
                rows.append({
                    "method": method, "lr": lr, "seed": seed, "scores": scores, "id": scores["clean"],
                    "ood": mean(scores[d] for d in SHIFTED), "layers": layers,
                    "deviation": math.hypot(*layers.values()),
                })  # fmt: skip
    bar.close()
    return rows, {d: mean(b[d] for b in before) for d in DOMAINS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *MORE], default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning")
    parser.add_argument("--pretrain-steps", type=int, default=1200)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where pre-trained nets are kept")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the table and the pictures go")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a net so small gains nothing by more, and its bits would depend on their number
    rows, before = compare(args.methods, args.seeds, args.lr, args.steps, args.pretrain_steps, args.cache)
    text = table(rows, before)
    print(f"\n{text}\n")
    files = pictures(rows, args.out)
    made = f"torch {torch.__version__} and robustft_kernels {rft.__version__}"
    (args.out / "digits.md").write_text(
        f"# Digits: {args.seeds} seeds, {args.steps} steps\n\n"
        f"Written by `python -m examples.digits.run --out {args.out}` with {made}.\n"
        f"Accuracies are in percent, as mean ± standard deviation over seeds.\n\n{text}\n\n"
        + "".join(f"![{file.stem}]({file.name})\n" for file in files)
    )
    print("pictures:", *files)


if __name__ == "__main__":
    main()
