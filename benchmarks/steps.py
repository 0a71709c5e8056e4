"""What a step costs: native AdamSPD against torch's fused AdamW and against the loop it replaces.

    python -m benchmarks.steps

All contenders of a model run in one process, one after the other, round after round, each on fresh random gradients
(so that about half the segments fire); a ratio is that of two steps of the same round, given as its median and
quartiles. Absolute times mean little on a shared machine. Nothing is timed before the results have been checked.
"""

import argparse
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from statistics import mean, median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import robustft_kernels as rft
from robustft_kernels import ops
from robustft_kernels.testing import CASES, SETTINGS, Stepper, assert_same_step

from .loops import LoopSPD

Shapes = list[tuple[int, ...]]


def vit_b16() -> Shapes:
    """The 152 parameters of ViT-B/16 with a 1000-class head: 86.6M."""
    return vit_shapes(width=768, hidden=3072, blocks=12)


def vit_shapes(width: int, hidden: int, blocks: int) -> Shapes:
    """The parameters of a ViT of 16 × 16 patches with a 1000-class head."""
    block: Shapes = [(width,)] * 2 + [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,)] * 2 + [(hidden, width), (hidden,), (width, hidden), (width,)]
    stem: Shapes = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return stem + block * blocks + [(width,), (width,), (1000, width), (1000,)]


MODELS: dict[str, tuple[Shapes, str]] = {
    "ViT-B/16": (vit_b16(), "initial"),
    "LoRA-like, 256 × 32,768": ([(32768,)] * 256, "zero"),
    "2,000 × 256": ([(256,)] * 2000, "initial"),
}


def check_results(backend: str, device: str, methods: Sequence[tuple[str, str | None]] = (("spd", None),)) -> None:
    """Raises AssertionError where the backend's step is not the oracle's."""
    for method, norm in methods:
        got = Stepper(CASES, SETTINGS[0], method, torch.float32, device=torch.device(device), norm=norm)
        for _ in range(3):
            grads, before = got.grads(), got.clone()
            want = before.clone()
            want.run_oracle(grads)
            got.run(ops.PREPARE[backend]["adamw"], grads)
            assert_same_step(got, want, before, grads)


def check_idle() -> str:
    """A warning where another process keeps the cores busy, else ""."""
    began, cpu = time.perf_counter(), _busy_ticks()
    time.sleep(0.5)
    busy = (_busy_ticks() - cpu) / 100 / (time.perf_counter() - began)
    return (
        f"WARNING: other processes use {busy:.1f} cores; the ratios below are not to be trusted" if busy > 0.2 else ""
    )


def _busy_ticks() -> int:
    try:
        with open("/proc/stat") as file:
            user, nice, system = map(int, file.readline().split()[1:4])
    except OSError:
        return 0
    return user + nice + system


def copy_bandwidth(n: int = 86_567_656) -> float:
    """GB/s of tensor.copy_, counting the read and the write."""
    source, target = torch.randn(n), torch.empty(n)
    return median(8 * n / _timed(lambda: target.copy_(source)) / 1e9 for _ in range(7))


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def contend(shapes: Shapes, anchor: str, rounds: int, loop: bool) -> tuple[dict[str, list[float]], float]:
    """Seconds of each contender's steps, and the fraction of the segments' elements that fired."""
    start = [torch.randn(shape) * 0.02 for shape in shapes]
    params = {name: [nn.Parameter(t.clone()) for t in start] for name in ("fused", "native", "loop")}
    anchors: list[Tensor | None] = [None if anchor == "zero" else t for t in start]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "fused": torch.optim.AdamW(params["fused"], lr=1e-4, weight_decay=0.0, fused=True),
        "native": rft.AdamSPD(params["native"], lr=1e-4, anchor=anchor, backend="native"),
    }
    if loop:
        optimizers["loop"] = LoopSPD(params["loop"], 1e-4, anchors)
    return take_turns(optimizers, params, rounds, _timed, watched="native")


def take_turns(
    optimizers: dict[str, torch.optim.Optimizer],
    params: dict[str, list[nn.Parameter]],
    rounds: int,
    timed: Callable[[Callable[[], object]], Any],
    watched: str,
    warm_up: int = 3,
) -> tuple[dict[str, list[Any]], float]:
    """What `timed` says of each optimizer's steps, round after round on fresh gradients, and the fraction of the
    `watched` one's elements that fired, if there is one."""
    times: dict[str, list[Any]] = {name: [] for name in optimizers}
    fired = []
    for t in range(warm_up + rounds):
        for name, optimizer in optimizers.items():
            for p in params[name]:
                p.grad = torch.randn_like(p)
            measured = timed(optimizer.step)
            if t >= warm_up:
                times[name].append(measured)
        if not watched:
            continue
        (launch,) = optimizers[watched]._plan.launches  # type: ignore[attr-defined]
        sizes = torch.tensor([p.numel() for p in launch.params], dtype=torch.float64, device=launch.alphas.device)
        fired.append(float(sizes[launch.alphas < 1].sum() / sizes.sum()))
    return times, mean(fired[warm_up:]) if watched else 0.0


def ratio(of: list[float], to: list[float]) -> str:
    low, middle, high = quantiles([a / b for a, b in zip(of, to, strict=True)], n=4)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def account(shapes: Shapes, anchor: str, fired: float) -> str:
    """What the bytes say: fp32, 28 a parameter for AdamW; sweep 2 in cache, and out of it."""
    sweep1, sweep2 = (28, 8) if anchor == "zero" else (32, 12)
    return f"{sweep1 / 28:.2f} … {(sweep1 + fired * sweep2) / 28:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if missing := ops.backends()["native"]:
        raise SystemExit(f"nothing to measure: {missing}")
    torch.set_num_threads(args.threads)
    check_results("native", "cpu")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print(
        f"commit {commit}, torch {torch.__version__}, {ops._native.ISA}, {args.threads} threads, {platform.machine()}"
    )
    print(f"copy bandwidth {copy_bandwidth():.0f} GB/s")
    if warning := check_idle():
        print(warning)
    print("\n| fp32 | native / fused AdamW | bytes say | loop / native | native GB/s | fired |")
    print("|---|---|---|---|---|---|")
    for name, (shapes, anchor) in tqdm(MODELS.items(), desc="models", leave=False):
        times, fired = contend(shapes, anchor, args.rounds, loop=False)
        against_loop, _ = contend(shapes, anchor, max(5, args.rounds // 4), loop=True)
        n = sum(torch.Size(shape).numel() for shape in shapes)
        moved = n * ((28 if anchor == "zero" else 32) + fired * (8 if anchor == "zero" else 12))
        tqdm.write(
            f"| {name} | {ratio(times['native'], times['fused'])} | {account(shapes, anchor, fired)} | "
            f"{ratio(against_loop['loop'], against_loop['native'])} | {moved / median(times['native']) / 1e9:.0f} | "
            f"{fired:.0%} |"
        )


if __name__ == "__main__":
    main()
