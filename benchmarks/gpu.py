"""What a step costs on a GPU: AdamSPD in both forms against torch's AdamW (fused, foreach) and the loop it replaces.

    python -m benchmarks.gpu --out benchmarks/results/h200.md        (make bench-gpu)

As benchmarks/steps.py: contenders take turns on fresh random gradients, so that about half the segments fire; a ratio
is that of two steps of the same round, as median (quartiles). A step's time is that of the wall, host included, from an
idle GPU to an idle GPU; the host's share, until `step` returns, stands apart. GB/s are counted bytes over that time,
also as a part of what the same GPU copies. torch keeps bf16 moments for bf16 weights, ours are float32: there a step of
ours moves 24 bytes a parameter to torch's 14. Nothing is timed before the results have been checked.
"""

import argparse
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import triton
from torch import nn
from tqdm import tqdm

import robustft_kernels as rft
from robustft_kernels import ops
from robustft_kernels.testing import CHUNK

from .loops import LoopSPD
from .steps import Shapes, check_results, ratio, take_turns, vit_b16, vit_shapes

FORMS = {"two launches": "triton", "one launch": "triton_tickets"}


def llama_1b() -> Shapes:
    """The 147 tensors of a 1B-parameter LLaMA-like model, embeddings tied: 1.24G."""
    width, hidden, kv = 2048, 8192, 512
    block: Shapes = [(width, width), (kv, width), (kv, width), (width, width)]
    block += [(hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [(128256, width), *block * 16, (width,), (1, 1)]


MODELS: dict[str, tuple[Shapes, str]] = {
    "ViT-B/16": (vit_b16(), "initial"),
    "ViT-L/16": (vit_shapes(width=1024, hidden=4096, blocks=24), "initial"),
    "LLaMA-like, 1B": (llama_1b(), "initial"),
    "LoRA-like, 256 × 32,768": ([(32768,)] * 256, "zero"),
    "2,000 × 256": ([(256,)] * 2000, "initial"),
}


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the wall, and of the host alone."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    returned = time.perf_counter()
    torch.cuda.synchronize()
    return time.perf_counter() - began, returned - began


def copy_bandwidth() -> float:
    """GB/s of tensor.copy_, counting the read and the write."""
    source = torch.empty(2**28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return median(8 * 2**28 / timed(lambda: target.copy_(source))[0] / 1e9 for _ in range(20))


def counted_bytes(shapes: Shapes, anchor: str, dtype: torch.dtype, fired: float) -> float:
    """θ, g, θ₀ and the moments read, θ and the moments written; the pull's own for what fires beyond one chunk."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    size, of_anchor = dtype.itemsize, 0 if anchor == "zero" else dtype.itemsize
    pulled_later = sum(n for n in sizes if n > CHUNK)
    return sum(sizes) * (3 * size + of_anchor + 16) + fired * pulled_later * (2 * size + of_anchor)


def contend(shapes: Shapes, anchor: str, dtype: torch.dtype, rounds: int, loop: bool) -> str:
    """One row of the table."""
    start = [torch.randn(shape, device="cuda", dtype=dtype) * 0.02 for shape in shapes]
    names = ["fused", "foreach", *FORMS, *(["loop"] if loop else [])]
    params = {name: [nn.Parameter(t.clone()) for t in start] for name in names}
    optimizers: dict[str, torch.optim.Optimizer] = {
        "fused": torch.optim.AdamW(params["fused"], lr=1e-4, weight_decay=0.0, fused=True),
        "foreach": torch.optim.AdamW(params["foreach"], lr=1e-4, weight_decay=0.0, foreach=True),
        **{form: rft.AdamSPD(params[form], lr=1e-4, anchor=anchor, backend=backend) for form, backend in FORMS.items()},
    }
    if loop:
        optimizers["loop"] = LoopSPD(params["loop"], 1e-4, [None if anchor == "zero" else t for t in start])
    times, fired = take_turns(optimizers, params, rounds, timed, watched="two launches", warm_up=5)
    wall = {name: [w for w, _ in pairs] for name, pairs in times.items()}
    host = {name: median(h for _, h in pairs) * 1e6 for name, pairs in times.items()}
    moved = counted_bytes(shapes, anchor, dtype, fired) / 1e9
    bandwidth = copy_bandwidth()
    cells = [ratio(wall[form], wall["fused"]) for form in FORMS]
    cells += [f"{moved / median(wall[form]):.0f} ({moved / median(wall[form]) / bandwidth:.0%})" for form in FORMS]
    cells += [ratio(wall["foreach"], wall["two launches"])]
    cells += [ratio(wall["loop"], wall["two launches"]) if loop else "–"]
    cells += [f"{host['two launches']:.0f} / {host['fused']:.0f}", f"{fired:.0%}"]
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if missing := ops.backends()["triton"]:
        print(f"nothing to measure: {missing}")
        return
    for backend in FORMS.values():
        check_results(backend, "cuda")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split()[0]
    lines = [
        f"{torch.cuda.get_device_name()}, driver {driver}, torch {torch.__version__}, Triton {triton.__version__}, "
        f"commit {commit}; copies {copy_bandwidth():.0f} GB/s",
        "",
        "| model | two launches / fused AdamW | one launch / fused AdamW | two: GB/s (of copy) | one: GB/s (of copy) | "
        "foreach AdamW / two | loop / two | host µs: two / fused | fired |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    cases = [(name, dtype) for name in MODELS for dtype in (torch.float32, torch.bfloat16)]
    for name, dtype in tqdm(cases, desc="models", leave=False):
        shapes, anchor = MODELS[name]
        row = contend(shapes, anchor, dtype, args.rounds, loop=not name.startswith("LLaMA"))
        lines.append(f"| {name}, {str(dtype).removeprefix('torch.')} | {row} |")
        torch.cuda.empty_cache()
    print("\n".join(lines))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
