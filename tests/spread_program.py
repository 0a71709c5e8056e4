"""A program, run by test_spread.py in several processes: optimizers on DTensors against the same on whole tensors."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import robustft_kernels as rft
from robustft_kernels.backends import digests
from robustft_kernels.core.methods import rule_of_group

from .processes import parser, randn, spawn

# Uneven and empty shards, rows of several chunks, every number of dimensions.
SHAPES = ((3,), (1,), (33001,), (7, 5), (64, 300), (2, 40000), (1, 9), (8, 4, 3, 3), ())
COMMON = dict(strength=1.3, radius=0.05, radius_lr=0.1, k=0.7)
OWN = {
    "spd": dict(weight_decay=0.1), "l2sp": dict(strength=5.0), "l2sp_coupled": dict(strength=0.3),
    "mars_sp": dict(strength=0.3), "l2sp_cautious": dict(strength=5.0), "digrap": dict(strength=0.7),
}  # fmt: skip
METHODS = [
    {**COMMON, **OWN.get(name, {}), "method": name, "norm": norm}
    for name, of in rft.METHODS.items()
    for norm in of.rules
]
AROUND = (
    dict(strength=1.3),
    dict(norm="mars_rows", strength=torch.tensor(1.3)),
    dict(gate="away", strength=0.5),
    dict(method="l2sp", strength=5.0),
    dict(method="project", radius=0.05),
    dict(method="project", norm="mars", radius=torch.tensor(0.05)),
    dict(method="project", norm="mars_rows", radius=0.05, anchor="zero"),
)


@dataclass
class Case:
    """An optimizer, and what is special about its run."""

    name: str
    make: Callable[..., Any]
    kwargs: dict[str, Any]
    dtype: torch.dtype = torch.float32
    skipped_by: str = ""  # "some" or "all" processes, in the third step, whose gradients are scaled
    apart: float = 0.0  # how much may differ, because random bits depend on the place in a part's own memory


def around(groups: Any, lr: float, backend: str, **pull: Any) -> Any:
    return rft.Anchored(torch.optim.AdamW(groups, lr=lr, fused=True), backend=backend, **pull)


CASES = [Case(f"adamw {m['method']} {m['norm']}", rft.AnchoredAdamW, dict(lr=1e-2, **m)) for m in METHODS]
CASES += [
    Case("sgd spd", rft.SGDSPD, dict(lr=1e-2, momentum=0.9)),
    Case("sgd ftp", rft.SGDFTP, dict(lr=1e-2)),
    Case("away", rft.AdamSPD, dict(lr=1e-2, gate="away", strength=0.5)),
    Case("away by rows", rft.SGDSPD, dict(lr=1e-2, gate="away", strength=0.5, norm="mars_rows")),
    Case("zero anchor", rft.AdamSPD, dict(lr=1e-2, anchor="zero")),
    Case("clipped", rft.AdamSPD, dict(lr=1e-2, max_grad_norm=0.7)),
    Case("scaled", rft.AdamFTP, dict(lr=1e-2), skipped_by="some"),
    Case(
        "scaled mars_sp, maximize", rft.AnchoredSGD, dict(lr=1e-2, method="mars_sp", maximize=True), skipped_by="some"
    ),
    Case("scaled digrap, maximize", rft.SGDSPD, dict(lr=1e-2, method="digrap", maximize=True), skipped_by="some"),
    Case("digrap, master", rft.AnchoredAdamW, dict(lr=1e-2, method="digrap", master_weights=True), torch.bfloat16),
    Case("bf16, master", rft.AdamSPD, dict(lr=1e-2, master_weights=True), torch.bfloat16),
    Case("bf16 moments", rft.AdamPGM, dict(lr=1e-2, radius=0.3, state_dtype=torch.bfloat16), apart=5e-2 / 256),
    *(Case(f"around {m}", around, dict(lr=1e-2, **m)) for m in AROUND),
    Case("around, scaled", around, dict(lr=1e-2), skipped_by="all"),
    Case("float64", rft.AdamFTP, dict(lr=1e-2), torch.float64),
]


def layouts(world: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    device = torch.get_default_device().type
    line = init_device_mesh(device, (world,))
    laid: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "rows": (line, (Shard(0),)),
        "columns": (line, (Shard(1),)),
        "replicated": (line, (Replicate(),)),
    }
    if world == 4:
        square = init_device_mesh(device, (2, 2), mesh_dim_names=("a", "b"))
        laid = {
            "rows": laid["rows"],
            "hsdp": (square, (Replicate(), Shard(0))),
            "both": (square, (Shard(0), Shard(1))),
            "rows of a submesh": (square["b"], (Shard(0),)),
        }
    return laid


def more_layouts(world: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Layouts for digests alone: what fully_shard makes of tensor parallelism, and dimensions that are cut twice."""
    device = torch.get_default_device().type
    if world != 4:
        return {"strided": (init_device_mesh(device, (world,)), (_StridedShard(0, split_factor=3),))}
    square = init_device_mesh(device, (2, 2))
    return {
        "strided": (square, (_StridedShard(0, split_factor=2), Shard(0))),
        "rows twice": (square, (Shard(0), Shard(0))),
        "columns and rows": (square, (Shard(1), Shard(0))),
    }


def placed(placements: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Replicated if there is no such dimension."""
    return tuple(p if p.is_replicate() or p.dim < len(shape) else Replicate() for p in placements)


def run(case: Case, backend: str, spread: Callable[[torch.Tensor], torch.Tensor] | None) -> tuple[Any, list[Any]]:
    """Makes five steps. Returns the optimizer and its parameters."""
    generator = torch.Generator().manual_seed(0)
    start = [randn(shape, generator).to(case.dtype) for shape in SHAPES]
    params = [nn.Parameter(p.clone() if spread is None else spread(p.clone())) for p in start]
    named = [(f"w{k}", p) for k, p in enumerate(params)]
    groups = [{"params": named[:4]}, {"params": named[4:], "lr": 3e-3}]
    optimizer = case.make(groups, backend=backend, **case.kwargs)
    for t in range(5):
        for p, first in zip(params, start, strict=True):
            away = first.float() if t % 2 == 0 else -first.float()
            grad = (0.3 * randn(first.shape, generator) + 0.5 * away).to(case.dtype)
            p.grad = grad if spread is None else spread(grad)
        if case.skipped_by:
            optimizer.grad_scale = torch.tensor(8.0)
            skipped = t == 2 and (spread is None or case.skipped_by == "all" or dist.get_rank() % 2)
            optimizer.found_inf = torch.tensor(float(skipped))
        optimizer.step()
    return optimizer, params


def compare(case: Case, backend: str, name: str, mesh: Any, placements: tuple[Any, ...]) -> None:
    if mesh.get_coordinate() is None:
        return
    whole, expected = run(case, backend, None)
    spread, params = run(
        case, backend, lambda t: distribute_tensor(t, mesh, placed(placements, t.shape), src_data_rank=None)
    )
    eps = torch.finfo(case.dtype).eps
    told, want = spread.telemetry(), whole.telemetry()
    for k, (p, q) in enumerate(zip(params, expected, strict=True)):
        what = f"{case.name}, {name}, w{k}"
        got = p.full_tensor()
        slack = (1e-5 if case.dtype != torch.float64 else 1e-12) * (1 + q.abs()) + 2 * eps * q.abs() + case.apart
        assert ((got.double() - q.double()).abs() <= slack).all(), (what, (got.double() - q.double()).abs().max())
        for key in ("selections", "inconsistencies"):
            counts = getattr(told[f"w{k}"], key), getattr(want[f"w{k}"], key)
            assert abs(counts[0] - counts[1]) < 1e-12 or all(of != of for of in counts), (what, key, counts)
        group = spread.param_groups[0]
        measured = rule_of_group(group).measures or all(of.is_replicate() for of in p.placements)
        for key in ("alpha", "deviation", "radius"):
            a, b = (getattr(of[f"w{k}"], key) for of in (told, want))
            if key == "deviation" and not measured:  # a process alone cannot know
                assert a != a, (what, a)
                continue
            # An α is made of the deviation. The smaller that is, the more the last places of the weights count.
            absolute = 1e-5 / max(1e-6, want[f"w{k}"].deviation) if key == "alpha" else 1e-5
            absolute += 1e3 * case.apart
            assert abs(a - b) <= 1e-4 * abs(b) + absolute or (a != a and b != b), (what, key, a, b)
    # The same bits in every process.
    bits = torch.tensor([x for of in told.values() for x in of], dtype=torch.float64).nan_to_num(nan=-1)
    gathered = [torch.zeros_like(bits) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, bits)
    assert all(torch.equal(bits, other) for other in gathered), f"{case.name}, {name}: the processes differ"
    if getattr(spread, "grad_norm", None) is not None:
        torch.testing.assert_close(spread.grad_norm, whole.grad_norm)


def check_digests(name: str, mesh: Any, placements: tuple[Any, ...]) -> None:
    """The digest of a DTensor is that of the whole tensor, in every process, and it takes one reading of each shard."""
    if mesh.get_coordinate() is None:
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        generator = torch.Generator().manual_seed(0)
        whole = [randn(shape, generator).to(dtype) for shape in SHAPES]
        spread = [distribute_tensor(t, mesh, placed(placements, t.shape), src_data_rank=None) for t in whole]
        for k, (got, want) in enumerate(zip(digests.digests(spread), digests.digests(whole), strict=True)):
            assert torch.equal(got, want), (name, dtype, k)
        if dist.get_rank():  # the others do not know that it was written
            spread[3].to_local().add_(1)
        changed = digests.digests(spread, anew=True)[3]
        assert not torch.equal(changed, digests.digest(whole[3])) or placements[0].is_replicate(), (name, dtype)


def main(args: argparse.Namespace) -> None:
    for name, (mesh, placements) in {**layouts(args.world), **more_layouts(args.world)}.items():
        if args.pick in f"{name} digests":
            check_digests(name, mesh, placements)
    for name, (mesh, placements) in layouts(args.world).items():
        for case in CASES:
            for backend in args.backends:
                if args.pick in f"{name} {case.name} {backend}":
                    compare(case, backend, name, mesh, placements)


if __name__ == "__main__":
    options = parser()
    options.add_argument("--backends", nargs="+", default=["native"])
    options.add_argument("--pick", default="")
    spawn(main, options.parse_args())
