"""Sweeps that make no step: they measure tensors as they are, or pull them. Every half of a step, every projection and
every pull around another optimizer's step is one of these.

The base is `bases.NO_STEP`, θ̃ = θ. The rule says what a sweep does. "observe" measures, and "given" pulls by given
alphas. Any other rule does what it does after a step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..backends.backend import Backend
from ..core.bases import NO_STEP, Base, GroupSpec
from ..core.contract import Run, StepTable, StepTensors, empty_results
from ..core.methods import RULES


class NoStep:
    """A prepared sweep.

    results, alphas: as in `contract.StepTable`. It makes its own tables if none are given.
    """

    def __init__(
        self,
        backend: Backend,
        tensors: Sequence[StepTensors],
        hyper: Tensor,
        live: Mapping[int, Tensor] | None = None,
        results: Tensor | None = None,
        alphas: Tensor | None = None,
    ) -> None:
        device = tensors[0].param.device if tensors else torch.device("cpu")
        own_results, own_alphas = empty_results(sum(of.segments for of in tensors), device)
        self.results = own_results if results is None else results
        self.alphas = own_alphas if alphas is None else alphas
        table = StepTable(NO_STEP, tensors, hyper, self.results, self.alphas, live or {})
        self._run: Run = backend.prepare(table)

    def __call__(
        self,
        grads: Sequence[Tensor] = (),
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """The sweep. Without gradients ⟨g,d⟩ is nan. Writes nothing when `found_inf` is not 0."""
        self._run(list(grads), grad_scale, found_inf)


def half_of(spec: GroupSpec) -> GroupSpec:
    """A group under the half of its rule, which measures as much and decides nothing. If the rule has no half, the
    group as it is."""
    return spec.under(RULES[spec.rule.half or spec.rule.name])


def observed(tensors: Sequence[StepTensors], base: Base = NO_STEP) -> list[StepTensors]:
    """The tensors under the halves of their rules."""
    return [of.under(half_of(of.spec).rule, base) for of in tensors]


def pulled(tensors: Sequence[StepTensors]) -> list[StepTensors]:
    """The tensors under the halves that pull by given alphas."""
    return [of.under(RULES[of.spec.rule.pull_half], NO_STEP) for of in tensors]


def rows_of(tensors: Sequence[StepTensors]) -> list[StepTensors]:
    """The tensors to be measured by rows."""
    return [of.under(RULES["observe_rows"], NO_STEP) for of in tensors]


def whole_of(tensors: Sequence[StepTensors]) -> list[StepTensors]:
    """The tensors to be measured as a whole."""
    return [of.under(RULES["observe"], NO_STEP) for of in tensors]


def deltas_of(tensors: Sequence[StepTensors]) -> list[StepTensors]:
    """The tensors' deltas, to be measured by rows. They are distances already, so their anchor is zero."""
    spec = GroupSpec(RULES["observe_rows"])
    return [replace(of, spec=spec, param=of.state["delta"], anchor=None, state={}, step=None) for of in tensors]
