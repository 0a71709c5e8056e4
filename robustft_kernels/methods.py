"""The table of methods: one row each, and the rules by which they choose α.

Every method is base step → measure → decide α → pull, θ ← θ₀ + α(θ̃ − θ₀); a row says which rule decides, a rule over
which segments.
"""

from dataclasses import dataclass

NORMS = ("l2", "mars", "mars_rows")


@dataclass(frozen=True)
class Rule:
    """What every backend must know of a rule; what it computes stands in the backends.

    by_rows: segments are rows, and sizes Σ|·|; otherwise segments are whole tensors, and sizes ‖·‖².
    measured: α waits for the measures of its segment; otherwise it is known before the step.
    tracks: it keeps, for each parameter, the `delta` c of its last step.
    learns: and from it a `radius_state`, its radius with two moments.
    elsewhere: for a measured rule, that which measures as much, and leaves α to be decided where the measures of all
        parts of a tensor are.
    """

    by_rows: bool = False
    measured: bool = True
    tracks: bool = False
    learns: bool = False
    elsewhere: str = ""


RULES = {
    "keep": Rule(measured=False),
    "l2sp": Rule(measured=False),
    "l2sp_coupled": Rule(measured=False),
    "mars_sp": Rule(measured=False),
    "spd": Rule(elsewhere="observe"),
    "spd_rows": Rule(by_rows=True, elsewhere="observe_rows"),
    "project": Rule(elsewhere="observe"),
    "project_mars": Rule(by_rows=True, elsewhere="observe_rows"),
    "project_rows": Rule(by_rows=True, elsewhere="observe_rows"),
    "ftp": Rule(by_rows=True, tracks=True, learns=True, elsewhere="track_rows"),
    # Halves of a step: measure alone, and pull by an α that is given.
    "observe": Rule(),
    "observe_rows": Rule(by_rows=True),
    "track_rows": Rule(by_rows=True, tracks=True),
    "given": Rule(measured=False),
    "given_rows": Rule(by_rows=True, measured=False),
}


@dataclass(frozen=True)
class Method:
    """How one method chooses α.

    rules: the rule for each norm that it can measure with; the first is its own.
    anchored: whether the method needs θ₀ at all.
    """

    rules: dict[str, str]
    anchored: bool = True


METHODS = {
    # α = 1: the plain base optimizer
    "none": Method({"l2": "keep"}, anchored=False),
    # α = 1 − min(1, strength·r) where ⟨g, d⟩ > 0, else 1 (SPD, NeurIPS 2024, Algorithm 2)
    "spd": Method({"l2": "spd", "mars_rows": "spd_rows"}),
    # α = 1 − min(1, strength·lr) (decoupled L2-SP; SPD paper, Algorithms 1 and 3)
    "l2sp": Method({"l2": "l2sp"}),
    # g + strength·d goes through the moments, α = 1 (L2-SP, ICML 2018)
    "l2sp_coupled": Method({"l2": "l2sp_coupled"}),
    # g + strength·sign(d) on the row of largest Σ|d|, α = 1 (MARS-SP, ICLR 2021, penalty form)
    "mars_sp": Method({"mars": "mars_sp"}),
    # α = min(1, radius/n) (PGM and LCC, ICLR 2021; TPGM, CVPR 2023, Eqs. 3 and 4)
    "project": Method({"l2": "project", "mars": "project_mars", "mars_rows": "project_rows"}),
    # α = min(1, γ/n) of each row, γ learned from the gradients (FTP, NeurIPS 2023, Algorithm 1)
    "ftp": Method({"mars_rows": "ftp"}),
}


def method_of(name: str) -> Method:
    """The row of `name`. Raises ValueError for a name the table lacks."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(map(repr, METHODS))}")
    return METHODS[name]


def rule_of(name: str, norm: str | None) -> str:
    """The rule of a method with a norm, None for the method's own. Raises ValueError for a norm it does not have."""
    rules = method_of(name).rules
    if norm is None:
        return next(iter(rules.values()))
    if norm not in rules:
        raise ValueError(f"method {name!r} does not go with norm={norm!r}: choose {' or '.join(map(repr, rules))}")
    return rules[norm]


def segments_of(rule: str, shape: tuple[int, ...]) -> int:
    """How many segments a tensor of this shape is: one, or its rows, the indices of dimension 0; below two dimensions
    a tensor is one row."""
    return shape[0] if RULES[rule].by_rows and len(shape) > 1 else 1
