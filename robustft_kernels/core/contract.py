"""One step as every backend takes it: a table of tensors, and a function of their gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from .bases import Base, GroupSpec
from .methods import RESULTS, Rule


@dataclass(frozen=True, eq=False)
class StepTensors:
    """One parameter of a step, with all that belongs to it. What it does not have is None, or not in `state`.

    row: its group's row of hyper-parameters.
    state: moments and their scales, "delta", learned numbers and "master", by their keys.
    step: the count of its steps, a float32.
    seed: of its random bits.
    label: its name in messages.
    """

    spec: GroupSpec
    row: int
    param: Tensor
    anchor: Tensor | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    step: Tensor | None = None
    seed: int = 0
    label: str = ""

    @property
    def segments(self) -> int:
        """How many segments its rule sees."""
        return self.spec.rule.segments_of(self.param.shape)

    @property
    def dithered(self) -> bool:
        """Whether its weights are rounded stochastically."""
        rounds = self.spec.stochastic_rounding and self.param.dtype == torch.bfloat16
        return rounds and "master" not in self.state

    def under(self, rule: Rule, base: Base) -> "StepTensors":
        """The same under another rule, with what this base and that rule need."""
        spec = self.spec.under(rule)
        return replace(
            self,
            spec=spec,
            state={key: self.state[key] for key, needed in base.state.items() if needed(spec, self.param)},
            step=self.step if base.counted(spec, self.param) else None,
        )


@dataclass(frozen=True, eq=False)
class StepTable:
    """All tensors of a step on one device. The tensors of a group are neighbours.

    hyper: float64 on the CPU, one row a group, with the columns `Base.hyper`.
    results: float64, one row a segment in the order of the tensors, with the columns `methods.RESULTS`. The step writes
        the measures, or nan if the rule measures nothing. It adds one to the next column when α ≠ 1, and to the last
        when ⟨g,d⟩ > 0.
    alphas: float64, one a segment. The step writes them, or reads them if the rule is given its α.
    live: tensors on the device that hold hyper-parameters, by their place in the flat `hyper`. Backends that keep
        addresses read them at each step. The others take none.
    """

    base: Base
    tensors: Sequence[StepTensors]
    hyper: Tensor
    results: Tensor
    alphas: Tensor
    live: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def firsts(self) -> list[int]:
        """Each tensor's first segment, and at the end how many there are."""
        return list(accumulate((of.segments for of in self.tensors), initial=0))

    def check(self) -> None:
        """Raises ValueError naming the first table whose shape, dtype or device does not fit."""
        device = self.tensors[0].param.device if self.tensors else self.results.device
        rows = max((of.row for of in self.tensors), default=-1) + 1
        segments = self.firsts[-1]
        for name, of, shape, where in (
            ("hyper", self.hyper, (max(rows, len(self.hyper)), len(self.base.hyper)), torch.device("cpu")),
            ("results", self.results, (segments, len(RESULTS)), device),
            ("alphas", self.alphas, (segments,), device),
        ):
            if (tuple(of.shape), of.dtype, of.device) != (shape, torch.float64, where) or not of.is_contiguous():
                raise ValueError(
                    f"robustft: {name} must be a contiguous float64 tensor of shape {shape} on {where}, got {of.dtype} "
                    f"of shape {tuple(of.shape)} on {of.device}"
                )


def empty_results(segments: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Results and alphas before any step: zeros and ones."""
    return (
        torch.zeros(segments, len(RESULTS), dtype=torch.float64, device=device),
        torch.ones(segments, dtype=torch.float64, device=device),
    )


def own_gradients(table: StepTable) -> list[Tensor]:
    """Those of the parameters. Raises ValueError naming the first that has none."""
    grads = []
    for of in table.tensors:
        if of.param.grad is None:
            raise ValueError(f"robustft: {of.label or 'a parameter'} has lost its gradient")
        grads.append(of.param.grad)
    return grads


class Run(Protocol):
    """A prepared step: a function of the gradients of the table's parameters."""

    def __call__(
        self, grads: list[Tensor] | None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        """One step, with gradients divided by `grad_scale`. Writes nothing when `found_inf` is not 0.

        None takes each parameter's own gradients. A base that makes no step takes an empty list too, and ⟨g,d⟩ is then
        nan.
        """

    def squared_norm(self, grads: list[Tensor] | None) -> Tensor:
        """Σ g² over all gradients: a float64 on their device. The host does not wait for it."""
        ...
