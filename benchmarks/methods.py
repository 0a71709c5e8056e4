"""What the other methods cost on the CPU, against fused AdamW, the speed of a copy, and the loops they replace.

    python -m benchmarks.methods

On ViT-B/16's shapes in fp32, as benchmarks/steps.py measures: contenders take turns, ratios are of the same round.
"""

import argparse
import platform
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import robustft_kernels as rft
from robustft_kernels import ops

from .loops import Given, LoopFTP, loop_update
from .steps import _timed, check_idle, check_results, copy_bandwidth, ratio, take_turns, vit_b16

METHODS: dict[str, dict[str, Any]] = {
    "AdamFTP": {"method": "ftp"},
    "AdamPGM, l2": {"method": "project", "radius": 0.05},
    "AdamPGM, mars": {"method": "project", "norm": "mars", "radius": 0.05},
    "AdamPGM, mars_rows": {"method": "project", "norm": "mars_rows", "radius": 0.05},
    "AdamSPD by rows": {"method": "spd", "norm": "mars_rows"},
    "L2-SP, coupled": {"method": "l2sp_coupled"},
    "MARS-SP": {"method": "mars_sp"},
}
# Bytes a parameter: those of the survey, of sweep 1 and, where it finds nothing in the cache, of sweep 2.
BYTES = {
    "AdamFTP": (6, 34, 0), "AdamPGM, l2": (0, 32, 12), "AdamPGM, mars": (0, 32, 12), "AdamPGM, mars_rows": (0, 32, 0),
    "AdamSPD by rows": (0, 32, 0), "L2-SP, coupled": (0, 32, 0), "MARS-SP": (8, 32, 0),
}  # fmt: skip


def optimizers(rounds: int) -> list[str]:
    """A line for each method: its step against fused AdamW's."""
    lines = []
    for name, options in tqdm(METHODS.items(), desc="optimizers", leave=False):
        start = [torch.randn(shape) * 0.02 for shape in vit_b16()]
        params = {who: [nn.Parameter(t.clone()) for t in start] for who in ("fused", "native")}
        times, _ = take_turns(
            {
                "fused": torch.optim.AdamW(params["fused"], lr=1e-4, weight_decay=0.0, fused=True),
                "native": rft.AnchoredAdamW(params["native"], lr=1e-4, backend="native", **options),
            },
            params, rounds, _timed, watched="",
        )  # fmt: skip
        survey, step, pull = BYTES[name]
        say = f"{(survey + step) / 28:.2f}" + (f" … {(survey + step + pull) / 28:.2f}" if pull else "")
        lines.append(f"| {name} | {ratio(times['native'], times['fused'])} | {say} |")
    return lines


def loops(rounds: int) -> list[str]:
    """What the loop costs that AdamFTP replaces."""
    start = [torch.randn(shape) * 0.02 for shape in vit_b16()]
    params = {who: [nn.Parameter(t.clone()) for t in start] for who in ("loop", "native")}
    contenders: dict[str, torch.optim.Optimizer] = {
        "loop": LoopFTP(params["loop"], 1e-4, start),
        "native": rft.AdamFTP(params["native"], lr=1e-4, backend="native"),
    }
    times, _ = take_turns(contenders, params, rounds, _timed, watched="")
    return [f"FTP, loop / native: {ratio(times['loop'], times['native'])}"]


def projections(rounds: int) -> list[str]:
    """`project_` in units of what its bytes take at the speed of a copy."""
    anchors = [torch.randn(shape) * 0.02 for shape in vit_b16()]
    source = [a + 1e-3 * torch.randn_like(a) for a in anchors]
    params, n = [t.clone() for t in source], sum(t.numel() for t in source)
    flat, target = torch.randn(n), torch.empty(n)
    lines = []
    for norm, moved in tqdm((("l2", 20), ("mars", 20), ("mars_rows", 12)), desc="project_", leave=False):
        projected, copied = [], []
        for _ in range(rounds + 2):
            torch._foreach_copy_(params, source)
            projected.append(_timed(lambda norm=norm: rft.project_(params, anchors, 1e-2, norm)) / moved)
            copied.append(_timed(lambda: target.copy_(flat)) / 8)
        lines.append(f"| {norm} | {moved} | {ratio(projected[2:], copied[2:])} |")
    return lines


def transformer() -> nn.Module:
    """ViT-B/16's blocks; its patches are given."""
    layer = nn.TransformerEncoderLayer(768, 12, 3072, dropout=0, activation="gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)


def tpgm(rounds: int) -> list[str]:
    """TPGM's own work for a step on the radii, against forward and backward of the model, and against the loop."""
    model = transformer()
    inputs = torch.randn(8, 197, 768)
    learner = rft.TPGM(model)
    params = list(model.parameters())
    anchors = [p.detach().clone() for p in params]
    grads = [torch.randn_like(p) for p in params]
    with torch.no_grad():
        for p in params:
            p.add_(1e-3 * torch.randn_like(p))
    adam = torch.optim.Adam([torch.full((), 1e-4, requires_grad=True) for _ in params], lr=1e-2)

    def model_step() -> None:
        torch.autograd.grad(model(inputs).square().mean(), params)

    def own_steps(steps: int) -> Callable[[], object]:
        return lambda: learner.update(lambda _: Given.apply(grads, *params), [0], steps, progress=False)

    contenders: dict[str, tuple[Callable[[], object], int]] = {
        "one": (own_steps(1), 1),
        "twenty": (own_steps(20), 20),
        "model": (model_step, 1),
        "loop": (lambda: loop_update(model, anchors, adam, grads), 1),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for t in tqdm(range(rounds + 1), desc="TPGM", leave=False):
        for name, (run, steps) in contenders.items():
            seconds = _timed(run) / steps
            if t:
                times[name].append(seconds)
    model_work, lines = "forward and backward of 12 blocks, batch 8", []
    for name, steps in (("one", 1), ("twenty", 20)):
        lines.append(f"TPGM's own work, a step of {steps} / {model_work}: {ratio(times[name], times['model'])}")
        lines.append(f"TPGM, the authors' loop / ours, a step of {steps}: {ratio(times['loop'], times[name])}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if missing := ops.backends()["native"]:
        raise SystemExit(f"nothing to measure: {missing}")
    torch.set_num_threads(args.threads)
    check_results("native", "cpu", [(name, of.get("norm")) for of in METHODS.values() for name in [of["method"]]])
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print(
        f"commit {commit}, torch {torch.__version__}, {ops._native.ISA}, {args.threads} threads, {platform.machine()}"
    )
    print(f"copy bandwidth {copy_bandwidth():.0f} GB/s")
    if warning := check_idle():
        print(warning)
    print("\n| optimizer | native / fused AdamW | bytes say |\n|---|---|---|")
    print(*optimizers(args.rounds), sep="\n", flush=True)
    print("\n| project_ | bytes a parameter | in units of a copy of so many |\n|---|---|---|")
    print(*projections(args.rounds), sep="\n", flush=True)
    print()
    print(*tpgm(max(5, args.rounds // 3)), *loops(max(5, args.rounds // 3)), sep="\n")


if __name__ == "__main__":
    main()
