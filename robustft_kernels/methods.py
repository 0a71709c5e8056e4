"""The table of methods: one row each.

Every method is base step → measure → decide α → pull, θ ← θ₀ + α(θ − θ₀); a row says which rule decides.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How one method chooses α.

    rule: the name under which every backend keeps the function from measures, strength and lr to α.
    anchored: whether the method needs θ₀ at all.
    """

    rule: str
    anchored: bool


METHODS = {
    # α = 1: the plain base optimizer
    "none": Method(rule="keep", anchored=False),
    # α = 1 − min(1, strength·r) where ⟨g, d⟩ > 0, else 1 (SPD, NeurIPS 2024, Algorithm 2)
    "spd": Method(rule="spd", anchored=True),
    # α = 1 − min(1, strength·lr) (decoupled L2-SP; SPD paper, Algorithms 1 and 3)
    "l2sp": Method(rule="l2sp", anchored=True),
}


def method_of(name: str) -> Method:
    """The row of `name`. Raises ValueError for a name the table lacks."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(map(repr, METHODS))}")
    return METHODS[name]
