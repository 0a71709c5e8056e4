"""Projections beside a copy, TPGM's own work beside the eager code's, and what optimizers take of memory."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import robustft_kernels as rft

from . import memory
from .contest import COPY, Work, copy_of
from .loops import Given, loop_update
from .shapes import MODELS, SMOKE, numel

PROJECTIONS = {
    "l2": 20,
    "mars": 20,
    "mars_rows": 12,
}  # bytes for each parameter; a row stays in the cache

STEPS = 5


@pytest.mark.parametrize("norm", PROJECTIONS)
def bench_projections(ring, norm):
    """`project_` of ViT-B/16 with every tensor outside its ball, over a copy of its parameters."""
    shapes = SMOKE if ring.smoke else MODELS["ViT-B/16"]
    n = numel(shapes)
    anchors = [torch.randn(shape, device=ring.device) * 0.02 for shape in shapes]
    source = [a + 1e-3 * torch.randn_like(a) for a in anchors]
    params = [t.clone() for t in source]
    name = f"project_, {norm}"
    projection = Work(
        lambda: rft.project_(params, anchors, 1e-2, norm),
        prepare=lambda: torch._foreach_copy_(params, source),
        moved=PROJECTIONS[norm] * n,
    )
    ring.contest({name: projection, COPY: copy_of(4 * n, ring.device)}, name, n, baseline=COPY, dtype="float32")


def bench_tpgm(ring):
    """TPGM's own work for a few steps on the radii of ViT-B/16, without the model's work, beside the eager code's."""
    shapes = SMOKE if ring.smoke else MODELS["ViT-B/16"]
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
    ring.contest(entrants, "TPGM", numel(shapes), baseline="TPGM", model="ViT-B/16")


@pytest.mark.parametrize("choice", memory.CHOICES)
def bench_memory(ring, choice):
    """What an optimizer keeps, and how far its steps rise above that, in bytes for each parameter of Swin-T."""
    found = ring.benchmark.pedantic(memory.found, (choice, ring.device.type, ring.smoke), rounds=1)
    n = numel(SMOKE if ring.smoke else MODELS["Swin-T"])
    ring.benchmark.extra_info.update(choice=choice, trusted=True, parameters=n, **found)
