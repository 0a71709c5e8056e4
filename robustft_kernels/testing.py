"""Cases (of cases.py), streams and tolerances: one place, for the tests and the benchmarks.

Tolerances are derived. One step from identical state is compared with the oracle in float64, and may differ by
- rounding to storage: 2 units in the last place of the stored value;
- arithmetic: a dozen roundings of the operands, an update's size being lr·(1 + |g|) even where its moment cancels;
- the measured gain: θ̃ may fall on the neighbouring stored value, so that a term moves by about w·ulp(θ̃), w being
  2|c| for squares and 1 for magnitudes, independently: √(Σ(w·ulp)²), three times that; the rounding of the factor
  1 − lr·wd moves all of them together: ½ulp(1)·Σ w|θ|;
- a learned radius: what the slope's difference makes of its step;
- α: what the differences of gain and radius make of it, times |c|.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import reference
from .bases import ADAMW, MEASURES, RADIUS_STATE, arithmetic_of
from .cases import CASES, CHUNK, DTYPES, LEAN_CASES, ROW_CASES, SETTINGS, Case, Settings
from .methods import RULES, rule_of, segments_of
from .state import dtype_of

__all__ = [
    "CASES", "CHUNK", "DTYPES", "LEAN_CASES", "ROW_CASES", "SETTINGS", "Case", "Settings",
    "Stepper", "assert_same_step", "ulp",
]  # fmt: skip
SEED = 123456789
PENALTIES = ("l2sp_coupled", "mars_sp")  # the rules that change the gradient


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
        norm: str | None = None,
    ) -> None:
        self.device = device = device or torch.get_default_device()
        self.settings, self.rule = settings, rule_of(method, norm)
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
        base = settings.base
        row = {**settings.hyper, "rule": self.rule}
        self.states = {key: self._first(key) if drawn(row, dtype) else [] for key, drawn in base.state}
        self.steps = [torch.zeros((), device=device) for _ in cases] if base.counted(row, dtype) else []
        n = sum(self.segments)
        self.measures = torch.full((n, len(MEASURES)), -7.0, dtype=torch.float64, device=device)
        self.alphas = torch.full((n,), -7.0, dtype=torch.float64, device=device)

    @property
    def segments(self) -> list[int]:
        """How many each tensor has."""
        return [segments_of(self.rule, p.shape) for p in self.params]

    @property
    def weights(self) -> list[Tensor]:
        """What a step begins from, and leaves: the master weights that still are what the parameters show, or those."""
        masters = self.states.get("master") or self.params
        return [torch.where(m.to(p.dtype) == p, m, p.to(m.dtype)) for m, p in zip(masters, self.params, strict=True)]

    def _first(self, key: str) -> list[Tensor]:
        if key == "radius_state":
            return [torch.zeros(len(RADIUS_STATE), dtype=torch.float64, device=self.device) for _ in self.cases]
        if key == "master":  # between the weights and their neighbours; some no longer what their parameter shows
            beyond = (
                1 + 0.6 * torch.finfo(self.params[0].dtype).eps * self._randn(case).to(self.device)
                for case in self.cases
            )
            return [case.lay(p.float() * b) for case, p, b in zip(self.cases, self.params, beyond, strict=True)]
        return [
            case.lay(torch.zeros_like(p, dtype=dtype_of(key, p.dtype, self.settings.state_dtype)))
            for case, p in zip(self.cases, self.params, strict=True)
        ]

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
        other.states = {
            key: [t.clone() if key == "radius_state" else lay(t) for lay, t in zip(copy, of, strict=False)]
            for key, of in self.states.items()
        }
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
            [SEED << 32 | i for i in range(len(self.params))],
        ]  # fmt: skip

    def run(self, prepare: Callable[..., Callable[[list[Tensor]], None]], grads: list[Tensor]) -> None:
        """One step by a backend's `prepare` for this base."""
        prepare(self.params, *self.args())(grads)

    def run_oracle(self, grads: list[Tensor]) -> None:
        """One step by the reference in float64."""
        reference.step_(self.settings.base, self.params, grads, *self.args(), arithmetic=torch.float64)

    def tensors(self) -> Iterator[Tensor]:
        """All that a step may write."""
        yield from self.params
        for state in self.states.values():
            yield from state
        yield from self.steps
        yield self.measures
        yield self.alphas


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of values, in float64, to their neighbours in `dtype`; at least that of its smallest normal."""
    info = torch.finfo(dtype)
    return values.abs().clamp(min=info.smallest_normal) * info.eps


def assert_same_step(got: Stepper, want: Stepper, before: Stepper, grads: list[Tensor]) -> None:
    """`got` made the step from `before` that the oracle made in `want`, to the tolerances above. Raises AssertionError
    naming the case and what differs."""
    hyper, rule = want.settings.hyper, want.rule
    sign = -1 if hyper["maximize"] else 1
    unpulled = before.clone()
    unpulled.rule = rule if rule in PENALTIES else "keep"
    unpulled.states = {key: of if key not in ("delta", "radius_state") else [] for key, of in unpulled.states.items()}
    start = before.weights
    n = sum(unpulled.segments)
    unpulled.measures, unpulled.alphas = unpulled.measures.new_zeros(n, len(MEASURES)), unpulled.alphas.new_zeros(n)
    dtype = want.params[0].dtype
    unpulled.steps = unpulled.steps if want.settings.base.counted({**hyper, "rule": "keep"}, dtype) else []
    unpulled.run_oracle(grads)
    firsts = [sum(want.segments[:i]) for i in range(len(want.cases))]
    for i, case in enumerate(want.cases):
        of = slice(firsts[i], firsts[i] + want.segments[i])
        storage = start[i].dtype
        eps = torch.finfo(arithmetic_of(storage)).eps
        theta, theta_0, g, tilde, new = (
            t.double() for t in (start[i], want.anchors[i], grads[i] * sign, unpulled.weights[i], want.weights[i])
        )
        d, c, u = theta - theta_0, tilde - theta_0, tilde - theta
        alpha, alpha_slack = want.alphas[of], torch.full_like(want.alphas[of], eps)
        *found, selected = want.measures[of].T
        if RULES[rule].measured:
            firing, size, gain = found
            slacks = _measure_slacks(rule, hyper, storage, g, d, u, theta, tilde)
            assert ((firing == 0) | (firing.abs() > 4 * slacks[0]) | (slacks[0] == 0)).all() or not rule.startswith(
                "spd"
            ), f"{case.name}: ⟨g,d⟩ too near zero to be a test"
            for name, a, b, slack in zip(MEASURES[:3], got.measures[of].T, found, slacks, strict=False):
                assert ((a - b).abs() <= slack).all(), f"{case.name}: {name} is {a}, not {b} ± {slack}"
            alpha_slack += _alpha_slack(rule, hyper, firing, size, gain, alpha, slacks)
        else:
            assert got.measures[of, :3].isnan().all(), f"{case.name}: measured what no rule needs"
        if want.states.get("radius_state"):
            radius = want.states["radius_state"][i]
            radius_slack = _radius_slack(hyper, eps, before, i, g, radius, float(want.steps[i]))
            if of.start < of.stop:  # it may be the largest row's norm
                radius_slack += float((slacks[1] + slacks[2]).max())
            _assert_within(
                got.states["radius_state"][i][:1], radius[:1], radius.new_tensor([radius_slack]), f"{case.name}: radius"
            )
            alpha_slack += radius_slack / (found[1] + found[2] + 1e-8)
        assert ((got.alphas[of] - alpha).abs() <= alpha_slack).all(), (
            f"{case.name}: α is {got.alphas[of]}, not {alpha} ± {alpha_slack}"
        )
        assert ((got.measures[of, 3] == selected) | ((alpha - 1).abs() <= alpha_slack)).all(), f"{case.name}: selected"

        # A moment may cancel, not its error; a penalty adds to g.
        size_of_g = g.abs() + (hyper["strength"] * (d.abs() + 1) if rule in PENALTIES else 0)
        scale = theta.abs() + theta_0.abs() + u.abs() + hyper["lr"] * (1 + size_of_g)
        by_row = alpha_slack.reshape([-1, *[1] * (c.dim() - 1)] if c.dim() else [])
        allowed = 2 * ulp(new, storage) + 16 * eps * scale + by_row * c.abs()
        if rule in PENALTIES and want.settings.base is ADAMW:  # g + penalty may cancel, and Adam divides by its size
            rms = (want.states["exp_avg_sq"][i].double() / (1 - hyper["beta2"] ** float(want.steps[i]))).sqrt()
            allowed += hyper["lr"] * (16 * eps * size_of_g / (rms + hyper["eps"])).clamp(max=2)
        _assert_within(got.weights[i], new, allowed, f"{case.name}: weights")
        shown = want.params[i].double()
        _assert_within(got.params[i], shown, allowed + 2 * ulp(shown, dtype), f"{case.name}: param")
        for key, states in want.states.items():
            if states and key not in ("radius_state", "master"):
                exact = states[i].double()
                near = (
                    8 * eps * (exact.abs() + size_of_g.clamp(min=size_of_g.square()) + 0.01 * theta.abs())
                    + torch.finfo(states[i].dtype).tiny
                )
                if states[i].dtype == torch.bfloat16:
                    near += ulp(exact, torch.bfloat16)
                if key == "delta":
                    near = ulp(exact, states[i].dtype) + ulp(tilde, storage) + 16 * eps * scale
                _assert_within(got.states[key][i], exact, near, f"{case.name}: {key}")
        if want.steps:
            assert torch.equal(got.steps[i], want.steps[i]), f"{case.name}: step"


def _measure_slacks(
    rule: str,
    hyper: dict[str, float],
    storage: torch.dtype,
    g: Tensor,
    d: Tensor,
    u: Tensor,
    theta: Tensor,
    tilde: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """By how much a segment's measures may differ."""
    eps = torch.finfo(arithmetic_of(storage)).eps
    c = d + u

    def total(values: Tensor) -> Tensor:
        return reference.segments(values, rule).sum(1)

    if RULES[rule].by_rows:
        size, weight, gain = d.abs(), torch.ones_like(c), u.abs()
    else:
        size, weight, gain = d * d, 2 * c.abs(), (u * (2 * d + u)).abs()
    moved = 3 * total((weight * ulp(tilde, storage)).square()).sqrt() + 16 * eps * total(gain)
    if hyper["weight_decay"]:
        moved += eps * total((weight * theta).abs())
    return 16 * eps * total((g * d).abs()), 16 * eps * total(size), moved


def _alpha_slack(
    rule: str,
    hyper: dict[str, float],
    firing: Tensor,
    size: Tensor,
    gain: Tensor,
    alpha: Tensor,
    slacks: tuple[Tensor, ...],
) -> Tensor:
    """By how much α may differ for what the measures do."""
    _, size_slack, gain_slack = slacks
    after = size + gain
    if rule.startswith("spd"):
        norms = after if RULES[rule].by_rows else (size.sqrt() + after.sqrt()) * after.sqrt()
        slack = hyper["strength"] * gain_slack / norms * 2
        return torch.where((firing > 0) & (after > 0), slack, 0.0)
    relative = (size_slack + gain_slack) / after / (1 if RULES[rule].by_rows else 2)
    if rule == "project_mars" and len(after):
        relative = relative.gather(0, after.argmax().reshape(1)).expand_as(after)
    return torch.where(after > 0, 2 * alpha * relative, 0.0)


def _radius_slack(
    hyper: dict[str, float], eps: float, before: Stepper, i: int, g: Tensor, after: Tensor, t: float
) -> float:
    """By how much a learned radius may differ: the slope's error in units of its root mean square, times the step."""
    rows, g_rows = (reference.segments(x.double(), "ftp") for x in (before.states["delta"][i], g))
    error = float((16 * eps * (rows * g_rows).abs().sum(1) / (rows.abs().sum(1) + 1e-8)).sum())
    rms = (float(after[2]) / (1 - hyper["radius_beta2"] ** t)) ** 0.5
    return 1e-12 + (4 * hyper["radius_lr"] * error / rms if rms else 0)


def _assert_within(got: Tensor, want: Tensor, allowed: Tensor, what: str) -> None:
    excess = (got.double() - want).abs() - allowed
    assert not got.numel() or float(excess.max()) <= 0, (
        f"{what} differs by {float((got.double() - want).abs().max())}, {float(excess.max())} beyond its tolerance"
    )
