"""A step of an optimizer: against other packages' AdamW and the eager code, by method and by precision.

Also by how large and how many the tensors are, by how many fire, and by threads. And where the time of a step goes.
"""

import os

import pytest
import torch

from .contenders import (
    BASELINE,
    CHOICES,
    COMPILED,
    EAGER,
    EIGHT_BIT,
    EIGHT_BIT_PEERS,
    METHODS,
    PEERS,
    REPEATED,
    TORCH,
    other_forms,
    ours,
)
from .contest import COPY, Field, Stepper, Work, copy_of
from .shapes import ADAPTERS, MODELS, SMOKE, Shapes, numel, part_of_vit

F32, BF16 = torch.float32, torch.bfloat16
FUSED = {BASELINE: TORCH[BASELINE]}
SPD = {"AdamSPD": METHODS["AdamSPD"]}
MARGIN = 2**30  # bytes, among them two buffers of 2^29 for the copy
LARGE = 2.5e8  # with more parameters, ours are compared with torch's fastest alone
TAKES_LONG = pytest.mark.once_on_cpu("a list so large takes long to set up, and no text quotes it")
SLOW_PEERS = pytest.mark.once("others' steps and compilations are slow, and the ratios far from ours")
LISTS = [pytest.param(model, marks=TAKES_LONG) if numel(of) > LARGE else model for model, of in MODELS.items()]
LARGEST = 5e8  # on a CPU: with more, nothing changes but the time
ANSWERED = {("Swin-T", BF16), ("ViT-L/16", BF16)}  # there, by lists that are smaller
MANY = {"10,000 × 256": [(256,)] * 10_000}


def room_for(room, shapes: Shapes, dtype: torch.dtype, contenders: dict) -> None:
    copies = 3 * len(contenders) + 3  # of the weights: each one's own and its moments; anchors, and shared gradients
    room(numel(shapes) * dtype.itemsize * copies + MARGIN)


def of_ours(device: torch.device, model: str, dtype: torch.dtype) -> dict:
    """AdamSPD, as one would use it on that model, and in bfloat16 also with moments as torch has them."""
    anchor = {"anchor": "zero"} if "LoRA" in model else {}
    like_torch = {"AdamSPD, bf16 moments": ours("spd", state_dtype=BF16, **anchor)} if dtype == BF16 else {}
    return {**other_forms(device, **anchor), "AdamSPD": ours("spd", **anchor), **like_torch}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("model", LISTS)
def bench_peers(ring, model, dtype, room):
    """What a step costs beside what a user would take instead, on the tensors of real models."""
    shapes, contenders = MODELS[model], of_ours(ring.device, model, dtype)
    if ring.device.type == "cpu" and (numel(shapes) > LARGEST or (model, dtype) in ANSWERED):
        pytest.skip("on a CPU other lists answer the same")
    if numel(shapes) > LARGE:  # in bfloat16 the moments of the largest fit beside each other only as torch keeps them
        contenders = {**FUSED, **(dict([contenders.popitem()]) if dtype == BF16 else contenders)}
    else:
        peers = {name: of for name, of in {**TORCH, **PEERS}.items() if name in REPEATED}
        contenders = {**peers, "AdamW (none)": METHODS["AdamW (none)"], **contenders}
    room_for(room, shapes, dtype, contenders)
    ring.race(contenders, shapes, dtype, list(contenders)[-1], model=model)


def beside_others(ring, model, shapes, dtype, room, names) -> None:
    contenders = {**FUSED, **{name: of for name, of in {**TORCH, **PEERS}.items() if name in names}}
    contenders |= of_ours(ring.device, model, dtype)
    room_for(room, shapes, dtype, contenders)
    ring.race(contenders, shapes, dtype, list(contenders)[-1], model=model)


@SLOW_PEERS
@pytest.mark.parametrize(("model", "dtype"), [("ResNet-50", F32), (ADAPTERS[0], F32), (ADAPTERS[0], BF16)], ids=str)
def bench_others(ring, model, dtype, room):
    """The same beside the other packages."""
    names = {*TORCH, *PEERS} - {*REPEATED, *COMPILED}
    beside_others(ring, model, MODELS[model], dtype, room, names)


@SLOW_PEERS
def bench_compiled(ring, room):
    """The same beside what is compiled first. Few tensors, as the compiler takes seconds for each."""
    beside_others(ring, "8 × 3072 × 768", [(3072, 768)] * 8, F32, room, COMPILED)


def bench_eight_bit(ring):
    """Moments of 8 bits, ours beside torchao's and bitsandbytes', on adapters: torchao compiles for each shape."""
    (model,) = ADAPTERS
    mine = {
        "AdamW (none), 8-bit moments": ours("none", **EIGHT_BIT),
        "AdamSPD, 8-bit moments": ours("spd", anchor="zero", **EIGHT_BIT),
    }
    contenders = {**FUSED, **{name: PEERS[name] for name in EIGHT_BIT_PEERS}, **mine}
    ring.race(contenders, MODELS[model], F32, "AdamSPD, 8-bit moments", model=model)


def bench_methods(ring):
    """What anchoring costs over plain AdamW, by method."""
    model, shapes = part_of_vit(ring.device.type)
    ring.race({**FUSED, **METHODS}, shapes, F32, "AdamSPD", model=model)


@pytest.mark.once("a step of the oracle takes a second, and nobody runs it for speed")
def bench_reference(ring):
    """The same formulas in plain torch: the backend of a machine without a compiler."""
    model, shapes = part_of_vit(ring.device.type)
    ring.race({**FUSED, "AdamSPD, reference": ours("spd", "reference")}, shapes, F32, "AdamSPD, reference", model=model)


@pytest.mark.parametrize("dtype", CHOICES)
def bench_precision(ring, dtype):
    """What the choices of docs/precision.md cost."""
    model, shapes = part_of_vit(ring.device.type)
    ring.race({**FUSED, **CHOICES[dtype]}, shapes, getattr(torch, dtype), "AdamSPD", model=model)


@pytest.mark.parametrize(
    ("method", "model"),
    [*(("AdamSPD", model) for model in ("ResNet-50", "ViT-B/16", *ADAPTERS)), ("AdamFTP", "ResNet-50")],
)
def bench_eager(ring, method, model):
    """What a user of the eager code gains."""
    contenders = {method: METHODS[method], f"{method}, eager": EAGER[method]}
    ring.race(contenders, MODELS[model], F32, method, baseline=method, model=model)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("millions", [1, 8, 64])
def bench_parameters(ring, millions, dtype):
    """How the cost grows with the number of parameters: 64 tensors, moments of the parameters' dtype."""
    n = millions * 2**20
    contenders = {**FUSED, "AdamSPD": ours("spd", state_dtype=dtype)}
    ring.race(contenders, [(n // 64 // 256, 256)] * 64, dtype, "AdamSPD")


@pytest.mark.parametrize("tensors", [1, 100, 1000, 10_000])
def bench_tensors(ring, tensors):
    """How the cost grows with the number of tensors: 10 million parameters. The slow ones stop at 1,000."""
    slow = {"torch foreach": TORCH["torch foreach"], "AdamSPD, eager": EAGER["AdamSPD"]} if tensors <= 1000 else {}
    ring.race({**FUSED, **slow, **SPD}, [(10_000_000 // tensors,)] * tensors, F32, "AdamSPD")


@pytest.mark.parametrize("fire", [0.0, 0.5, 1.0])
def bench_fire(ring, fire):
    """How the cost grows with the share of the elements whose tensors fire."""
    model, shapes = part_of_vit(ring.device.type)
    ring.race({**FUSED, **SPD}, shapes, F32, "AdamSPD", fire=fire, model=model)


@pytest.mark.parametrize("threads", sorted({1, 2, os.cpu_count() or 1}))
def bench_threads(ring, threads):
    """How the cost falls with threads."""
    if ring.device.type != "cpu":
        pytest.skip("threads are the CPU's")
    torch.set_num_threads(threads)
    model, shapes = part_of_vit("cpu")
    ring.race({**FUSED, **SPD}, shapes, F32, "AdamSPD", model=model)


def backend_alone(stepper: Stepper) -> Work:
    """The backend's call alone, without what leads to it. The step is planned already."""
    (launch,) = stepper.optimizer._plans.current.launches

    def step() -> None:
        launch.begin(None, None)
        launch.finish()

    return Work(step, stepper.prepare)


@pytest.mark.parametrize("model", ["ViT-B/16", *ADAPTERS, *MANY])
def bench_parts(ring, model):
    """Where a step's time goes: the whole step, and the backend's call alone, when nothing fires and when half does.
    Beside torch's step."""
    model, shapes = part_of_vit(ring.device.type) if model == "ViT-B/16" else (model, {**MODELS, **MANY}[model])
    shapes = SMOKE if ring.smoke else shapes
    entrants = {}
    for fire, name in ((0.5, BASELINE), (0.5, "whole step"), (0.5, "backend"), (0.0, "backend, none fires")):
        on = Field(shapes, F32, ring.device, fire)
        entrant = Stepper(TORCH[BASELINE] if name == BASELINE else METHODS["AdamSPD"], on)
        entrant.prepare()
        entrant.step()
        on.turn()
        entrants[name] = backend_alone(entrant) if "backend" in name else entrant
    entrants[COPY] = copy_of(4 * numel(shapes), ring.device)
    told = {"model": model, "tensors": len(shapes), "ours": ["whole step"]}
    ring.contest(entrants, "whole step", numel(shapes), **told)
