"""The kernels of csrc/cuda, run on this CPU: what nvcc makes of them, behind the backend's own host side.

A step must have the bits of the native backend, which shares their formulas and the order of their sums.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustft_kernels.backends import cuda, registry
from robustft_kernels.core.bases import NO_STEP
from robustft_kernels.core.contract import StepTable
from robustft_kernels.core.methods import RULES
from robustft_kernels.step.no_step import NoStep
from robustft_kernels.testing import Stepper
from robustft_kernels.testing.cases import misaligned

from ..table import ANCHORS, TABLE, covering
from . import steps
from .driver import Driver, installed
from .module import plain
from .program import CACHE, Program, Schedule, spans_of
from .samples import compiled
from .steps import BF16, F32, F64, TINY, Row, given, made_tiny, with_live_lr

APART, HALVES = "gradients begin anywhere", "without a base step"
ROWS = (
    *(row for row in steps.ROWS if not row.tickets),
    Row("spd", "l2", "adamw", F32, how=APART),
    Row("spd", "l2", "adamw", BF16, how=APART),
    Row("spd", "l2", "adamw", F64, F32, how=APART),
    Row("ftp", "mars_rows", "adamw", F32, BF16, how=APART),
    Row("spd", "l2", "sgd, momentum, dampening", F32, BF16),
    Row("none", None, "adamw", F32, how=HALVES),
    Row("none", None, "adamw, master", BF16, F32, how=HALVES),
    Row("project", "mars_rows", "sgd, decay", F64, how=HALVES),
)
CSRC = Path(__file__).parents[2] / "csrc"


@cache
def ptx() -> str:
    """What nvcc makes of the kernels. Kept in a cache."""
    sources = sorted([*CSRC.glob("*.h"), *CSRC.glob("cuda/*")])
    kept = CACHE / f"sweeps-{sha256(b''.join(of.read_bytes() for of in sources)).hexdigest()[:24]}.ptx"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_suffix(f".{os.getpid()}")
        compiled(CSRC / "cuda" / "sweeps.cu", fresh)
        fresh.rename(kept)
    return plain(kept.read_text())


@dataclass
class Device:
    """A GPU that is this machine. schedule, fault, seen, launched: as of device.Device."""

    schedule: Schedule = field(default_factory=Schedule)
    fault: Callable[[str], str] | None = None
    seen: list[str] = field(default_factory=list)
    launched: list[str] = field(default_factory=list)
    _programs: dict[tuple[str, str], Program] = field(default_factory=dict)
    _touched: Callable[[], Iterator[Tensor]] = lambda: iter(())

    def __post_init__(self) -> None:
        self.driver = Driver(self._launch)

    def _launch(self, name: str, programs: int, threads: int, parameters: int) -> None:
        text = ptx() if self.fault is None else self.fault(ptx())
        if (name, text) not in self._programs:
            self._programs[name, text] = Program(text, name)
        program = self._programs[name, text]
        assert threads == program.kernel.threads
        spans = sorted({span for of in self._touched() for span in spans_of(of)})
        given = ctypes.string_at(parameters, program.kernel.bytes)
        found = program(programs, 0, given, spans, self.schedule)
        self.launched.append(name)
        self.seen += [line for line in found if line not in self.seen]

    def prepare(self, table: StepTable) -> Any:
        """As cuda.prepare. The device knows what the step's kernels may touch."""
        return _Watched(self, cuda.prepare(table), table)

    def run(self, run: Any, table: StepTable, grads: list[Tensor], others: list[Tensor | None], call: Any) -> Any:
        """Makes a step. Raises what a launch has raised."""

        def touched() -> Iterator[Tensor]:
            for of in table.tensors:
                yield from (t for t in (of.param, of.anchor, of.step, *of.state.values()) if t is not None)
            yield from (*grads, *(t for t in others if t is not None), *table.live.values())
            yield from (table.results, table.alphas, *run._step.memory())

        self._touched = touched
        try:
            return call()
        except RuntimeError:
            raise self.driver.failed or AssertionError("the driver has not failed") from None
        finally:
            self.driver.failed = None


@dataclass
class _Watched:
    device: Device
    of: Any
    table: StepTable

    def __call__(self, grads: list[Tensor], grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        others = [grad_scale, found_inf]
        self.device.run(self.of, self.table, grads, others, lambda: self.of(grads, grad_scale, found_inf))

    def squared_norm(self, grads: list[Tensor]) -> Tensor:
        squared: Tensor = self.device.run(self.of, self.table, grads, [], lambda: self.of.squared_norm(grads))
        return squared


def install() -> Device:
    """Makes the backend "cuda" step CPU tensors, for the whole process."""
    device = Device()
    installed(device.driver.functions)
    registry.BACKENDS["cuda"] = replace(registry.BACKENDS["cuda"], prepare=device.prepare)
    return device


def table(pairs: bool = False) -> list[Row]:
    """The table of cases as rows: all whose settings act in their dtype, or as many as meet every pair."""
    acting = [of for of in TABLE if of.settings.acts_on(of.dtype)]
    rows = covering(0, acting) if pairs else acting
    return [Row(*of.method_norm, of.settings.name, of.dtype, ANCHORS[of.anchor]) for of in rows]


def step(row: Row) -> Stepper:
    """Makes the row's step on both. Raises AssertionError naming what has other bits."""
    got = row.settled()
    grads = got.grads()
    grads = made_tiny(got, grads) if row.how == TINY else grads
    want = got.clone()
    if row.how == "norm":
        norms = [registry.prepare(on, of.table()).squared_norm(grads) for on, of in (("native", want), ("cuda", got))]
        assert torch.equal(*norms), f"the norm is {norms[1]}, and not {norms[0]}"
        return got
    if row.how == HALVES:
        for of, on in ((want, "native"), (got, "cuda")):
            halves(row, of, on, grads)
        assert_same_bits(got, want)
        return got
    scaled, options = given(row, grads)
    scaled = list(map(misaligned, scaled)) if row.how == APART else scaled
    registry.prepare("native", want.table())(scaled, **options)
    table = with_live_lr(got.table()) if row.how == "lr is a tensor" else got.table()
    registry.prepare("cuda", table)(scaled, **options)
    assert_same_bits(got, want)
    return got


def halves(row: Row, of: Stepper, backend: str, grads: list[Tensor]) -> None:
    """Measures, with gradients and without, and then pulls by alphas that are given."""
    by_rows = "_rows" if row.norm else ""
    hyper = torch.tensor([[0.0] * len(NO_STEP.hyper)], dtype=torch.float64)
    hyper[0, NO_STEP.hyper.index("anchored")] = 1
    for name, gradients in (("observe", grads), ("observe", []), ("given", [])):
        of.rule = RULES[name + by_rows]
        n = sum(of.segments)
        alphas = torch.tensor([0.0, 1.0, 0.37], dtype=torch.float64).repeat(n)[:n] if name == "given" else None
        tensors = [of.tensor(i).under(of.rule, NO_STEP) for i in range(len(of.params))]
        sweep = NoStep(registry.BACKENDS[backend], tensors, hyper, alphas=alphas)
        sweep(gradients)
        of.results, of.alphas = sweep.results, torch.zeros(0)


def assert_same_bits(got: Stepper, want: Stepper) -> None:
    """Raises AssertionError naming the first tensor of the steps that differs, and the first case."""
    for name, mine, theirs in (
        ("measures", [got.results], [want.results]), ("alphas", [got.alphas], [want.alphas]),
        *((key, got.states[key], want.states[key]) for key in got.states),
        ("steps", got.steps, want.steps), ("params", got.params, want.params),
    ):  # fmt: skip
        for k, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            differ = a.nan_to_num(nan=0.125) != b.nan_to_num(nan=0.125)
            where = f"{name} of {got.cases[k].name!r}" if len(mine) == len(got.cases) else name
            assert not differ.any(), (
                f"{where}: {int(differ.sum())} of {a.numel()} differ, {a[differ][:3]}, {b[differ][:3]}"
            )


def check(device: Device, row: Row) -> list[str]:
    """What is wrong with a row's step: a line each."""
    return steps.check(device, row, step)
