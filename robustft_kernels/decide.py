"""Decide, in torch: from measures to α where the backends cannot, because the measures of a segment come from several
launches or processes. As everywhere, α = 1 leaves a segment alone."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .methods import RULES

Number = float | Tensor  # or a tensor of one for each segment
EPS = 1e-8  # FTP's


def shrink(ratio: Tensor, grad_dot_delta: Tensor, gain: Tensor, strength: Number) -> Tensor:
    """1 − min(1, strength·ratio) where ⟨g,d⟩ > 0 and the segment moved away, else 1."""
    fires = (grad_dot_delta > 0) & (gain > 0) & ratio.isfinite()
    return torch.where(fires, 1 - (strength * ratio).clamp(max=1), 1.0)


def within(sizes: Tensor, radius: Number) -> Tensor:
    """min(1, radius/n); 1 where n is not finite."""
    return torch.where((sizes > radius) & sizes.isfinite(), radius / sizes, 1.0)


def _spd(measures: Tensor, counts: Sequence[int], strength: Number, _: Number) -> Tensor:
    dot, before, gain = measures.T
    after = (before + gain).sqrt()
    return shrink(gain / (before.sqrt() + after) / after, dot, gain, strength)


def _spd_rows(measures: Tensor, counts: Sequence[int], strength: Number, _: Number) -> Tensor:
    dot, before, gain = measures.T
    return shrink(gain / (before + gain), dot, gain, strength)


def _project(measures: Tensor, counts: Sequence[int], _: Number, radius: Number) -> Tensor:
    return within(sizes_of(measures).clamp(min=0).sqrt(), radius)


def _project_mars(measures: Tensor, counts: Sequence[int], _: Number, radius: Number) -> Tensor:
    return spread(within(largest(sizes_of(measures), counts), radius), counts)


def _project_rows(measures: Tensor, counts: Sequence[int], _: Number, radius: Number) -> Tensor:
    return within(sizes_of(measures), radius)


def _ftp(measures: Tensor, counts: Sequence[int], _: Number, radius: Number) -> Tensor:
    return within(sizes_of(measures) + EPS, radius)


DECIDE: dict[str, Callable[[Tensor, Sequence[int], Number, Number], Tensor]] = {
    "spd": _spd, "spd_rows": _spd_rows, "project": _project, "project_mars": _project_mars,
    "project_rows": _project_rows, "ftp": _ftp,
}  # fmt: skip
assert set(DECIDE) == {rule for rule, of in RULES.items() if of.elsewhere}


def decide(rule: str, measures: Tensor, counts: Sequence[int], strength: Number, radius: Number) -> Tensor:
    """α of each segment of tensors under one rule; counts: how many each tensor has. radius: of "ftp", one each."""
    return DECIDE[rule](measures[:, :3], counts, strength, radius)


def sizes_of(measures: Tensor) -> Tensor:
    """|c| of each segment: ‖c‖², or Σ|c| of a row."""
    return measures[:, 1] + measures[:, 2]


def learn(radius_states: Tensor, slopes: Tensor, t: Tensor, hyper: Mapping[str, Number]) -> Tensor:
    """FTP's radii and their moments, [tensors, 3], after one step of Adam on their slopes.

    The first step sets a radius to 1e-8; a slope that is not finite leaves all as it is.
    """
    radius, first, second = radius_states.T
    slopes = torch.where(slopes > 0, hyper["k"] * slopes, slopes)
    first = hyper["radius_beta1"] * first + (1 - hyper["radius_beta1"]) * slopes
    second = hyper["radius_beta2"] * second + (1 - hyper["radius_beta2"]) * slopes * slopes
    m, v = first / (1 - hyper["radius_beta1"] ** t), second / (1 - hyper["radius_beta2"] ** t)
    moved = (radius - hyper["radius_lr"] * m / (v.sqrt() + EPS)).clamp(min=EPS)
    new = torch.where(slopes.isfinite()[:, None], torch.stack([moved, first, second], 1), radius_states)
    fresh = radius_states.new_tensor([EPS, 0, 0])
    return torch.where((radius == 0)[:, None], fresh, new)


def largest(values: Tensor, counts: Sequence[int]) -> Tensor:
    """The largest of each tensor's segments, infinite where one is not finite; 0 for a tensor without any."""
    known = torch.where(values.isfinite(), values, torch.inf)
    return fold(known, counts, "max")


def fold(values: Tensor, counts: Sequence[int], how: str) -> Tensor:
    """One value a tensor, of its segments' in their order; 0 for a tensor without any."""
    return torch.segment_reduce(values, how, lengths=_lengths(values, counts), initial=0, unsafe=True)


def spread(by_tensor: Tensor, counts: Sequence[int]) -> Tensor:
    """Each tensor's value for each of its segments."""
    return by_tensor.repeat_interleave(_lengths(by_tensor, counts), output_size=sum(counts))


def _lengths(values: Tensor, counts: Sequence[int]) -> Tensor:
    return torch.tensor(counts, dtype=torch.int64, device="cpu").to(values.device, non_blocking=True)
