"""Decide: from measures and strength to alpha, in float64. alpha = 1 leaves the segment alone.

A rule that needs no measures gives its alpha to whatever it is handed; one that does gives 1 where they are nan. So the
same call, handed nan, tells what is known before the sweep.
"""

import triton
import triton.language as tl


@triton.jit
def keep(grad_dot_delta, delta_sq, gain, strength, lr):
    """1."""
    return strength * 0 + 1


@triton.jit
def l2sp(grad_dot_delta, delta_sq, gain, strength, lr):
    """1 − min(1, strength·lr)."""
    return 1 - tl.minimum(strength * lr, 1.0)


@triton.jit
def spd(grad_dot_delta, delta_sq, gain, strength, lr):
    """1 − min(1, strength·r) where ⟨g,d⟩ > 0, else 1; r = max(0, ‖c‖ − ‖d‖)/‖c‖, 0 where ‖c‖ = 0."""
    before, after = tl.sqrt(delta_sq), tl.sqrt(delta_sq + gain)
    ratio = gain / (before + after) / after
    fires = (grad_dot_delta > 0) & (gain > 0) & (ratio < float("inf"))
    return tl.where(fires, 1 - tl.minimum(strength * ratio, 1.0), 1.0)


RULES = {"keep": keep, "l2sp": l2sp, "spd": spd}
MEASURED = {"spd"}


@triton.jit
def decide(rule, grad_dot_delta, delta_sq, gain, strength, lr, V: tl.constexpr):
    """The alpha of the rule whose place in V.RULES is `rule`."""
    alpha = tl.full((), 1.0, tl.float64)
    for k in tl.static_range(len(V.RULES)):
        alpha = tl.where(rule == k, V.RULES[k](grad_dot_delta, delta_sq, gain, strength, lr), alpha)
    return alpha
