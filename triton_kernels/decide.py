"""Decide: from measures to alpha, in float64, of one segment or of several at once. alpha = 1 leaves a segment alone.

A rule that needs no measures gives its alpha to whatever it is handed; one that does gives 1 where they are nan. So the
same call, handed nan, tells what is known before the sweep. `radius` is the group's, or the one that was learned.
"""

import triton
import triton.language as tl

ROW_EPS = tl.constexpr(1e-8)  # FTP's


@triton.jit
def keep(grad_dot_delta, before, gain, strength, lr, radius):
    """1."""
    return before * 0 + 1


@triton.jit
def l2sp(grad_dot_delta, before, gain, strength, lr, radius):
    """1 − min(1, strength·lr)."""
    return 1 - tl.minimum(strength * lr, 1.0)


@triton.jit
def shrink(ratio, grad_dot_delta, gain, strength):
    """1 − min(1, strength·ratio) where ⟨g,d⟩ > 0 and the segment moved away, else 1."""
    fires = (grad_dot_delta > 0) & (gain > 0) & (ratio < float("inf"))
    return tl.where(fires, 1 - tl.minimum(strength * ratio, 1.0), 1.0)


@triton.jit
def within(n, radius):
    """min(1, radius/n); 1 where n is not finite."""
    return tl.where((n > radius) & (n < float("inf")), radius / n, 1.0)


@triton.jit
def spd(grad_dot_delta, before, gain, strength, lr, radius):
    """1 − min(1, strength·r) where ⟨g,d⟩ > 0, else 1; r = max(0, ‖c‖ − ‖d‖)/‖c‖, 0 where ‖c‖ = 0."""
    after = tl.sqrt(before + gain)
    return shrink(gain / (tl.sqrt(before) + after) / after, grad_dot_delta, gain, strength)


@triton.jit
def spd_rows(grad_dot_delta, before, gain, strength, lr, radius):
    """`spd` with Σ|·| for ‖·‖."""
    return shrink(gain / (before + gain), grad_dot_delta, gain, strength)


@triton.jit
def project(grad_dot_delta, before, gain, strength, lr, radius):
    """min(1, radius/‖c‖)."""
    return within(tl.sqrt(tl.maximum(before + gain, 0.0)), radius)


@triton.jit
def project_rows(grad_dot_delta, before, gain, strength, lr, radius):
    """min(1, radius/n)."""
    return within(before + gain, radius)


@triton.jit
def ftp(grad_dot_delta, before, gain, strength, lr, radius):
    """min(1, γ/(n + 1e-8))."""
    return within(before + gain + ROW_EPS, radius)


# "given" stands for any: its alpha is the caller's. "project_mars" decides for the largest row of a tensor.
FUNCTIONS = {
    "keep": keep, "l2sp": l2sp, "l2sp_coupled": keep, "mars_sp": keep, "spd": spd, "spd_rows": spd_rows,
    "project": project, "project_mars": project_rows, "project_rows": project_rows, "ftp": ftp,
    "observe": keep, "observe_rows": keep, "track_rows": keep, "given": keep, "given_rows": keep,
}  # fmt: skip


@triton.jit
def decide(rule, grad_dot_delta, before, gain, strength, lr, radius, V: tl.constexpr):
    """The alpha of the rule whose place in V.RULES is `rule`."""
    alpha = before * 0 + 1
    for k in tl.static_range(len(V.RULES)):
        alpha = tl.where(rule == k, V.RULES[k](grad_dot_delta, before, gain, strength, lr, radius), alpha)
    return tl.where(alpha == alpha, alpha, 1.0)


@triton.jit
def learn(radius, exp_avg, exp_avg_sq, slope, t, k, lr, beta1, beta2, powers1, powers2):
    """A learned radius and the moments of its gradient after one step of Adam on the slope; `powers`: βᵗ.

    The first step sets the radius to 1e-8; a slope that is not finite leaves all as it is.
    """
    slope = tl.where(slope > 0, k * slope, slope)
    finite = tl.abs(slope) < float("inf")
    m = tl.where(finite, beta1 * exp_avg + (1 - beta1) * slope, exp_avg)
    v = tl.where(finite, beta2 * exp_avg_sq + (1 - beta2) * slope * slope, exp_avg_sq)
    moved = radius - lr * (m / (1 - powers1)) / (tl.sqrt(v / (1 - powers2)) + 1e-8)
    new = tl.where(finite, tl.maximum(moved, 1e-8), radius)
    fresh = radius == 0
    return tl.where(fresh, 1e-8, new), tl.where(fresh, 0.0, m), tl.where(fresh, 0.0, v)
