"""How much memory an optimizer takes, measured in a process of its own.

python -m benchmarks.memory CHOICE cpu        prints one line of JSON
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import robustft_kernels as rft

from . import contenders
from .contenders import BASELINE, BF16, COMPILED, EAGER, F32, METHODS, PEERS, TORCH, Contender, Params
from .shapes import MODELS, SMOKE, Shapes, numel


def _from_file(params: Params) -> rft.AnchoredAdamW:
    from safetensors.torch import save_file

    folder = tempfile.mkdtemp(dir=os.environ["ANCHORS"])
    named = [(f"p{k}", param) for k, param in enumerate(params)]
    save_file({name: param.detach() for name, param in named}, Path(folder) / "model.safetensors")
    return rft.AdamSPD(named, anchor=folder, anchor_device="disk")


# Those that compile are left out: the compiler's own memory would count. So are those that keep what others here do.
NO_QUESTION = ("torch for-loop", "optimi", "optimi, Triton", "pytorch_optimizer", "DeepSpeed CPUAdam")
OTHERS = {name: of for name, of in {**TORCH, **PEERS}.items() if name not in (*COMPILED, *NO_QUESTION)}
# What rounds, clips or goes by rows keeps what AdamSPD keeps.
ALIKE = ("clipped", "stochastic", "by rows")
OURS = {
    dtype: {name: of for name, of in names.items() if not any(word in name for word in ALIKE)}
    for dtype, names in contenders.CHOICES.items()
}
STORED = "AdamSPD, weights from a bf16 checkpoint"
FILE = "AdamSPD, anchors in a file"
LISTS: dict[torch.dtype, dict[str, Contender]] = {
    F32: {
        **OTHERS, **{f"{name}, eager": of for name, of in EAGER.items()}, **OURS["float32"],
        STORED: METHODS["AdamSPD"], FILE: Contender(_from_file), "AdamFTP": METHODS["AdamFTP"],
    },
    BF16: {BASELINE: TORCH[BASELINE], **OURS["bfloat16"]},
}  # fmt: skip
CHOICES = {f"{str(dtype)[6:]}: {name}": (dtype, of) for dtype, names in LISTS.items() for name, of in names.items()}


def found(choice: str, device: str, smoke: bool = False) -> dict[str, float | str]:
    """Bytes for each parameter, or `missing`: why there are none.

    `state`: of the optimizer's tensors. `kept`: by how many the process grew. `peak`: the most during two steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", choice, device, *(["--smoke"] if smoke else [])],
            # Freed memory goes back at once, so that what was freed is not counted.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "ANCHORS": folder},
            capture_output=True, text=True,
        )  # fmt: skip
    if run.returncode:
        return {"missing": (run.stderr.strip().splitlines() or ["?"])[-1][:100]}
    measured: dict[str, float | str] = json.loads(run.stdout.splitlines()[-1])
    return measured


def main(choice: str, device: str, *smoke: str) -> None:
    dtype, contender = CHOICES[choice]
    if why := contender.missing(torch.device(device)):
        raise SystemExit(why)
    _run(contender, _weights(SMOKE, dtype, device))  # what is loaded only once does not count as the optimizer's
    shapes = SMOKE if smoke else MODELS["Swin-T"]
    rounded = BF16 if STORED in choice else dtype
    params = [nn.Parameter(p.detach().to(rounded).to(dtype)) for p in _weights(shapes, dtype, device)]
    grads = [torch.full_like(p, 0.1) for p in params]
    kept, risen = _now(device)
    _forget_peak(device)
    optimizer = _run(contender, params, grads)
    state = sum(
        t.untyped_storage().nbytes()
        for of in optimizer.state.values()
        for name, t in of.items()
        if isinstance(t, torch.Tensor) and t.numel() > 3 and not (FILE in choice and name == "anchor")
    )
    now, n = _now(device)[0], numel(shapes)
    print(json.dumps({"state": state / n, "kept": (now - kept) / n, "peak": (_peak(device) - risen) / n}))


def _weights(shapes: Shapes, dtype: torch.dtype, device: str) -> Params:
    torch.manual_seed(0)
    return [nn.Parameter((torch.randn(shape, device=device) * 0.02).to(dtype)) for shape in shapes]


def _run(contender: Contender, params: Params, grads: list[torch.Tensor] | None = None) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = contender.make(params)
    for _ in range(2):
        for k, param in enumerate(params):
            param.grad = torch.full_like(param, 0.1) if grads is None else grads[k]
        optimizer.step()
    return optimizer


def _now(device: str) -> tuple[int, int]:
    """The bytes that are this process's own, and all its bytes. The peak is a peak of the latter."""
    if device == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.memory_allocated()
    return _proc("smaps_rollup", "Anonymous"), _proc("status", "VmRSS")


def _forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _proc("status", "VmHWM")


def _proc(file: str, what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/self/{file}").read_text())
    assert found, f"no {what}"
    return 1024 * int(found[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
