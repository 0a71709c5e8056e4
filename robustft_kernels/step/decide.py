"""Decides in torch: from measures to α. Backends cannot decide when the measures of a segment come from several sweeps
or processes. As everywhere, α = 1 leaves a segment alone.

A rule is a function of the same name as its row in `methods.RULES`. It takes the measures by name, each with one number
a segment, and the hyper-parameters by name.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..core.methods import MEASURES, RULES, Rule
from ..core.staging import staged

Number = float | Tensor  # one number, or a tensor with one for each segment
Measured = Mapping[str, Tensor]
Terms = Mapping[str, Number]
EPS = 1e-8  # FTP's


def shrink(ratio: Tensor, m: Measured, strength: Number) -> Tensor:
    """1 − min(1, strength·ratio) when the segment moved away, else 1."""
    fires = (m["gain"] > 0) & ratio.isfinite()
    return torch.where(fires, 1 - (strength * ratio).clamp(max=1), 1.0)


def inconsistent(m: Measured, alpha: Tensor) -> Tensor:
    """α when ⟨g,d⟩ > 0, else 1."""
    return torch.where(m["grad_dot_delta"] > 0, alpha, 1.0)


def within(sizes: Tensor, radius: Number) -> Tensor:
    """min(1, radius/n), or 1 when n is not finite."""
    return torch.where((sizes > radius) & sizes.isfinite(), radius / sizes, 1.0)


def size_of(m: Measured) -> Tensor:
    """The size of c: ‖c‖², or Σ|c| of a row."""
    return m["before"] + m["gain"]


def spd_away(m: Measured, h: Terms) -> Tensor:
    """1 − min(1, strength·r). r = max(0, ‖c‖ − ‖d‖)/‖c‖."""
    after = size_of(m).sqrt()
    return shrink(m["gain"] / (m["before"].sqrt() + after) / after, m, h["strength"])


def spd_away_rows(m: Measured, h: Terms) -> Tensor:
    """`spd_away` with Σ|·| for ‖·‖."""
    return shrink(m["gain"] / size_of(m), m, h["strength"])


def spd(m: Measured, h: Terms) -> Tensor:
    """1 − min(1, strength·r) when ⟨g,d⟩ > 0, else 1."""
    return inconsistent(m, spd_away(m, h))


def spd_rows(m: Measured, h: Terms) -> Tensor:
    """`spd` with Σ|·| for ‖·‖."""
    return inconsistent(m, spd_away_rows(m, h))


def project(m: Measured, h: Terms) -> Tensor:
    """min(1, radius/‖c‖)."""
    return within(size_of(m).clamp(min=0).sqrt(), h["radius"])


def project_rows(m: Measured, h: Terms) -> Tensor:
    """min(1, radius/n)."""
    return within(size_of(m), h["radius"])


def ftp(m: Measured, h: Terms) -> Tensor:
    """min(1, γ/(n + 1e-8)), `radius` being the learned γ."""
    return within(size_of(m) + EPS, h["radius"])


DECIDE: dict[str, Callable[[Measured, Terms], Tensor]] = {
    "spd": spd, "spd_rows": spd_rows, "spd_away": spd_away, "spd_away_rows": spd_away_rows, "project": project,
    "project_mars": project_rows, "project_rows": project_rows, "ftp": ftp, "ftp_learned": ftp,
}  # fmt: skip


def decide(rule: Rule, measures: Tensor, counts: Sequence[int], terms: Terms) -> Tensor:
    """α of each segment of tensors under one rule.

    measures: float64 [segments, measures].
    counts: how many segments each tensor has.
    terms: the hyper-parameters. A learned radius comes as `radius`, with one number a segment.
    """
    m = dict(zip(MEASURES, measures.T, strict=True))
    if not rule.tied:
        return DECIDE[rule.name](m, terms)
    return expanded(decide_by_size(rule, largest(size_of(m), counts), terms), counts)


def decide_by_size(rule: Rule, sizes: Tensor, terms: Terms) -> Tensor:
    """α of segments of which no more than the size of c is known: ‖c‖², or Σ|c| of a row."""
    return DECIDE[rule.name]({**dict.fromkeys(MEASURES, torch.zeros_like(sizes)), "before": sizes}, terms)


def learn(states: Tensor, slopes: Tensor, t: Tensor, terms: Terms) -> Tensor:
    """FTP's radii and their moments, [tensors, 3], after one step of Adam on their slopes.

    The first step sets a radius to 1e-8. A slope that is not finite leaves all as it is.
    """
    radius, first, second = states.T
    slopes = torch.where(slopes > 0, terms["k"] * slopes, slopes)
    first = terms["radius_beta1"] * first + (1 - terms["radius_beta1"]) * slopes
    second = terms["radius_beta2"] * second + (1 - terms["radius_beta2"]) * slopes * slopes
    m, v = first / (1 - terms["radius_beta1"] ** t), second / (1 - terms["radius_beta2"] ** t)
    moved = (radius - terms["radius_lr"] * m / (v.sqrt() + EPS)).clamp(min=EPS)
    new = torch.where(slopes.isfinite()[:, None], torch.stack([moved, first, second], 1), states)
    fresh = states.new_tensor([EPS, 0, 0])
    return torch.where((radius == 0)[:, None], fresh, new)


def projection(dot: Tensor, size: Tensor, strength: Number) -> Tensor:
    """DiGraP's factor of d: −min(1, strength)·⟨g,d⟩/‖d‖² when ⟨g,d⟩ < 0, else 0."""
    factor = -torch.as_tensor(strength, dtype=dot.dtype, device=dot.device).clamp(max=1) * dot / size
    return torch.where((dot < 0) & factor.isfinite(), factor, 0.0)


LEARN: dict[str, Callable[[Tensor, Tensor, Tensor, Terms], Tensor]] = {"ftp": learn}


def check_functions() -> None:
    """Raises ValueError naming a rule without a function here, if it waits for its measures or learns."""
    for rule in RULES.values():
        if (rule.waits and rule.name not in DECIDE) or (rule.learns and rule.name not in LEARN):
            raise ValueError(f"rule {rule.name!r} has no function in step/decide.py")


check_functions()


def largest(values: Tensor, counts: Sequence[int]) -> Tensor:
    """The largest value of each tensor's segments. It is infinite if one of them is not finite, and 0 for a tensor
    without any."""
    return fold(torch.where(values.isfinite(), values, torch.inf), counts, "max")


def fold(values: Tensor, counts: Sequence[int], how: str) -> Tensor:
    """One value a tensor, folded from its segments' values in their order. 0 for a tensor without any."""
    lengths = lengths_on(values.device, tuple(counts))
    return torch.segment_reduce(values, how, lengths=lengths, initial=0, unsafe=True)


def expanded(by_tensor: Tensor, counts: Sequence[int]) -> Tensor:
    """The value of each tensor, repeated for each of its segments."""
    return by_tensor.repeat_interleave(lengths_on(by_tensor.device, tuple(counts)), output_size=sum(counts))


@lru_cache(maxsize=256)
def lengths_on(device: torch.device, counts: tuple[int, ...]) -> Tensor:
    """The counts as int64 on a device. They are kept there, as steps ask for the same ones, and a copy would make the
    host wait. Not to be written."""
    return staged(torch.tensor(counts, dtype=torch.int64, device="cpu"), device)
