"""What each choice of precision keeps: bytes a parameter of the optimizer's state, as it is and as the process grows.

python -m benchmarks.memory        a table, for docs/precision.md
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import robustft_kernels as rft

N = 8 * 2**20  # parameters
BF16, F32 = torch.bfloat16, torch.float32
# Weights of 32 bits, and such as a bfloat16 checkpoint gives; the optimizer's arguments.
CHOICES = {
    "torch.optim.AdamW": (F32, False, None),
    "AdamSPD": (F32, False, {}),
    "AdamSPD, weights from a bf16 checkpoint": (F32, True, {}),
    'AdamSPD, `anchor="zero"`': (F32, False, {"anchor": "zero"}),
    "AdamSPD, anchors in a file": (F32, False, {"anchor": "file"}),
    "AdamSPD, `state_dtype=torch.bfloat16`": (F32, False, {"state_dtype": BF16}),
    "AdamFTP": (F32, False, {"method": "ftp"}),
    "bf16 weights: AdamSPD": (BF16, False, {}),
    "bf16 weights: AdamSPD, `master_weights=True`": (BF16, False, {"master_weights": True}),
    "bf16 weights: AdamSPD, `state_dtype=torch.bfloat16`": (BF16, False, {"state_dtype": BF16}),
    "bf16 weights: both": (BF16, False, {"master_weights": True, "state_dtype": BF16}),
}


def anonymous() -> int:
    """Bytes of memory that are this process's own."""
    return 1024 * int(re.search(r"Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1])


def measure(name: str, folder: str) -> None:
    dtype, stored, kwargs = CHOICES[name]
    torch.manual_seed(0)
    weights = torch.randn(N)
    param = torch.nn.Parameter((weights.to(BF16) if stored else weights).to(dtype))
    del weights
    param.grad = torch.full_like(param, 0.1)
    small = torch.nn.Parameter(torch.zeros(10, dtype=dtype))
    small.grad = torch.ones_like(small)
    rft.AdamSPD([small]).step()
    if kwargs is not None and kwargs.get("anchor") == "file":
        kwargs = {**kwargs, "anchor": folder}
    before = anonymous()
    if kwargs is None:
        optimizer = torch.optim.AdamW([param], fused=True)
    else:
        optimizer = rft.AnchoredAdamW([("w", param)], **{"method": "spd", **kwargs})
    optimizer.step()
    kept = sum(
        t.untyped_storage().nbytes()
        for t in optimizer.state[param].values()
        if t.numel() > 3 and not (kwargs and kwargs.get("anchor") == folder and t is optimizer.state[param]["anchor"])
    )
    print(kept / N, (anonymous() - before) / N)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        from safetensors.torch import save_file

        save_file({"w": torch.randn(N)}, Path(folder) / "model.safetensors")
        print("| | bytes a parameter, state | as the process grew |")
        print("|---|---|---|")
        for name in CHOICES:
            command = [sys.executable, "-m", "benchmarks.memory", name, folder]
            kept, grown = map(
                float, subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
            )
            print(f"| {name} | {kept:.0f} | {grown:.1f} |")


if __name__ == "__main__":
    measure(*sys.argv[1:]) if len(sys.argv) > 1 else main()
