"""Streams of steps: the tensors of one call for a list of cases, and their gradients."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..backends import reference, registry
from ..core.bases import GroupSpec, spec_of_hyper, state_dtype_of, state_shape_of
from ..core.contract import StepTable, StepTensors
from ..core.eight_bit import SCALE, decoded, is_scale
from ..core.methods import GATES, LEARNED, MEASURES, RESULTS, rule_of
from .cases import Case, Settings

try:
    import numpy as np
except ImportError:
    np = None  # type: ignore[assignment]

SEED = 123456789
ABSENT = torch.empty(0)  # what a tensor does not keep, of a list that has others' of it


def _present(tensors: list[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t is not ABSENT]


class Numbers:
    """What is used of a numpy generator, on a machine without numpy. Its normals depend on the instruction set, and
    are others than numpy's."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def standard_normal(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.randn(shape, generator=self._generator, device="cpu", dtype=getattr(torch, dtype))

    def integers(self, high: int) -> int:
        return int(torch.randint(high, (), generator=self._generator, device="cpu"))


class Stepper:
    """The tensors of one op call for a table of cases, and the call itself on any backend.

    anchored: True for anchors of the parameters' dtype, False for zero, or a dtype.
    seed: the numbers depend on it alone, whatever the device.
    """

    def __init__(
        self,
        cases: tuple[Case, ...],
        settings: Settings,
        method: str,
        dtype: torch.dtype,
        anchored: bool | torch.dtype = True,
        seed: int = 0,
        device: torch.device | None = None,
        norm: str | None = None,
        gate: str = GATES[0],
    ) -> None:
        self.device = device = device or torch.get_default_device()
        self.settings, self.rule = settings, rule_of(method, norm, gate)
        self.random = Numbers(seed) if np is None else np.random.default_rng(seed)
        self.cases = cases
        self.anchored = bool(anchored)
        anchor_dtype = anchored if isinstance(anchored, torch.dtype) else dtype
        self.params = [case.lay(self._randn(case).to(device, dtype)) for case in cases]
        self.anchors = [
            case.lay((p.float() + 0.05 * self._randn(case).to(device)).to(anchor_dtype))
            if self.anchored
            else torch.zeros(())
            for case, p in zip(cases, self.params, strict=True)
        ]
        base, spec = settings.base, self.spec
        self.states: dict[str, list[Tensor]] = {}
        for key, needed in base.state.items():
            each = zip(cases, self.params, strict=True)
            of = [self._first(key, case, p) if needed(spec, p) else ABSENT for case, p in each]
            self.states[key] = [] if all(t is ABSENT for t in of) else of
        self.steps = [torch.zeros((), device=device) for _ in cases] if base.counted(spec, self.params[0]) else []
        n = sum(self.segments)
        self.results = torch.full((n, len(RESULTS)), -7.0, dtype=torch.float64, device=device)
        self.alphas = torch.full((n,), -7.0, dtype=torch.float64, device=device)

    @property
    def spec(self) -> GroupSpec:
        """The spec of the group that all tensors are in."""
        spec = spec_of_hyper(self.settings.base, {**self.settings.hyper, "anchored": self.anchored}, self.rule.name)
        return replace(spec, state_dtype=self.settings.state_dtype)

    @property
    def measures(self) -> Tensor:
        """The columns of the results that are measures."""
        return self.results[:, : len(MEASURES)]

    @property
    def segments(self) -> list[int]:
        """How many each tensor has."""
        return [self.rule.segments_of(p.shape) for p in self.params]

    @property
    def weights(self) -> list[Tensor]:
        """What a step begins from, and leaves: the master weights that still are what the parameters show, or those."""
        masters = self.states.get("master") or self.params
        return [torch.where(m.to(p.dtype) == p, m, p.to(m.dtype)) for m, p in zip(masters, self.params, strict=True)]

    def _first(self, key: str, case: Case, param: Tensor) -> Tensor:
        dtype = state_dtype_of(key, param, self.settings.state_dtype)
        if key in LEARNED or is_scale(key):
            return torch.zeros(state_shape_of(key, param), dtype=dtype, device=self.device)
        if key == "master":  # between the weights and their neighbours. Some parameters no longer show theirs
            return case.lay(
                param.float() * (1 + 0.6 * torch.finfo(param.dtype).eps * self._randn(case).to(self.device))
            )
        return case.lay(torch.zeros_like(param, dtype=dtype))

    def numbers(self, key: str, i: int) -> Tensor:
        """The state `key` of tensor i as numbers, in float64."""
        kept, scales = self.states[key][i], self.states.get(key + SCALE)
        return (decoded(kept, scales[i]) if scales and scales[i] is not ABSENT else kept).double()

    def _randn(self, case: Case) -> Tensor:
        return torch.as_tensor(self.random.standard_normal(case.shape, "float32"), device="cpu")

    def grads(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The next gradients of a fixed stream. By turns they lead strongly away from the anchor or gently back. So the
        momentum still leads away when the gradient says back, and then SPD fires. No ⟨g,d⟩ is near zero."""
        out = []
        for i, (case, p) in enumerate(zip(self.cases, self.params, strict=True)):
            anchor = self.anchors[i].float() if self.anchored else 0
            turn = 0.5 if self.random.integers(2) else -3.0
            turn *= -1 if self.settings.hyper["maximize"] else 1
            noise = 0.05 * self._randn(case).to(self.device)
            out.append(case.lay((noise + turn * (p.float() - anchor)).to(dtype or p.dtype)))
        return out

    def laid(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies on this device of tensors that have the cases' shapes, or of none, laid out as the cases say."""
        pairs = zip(self.cases, tensors, strict=bool(tensors))
        return [t if t is ABSENT else case.lay(t.to(self.device)) for case, t in pairs]

    def clone(self, device: torch.device | None = None) -> "Stepper":
        """The same state in its own memory, laid out alike, and on another device if one is given."""
        other = object.__new__(Stepper)
        other.__dict__.update(self.__dict__)
        other.device = device or self.device

        def copied(t: Tensor) -> Tensor:
            return t if t is ABSENT else t.to(other.device, copy=True)

        other.params = other.laid(self.params)
        other.anchors = other.laid(self.anchors) if self.anchored else [copied(t) for t in self.anchors]
        other.states = {
            key: [copied(t) for t in of] if key in LEARNED or is_scale(key) else other.laid(of)
            for key, of in self.states.items()
        }
        other.steps = [copied(t) for t in self.steps]
        other.results, other.alphas = copied(self.results), copied(self.alphas)
        return other

    @property
    def hyper(self) -> Tensor:
        """The one row of hyper-parameters."""
        hyper = {**self.settings.hyper, "anchored": float(self.anchored)}
        row = [[hyper[column] for column in self.settings.base.hyper]]
        return torch.tensor(row, dtype=torch.float64, device="cpu")

    def tensor(self, i: int, row: int = 0) -> StepTensors:
        """Tensor `i` as a backend takes it."""
        return StepTensors(
            self.spec,
            row,
            self.params[i],
            self.anchors[i] if self.anchored else None,
            {key: of[i] for key, of in self.states.items() if of and of[i] is not ABSENT},
            self.steps[i] if self.steps else None,
            SEED << 32 | i,
            f"case {self.cases[i].name!r}",
        )

    def table(self) -> StepTable:
        """All tensors as a backend takes them."""
        tensors = [self.tensor(i) for i in range(len(self.params))]
        return StepTable(self.settings.base, tensors, self.hyper, self.results, self.alphas)

    def op_args(self) -> list[Any]:
        """The arguments of the op from `anchors` on."""
        return [
            self.anchors if self.anchored else [], *map(_present, self.states.values()), self.steps,
            self.results, self.alphas, self.hyper, [len(self.params)], [self.rule.name],
            [SEED << 32 | i for i in range(len(self.params))],
        ]  # fmt: skip

    def run(self, backend: str, grads: list[Tensor]) -> None:
        """One step on a backend."""
        registry.prepare(backend, self.table())(grads)

    def run_oracle(self, grads: list[Tensor]) -> None:
        """One step by the reference in float64."""
        reference.step_(self.table(), grads, arithmetic=torch.float64)

    def tensors(self) -> Iterator[Tensor]:
        """All that a step may write."""
        yield from self.params
        for state in self.states.values():
            yield from _present(state)
        yield from self.steps
        yield self.results
        yield self.alphas
