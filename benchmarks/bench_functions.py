"""Projections beside a copy, TPGM's own work beside the eager code's, and what optimizers take of memory."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import robustft_kernels as rft

from . import memory
from .contest import COPY, Work, copy_of
from .loops import Given, loop_update
from .shapes import MODELS, SMOKE, numel, part_of_vit

PROJECTIONS = {"l2": 20, "mars": 20, "mars_rows": 12}  # bytes for each parameter; a row stays in the cache
STEPS = 5


def bench_projections(ring):
    """`project_` with every tensor outside its ball, over a copy of its parameters."""
    model, shapes = part_of_vit(ring.device.type)
    shapes = SMOKE if ring.smoke else shapes
    n = numel(shapes)
    anchors = [torch.randn(shape, device=ring.device) * 0.02 for shape in shapes]
    source = [a + 1e-3 * torch.randn_like(a) for a in anchors]
    params = [t.clone() for t in source]

    def projection(norm: str, moves: int) -> Work:
        return Work(
            lambda: rft.project_(params, anchors, 1e-2, norm),
            prepare=lambda: torch._foreach_copy_(params, source),
            moved=moves * n,
        )

    ours = {f"project_, {norm}": projection(norm, moves) for norm, moves in PROJECTIONS.items()}
    entrants = {**ours, COPY: copy_of(4 * n, ring.device)}
    told = {"dtype": "float32", "model": model, "ours": list(ours)}
    ring.contest(entrants, "project_, l2", n, baseline=COPY, **told)


def bench_tpgm(ring):
    """TPGM's own work for a few steps on radii, without the model's work, beside the eager code's."""
    name, shapes = part_of_vit(ring.device.type)
    shapes = SMOKE if ring.smoke else shapes
    model = nn.ParameterList(nn.Parameter(torch.randn(shape, device=ring.device) * 0.02) for shape in shapes)
    learner, params = rft.TPGM(model), list(model)
    anchors = [p.detach().clone() for p in params]
    grads = [torch.randn_like(p) for p in params]
    with torch.no_grad():
        for p in params:
            p.add_(1e-3 * torch.randn_like(p))
    adam = torch.optim.Adam([torch.full((), 1e-4, device=ring.device, requires_grad=True) for _ in params], lr=1e-2)

    def ours() -> None:
        learner.update(lambda _: Given.apply(grads, *params), [0], STEPS, progress=False)

    def eager() -> None:
        for _ in range(STEPS):
            loop_update(model, anchors, adam, grads)

    runs: dict[str, Callable[[], None]] = {"TPGM": ours, "TPGM, eager": eager}
    entrants = {name: Work(run) for name, run in runs.items()}
    ring.contest(entrants, "TPGM", numel(shapes), baseline="TPGM", model=name)


@pytest.fixture(scope="session")
def memories(request):
    """What each choice that is asked for takes: a process for each, as many at a time as there are cores."""
    asked = [of.callspec.params["choice"] for of in request.session.items if of.originalname == "bench_memory"]
    device, smoke = (request.config.getoption(name) for name in ("--device", "--smoke"))
    with ThreadPoolExecutor(os.cpu_count() if device == "cpu" else 1) as pool:
        return dict(zip(asked, pool.map(lambda choice: memory.found(choice, device, smoke), asked), strict=True))


@pytest.mark.once("bytes are the same each time")
@pytest.mark.parametrize("choice", memory.CHOICES)
def bench_memory(ring, memories, choice):
    """What an optimizer keeps, and how far its steps rise above that, in bytes for each parameter of Swin-T."""
    found = ring.benchmark.pedantic(memories.get, (choice,), rounds=1)
    n = numel(SMOKE if ring.smoke else MODELS["Swin-T"])
    ring.benchmark.extra_info.update(choice=choice, trusted=True, parameters=n, **found)
