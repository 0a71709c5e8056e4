"""Who is measured: our optimizers, torch's, the AdamW of other installed packages, and the eager code that this package
replaces. Each can also say how many bytes its step must move."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import robustft_kernels as rft
from robustft_kernels.backends import registry
from robustft_kernels.testing import CHUNK

from .loops import LoopFTP, LoopSPD
from .machine import chosen, versions_of

Params = list[nn.Parameter]
LR = 1e-3
BASELINE = "torch fused"
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Contender:
    """make: makes an optimizer of these parameters. module: what it needs beside torch, imported when it is made.
    state: the dtype of its moments, None for that of the parameters. moves: the bytes of a step over tensors of these
    sizes, if they are counted. backend: the one that it asks for by name, or "". ours: whether check.py judges it.
    """

    make: Callable[[Params], Any]
    module: str = ""
    state: torch.dtype | None = None
    moves: Callable[[list[int], torch.dtype, float], float] | None = None
    backend: str = ""
    ours: bool = False

    def missing(self, device: torch.device) -> str:
        """Why it cannot be measured on that device, or ""."""
        if self.backend:
            return registry.objection_to(self.backend, device, {torch.float32})
        return f"{self.module} is not installed" if self.module and not find_spec(self.module) else ""


def adamw_bytes(sizes: list[int], dtype: torch.dtype, fired: float, state: torch.dtype | None = None) -> float:
    """θ and the moments read and written, g read."""
    return sum(sizes) * (3 * dtype.itemsize + 4 * (state or dtype).itemsize)


def anchored_bytes(
    sizes: list[int], dtype: torch.dtype, fired: float, state: torch.dtype = torch.float32,
    anchor: torch.dtype | None = None, zero: bool = False, survey: int = 0, tracks: bool = False, pulled: bool = True,
    master: bool = False,
) -> float:  # fmt: skip
    """The bytes of AdamW, the anchor, a survey, the bf16 c of FTP, float32 masters, and a pull.

    survey: how many tensors of the parameters' dtype are read before the step. tracks: whether FTP reads c then, and
    writes it later. The pull is that of tensors that fire and are longer than a chunk.
    """
    n, of_anchor = sum(sizes), 0 if zero else (anchor or dtype).itemsize
    extra = survey * dtype.itemsize + (4 if tracks else 0) + (8 if master else 0)
    step = adamw_bytes(sizes, dtype, fired, state) + n * (of_anchor + extra)
    later = sum(size for size in sizes if size > CHUNK) if pulled else 0
    return step + fired * later * (of_anchor + dtype.itemsize + (8 if master else dtype.itemsize))


def _import(module: str) -> Any:
    return __import__(module, fromlist=["_"])


def _compiled(params: Params) -> Optimizer:
    optimizer = AdamW(params, **PLAIN, foreach=True)
    optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
    return optimizer


PACKAGES = ("torch", "torch-optimi", "pytorch_optimizer", "heavyball", "torchao", "bitsandbytes", "deepspeed")


def _peer(module: str, make: Callable[[Any, Params], Optimizer], state: torch.dtype | None = None) -> Contender:
    moves = partial(adamw_bytes, state=state)
    return Contender(lambda params: make(_import(module), params), module.split(".")[0], state, moves)


PLAIN = {"lr": LR, "weight_decay": 0.0}
TORCH = {
    BASELINE: Contender(partial(AdamW, **PLAIN, fused=True), moves=adamw_bytes),
    "torch foreach": Contender(partial(AdamW, **PLAIN, foreach=True)),
    "torch for-loop": Contender(partial(AdamW, **PLAIN, foreach=False)),
    "torch compiled": Contender(_compiled),
}
F32 = torch.float32
PEERS = {
    "optimi": _peer("optimi", lambda m, p: m.AdamW(p, **PLAIN)),
    "optimi, Triton": _peer("optimi", lambda m, p: m.AdamW(p, **PLAIN, triton=True)),
    "pytorch_optimizer": _peer("pytorch_optimizer", lambda m, p: m.StableAdamW(p, **PLAIN)),
    "heavyball": _peer("heavyball", lambda m, p: m.AdamW(p, **PLAIN)),
    "torchao": _peer("torchao.optim", lambda m, p: m._AdamW(p, **PLAIN, bf16_stochastic_round=p[0].dtype == BF16)),
    "torchao, 8-bit": _peer("torchao.optim", lambda m, p: m.AdamW8bit(p, **PLAIN), torch.uint8),
    "bitsandbytes": _peer("bitsandbytes", lambda m, p: m.optim.AdamW(p, **PLAIN), F32),
    "bitsandbytes, 8-bit": _peer("bitsandbytes", lambda m, p: m.optim.AdamW8bit(p, **PLAIN), torch.uint8),
    "DeepSpeed CPUAdam": _peer("deepspeed.ops.adam", lambda m, p: m.DeepSpeedCPUAdam(p, **PLAIN), F32),
}

REPEATED = ("torch fused", "torch foreach", "DeepSpeed CPUAdam")  # the others are measured in one process
EIGHT_BIT_PEERS = ("torchao, 8-bit", "bitsandbytes, 8-bit")
COMPILED = ("torch compiled", "torchao", "torchao, 8-bit", "heavyball")  # slow to compile, so on one list alone


def ours(method: str, backend: str = "auto", *, moved: dict[str, Any] | None = None, **options: Any) -> Contender:
    """An AnchoredAdamW. moved: what `anchored_bytes` must know."""
    facts = {"state": options.get("state_dtype", F32), "master": options.get("master_weights", False)}
    facts["zero"] = method == "none" or options.get("anchor") == "zero"
    facts.update(moved or {})
    return Contender(
        lambda params: rft.AnchoredAdamW(params, method=method, backend=backend, lr=LR, **options),
        state=facts["state"], moves=partial(anchored_bytes, **facts), backend="" if backend == "auto" else backend,
        ours=True,
    )  # fmt: skip


# Rules by rows pull while the row is in the cache; MARS-SP and FTP survey the rows first.
ROWS = {"pulled": False}
METHODS = {
    "AdamW (none)": ours("none", moved=ROWS),
    "AdamSPD": ours("spd"),
    "AdamSPD, by rows": ours("spd", norm="mars_rows", moved=ROWS),
    "AdamL2SP": ours("l2sp", strength=1.0, moved=ROWS),
    "L2-SP, coupled": ours("l2sp_coupled", strength=1e-2, moved=ROWS),
    "MARS-SP": ours("mars_sp", strength=1e-2, moved={**ROWS, "survey": 2}),
    "AdamPGM, l2": ours("project", radius=0.05),
    "AdamPGM, mars": ours("project", norm="mars", radius=0.05),
    "AdamPGM, mars_rows": ours("project", norm="mars_rows", radius=0.05, moved=ROWS),
    "AdamFTP": ours("ftp", moved={**ROWS, "survey": 1, "tracks": True}),
}
CUDA, TRITON, ONE_LAUNCH = "AdamSPD, CUDA", "AdamSPD, Triton", "AdamSPD, one launch"
FORMS = {"cuda": CUDA, "triton": TRITON, "triton_tickets": ONE_LAUNCH}  # the backends of a GPU
EIGHT_BIT: dict[str, Any] = {"state_dtype": "8bit", "moved": {"state": torch.uint8}}  # their scales are not counted
CHOICES = {
    "float32": {
        "AdamSPD": ours("spd"),
        'AdamSPD, anchor="zero"': ours("spd", anchor="zero"),
        "AdamSPD, bf16 anchor": ours("spd", anchor_dtype=BF16, moved={"anchor": BF16}),
        "AdamSPD, bf16 moments": ours("spd", state_dtype=BF16),
        "AdamSPD, clipped": ours("spd", max_grad_norm=1e30, moved={"survey": 1}),
        "AdamSPD, 8-bit moments": ours("spd", **EIGHT_BIT),
    },
    "bfloat16": {
        "AdamSPD": ours("spd"),
        "AdamSPD, bf16 moments": ours("spd", state_dtype=BF16),
        "AdamSPD, stochastic rounding": ours("spd", stochastic_rounding=True),
        "AdamSPD, bf16 moments, stochastic rounding": ours("spd", state_dtype=BF16, stochastic_rounding=True),
        "AdamSPD, master weights": ours("spd", master_weights=True),
        "AdamSPD, master weights, bf16 moments": ours("spd", master_weights=True, state_dtype=BF16),
        "AdamSPD, by rows, master weights": ours("spd", norm="mars_rows", master_weights=True, moved=ROWS),
        "AdamSPD, 8-bit moments": ours("spd", **EIGHT_BIT),
    },
}


def other_forms(device: torch.device, **options: Any) -> dict[str, Contender]:
    """AdamSPD on each backend of a GPU but that of "AdamSPD", which is what "auto" takes. None for a CPU."""
    taken = chosen(device) if device.type == "cuda" else ""
    return {name: ours("spd", on, **options) for on, name in FORMS.items() if taken and on != taken}


def _eager(loop: type[Optimizer]) -> Contender:
    def make(params: Params) -> Optimizer:
        return loop(params, LR, [p.detach().clone() for p in params])  # type: ignore[call-arg]

    return Contender(make)


EAGER = {"AdamSPD": _eager(LoopSPD), "AdamFTP": _eager(LoopFTP)}


def versions() -> dict[str, str]:
    """The installed versions of the packages that contenders come from."""
    return {package: found or "not installed" for package, found in versions_of(PACKAGES).items()}
