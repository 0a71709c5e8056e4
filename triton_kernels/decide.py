"""Decide: from measures to α, in float64, for one segment or several at once. α = 1 leaves a segment alone.

A rule is a function of the same name as its row in `methods.RULES`. It takes the measures `m` and the hyper-parameters
`h`, both tuples. A rule that needs no measures returns its α whatever they are. A rule that needs them returns 1 when
they are nan. So the same call, with nan, tells what is known before the sweep. The radius is the group's, or the
learned one.
"""

import triton
import triton.language as tl

from ..core.methods import LEARNED, METHOD_HYPER, RULES
from .base import power
from .measure import BEFORE, GAIN, GRAD_DOT_DELTA, size_of

TERMS = ("lr", *METHOD_HYPER)  # hyper-parameters that rules read
LR, STRENGTH, RADIUS, K, RADIUS_LR, RADIUS_BETA1, RADIUS_BETA2 = (
    tl.constexpr(TERMS.index(name))
    for name in ("lr", "strength", "radius", "k", "radius_lr", "radius_beta1", "radius_beta2")
)
ROW_EPS = tl.constexpr(1e-8)  # FTP's


@triton.jit
def keep(m, h):
    """1."""
    return m[BEFORE] * 0 + 1


@triton.jit
def l2sp(m, h):
    """1 − min(1, strength·lr)."""
    return 1 - tl.minimum(h[STRENGTH] * h[LR], 1.0)


@triton.jit
def shrink(ratio, m, h):
    """1 − min(1, strength·ratio) when the segment moved away, else 1."""
    fires = (m[GAIN] > 0) & (ratio < float("inf"))
    return tl.where(fires, 1 - tl.minimum(h[STRENGTH] * ratio, 1.0), 1.0)


@triton.jit
def within(n, radius):
    """min(1, radius/n), and 1 when n is not finite."""
    return tl.where((n > radius) & (n < float("inf")), radius / n, 1.0)


@triton.jit
def spd_away(m, h):
    """1 − min(1, strength·r). r = max(0, ‖c‖ − ‖d‖)/‖c‖, and 0 when ‖c‖ = 0."""
    after = tl.sqrt(size_of(m))
    return shrink(m[GAIN] / (tl.sqrt(m[BEFORE]) + after) / after, m, h)


@triton.jit
def spd_away_rows(m, h):
    """`spd_away` with Σ|·| for ‖·‖."""
    return shrink(m[GAIN] / size_of(m), m, h)


@triton.jit
def spd(m, h):
    """1 − min(1, strength·r) when ⟨g,d⟩ > 0, else 1."""
    return tl.where(m[GRAD_DOT_DELTA] > 0, spd_away(m, h), 1.0)


@triton.jit
def spd_rows(m, h):
    """`spd` with Σ|·| for ‖·‖."""
    return tl.where(m[GRAD_DOT_DELTA] > 0, spd_away_rows(m, h), 1.0)


@triton.jit
def project(m, h):
    """min(1, radius/‖c‖)."""
    return within(tl.sqrt(tl.maximum(size_of(m), 0.0)), h[RADIUS])


@triton.jit
def project_rows(m, h):
    """min(1, radius/n)."""
    return within(size_of(m), h[RADIUS])


@triton.jit
def ftp(m, h):
    """min(1, γ/(n + 1e-8))."""
    return within(size_of(m) + ROW_EPS, h[RADIUS])


# "project_mars" decides for the largest row of a tensor. Rules that never pull, or are given α, need no function.
FUNCTIONS = {
    "l2sp": l2sp, "l2sp_cautious": l2sp, "spd": spd, "spd_rows": spd_rows, "spd_away": spd_away,
    "spd_away_rows": spd_away_rows, "project": project, "project_mars": project_rows, "project_rows": project_rows,
    "ftp": ftp, "ftp_learned": ftp,
}  # fmt: skip


@triton.jit
def among(rule, RULES: tl.constexpr):
    """Whether `rule`, a place in V.RULES, is one of those whose bits are set."""
    return (tl.full((), RULES, tl.int64) >> rule) & 1 != 0


@triton.jit
def decide(rule, m, h, V: tl.constexpr):
    """The α of the rule whose place in V.RULES is `rule`."""
    alpha = keep(m, h)
    for k in tl.static_range(len(V.RULES)):
        alpha = tl.where(rule == k, V.RULES[k](m, h), alpha)
    return tl.where(alpha == alpha, alpha, 1.0)


@triton.jit
def conflict(dot, size, h):
    """DiGraP's factor of d: −min(1, strength)·⟨g,d⟩/‖d‖² when ⟨g,d⟩ < 0, else 0, or when it is not finite."""
    factor = -tl.minimum(h[STRENGTH], 1.0) * dot / size
    return tl.where((dot < 0) & (factor < float("inf")), factor, 0.0)


@triton.jit
def learn_radius(learned, slope, t, h):
    """A radius and the moments of its gradient after one step of Adam on the slope.

    The first step sets the radius to 1e-8. A slope that is not finite changes nothing.
    """
    radius, exp_avg, exp_avg_sq = learned
    beta1, beta2 = h[RADIUS_BETA1], h[RADIUS_BETA2]
    slope = tl.where(slope > 0, h[K] * slope, slope)
    finite = tl.abs(slope) < float("inf")
    m = tl.where(finite, beta1 * exp_avg + (1 - beta1) * slope, exp_avg)
    v = tl.where(finite, beta2 * exp_avg_sq + (1 - beta2) * slope * slope, exp_avg_sq)
    moved = radius - h[RADIUS_LR] * (m / (1 - power(beta1, t))) / (tl.sqrt(v / (1 - power(beta2, t))) + 1e-8)
    new = tl.where(finite, tl.maximum(moved, 1e-8), radius)
    fresh = radius == 0
    return tl.where(fresh, 1e-8, new), tl.where(fresh, 0.0, m), tl.where(fresh, 0.0, v)


LEARN = {"ftp": learn_radius}


def check_functions() -> None:
    """Raises ValueError naming a rule that chooses its α, or learns, and has no function here."""
    for rule in RULES.values():
        if rule.pulls and not rule.given and rule.name not in FUNCTIONS:
            raise ValueError(f"rule {rule.name!r} has no function in triton_kernels/decide.py")
        if rule.learns and rule.name not in LEARN:
            raise ValueError(f"rule {rule.name!r} learns {rule.learns!r}, with no function in triton_kernels/decide.py")


check_functions()
NUMBERS = {name: len(LEARNED[RULES[name].learns]) for name in LEARN}  # how many each learns
