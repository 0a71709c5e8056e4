"""A step of an optimizer: against other packages' AdamW and the eager code, by method and by precision.

Also by how large and how many the tensors are, by how many fire, and by threads. And where the time of a step goes.
"""

import os

import pytest
import torch

from .contenders import BASELINE, CHOICES, COMPILED, EAGER, METHODS, PEERS, PROJECTS, TORCH, other_forms, ours
from .contest import COPY, Field, Stepper, Work, copy_of
from .shapes import ADAPTERS, MODELS, SMOKE, Shapes, numel

F32, BF16 = torch.float32, torch.bfloat16
VIT = MODELS["ViT-B/16"]
FUSED = {BASELINE: TORCH[BASELINE]}
SPD = {"AdamSPD": METHODS["AdamSPD"]}
MARGIN = 2**30  # bytes, among them two buffers of 2^29 for the copy
LARGE = 2.5e8  # with more parameters, ours are compared with torch's fastest alone


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("model", MODELS)
def bench_peers(ring, model, dtype, room):
    """What a step costs beside what a user would take instead, on the tensors of real models."""
    shapes = MODELS[model]
    n = numel(shapes)
    anchor = {"anchor": "zero"} if model in ADAPTERS else {}
    like_torch = {"AdamSPD, bf16 moments": ours("spd", state_dtype=BF16, **anchor)} if dtype == BF16 else {}
    contenders = {**other_forms(ring.device, **anchor), "AdamSPD": ours("spd", **anchor), **like_torch}
    if n > LARGE:  # in bfloat16 the moments of the largest fit beside each other only as torch keeps them
        contenders = {**FUSED, **(like_torch or contenders)}
    else:
        peers = {**TORCH, **PEERS}
        if model not in ADAPTERS:
            peers = {name: of for name, of in peers.items() if name not in COMPILED}
        contenders = {**peers, "AdamW (none)": METHODS["AdamW (none)"], **contenders}
    copies = 3 * len(contenders) + 3  # of the weights: each one's own and its moments; anchors, and shared gradients
    room(n * dtype.itemsize * copies + MARGIN)
    ring.race(contenders, shapes, dtype, list(contenders)[-1], model=model)


@pytest.mark.parametrize("method", METHODS)
def bench_methods(ring, method):
    """What anchoring costs over plain AdamW, by method, on ViT-B/16 in float32."""
    ring.race({**FUSED, method: METHODS[method]}, VIT, F32, method, fire=1.0 if method in PROJECTS else 0.5)


def bench_reference(ring):
    """The same formulas in plain torch: the backend of a machine without a compiler."""
    ring.race({**FUSED, "AdamSPD, reference": ours("spd", "reference")}, VIT, F32, "AdamSPD, reference")


@pytest.mark.parametrize("choice", [f"{dtype}, {name}" for dtype, of in CHOICES.items() for name in of])
def bench_precision(ring, choice):
    """What the choices of docs/precision.md cost, on ViT-B/16."""
    dtype, name = choice.split(", ", 1)
    ring.race({**FUSED, name: CHOICES[dtype][name]}, VIT, getattr(torch, dtype), name)


@pytest.mark.parametrize("model", ["ResNet-50", "ViT-B/16", *ADAPTERS])
@pytest.mark.parametrize("method", EAGER)
def bench_eager(ring, method, model):
    """What a user of the eager code gains."""
    contenders = {method: METHODS[method], f"{method}, eager": EAGER[method]}
    ring.race(contenders, MODELS[model], F32, method, baseline=method, model=model)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("millions", [1, 4, 16, 64, 256, 1024])
def bench_parameters(ring, millions, dtype, room):
    """How the cost grows with the number of parameters: 64 tensors, moments of the parameters' dtype."""
    n = millions * 2**20
    room(8 * n * dtype.itemsize + MARGIN)
    contenders = {**FUSED, "AdamSPD": ours("spd", state_dtype=dtype)}
    ring.race(contenders, [(n // 64 // 256, 256)] * 64, dtype, "AdamSPD")


@pytest.mark.parametrize("tensors", [1, 10, 100, 1000, 10_000])
def bench_tensors(ring, tensors):
    """How the cost grows with the number of tensors: 10 million parameters."""
    others = {**FUSED, "torch foreach": TORCH["torch foreach"], "AdamSPD, eager": EAGER["AdamSPD"]}
    ring.race({**others, **SPD}, [(10_000_000 // tensors,)] * tensors, F32, "AdamSPD")


@pytest.mark.parametrize("fire", [0.0, 0.25, 0.5, 0.75, 1.0])
def bench_fire(ring, fire):
    """How the cost grows with the share of the elements whose tensors fire, on ViT-B/16."""
    ring.race({**FUSED, **SPD}, VIT, F32, "AdamSPD", fire=fire)


@pytest.mark.parametrize("threads", sorted({1, 2, os.cpu_count() or 1}))
def bench_threads(ring, threads):
    """How the cost falls with threads, on ViT-B/16."""
    if ring.device.type != "cpu":
        pytest.skip("threads are the CPU's")
    torch.set_num_threads(threads)
    ring.race({**FUSED, **SPD}, VIT, F32, "AdamSPD")


def backend_alone(stepper: Stepper) -> Work:
    """The backend's call alone, without what leads to it. The step is planned already."""
    (launch,) = stepper.optimizer._plans.current.launches

    def step() -> None:
        launch.begin(None, None)
        launch.finish()

    return Work(step, stepper.prepare)


@pytest.mark.parametrize("model", ["ViT-B/16", *ADAPTERS, "10,000 × 100"])
def bench_parts(ring, model):
    """Where a step's time goes: the whole step, and the backend's call alone, when nothing fires and when half does."""
    shapes: Shapes = SMOKE if ring.smoke else MODELS.get(model, [(100,)] * 10_000)
    entrants = {}
    for fire, name in ((0.5, "whole step"), (0.5, "backend"), (0.0, "backend, none fires")):
        on = Field(shapes, F32, ring.device, fire)
        entrant = Stepper(METHODS["AdamSPD"], on)
        entrant.prepare()
        entrant.step()
        on.turn()
        entrants[name] = entrant if name == "whole step" else backend_alone(entrant)
    entrants[COPY] = copy_of(4 * numel(shapes), ring.device)
    ring.contest(entrants, "whole step", numel(shapes), baseline="whole step", model=model)
