"""A program that times a step on lists of real tensors: ours beside torch's fused AdamW and the eager loop.

python -m benchmarks.bringup.timings cuda

All take turns in one process. There are three passes. The first takes wall time from an idle device, and the host's
part of it. The second takes the device's time alone: a wait is queued ahead, so that all of a step is queued when the
device begins with it. (The eager loop waits for the device, so its time there is about its wall time.) The third is
about sweeps. It marks each launch of the Triton backend. Of the CUDA backend it takes whole steps in which nothing
fires, to stand beside those of the second pass: what these take longer is what firing costs.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.contenders import BASELINE, CUDA, EAGER, ONE_LAUNCH, TORCH, Contender, ours
from benchmarks.contest import COPY, Entrant, Field, Ring, Stepper, copy_of, entered, quartiles, ratios
from benchmarks.machine import free_memory
from benchmarks.shapes import MODELS, SMOKE, Shapes, numel

from .facts import peak
from .items import WORDS, Log, tiny

F32, BF16 = torch.float32, torch.bfloat16
LISTS: dict[str, tuple[Shapes, torch.dtype, dict[str, Any]]] = {
    "ViT-L/16, float32": (MODELS["ViT-L/16"], F32, {}),
    "ViT-L/16, bfloat16": (MODELS["ViT-L/16"], BF16, {}),
    "ViT-B/16, float32": (MODELS["ViT-B/16"], F32, {}),
    "LoRA, 256 × 32,768": (MODELS["LLaMA-7B, LoRA r=8"], F32, {"anchor": "zero"}),
    "2,000 × 256": ([(256,)] * 2000, F32, {}),
    "LLaMA-1B, bfloat16": (MODELS["LLaMA-1B"], BF16, {}),
    "LLaMA-1B, float32": (MODELS["LLaMA-1B"], F32, {}),
}
# OURS is the Triton backend's, of which the predictions are.
OURS, MOMENTS, LOOP = "AdamSPD", "AdamSPD, bf16 moments", "AdamSPD, eager"
STEPS = 11  # of each pass; together they are fewer than after which a bf16 weight stands still, see contest.ROUNDS
MARGIN = 3 * 2**30  # bytes: the buffers of a copy, and what the eager loop needs beside its state
CYCLES = 2e9  # a second, at about the highest clock
SECONDS = 4.0  # of the first pass
NONE = 0.03  # the share that may fire by rounding where nothing should
NONE_FIRES, SOME_FIRE = "a step, CUDA, nothing fires", "a step, CUDA"


def contenders(dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Contender]:
    like_torch = {MOMENTS: ours("spd", "triton", state_dtype=BF16, **options)} if dtype == BF16 else {}
    return {
        BASELINE: TORCH[BASELINE],
        OURS: ours("spd", "triton", **options),
        CUDA: ours("spd", "cuda", **options),
        ONE_LAUNCH: ours("spd", "triton_tickets", **options),
        **like_torch,
        LOOP: EAGER["AdamSPD"],
    }


def here(names: dict[str, Contender], device: torch.device) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those whose backend is ready, and why that of the others is not."""
    absent = {name: why for name, of in names.items() if (why := of.missing(device))}
    return {name: of for name, of in names.items() if name not in absent}, absent


def with_room(
    names: dict[str, Contender], n: int, dtype: torch.dtype, free: float
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those for which the memory is enough, in their order, and why the others are not among them."""
    taken, absent, left = {}, {}, free - MARGIN - n * dtype.itemsize
    for name, of in names.items():
        need = n * (2 * dtype.itemsize + 2 * (of.state or dtype).itemsize)
        if name == LOOP:
            need *= 2  # its temporaries are as large as the largest tensors
        if need <= left:
            taken[name], left = of, left - need
        else:
            absent[name] = f"needs {need / 1e9:.0f} GB beside the others"
    return taken, absent


class Pedantic:
    """Does for a Ring what pytest-benchmark's fixture does, on a machine without it."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, run: Callable[[], None], setup: Callable[[], None], rounds: int, iterations: int) -> None:
        for _ in range(rounds):
            setup()
            run()


class Clock:
    """Marks in the stream of a device, or in time on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self._cuda:
            return SimpleNamespace(at=time.perf_counter())
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two marks, when the device has passed both."""
        if not self._cuda:
            return float(end.at - begin.at)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def ahead(self, seconds: float) -> None:
        """Keeps the idle device busy for so long, so that what is queued now waits."""
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda._sleep(int(seconds * CYCLES))


@contextmanager
def marked(clock: Clock) -> Iterator[list[tuple[str, Any, Any]]]:
    """The launches of our Triton kernels: name, mark before, mark after."""
    from robustft_kernels.triton_kernels import launch  # which need not be there

    marks: list[tuple[str, Any, Any]] = []
    original = launch.Launch.__call__

    def launched(of: launch.Launch, *given: Tensor | None) -> None:
        begin = clock.mark()
        original(of, *given)
        marks.append((of.kernel.__name__, begin, clock.mark()))

    with patch.object(launch.Launch, "__call__", launched):
        yield marks


def on_device(entrants: dict[str, Entrant], clock: Clock, host: dict[str, float], steps: int) -> dict[str, list[float]]:
    """The seconds of each round in which the device was at work on a step."""
    seconds: dict[str, list[float]] = {name: [] for name in entrants}
    for _ in range(steps):
        for name, entrant in entrants.items():
            entrant.prepare()
            clock.ahead(min(2e-2, 1e-4 + 2 * host[name]))
            begin = clock.mark()
            entrant.step()
            seconds[name].append(clock.seconds(begin, clock.mark()))
    return seconds


def sweeps_of(stepper: Stepper, clock: Clock, host: float, steps: int) -> dict[str, list[float]]:
    """The seconds of each launch, by kernel."""
    found: dict[str, list[float]] = {}
    for _ in range(steps):
        stepper.prepare()
        clock.ahead(min(2e-2, 1e-3 + 2 * host))
        with marked(clock) as marks:
            stepper.step()
        for name, begin, end in marks:
            found.setdefault(name, []).append(clock.seconds(begin, end))
    return found


def none_fires(stepper: Stepper, on: Field, clock: Clock, host: float, steps: int) -> list[float]:
    """The seconds of each round in which the device was at work on a step in which nothing fires."""
    on.let_fire(False)
    try:
        seconds = on_device({"": stepper}, clock, {"": host}, steps)[""]
        if (fired := stepper.fired()) > NONE:
            raise RuntimeError(f"{fired:.0%} fired in steps in which nothing should")
        return seconds
    finally:
        on.let_fire(True)


def sweeps_told(
    seconds: dict[str, list[float]], contender: Contender, on: Field, fired: float, of_peak: float
) -> dict[str, dict[str, Any]]:
    """What is kept of sweeps, or of whole steps of the CUDA backend: quartiles of seconds, bytes, the share of the peak
    bandwidth, and how much fired."""
    assert contender.moves is not None
    first = contender.moves(on.sizes, on.dtype, 0.0)
    whole = contender.moves(on.sizes, on.dtype, fired)
    moved = {"step_sweep": first, "pull_sweep": whole - first, "ticket_sweep": whole}
    moved.update({NONE_FIRES: first, SOME_FIRE: whole})
    return {
        name: {
            "seconds": quartiles(of),
            "bytes": moved[name],
            "fired": 0.0 if name == NONE_FIRES else fired,
            **({"of peak": round(moved[name] / median(of) / of_peak, 4)} if of_peak else {}),
        }
        for name, of in seconds.items()
    }


def measure(shapes: Shapes, dtype: torch.dtype, options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    small = device.type == "cpu"
    steps = 2 if small else STEPS
    shapes, n = (SMOKE, numel(SMOKE)) if small else (shapes, numel(shapes))
    all_of, absent = here(contenders(dtype, options), device)
    taken, too_large = with_room(all_of, n, dtype, free_memory(device))
    absent.update(too_large)
    on, entrants, failed = entered(taken, shapes, dtype, device)
    info = Pedantic()
    ring = Ring(info, device, SECONDS, small, patience=0, at_most=steps)
    watched = OURS if OURS in entrants else BASELINE
    all_: dict[str, Entrant] = dict(entrants)
    all_[COPY] = copy_of(4 * n, device)
    told = ring.contest(all_, watched, n, absent={**absent, **failed}, tensors=len(on.sizes), dtype=str(dtype)[6:])

    clock, host = Clock(device), {name: of["host"] for name, of in told["contenders"].items()}
    for name, seconds in (alone := on_device(all_, clock, host, steps)).items():
        over = quartiles(ratios(seconds, alone[BASELINE]))
        told["contenders"][name].update(device=median(seconds), device_ratio=[round(q, 4) for q in over])
    told["sweeps"], of_peak = {}, 0.0 if small else peak()
    for name in (OURS, CUDA, ONE_LAUNCH):
        if name in entrants:
            try:
                fired = told["fired"] = round(entrants[name].fired(), 4)
                if name == CUDA:
                    seconds_of = {NONE_FIRES: none_fires(entrants[name], on, clock, host[name], steps)}
                    seconds_of[SOME_FIRE] = alone[name]
                else:
                    seconds_of = sweeps_of(entrants[name], clock, host[name], steps)
                told["sweeps"].update(sweeps_told(seconds_of, taken[name], on, fired, of_peak))
            except Exception as error:  # the rest is worth keeping
                failed[f"sweeps of {name}"] = f"{type(error).__name__}: {error}"
    if failed:
        told.update(outcome="failed", why="; ".join(f"{name}: {why}" for name, why in failed.items())[:WORDS])
    return told


def main(device: str) -> None:
    torch.set_num_threads(1 if device == "cpu" else 4)
    names = list(LISTS)[: 1 if tiny() else None]
    Log().each({name: partial(measure, *LISTS[name], torch.device(device)) for name in names})


if __name__ == "__main__":
    main(*sys.argv[1:])
