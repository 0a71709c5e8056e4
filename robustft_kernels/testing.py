"""Cases, streams and tolerances: one place, for the tests and the benchmarks.

Tolerances are derived. One step from identical state is compared with the oracle in float64, and may differ by
- rounding to storage: 2 units in the last place of the stored value;
- arithmetic: a dozen roundings of the operands, an update's size being lr·(1 + |g|) even where its moment cancels;
- the measured gain: θ̃ may fall on the neighbouring stored value, so that the sum Σ u(2d + u) moves by about
  2|c|·ulp(θ̃) for each element, independently: √(Σ(2|c|·ulp)²), three times that; the rounding of the factor
  1 − lr·wd moves all of them together: ½ulp(1)·Σ 2|cθ|;
- α: what the gain's difference makes of it, times |c|.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import reference
from .bases import ADAMW, MEASURES, SGD, Base, arithmetic_of
from .methods import METHODS

CHUNK = 16384
SEED = 123456789
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)


def _channels_last(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.channels_last)


def _misaligned(t: Tensor) -> Tensor:
    """One element off the allocator's alignment."""
    return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)


@dataclass(frozen=True)
class Case:
    """A tensor to step: its shape, and how it lies in memory."""

    name: str
    shape: tuple[int, ...]
    lay: Callable[[Tensor], Tensor] = torch.clone


# What a vector path, its tail, a block, a chunk and several chunks each see; every number of dimensions from 0 to 5.
CASES = (
    Case("0-d", ()),
    Case("empty", (0,)),
    Case("empty matrix", (3, 0)),
    Case("1", (1,)),
    Case("3", (3,)),
    Case("4k-1", (4 * 16 - 1,)),
    Case("4k+1", (4 * 16 + 1,)),
    Case("tile, block and tail", (1024 + 64 + 17,)),
    Case("one chunk", (CHUNK,)),
    Case("chunk and 1", (CHUNK + 1,)),
    Case("two chunks and 1", (2 * CHUNK + 1,)),
    Case("several chunks", (5 * CHUNK + 333,)),
    Case("matrix", (257, 129)),
    Case("transposed", (211, 173), _transposed),
    Case("misaligned", (3 * CHUNK + 5,), _misaligned),
    Case("conv", (32, 16, 3, 3)),
    Case("channels_last", (40, 32, 9, 7), _channels_last),
    Case("5-d", (2, 3, 4, 5, 6)),
)


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of a base, with the options that change its formula."""

    name: str
    base: Base
    hyper: dict[str, float]


def _adamw(name: str, **other: float) -> Settings:
    defaults = dict(
        lr=1e-2,
        beta1=0.9,
        beta2=0.99,
        eps=1e-8,
        weight_decay=0,
        strength=1.3,
        amsgrad=0,
        maximize=0,
        stochastic_rounding=0,
    )
    return Settings(name, ADAMW, {**defaults, **other})


def _sgd(name: str, **other: float) -> Settings:
    defaults = dict(
        lr=1e-2, momentum=0, dampening=0, weight_decay=0, strength=1.3, nesterov=0, maximize=0, stochastic_rounding=0
    )
    return Settings(name, SGD, {**defaults, **other})


SETTINGS = (
    _adamw("adamw"),
    _adamw("adamw, decay", weight_decay=0.1),
    _adamw("adamw, amsgrad, maximize", amsgrad=1, maximize=1),
    _sgd("sgd, decay", weight_decay=0.01),
    _sgd("sgd, momentum, dampening", momentum=0.9, dampening=0.2, weight_decay=0.01),
    _sgd("sgd, nesterov, maximize", momentum=0.9, nesterov=1, maximize=1),
    _adamw("adamw, stochastic", stochastic_rounding=1),
    _sgd("sgd, stochastic", stochastic_rounding=1),
)


class Stepper:
    """The tensors of one op call for a table of cases, and the call itself on any backend.

    anchored: True for anchors of the parameters' dtype, False for zero, or a dtype. The numbers are those of `seed`,
    whatever the device.
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
    ) -> None:
        self.device = device = device or torch.get_default_device()
        self.settings, self.rule = settings, METHODS[method].rule
        self.random = np.random.default_rng(seed)  # torch's normals depend on the instruction set
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
        wide = arithmetic_of(dtype)
        hyper, base = settings.hyper, settings.base
        drawn = {**hyper, "momentum": hyper.get("momentum", 0)}
        self.states = {
            key: [case.lay(torch.zeros(case.shape, dtype=wide, device=device)) for case in cases]
            if wanted(drawn)
            else []
            for key, wanted in base.state
        }
        self.steps = [torch.zeros((), device=device) for _ in cases] if base.counted(drawn) else []
        self.measures = torch.full((len(cases), len(MEASURES)), -7.0, dtype=torch.float64, device=device)
        self.alphas = torch.full((len(cases),), -7.0, dtype=torch.float64, device=device)

    def _randn(self, case: Case) -> Tensor:
        return torch.from_numpy(np.asarray(self.random.standard_normal(case.shape, np.float32)))

    def grads(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The next gradients of a fixed stream: strongly away from the anchor or gently back, by turns, so that the
        momentum still leads away when the gradient says back, where SPD fires; no ⟨g,d⟩ is near zero."""
        out = []
        for i, (case, p) in enumerate(zip(self.cases, self.params, strict=True)):
            anchor = self.anchors[i].float() if self.anchored else 0
            turn = 0.5 if self.random.integers(2) else -3.0
            turn *= -1 if self.settings.hyper["maximize"] else 1
            noise = 0.05 * self._randn(case).to(self.device)
            out.append(case.lay((noise + turn * (p.float() - anchor)).to(dtype or p.dtype)))
        return out

    def clone(self) -> "Stepper":
        """The same state in memory of its own, laid out alike."""
        other = object.__new__(Stepper)
        other.__dict__.update(self.__dict__)
        copy = [case.lay for case in self.cases]
        other.params = [lay(t) for lay, t in zip(copy, self.params, strict=True)]
        other.states = {k: [lay(t) for lay, t in zip(copy, ts, strict=False)] for k, ts in self.states.items()}
        other.steps = [t.clone() for t in self.steps]
        other.measures, other.alphas = self.measures.clone(), self.alphas.clone()
        return other

    def args(self) -> list[Any]:
        """The op's arguments from `anchors` on."""
        hyper = {**self.settings.hyper, "anchored": float(self.anchored)}
        row = [[hyper[column] for column in self.settings.base.hyper]]
        return [
            self.anchors if self.anchored else [], *self.states.values(), self.steps, self.measures, self.alphas,
            torch.tensor(row, dtype=torch.float64, device="cpu"), [len(self.params)], [self.rule],
            [SEED << 32 | i for i in range(len(self.params))] if hyper["stochastic_rounding"] else [],
        ]  # fmt: skip

    def run(self, prepare: Callable[..., Callable[[list[Tensor]], None]], grads: list[Tensor]) -> None:
        """One step by a backend's `prepare` for this base."""
        prepare(self.params, *self.args())(grads)

    def run_oracle(self, grads: list[Tensor]) -> None:
        """One step by the reference in float64."""
        step: Callable[..., None] = reference.adamw_ if self.settings.base is ADAMW else reference.sgd_
        step(self.params, grads, *self.args(), arithmetic=torch.float64)

    def tensors(self) -> Iterator[Tensor]:
        """All that a step may write."""
        yield from self.params
        for state in self.states.values():
            yield from state
        yield from self.steps
        yield self.measures
        yield self.alphas


# What rows a program takes: short and long, whole and in parts, aligned or not, contiguous or strided, one or none.
ROW_CASES = (
    *CASES,
    Case("rows of 1", (300, 1)),
    Case("rows of 9", (768, 1, 3, 3)),
    Case("rows of 768", (70, 768)),
    Case("rows of a chunk", (3, CHUNK)),
    Case("long rows", (3, 2 * CHUNK + 64)),
    Case("long odd rows", (2, CHUNK + 77)),
    Case("one row", (1, 5000)),
    Case("transposed long rows", (5, CHUNK + 3), _transposed),
    Case("no row", (0, 5)),
)


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of values, in float64, to their neighbours in `dtype`; at least that of its smallest normal."""
    info = torch.finfo(dtype)
    return values.abs().clamp(min=info.smallest_normal) * info.eps


def assert_same_step(got: Stepper, want: Stepper, before: Stepper, grads: list[Tensor]) -> None:
    """`got` made the step from `before` that the oracle made in `want`, to the tolerances above. Raises AssertionError
    naming the case and what differs."""
    hyper = want.settings.hyper
    sign = -1 if hyper["maximize"] else 1
    unpulled = before.clone()
    unpulled.rule = "keep"
    unpulled.run_oracle(grads)
    for i, case in enumerate(want.cases):
        storage = want.params[i].dtype
        eps = torch.finfo(arithmetic_of(storage)).eps
        theta, theta_0, g, tilde, new = (
            t.double() for t in (before.params[i], want.anchors[i], grads[i] * sign, unpulled.params[i], want.params[i])
        )
        d, c, u = theta - theta_0, tilde - theta_0, tilde - theta
        alpha, alpha_slack = float(want.alphas[i]), eps
        if not want.measures[i].isnan().all():
            firing, delta_sq, gain = want.measures[i].tolist()
            firing_slack = 16 * eps * float((g * d).abs().sum())
            gain_slack = 3 * float((2 * c.abs() * ulp(tilde, storage)).square().sum().sqrt())
            gain_slack += 16 * eps * float((u * (2 * d + u)).abs().sum())
            if hyper["weight_decay"]:
                gain_slack += eps * float((c * theta).abs().sum())
            assert firing == 0 or abs(firing) > 4 * firing_slack, f"{case.name}: ⟨g,d⟩ too near zero to be a test"
            slacks = (firing_slack, 16 * eps * delta_sq, gain_slack)
            for name, a, b, slack in zip(
                MEASURES, got.measures[i].tolist(), want.measures[i].tolist(), slacks, strict=True
            ):
                assert abs(a - b) <= slack, f"{case.name}: {name} is {a}, not {b} ± {slack}"
            after_sq = delta_sq + gain
            if firing > 0 and after_sq > 0:
                norms = (delta_sq**0.5 + after_sq**0.5) * after_sq**0.5
                alpha_slack += hyper["strength"] * (gain_slack / norms) * 2
        else:
            assert got.measures[i].isnan().all(), f"{case.name}: measured what no rule needs"
        assert abs(float(got.alphas[i]) - alpha) <= alpha_slack, f"{case.name}: α is {got.alphas[i]}, not {alpha}"

        scale = (
            theta.abs() + theta_0.abs() + u.abs() + hyper["lr"] * (1 + g.abs())
        )  # a moment may cancel, not its error
        allowed = 2 * ulp(new, storage) + 16 * eps * scale + alpha_slack * c.abs()
        _assert_within(got.params[i], new, allowed, f"{case.name}: param")
        for key, states in want.states.items():
            if states:
                exact = states[i].double()
                near = (
                    8 * eps * (exact.abs() + g.abs().clamp(min=g.square()) + 0.01 * theta.abs())
                    + torch.finfo(states[i].dtype).tiny
                )
                _assert_within(got.states[key][i], exact, near, f"{case.name}: {key}")
        if want.steps:
            assert torch.equal(got.steps[i], want.steps[i]), f"{case.name}: step"


def _assert_within(got: Tensor, want: Tensor, allowed: Tensor, what: str) -> None:
    excess = (got.double() - want).abs() - allowed
    assert not got.numel() or float(excess.max()) <= 0, (
        f"{what} differs by {float((got.double() - want).abs().max())}, {float(excess.max())} beyond its tolerance"
    )
