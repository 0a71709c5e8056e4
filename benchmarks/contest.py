"""Contenders take turns, round after round, in one process. A ratio compares two steps of the same round.

passes.py repeats contests in other processes.
"""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from statistics import median, quantiles
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .contenders import BASELINE, Contender
from .machine import BUSY, GLANCE, Others, wait_until_idle
from .shapes import SMOKE, Shapes

WARM_UP = 3
# At least and at most. Later the momentum has faded, so that a bf16 weight stands still and its tensor fires no more.
ROUNDS = 4, 36
COPY = "copy"  # reads and writes as many bytes as the parameters have: the unit of GB/s
TINY = 1e-8


@dataclass
class Times:
    """Seconds of each round. wall: until the device is idle. host: until the call returned."""

    wall: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def add(self, run: Callable[[], object], device: torch.device) -> None:
        synchronize = torch.cuda.synchronize if device.type == "cuda" else _nothing
        synchronize()
        began = time.perf_counter()
        run()
        returned = time.perf_counter()
        synchronize()
        self.wall.append(time.perf_counter() - began)
        self.host.append(returned - began)


def quartiles(values: list[float]) -> list[float]:
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def _nothing() -> None: ...


class Field:
    """Parameters of these shapes for each contender, and gradients that all share.

    The first gradient leads away from the anchor. Later ones are tiny, so the momentum goes on leading away. Some
    tensors, with the share `fire` of all elements, then have gradients that lead back. Under SPD these tensors fire,
    and the others do not.
    """

    def __init__(self, shapes: Shapes, dtype: torch.dtype, device: torch.device, fire: float = 0.5) -> None:
        self.device, self.dtype = device, dtype
        self.sizes = [prod(shape) for shape in shapes]
        generator = torch.Generator(device).manual_seed(0)
        self._shapes, self._block = shapes, torch.randn(2**20, generator=generator, device=device) * 0.02
        self.grads = [self._tiled(shape).neg_() for shape in shapes]
        self.fired = self._choose(fire)
        self._later, self._firing = False, True

    def _choose(self, fire: float) -> list[bool]:
        chosen, seen, fired = [], 0, 0
        for size in self.sizes:
            seen += size
            chosen.append(fired + size / 2 < fire * seen)
            fired += size * chosen[-1]
        return chosen

    def params(self) -> list[nn.Parameter]:
        return [nn.Parameter(self._tiled(shape)) for shape in self._shapes]

    def _tiled(self, shape: tuple[int, ...]) -> Tensor:
        flat = torch.empty(prod(shape), dtype=self.dtype, device=self.device)
        for part in flat.split(self._block.numel()):
            part.copy_(self._block[: part.numel()])
        return flat.view(shape)

    def turn(self) -> None:
        """Goes from the first gradients to the later ones."""
        if not self._later:
            for grad, fires in zip(self.grads, self.fired, strict=True):
                grad.mul_(-TINY if fires else TINY)
            self._later = True

    def let_fire(self, firing: bool) -> None:
        """Whether the tensors that are to fire do so in the next steps. Their later gradients lead back, or not."""
        assert self._later
        if firing != self._firing:
            for grad, fires in zip(self.grads, self.fired, strict=True):
                if fires:
                    grad.neg_()
            self._firing = firing


class Entrant(Protocol):
    """Who takes turns: `step` is timed, `prepare` is not."""

    def prepare(self) -> None: ...

    def step(self) -> None: ...

    def moved(self) -> float | None:
        """Bytes that a step had to move, if they are counted."""


class Work:
    """Any work as an entrant."""

    def __init__(
        self, run: Callable[[], object], prepare: Callable[[], object] = _nothing, moved: float | None = None
    ) -> None:
        self.step, self.prepare, self._moved = run, prepare, moved

    def moved(self) -> float | None:
        return self._moved


class Stepper:
    """A contender's optimizer on a field."""

    def __init__(self, contender: Contender, on: Field) -> None:
        self.params, self._field, self._contender = on.params(), on, contender
        self.optimizer = contender.make(self.params)

    def prepare(self) -> None:
        for param, grad in zip(self.params, self._field.grads, strict=True):
            param.grad = grad

    def step(self) -> None:
        self.optimizer.step()

    def moved(self) -> float | None:
        count = self._contender.moves
        return count and count(self._field.sizes, self._field.dtype, self.fired())

    def fired(self) -> float:
        """The share of the elements that the last step pulled, 0 for the optimizers of others."""
        telemetry = getattr(self.optimizer, "telemetry", None)
        if telemetry is None:
            return 0.0
        pairs = zip(telemetry().values(), self._field.sizes, strict=True)
        return float(sum(of.selected * size for of, size in pairs) / sum(self._field.sizes))


def entered(
    contenders: Mapping[str, Contender], shapes: Shapes, dtype: torch.dtype, device: torch.device, fire: float = 0.5
) -> tuple[Field, dict[str, Stepper], dict[str, str]]:
    """A field with the contenders on it, each after its first step, and why the others are not there."""
    on = Field(shapes, dtype, device, fire)
    entrants: dict[str, Stepper] = {}
    absent: dict[str, str] = {}
    for name, contender in contenders.items():
        if why := contender.missing(device):
            absent[name] = why
            continue
        try:
            entrant = Stepper(contender, on)
            entrant.prepare()
            entrant.step()  # many fail only here
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
        else:
            entrants[name] = entrant
    on.turn()
    return on, entrants, absent


def copy_of(n: int, device: torch.device) -> Work:
    """A copy of n bytes by the device, or of fewer if those are enough to tell its bandwidth."""
    n = min(n, 2**29)
    source = torch.ones(n // 4, device=device)
    target = torch.empty_like(source)
    return Work(lambda: target.copy_(source), moved=2 * n)


def ratios(of: list[float], to: list[float]) -> list[float]:
    return [a / b for a, b in zip(of, to, strict=True)]


@dataclass
class Ring:
    """Where contests take place. benchmark: pytest-benchmark's fixture. seconds: how long a contest is to take.
    patience: how many seconds are left to wait until other programs let the machine go. at_most: so many rounds."""

    benchmark: Any
    device: torch.device
    seconds: float
    smoke: bool
    patience: float
    at_most: int = ROUNDS[1]

    def rounds(self, seconds: float, least: int = ROUNDS[0]) -> int:
        """How many, if one takes so many seconds."""
        return 2 if self.smoke else min(self.at_most, max(least, int(self.seconds / seconds)))

    def idle(self) -> bool:
        """Whether other programs have let the machine go, or do so while there is patience."""
        began = time.monotonic()
        idle = wait_until_idle(self.patience)
        self.patience = max(0.0, self.patience - (time.monotonic() - began - GLANCE))
        return idle

    def contest(
        self,
        entrants: Mapping[str, Entrant],
        watched: str,
        n: int,
        baseline: str = BASELINE,
        least: int = ROUNDS[0],
        **told: Any,
    ) -> dict[str, Any]:
        """Times the `step` of each entrant, each after its `prepare`. pytest-benchmark times that of the watched one.

        n: how many parameters. least: so many rounds, however long they take. The benchmark's `extra_info` gets what is
        told, and how many cores others used. For each entrant, it gets the quartiles of its time over the baseline's,
        the median seconds, the host's part of them, and the bytes that it moved.
        """
        lasted, spent = 0.0, 0.0
        for _ in range(WARM_UP):
            if spent > self.seconds:
                break
            began = time.perf_counter()
            for entrant in entrants.values():
                entrant.prepare()
                entrant.step()
            lasted = time.perf_counter() - began
            spent += lasted
        gc.collect()
        idle = self.idle()
        times = {name: Times() for name in entrants}

        def others_first() -> None:
            for name, entrant in entrants.items():
                entrant.prepare()
                if name != watched:
                    times[name].add(entrant.step, self.device)
            entrants[watched].prepare()

        def step() -> None:
            times[watched].add(entrants[watched].step, self.device)

        others = Others()
        self.benchmark.pedantic(step, setup=others_first, rounds=self.rounds(lasted, least), iterations=1)
        busy = others.cores()
        info: dict[str, Any] = self.benchmark.extra_info
        info.update(
            told, baseline=baseline, watched=watched, busy=round(busy, 2), trusted=idle and busy <= BUSY, parameters=n,
            threads=torch.get_num_threads(),
            contenders={
                name: {
                    "ratio": [round(q, 4) for q in quartiles(ratios(of.wall, times[baseline].wall))],
                    "seconds": median(of.wall),
                    "host": median(of.host),
                    **({} if (moved := entrants[name].moved()) is None else {"bytes": moved}),
                }
                for name, of in times.items()
            },
        )  # fmt: skip
        return info

    def race(
        self,
        contenders: Mapping[str, Contender],
        shapes: Shapes,
        dtype: torch.dtype,
        watched: str,
        baseline: str = BASELINE,
        fire: float = 0.5,
        **told: Any,
    ) -> None:
        """A contest of optimizers on one list of shapes. Those that cannot run here are named with the reason."""
        on, entrants, absent = entered(contenders, SMOKE if self.smoke else shapes, dtype, self.device, fire)
        watched = watched if watched in entrants else baseline
        n, about = sum(on.sizes), entrants[watched]
        all_ = {**entrants, COPY: copy_of(4 * n, self.device)}
        told.update(absent=absent, tensors=len(on.sizes), ours=[name for name in entrants if contenders[name].ours])
        info = self.contest(all_, watched, n, baseline, **told)
        info.update(dtype=str(dtype).removeprefix("torch."), fired=about.fired())
