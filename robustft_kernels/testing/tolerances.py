"""How far a step may be from the oracle's. All tolerances are derived, in this one place.

One step from identical state is compared with the oracle in float64. It may differ by

- rounding to storage: 2 units in the last place of the stored value. For 8 bits, the distance of two codes, of each
  side's scale.
- arithmetic: a dozen roundings of the operands. The size of an update is lr·(1 + |g|), even if its moment cancels.
- a measure: 16 roundings of each summand. θ̃ may fall on a neighbouring stored value. That moves a summand by s,
  independently of the others: 3·√(Σ s²). The rounding of the factor 1 − lr·wd moves all of them together.
- learned numbers: what the slope's difference makes of them.
- α: what the differences of measures and radius make of it, times |c|. If the pull is cautious, an element whose step
  is within those roundings of 0 may be held or not.

What a difference makes of a formula is asked of the oracle's own function: it is evaluated beside the point. So a new
rule, measure or learned number needs nothing here.
"""

from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor

from ..backends import reference
from ..core.bases import ADAMW, arithmetic_of
from ..core.eight_bit import BLOCK, SCALE, is_scale
from ..core.methods import LEARNED, MEASURES, RULES, Rule
from .stepper import Stepper


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of values, in float64, to their neighbours in `dtype`. It is at least that of the smallest
    normal."""
    info = torch.finfo(dtype)
    return values.abs().clamp(min=info.smallest_normal) * info.eps


def assert_same_step(got: Stepper, want: Stepper, before: Stepper, grads: list[Tensor]) -> None:
    """Checks that `got` made the step from `before` that the oracle made in `want`, to the tolerances above. Raises
    AssertionError naming the case and what differs."""
    hyper, rule, base = want.settings.hyper, want.rule, want.settings.base
    sign = -1 if hyper["maximize"] else 1
    start, unpulled, ends, found_ends = before.weights, _unpulled(before, grads), want.weights, got.weights
    exactly = _unrounded(before, grads) if rule.cautious else []
    firsts = [sum(want.segments[:i]) for i in range(len(want.cases))]
    for i, case in enumerate(want.cases):
        of = slice(firsts[i], firsts[i] + want.segments[i])
        storage = start[i].dtype
        eps = torch.finfo(arithmetic_of(storage)).eps
        theta, theta_0, g, tilde, new = (
            t.double() for t in (start[i], want.anchors[i], grads[i] * sign, unpulled[i], ends[i])
        )
        d, c, u = theta - theta_0, tilde - theta_0, tilde - theta
        alpha, alpha_slack = want.alphas[of], torch.full_like(want.alphas[of], eps)
        found = dict(zip(MEASURES, want.measures[of].T, strict=True))
        selected, inconsistent = want.results[of, len(MEASURES) :].T
        slacks: dict[str, Tensor] = {}
        if rule.measures:
            slacks = _measure_slacks(rule, hyper, storage, g, d, u, theta, tilde)
            for name, a in zip(MEASURES, got.measures[of].T, strict=True):
                b, slack = found[name], slacks[name]
                assert ((a - b).abs() <= slack).all(), f"{case.name}: {name} is {a}, not {b} ± {slack}"
        else:
            assert got.measures[of].isnan().all(), f"{case.name}: measured what no rule needs"
        terms, radius_slack = hyper, torch.zeros((), dtype=torch.float64)
        if rule.learns:
            numbers = want.states[rule.learns][i]
            by = _learned_slack(rule, hyper, eps, before, i, g, float(want.steps[i]))
            if of.start < of.stop:  # the radius may be the largest row's norm
                by[0] += (slacks["before"] + slacks["gain"]).max()
            _assert_within(got.states[rule.learns][i], numbers, by, f"{case.name}: {rule.learns}")
            projected, radius_slack = reference_radius(rule, hyper, before, i, g, float(want.steps[i])), by[0]
            terms = {**hyper, "radius": float(projected)}
        if rule.waits:
            alpha_slack += _alpha_slack(rule, terms, found, slacks, float(radius_slack), case.name)
        assert ((got.alphas[of] - alpha).abs() <= alpha_slack).all(), (
            f"{case.name}: α is {got.alphas[of]}, not {alpha} ± {alpha_slack}"
        )
        counted, opened = got.results[of, len(MEASURES) :].T
        assert ((counted == selected) | ((alpha - 1).abs() <= alpha_slack)).all(), f"{case.name}: selected"
        near_zero = found["grad_dot_delta"].abs() <= slacks["grad_dot_delta"] if slacks else torch.zeros_like(alpha) > 0
        assert ((opened == inconsistent) | near_zero).all(), f"{case.name}: inconsistent"

        if rule.cautious:
            step, c = exactly[i] - theta, d
        # A moment may cancel, but not its error. A penalty adds to g.
        size_of_g = g.abs() + (hyper["strength"] * (d.abs() + 1) if rule.penalty else 0)
        scale = theta.abs() + theta_0.abs() + u.abs() + hyper["lr"] * (1 + size_of_g)
        by_row = alpha_slack.reshape([-1, *[1] * (c.dim() - 1)] if c.dim() else [])
        allowed = 2 * ulp(new, storage) + 16 * eps * scale + by_row * c.abs()
        if rule.cautious:
            allowed += torch.where(step.abs() <= 16 * eps * scale, (1 - alpha[0]) * d.abs(), 0)
        if rule.penalty and base is ADAMW:  # g + penalty may cancel, and Adam divides by the size of the sum
            squares, kept = want.numbers("exp_avg_sq", i), want.states["exp_avg_sq"][i]
            if not kept.is_floating_point():  # the step divided by what was rounded to these codes
                by = want.states["exp_avg_sq" + SCALE][i]
                squares = (squares - _spacing(squares, kept.dtype, by)).clamp(min=0)
            rms = (squares / (1 - hyper["beta2"] ** float(want.steps[i]))).sqrt()
            allowed += hyper["lr"] * (16 * eps * size_of_g / (rms + hyper["eps"])).clamp(max=2)
        _assert_within(found_ends[i], new, allowed, f"{case.name}: weights")
        shown = want.params[i].double()
        _assert_within(got.params[i], shown, allowed + 2 * ulp(shown, want.params[i].dtype), f"{case.name}: param")
        for key, states in want.states.items():
            if states and key not in (*LEARNED, "master") and not is_scale(key):
                exact = want.numbers(key, i)
                near = (
                    8 * eps * (exact.abs() + size_of_g.clamp(min=size_of_g.square()) + 0.01 * theta.abs())
                    + torch.finfo(arithmetic_of(storage)).tiny
                )
                if not states[i].is_floating_point():
                    near += _spacing(exact, states[i].dtype, got.states[key + SCALE][i], want.states[key + SCALE][i])
                if states[i].dtype == torch.bfloat16:
                    near += ulp(exact, torch.bfloat16)
                if key == "delta":
                    near = ulp(exact, states[i].dtype) + ulp(tilde, storage) + 16 * eps * scale
                _assert_within(got.numbers(key, i), exact, near, f"{case.name}: {key}")
        if want.steps:
            assert torch.equal(got.steps[i], want.steps[i]), f"{case.name}: step"


def _spacing(values: Tensor, codes: torch.dtype, *scales: Tensor) -> Tensor:
    """The sum of the distances between codes at these values, by different scales of their blocks."""
    total = torch.zeros_like(values)
    for of in scales:
        unit = torch.empty_like(values)
        unit.as_strided((values.numel() // BLOCK, BLOCK), (BLOCK, 1)).copy_(
            2.0 ** (of.double().view(-1, 1) - 127 - (14 if codes == torch.int8 else 16))
        )
        total += unit * (2 * (values.abs() / unit).sqrt() + 3)  # (k + 1)² − k², of the next k
    return total


def _unpulled(before: Stepper, grads: list[Tensor]) -> list[Tensor]:
    """The weights θ̃ after the oracle's step, before the pull."""
    step = before.clone()
    step.rule = before.rule if before.rule.penalty else RULES["keep"]
    step.states = {key: of if key not in (*LEARNED, "delta") else [] for key, of in step.states.items()}
    n = sum(step.segments)
    step.results, step.alphas = step.results.new_zeros(n, step.results.shape[1]), step.alphas.new_zeros(n)
    counted = step.settings.base.counted(step.spec, step.params[0])
    step.steps = step.steps if counted else []
    step.run_oracle(grads)
    return step.weights


def _unrounded(before: Stepper, grads: list[Tensor]) -> list[Tensor]:
    """The same in float64, not rounded to storage."""
    step = before.clone()
    step.params = [of.double() for of in before.weights]
    step.states = {**step.states, "master": []}
    return _unpulled(step, grads)


def _measure_slacks(
    rule: Rule,
    hyper: Mapping[str, float],
    storage: torch.dtype,
    g: Tensor,
    d: Tensor,
    u: Tensor,
    theta: Tensor,
    tilde: Tensor,
) -> dict[str, Tensor]:
    """By how much each measure of each segment may differ."""
    eps = torch.finfo(arithmetic_of(storage)).eps
    exact = reference.summands(g, d, u, rule)

    def moved(by: Tensor) -> dict[str, Tensor]:
        """By how much each summand moves when θ̃ does."""
        beside = [reference.summands(g, d, u + sign * by, rule) for sign in (1, -1)]
        return {name: torch.stack([of[name] - exact[name] for of in beside]).abs().amax(0) for name in MEASURES}

    def total(values: Tensor) -> Tensor:
        return reference.segments(values, rule).sum(1)

    stored = moved(ulp(tilde, storage))
    decayed = moved(eps * theta.abs()) if hyper["weight_decay"] else {}
    slacks = {}
    for name in MEASURES:
        slacks[name] = 3 * total(stored[name].square()).sqrt() + 16 * eps * total(exact[name].abs())
        if decayed:
            slacks[name] += total(decayed[name])
    return slacks


def _alpha_slack(
    rule: Rule,
    terms: Mapping[str, float],
    found: Mapping[str, Tensor],
    slacks: Mapping[str, Tensor],
    radius_slack: float,
    case: str,
) -> Tensor:
    """By how much α may differ because the measures and a learned radius do: twice what the corners make of it.

    Raises AssertionError if the sign of a measure on which α depends may flip. Then the stream is no test.
    """

    def decide(by: Mapping[str, Tensor], radius: float = 0) -> Tensor:
        moved = {name: of + by.get(name, 0) for name, of in found.items()}
        moved["before"] = moved["before"].clamp(min=0)
        return reference.RULES[rule.name](moved, {**terms, "radius": terms["radius"] + radius})

    alpha, firing = decide({}), found["grad_dot_delta"]
    for sign in (4, -4):
        flipped = decide({"grad_dot_delta": sign * slacks["grad_dot_delta"]}) != alpha
        assert not (flipped & (firing != 0)).any(), f"{case}: ⟨g,d⟩ too near zero to be a test"
    names = [name for name in MEASURES if name != "grad_dot_delta"]
    worst = torch.zeros_like(alpha)
    for *signs, of_radius in product((-1, 1), repeat=len(names) + 1):
        by = {name: sign * slacks[name] for name, sign in zip(names, signs, strict=True)}
        worst = torch.maximum(worst, (decide(by, of_radius * radius_slack) - alpha).abs())
    return 2 * worst


def reference_radius(rule: Rule, hyper: Mapping[str, float], before: Stepper, i: int, g: Tensor, t: float) -> Tensor:
    """The radius by which the oracle's step projects, before it is bounded by the largest row."""
    slope = reference.slope_of(g, before.states["delta"][i])
    return reference.LEARN[rule.name](before.states[rule.learns][i].clone(), slope, torch.tensor(t), hyper)[0]


def _learned_slack(
    rule: Rule, hyper: Mapping[str, float], eps: float, before: Stepper, i: int, g: Tensor, t: float
) -> Tensor:
    """By how much learned numbers may differ: four times what the slope's error makes of them."""
    delta, numbers = before.states["delta"][i].double(), before.states[rule.learns][i]
    sizes = reference.segments(delta, rule).abs().sum(1) + 1e-8
    error = (16 * eps * reference.segments((delta * g).abs(), rule).sum(1) / sizes).sum()
    slope, count = reference.slope_of(g, delta), torch.tensor(t)
    exact, *beside = (
        reference.LEARN[rule.name](numbers.clone(), slope + by, count, hyper) for by in (0, error, -error)
    )
    return 1e-12 + 4 * torch.stack([of - exact for of in beside]).abs().amax(0)


def _assert_within(got: Tensor, want: Tensor, allowed: Tensor, what: str) -> None:
    excess = (got.double() - want).abs() - allowed
    assert not got.numel() or float(excess.max()) <= 0, (
        f"{what} differs by {float((got.double() - want).abs().max())}, {float(excess.max())} beyond its tolerance"
    )
