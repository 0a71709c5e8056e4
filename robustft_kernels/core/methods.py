"""The table of methods, and of the rules by which they choose α. A backend need not know more of them.

Every method is base step → measure → decide α → pull, θ ← θ₀ + α(θ̃ − θ₀). A method names a rule for each norm. A rule
declares facts. Its formula is a function of the same name in every backend.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any, TypeVar

NORMS = ("l2", "mars", "mars_rows")
GATES = ("inconsistent", "away")  # which steps SPD may hold back. The first is the paper's
# The sums over a segment that a step from d to c can measure: ⟨g,d⟩, the size of d, and the size of c less that of d,
# without cancellation.
MEASURES = ("grad_dot_delta", "before", "gain")
# What a step leaves of a segment. The last two count steps: those with α ≠ 1, and those with ⟨g,d⟩ > 0.
RESULTS = (*MEASURES, "selected", "inconsistent")
# What a rule learns, by the key in the state: a few float64 numbers, of which the first is the radius.
LEARNED = {"radius_state": ("radius", "exp_avg", "exp_avg_sq")}
METHOD_HYPER = ("strength", "radius", "k", "radius_lr", "radius_beta1", "radius_beta2")  # what rules may read


@dataclass(frozen=True)
class Rule:
    """The facts of a rule.

    pulls: whether α can be other than 1.
    measures: what the size of a segment is: "squares" (‖·‖²) or "magnitudes" (Σ|·|). "" if α is known before the step.
    by_rows: whether segments are rows, the indices of dimension 0. If not, they are whole tensors.
    compares: whether α depends on what was before the step, and not on c alone. Around the step of another optimizer,
        such a rule measures twice. Needed by each rule that measures, pulls and surveys nothing.
    half: the rule that measures and keeps as much, and decides nothing. Over processes it makes the step. α is decided
        once the sums of all shards are there. Needed by each rule that measures and pulls, or surveys.
    tied: whether all rows of a tensor share one α, that of the largest row.
    given: whether the caller gives α.
    cautious: whether the pull moves only elements whose step leads toward the anchor, and moves them by (1 − α)d.
    surveys: what must be known before the step: of all rows "slope" (of the last delta) or "largest_row", of the whole
        tensor "conflict" (⟨g,d⟩ and ‖d‖²), or "".
    penalty: what the rule adds to the gradient: "linear" (strength·d, or what a conflict makes of it), "sign"
        (strength·sign(d) on the surveyed row), or "".
    tracks: whether it keeps the `delta`, c of its last step.
    learns: the key in `LEARNED` of the state that it learns from the slope, or "".
    when_learned: the rule that makes the same step with a radius that is known. Over processes, all learn it before the
        step. Needed by each rule that learns.
    reads: the hyper-parameters that it reads.
    """

    name: str
    pulls: bool | None = None
    measures: str = ""
    by_rows: bool = False
    compares: bool | None = None
    half: str = ""
    tied: bool = False
    given: bool = False
    cautious: bool = False
    surveys: str = ""
    penalty: str = ""
    tracks: bool = False
    learns: str = ""
    when_learned: str = ""
    reads: tuple[str, ...] = ()

    @property
    def waits(self) -> bool:
        """Whether α waits for the measures of the whole segment."""
        return bool(self.measures and self.pulls)

    @property
    def crosses_rows(self) -> bool:
        """Whether a step must process the tensor row by row."""
        return self.by_rows or self.surveys in ("slope", "largest_row")

    @property
    def pull_half(self) -> str:
        """The rule of the other half, which pulls such segments by a given α."""
        return "given_rows" if self.by_rows else "given"

    @property
    def goes_around(self) -> bool:
        """Whether it can go around the step of another optimizer. Its gradient is not ours to change, and the weights
        before the step are gone."""
        return not (self.penalty or self.surveys or self.cautious)

    def segments_of(self, shape: tuple[int, ...]) -> int:
        """How many segments a tensor of this shape has: one, or its rows. Below two dimensions a tensor is one row."""
        return shape[0] if self.by_rows and len(shape) > 1 else 1


@dataclass(frozen=True)
class Method:
    """How one method chooses α.

    rules: the rule for each norm that the method can measure with. The first norm is its default.
    formula, source: as docstrings have them, with d = θ − θ₀, c = θ̃ − θ₀, nᵢ = Σ|cᵢ| of row i.
    anchored: whether the method needs θ₀ at all.
    gated: for each other gate than the first, its rules, as `rules` has them. Empty if the method has no gate.
    """

    rules: Mapping[str, str]
    formula: str
    source: str = ""
    anchored: bool = True
    gated: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def all_rules(self) -> list[str]:
        """The rules for all norms and gates."""
        return [rule for rules in (self.rules, *self.gated.values()) for rule in rules.values()]


def check_rules(rules: Iterable[Rule]) -> dict[str, Rule]:
    """The rules by name. Raises ValueError naming the first rule whose facts are missing or contradict each other."""
    by_name: dict[str, Rule] = {}
    for rule in rules:
        if rule.name in by_name:
            raise ValueError(f"two rules have the name {rule.name!r}")
        by_name[rule.name] = rule
    for rule in by_name.values():
        if objection := _objection_to(rule, by_name):
            raise ValueError(f"rule {rule.name!r} {objection}")
    return by_name


def _objection_to(rule: Rule, rules: Mapping[str, Rule]) -> str:
    """What is wrong with the facts of a rule, or ""."""
    for key, known in (
        ("measures", ("", "squares", "magnitudes")),
        ("surveys", ("", "slope", "largest_row", "conflict")),
        ("penalty", ("", "linear", "sign")),
        ("learns", ("", *LEARNED)),
    ):
        if getattr(rule, key) not in known:
            raise ValueError(f"rule {rule.name!r} has {key}={getattr(rule, key)!r}: choose one of {known}")
    if rule.pulls is None:
        return "does not say whether it pulls"
    if unknown := [key for key in rule.reads if key not in (*METHOD_HYPER, "lr")]:
        return f"reads {unknown[0]!r}, which is in no table of hyper-parameters: add it to METHOD_HYPER"
    if rule.measures and rule.by_rows != (rule.measures == "magnitudes"):
        return "must measure magnitudes of rows, or squares of whole tensors"
    if rule.tied and not rule.by_rows:
        return "is tied, which is about rows, but not by rows"
    if rule.learns and not (rule.surveys == "slope" and rule.tracks):
        return "learns, so it must survey the slope and track the delta"
    if bool(rule.learns) != (rule.when_learned in rules):
        return f"must name the rule of its step once it has learned, if it learns; when_learned={rule.when_learned!r}"
    if (rule.penalty == "sign") != (rule.surveys == "largest_row"):
        return "must survey the largest row if its penalty is a sign, and only then"
    if rule.surveys == "conflict" and rule.penalty != "linear":
        return "surveys a conflict, so its penalty must be linear"
    if rule.cautious and (not rule.pulls or rule.measures or rule.given):
        return "is cautious, so it must pull by an α that it knows before the step"
    if not (rule.waits or rule.surveys):
        return f"has half={rule.half!r}, but neither waits for its measures nor surveys" if rule.half else ""
    if rule.waits and not rule.surveys and rule.compares is None:
        return "does not say whether it compares c with what was before the step, compares=..."
    if rule.half not in rules:
        return f"must name the rule that makes its step over processes, half=...; {rule.half!r} is none"
    half = rules[rule.half]
    if half.pulls or half.surveys or half.penalty or half.learns:
        return f"has the half {half.name!r}, which does more than measure"
    same = ("measures", "by_rows", "tracks")
    if differing := [key for key in same if getattr(rule, key) != getattr(half, key)]:
        return f"has the half {half.name!r}, which does not agree in {', '.join(differing)}"
    return ""


RULES = check_rules((
    Rule("keep", pulls=False),
    Rule("l2sp", pulls=True, reads=("strength", "lr")),
    Rule("l2sp_cautious", pulls=True, cautious=True, reads=("strength", "lr")),
    Rule("l2sp_coupled", pulls=False, penalty="linear", reads=("strength",)),
    Rule("digrap", pulls=False, surveys="conflict", penalty="linear", half="keep", reads=("strength",)),
    Rule("mars_sp", pulls=False, surveys="largest_row", penalty="sign", half="keep", reads=("strength",)),
    Rule("spd", pulls=True, compares=True, measures="squares", half="observe", reads=("strength",)),
    Rule(
        "spd_rows", pulls=True, compares=True, measures="magnitudes", by_rows=True, half="observe_rows",
        reads=("strength",),
    ),
    Rule("spd_away", pulls=True, compares=True, measures="squares", half="observe", reads=("strength",)),
    Rule(
        "spd_away_rows", pulls=True, compares=True, measures="magnitudes", by_rows=True, half="observe_rows",
        reads=("strength",),
    ),
    Rule("project", pulls=True, compares=False, measures="squares", half="observe", reads=("radius",)),
    Rule(
        "project_mars", pulls=True, compares=False, measures="magnitudes", by_rows=True, tied=True, half="observe_rows",
        reads=("radius",),
    ),
    Rule(
        "project_rows", pulls=True, compares=False, measures="magnitudes", by_rows=True, half="observe_rows",
        reads=("radius",),
    ),
    Rule(
        "ftp", pulls=True, measures="magnitudes", by_rows=True, surveys="slope", tracks=True, learns="radius_state",
        half="track_rows", when_learned="ftp_learned", reads=("k", "radius_lr", "radius_beta1", "radius_beta2"),
    ),
    Rule(
        "ftp_learned", pulls=True, compares=False, measures="magnitudes", by_rows=True, tracks=True, half="track_rows",
        reads=("radius",),
    ),
    # Halves of a step: those that measure, and those that pull by an α that is given.
    Rule("observe", pulls=False, measures="squares"),
    Rule("observe_rows", pulls=False, measures="magnitudes", by_rows=True),
    Rule("track_rows", pulls=False, measures="magnitudes", by_rows=True, tracks=True),
    Rule("given", pulls=True, given=True),
    Rule("given_rows", pulls=True, by_rows=True, given=True),
))  # fmt: skip

METHODS = {
    "none": Method({"l2": "keep"}, "α = 1: the base optimizer alone. Keeps no anchor.", anchored=False),
    "spd": Method(
        {"l2": "spd", "mars_rows": "spd_rows"},
        "α = 1 − min(1, strength·r), r = max(0, ‖c‖−‖d‖)/‖c‖, for each tensor with ⟨g,d⟩ > 0; else 1. With "
        'norm="mars_rows" the same of each row, Σ|·| for ‖·‖. With gate="away" for each, whatever ⟨g,d⟩ is.',
        "SPD: Tian et al., NeurIPS 2024, Algorithm 2, with strength·r capped at 1 as its text states",
        gated={"away": {"l2": "spd_away", "mars_rows": "spd_away_rows"}},
    ),
    "l2sp": Method(
        {"l2": "l2sp"},
        "α = 1 − min(1, strength·lr).",
        "L2-SP: Li et al., ICML 2018, decoupled as in the SPD paper's Algorithms 1 and 3",
    ),
    "l2sp_cautious": Method(
        {"l2": "l2sp_cautious"},
        "θ ← θ̃ − min(1, strength·lr)·d on each element whose step leads toward θ₀ or nowhere, (θ − θ̃)·d ≥ 0; else θ̃.",
        "Cautious weight decay: Chen et al., ICLR 2026 (arXiv 2510.12402), Algorithm 1, with d for the weight",
    ),
    "l2sp_coupled": Method(
        {"l2": "l2sp_coupled"},
        "α = 1. g + strength·d takes the place of g, and goes through the moments.",
        "L2-SP: Li et al., ICML 2018, Eq. 3",
    ),
    "digrap": Method(
        {"l2": "digrap"},
        "α = 1. g − min(1, strength)·(⟨g,d⟩/‖d‖²)·d takes the place of g for each tensor with ⟨g,d⟩ < 0, and goes "
        "through the moments.",
        "DiGraP: Huang et al., ICLR 2025, Algorithm 1 with a fixed projection strength",
    ),
    "mars_sp": Method(
        {"mars": "mars_sp"},
        "α = 1. g + strength·sign(d) on the row of largest Σ|dᵢ|, a subgradient of strength·maxᵢ Σ|dᵢ|.",
        "MARS-SP: Gouk et al., ICLR 2021, Section 3, penalty form",
    ),
    "project": Method(
        {"l2": "project", "mars": "project_mars", "mars_rows": "project_rows"},
        'α = min(1, radius/n), n = ‖c‖ (norm="l2"), maxᵢ nᵢ ("mars"), or nᵢ of each row ("mars_rows").',
        'PGM, LCC: Gouk et al., ICLR 2021, Section 3; norm="mars": TPGM, Tian et al., CVPR 2023, Eqs. 3 and 4',
    ),
    "ftp": Method(
        {"mars_rows": "ftp"},
        "α = min(1, γ/(nᵢ + 1e-8)) of each row, with γ learned: 1e-8 at the first step; then one Adam step (radius_lr, "
        "radius_betas) on h = Σᵢ⟨gᵢ, c'ᵢ⟩/n'ᵢ, c' being the previous c; k·h when h > 0; and γ ≤ maxᵢ nᵢ.",
        "FTP: Tian et al., NeurIPS 2023, Algorithm 1",
    ),
}

T = TypeVar("T", bound=type)


def documents(names: Iterable[str]) -> Callable[[T], T]:
    """Puts the formulas of these methods into a class's docstring, in place of "{methods}"."""

    def told(name: str) -> str:
        method = METHODS[name]
        text = f'- "{name}": {method.formula}' + (f" ({method.source})" if method.source else "")
        return fill(text, 115, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False)

    def document(of: T) -> T:
        of.__doc__ = (of.__doc__ or "").replace("    {methods}", "\n".join(map(told, names)))
        return of

    return document


def method_of(name: str) -> Method:
    """The row of `name`. Raises ValueError for a name the table lacks."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(map(repr, METHODS))}")
    return METHODS[name]


def rule_of(name: str, norm: str | None, gate: str = GATES[0]) -> Rule:
    """The rule of a method with a norm, None for the method's own, and with a gate, if the method has one.

    Raises ValueError for a norm that the method does not have, or an unknown gate.
    """
    if gate not in GATES:
        raise ValueError(f"unknown gate {gate!r}: choose {' or '.join(map(repr, GATES))}")
    method = method_of(name)
    rules = method.gated.get(gate, method.rules)
    if norm is None:
        return RULES[next(iter(rules.values()))]
    if norm not in rules:
        raise ValueError(f"method {name!r} does not go with norm={norm!r}: choose {' or '.join(map(repr, rules))}")
    return RULES[rules[norm]]


def gate_key(gate: str) -> dict[str, str]:
    """What a parameter group has of a gate. Of the first it has nothing: torch.distributed.checkpoint would miss a key
    that older checkpoints do not have."""
    return {} if gate == GATES[0] else {"gate": gate}


def rule_of_group(group: Mapping[str, Any]) -> Rule:
    """The rule that a parameter group asks for. Raises as `rule_of` does."""
    return rule_of(group["method"], group["norm"], group.get("gate", GATES[0]))
