"""Several fine-tuned models in one: their mean (a uniform soup), and Model Stock, which draws that mean toward θ₀."""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import combinations, combinations_with_replacement
from math import nan, sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.sharding import is_dtensor
from ..step.sweep_cache import SweepCache
from .pairing import Buffers, Joint, Pretrained, blend, match_many, models_of, state_dict_like, state_of
from .projection import Ball

PIECE = 2**18  # elements of each model that are measured at once. The command has no more in memory


@torch.no_grad()
def soup(
    finetuned: Iterable[Pretrained],
    *,
    buffers: Literal["finetuned", "interpolate"] = "finetuned",
    exclude: str | Iterable[str] = (),
    parameters: Collection[str] | None = None,
) -> OrderedDict[str, Any]:
    """θ = (θ₁ + ... + θ_N)/N over N ≥ 2 state dicts, as a new one that the first model loads.

    It is computed in float32 (float64 if any model is float64), and rounded once, to the dtype of the first model. An
    element that is equal in all models stays as it is.

    Names, order, devices and dtypes are those of the first model. No memory is shared with any. Tensors tied in the
    first are tied in the result. Integer and bool entries, and what is not a tensor, are those of the first.

    Args:
        finetuned: the models, each a module, its state dict, or the path of a safetensors file, its index, or their
            directory. They should come from one θ₀: means of models that do not are worth nothing. Names are matched as
            by `wise_ft`, which overlooks wrappers and one prefix.
        buffers: what floating-point buffers, such as batch-norm statistics, become: "finetuned" (those of the first
            model), or "interpolate" (their mean). Either way, estimate batch-norm statistics anew on training data.
        exclude: names, or prefixes of names, of what stays as it is in the first model. The others need not have it.
        parameters: the names of the parameters, as in `wise_ft`.

    Raises:
        ValueError: fewer than two models, or two that are the same memory. Entries that one lacks, or of other shapes
            or kinds. A name that matches nothing, or buffers that cannot be told from parameters.
        TypeError: a model that is neither a module nor a mapping nor a path, or one model in place of several.

    Source: Wortsman et al., ICML 2022 (arXiv 2203.05482), uniform soup.
    """
    models = models_of(finetuned)
    joints = match_many(None, models, buffers, exclude, parameters)

    def value(joint: Joint) -> Tensor:
        if joint.others is None:
            return joint.first.detach().clone()
        return torch.empty_like(joint.first).copy_(mean([joint.first, *joint.others]))

    return state_dict_like(state_of(models[0], "finetuned[0]"), ((joint.names, value(joint)) for joint in joints))


@torch.no_grad()
def model_stock(
    pretrained: Pretrained,
    finetuned: Iterable[Pretrained],
    *,
    buffers: Buffers = "finetuned",
    exclude: str | Iterable[str] = (),
    parameters: Collection[str] | None = None,
) -> OrderedDict[str, Any]:
    """θ = t·mean(θᵢ) + (1 − t)·θ₀ over N ≥ 2 fine-tuned models, with a t for each tensor:

        t = N·cos / (1 + (N − 1)·cos)

    Here cos is that of the angle between two deviations θᵢ − θ₀ and θⱼ − θ₀ of the tensor, and for N > 2 its mean over
    all pairs of models. Models that agree have t near 1, their mean. Those at right angles have t = 0, and give θ₀ bit
    for bit. So do obtuse angles: t is at least 0. The cosine with a deviation of zero is 0. A tensor that moved in no
    model stays as it is.

    t is computed from inner products of float32 deviations, summed in float64. The rest is computed, rounded and
    returned as by `soup`, with whose arguments and errors these agree.

    Args:
        pretrained: θ₀, in one of the forms of a fine-tuned model.
        finetuned: the models. The same recipe with other seeds or orders of data is what the paper averages.
        buffers: as for `soup`, or "pretrained". With "interpolate", buffers have a t as parameters do.
        exclude: what stays as it is in the first model, such as a fresh head. θ₀ need not have it.

    Raises:
        ValueError: as `soup`. Also numbers in a tensor that are not finite, unless they are equal on all sides.

    The paper gives t for one angle. Its authors' notebook for two models, of which we read a copy, has a t for each
    entry of the state dict, weights and biases apart. The mean over pairs and the bound t ≥ 0 are ours.

    Source: Model Stock, Jang et al., ECCV 2024 (arXiv 2403.19522).
    """
    models = models_of(finetuned)
    joints = match_many(pretrained, models, buffers, exclude, parameters)

    def value(joint: Joint) -> Tensor:
        t = ratio_of(joint)
        if joint.theta_0 is None or t != t:
            return joint.first.detach().clone()
        assert joint.others is not None
        new = stocked(joint.theta_0, [joint.first, *joint.others], t)
        return torch.empty_like(joint.first).copy_(new)

    return state_dict_like(state_of(models[0], "finetuned[0]"), ((joint.names, value(joint)) for joint in joints))


@torch.no_grad()
def stock_ratios(
    pretrained: Pretrained,
    finetuned: Iterable[Pretrained],
    *,
    buffers: Buffers = "finetuned",
    exclude: str | Iterable[str] = (),
    parameters: Collection[str] | None = None,
) -> dict[str, float]:
    """The t of `model_stock` by name, in the order of the first model: how far the models agree on each tensor.

    nan is for a tensor that moved in no model. A tied tensor has its first name. What is not interpolated is left out:
    integers, what is excluded, and buffers unless `buffers="interpolate"`. Arguments, errors and source are those of
    `model_stock`.
    """
    joints = match_many(pretrained, models_of(finetuned), buffers, exclude, parameters)
    return {joint.names[0]: ratio_of(joint) for joint in joints if joint.others is not None and joint.interpolated}


def ratio_of(joint: Joint) -> float:
    """The t of a tensor. 0 for a buffer that becomes θ₀, and nan for a tensor that stays or moved in no model."""
    if joint.theta_0 is None or joint.others is None:
        return nan
    if not joint.interpolated:
        return 0.0
    sides = [_flat(of, joint.first.device) for of in (joint.theta_0, joint.first, *joint.others)]
    angles = Angles(joint.names[0], len(sides) - 1)
    for start, stop in pieces(sides[0].numel()):
        theta_0, *thetas = (side[start:stop] for side in sides)
        angles.add(theta_0, thetas)
    return angles.ratio


def pieces(numel: int) -> Iterator[tuple[int, int]]:
    """Where each piece of a tensor starts and stops. The sums of `Angles`, to their last bits, depend on these."""
    for start in range(0, numel, PIECE):
        yield start, min(start + PIECE, numel)


class Angles:
    """The inner products ⟨θᵢ − θ₀, θⱼ − θ₀⟩ of a tensor, whose pieces are added one by one, and t from them.

    name: the tensor's, for messages.
    models: N.
    """

    def __init__(self, name: str, models: int) -> None:
        self._name, self._models = name, models
        self._pairs = list(combinations_with_replacement(range(models), 2))
        self._products = [0.0] * len(self._pairs)
        self._room = torch.empty(0)
        self._sweeps = SweepCache(2)  # for pieces, and for the last one

    def add(self, theta_0: Tensor, thetas: Sequence[Tensor]) -> None:
        """Adds a piece, flat and of real numbers. Raises ValueError for numbers that are not finite, unless they are
        equal on all sides."""
        wide = _wide([theta_0, *thetas])
        if not self._room.numel():
            self._room = torch.empty(self._models, len(theta_0), dtype=wide, device=theta_0.device)
        start, deltas = theta_0.to(wide), list(self._room[:, : len(theta_0)])
        for theta, delta in zip(thetas, deltas, strict=True):
            torch.sub(theta.to(wide), start, out=delta)
        found = self._inner(deltas)
        if not found.isfinite().all():
            for theta, delta in zip(thetas, deltas, strict=True):
                delta[theta.to(wide) == start] = 0  # ∞ − ∞ is no number
            found = self._inner(deltas)
            if not found.isfinite().all():
                raise ValueError(
                    f"{self._name!r} has no angles, as its numbers or deviations are not finite; find the model that "
                    "broke, or exclude the tensor"
                )
        self._products = [old + new for old, new in zip(self._products, found.tolist(), strict=True)]

    def _inner(self, deltas: list[Tensor]) -> Tensor:
        one, other = ([deltas[pair[k]] for pair in self._pairs] for k in (0, 1))
        return Ball(one, "l2", self._sweeps).dots(one, None, other)

    @property
    def ratio(self) -> float:
        """t, in [0, 1]. nan if no model moved."""
        products = dict(zip(self._pairs, self._products, strict=True))
        sizes = [sqrt(products[k, k]) for k in range(self._models)]
        if not any(sizes):
            return nan
        pairs = list(combinations(range(self._models), 2))
        cosines = [products[i, j] / sizes[i] / sizes[j] if sizes[i] and sizes[j] else 0.0 for i, j in pairs]
        cos = min(1.0, sum(cosines) / len(cosines))
        return self._models * cos / (1 + (self._models - 1) * cos) if cos > 0 else 0.0


def mean(thetas: Sequence[Tensor], wide: torch.dtype = torch.float32) -> Tensor:
    """Σθᵢ/N on the device of the first, in `wide`, or in float64 if any is float64. Elements that are equal in all stay
    as they are."""
    if thetas[0].is_complex():
        return torch.view_as_complex(mean([torch.view_as_real(theta.resolve_conj()) for theta in thetas], wide))
    if wide != torch.float64:
        wide = _wide(thetas)
    first, *others = (theta.to(thetas[0].device, wide) for theta in thetas)
    total, still = first, torch.ones_like(first, dtype=torch.bool)
    for other in others:
        total, still = total + other, still & (other == first)
    return torch.where(still, first, total / len(thetas))


def stocked(theta_0: Tensor, thetas: Sequence[Tensor], t: float) -> Tensor:
    """t·mean(θᵢ) + (1 − t)·θ₀, not rounded yet. t = 0 gives θ₀ itself."""
    return blend(theta_0, mean(thetas, _wide([theta_0])), t)


def _wide(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(of.dtype.to_real() == torch.float64 for of in tensors) else torch.float32


def _flat(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor's real numbers, whole, in the order of its indices."""
    whole: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    whole = whole.detach()
    if whole.is_complex():
        whole = torch.view_as_real(whole.resolve_conj())
    return whole.to(device).reshape(-1)
