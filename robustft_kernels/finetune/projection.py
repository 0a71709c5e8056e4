"""Projections toward θ₀ over lists of tensors: measure the deviation, bring it within a radius, interpolate.

θ ← θ₀ + α·c with c = θ − θ₀. A *segment* is a tensor or a row of it. It is what is measured, and it has one α.
"""

from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.anchors import check_fits
from ..core.methods import NORMS, RULES, rule_of
from ..core.mistakes import refuse_model
from ..core.ranges import FROM_0_TO_1, Range, check_number
from ..core.sharding import is_dtensor
from ..core.staging import staged
from ..core.state import is_dense
from ..core.unsharded import resharded, shards_of
from ..step.fingerprint import forms
from ..step.sweep_cache import SweepCache

NO_BOUND = Range(above=True, finite=False)  # an infinite radius holds nothing back
Radius = float | Tensor | Sequence[float | Tensor]
SWEEPS = SweepCache()
SWEEPS_OF_COPIES = SweepCache()  # new tensors, whose memory seldom comes again, must not drive out the others


@torch.no_grad()
def deviation(params: Iterable[Tensor], anchors: Iterable[Tensor] | None, norm: str = "l2") -> Tensor | list[Tensor]:
    """n = ‖θ − θ₀‖ of each tensor.

        "l2":        n = √Σ c²         (Frobenius)
        "mars":      n = maxᵢ Σ|cᵢ|    (the largest row sum)
        "mars_rows": nᵢ = Σ|cᵢ|        (each row by itself)

    A row is an index of dimension 0 with all other dimensions flattened. A tensor below two dimensions is one row.

    Args:
        params: tensors on one device, of any floating dtype and dense layout.
        anchors: floating tensors of the same shapes. None is zero.

    Returns:
        float64 on the params' device: a tensor [n], or for "mars_rows" a list of one tensor [rows] for each param.

    Arithmetic is float32 (float64 for float64 params), and sums are float64. Never waits for the device. A second call
    with the same tensors sends nothing there, and a CUDA graph can capture it.

    Raises ValueError for an unknown norm, or for lists that do not match or are unfit, naming the index.
    Source: TPGM (Tian et al., CVPR 2023), Eq. 3 and 4. By rows: Gouk et al., ICLR 2021.
    """
    params, anchors = as_lists(params, anchors)
    ball = Ball(params, norm)
    norms = ball.norms(params, anchors)
    return list(norms.split(ball.counts)) if ball.alpha_by_row else norms


@torch.no_grad()
def project_(params: Iterable[Tensor], anchors: Iterable[Tensor] | None, radius: Radius, norm: str = "l2") -> None:
    """θ ← θ₀ + min(1, γ/n)·c in place. Afterwards n ≤ γ, to the rounding of the params' dtype.

    Args:
        params, anchors, norm: as in `deviation`, which defines n. "mars" scales a tensor by its largest row,
            "mars_rows" scales each row by its own norm. Anchors are never written.
        radius: γ > 0. It is a number, a tensor of one element, or a tensor or sequence with one radius a tensor.
            Numbers are checked. The host never reads a tensor: in it, a value below 0 counts as 0, and NaN as no
            constraint.

    What is within its radius keeps its bits, and so does what has no finite norm. Never waits for the device.

    A CUDA graph can capture a second call with the same tensors. A radius in a tensor on the device is read at each
    replay. A number stays as it was captured.

    Raises ValueError, before anything is written, for a radius that is NaN or not above 0, and as `deviation` does.
    Source: TPGM (Tian et al., CVPR 2023), Eq. 3 and 4. By rows: the radial scaling of Gouk et al., ICLR 2021.
    """
    params, anchors = as_lists(params, anchors)
    check_norm(norm)
    radii = _radii(radius, params)
    if any(map(is_dtensor, params)):
        ball = Ball(params, norm)
        ball.pull_(params, anchors, ball.alphas(radii, ball.norms(params, anchors)))
    else:
        SWEEPS.pull(rule_of("project", norm), params, anchors, radii=radii)


def project(
    params: Iterable[Tensor], anchors: Iterable[Tensor] | None, radius: Radius, norm: str = "l2"
) -> list[Tensor]:
    """θ̃ = θ₀ + min(1, γ/n)·c as new tensors, differentiable (once) in γ and in nothing else.

        dL/dγ = 1[γ < n]·⟨dL/dθ̃, c⟩/n    for a tensor; for "mars_rows" the sum of that over its rows

    Arguments and errors are those of `project_`. The gradient goes to a tensor `radius`, or to the tensors in a
    sequence. `params` and `anchors` must not be written until it is taken. A CUDA graph cannot capture it.
    """
    params, anchors = as_lists(params, anchors)
    ball = Ball(params, norm, SWEEPS_OF_COPIES)
    return list(_Project.apply(_radii(radius, params), params, anchors, ball))  # type: ignore[no-untyped-call]


@torch.no_grad()
def interpolate_(params: Iterable[Tensor], anchors: Iterable[Tensor] | None, alpha: float | Tensor) -> None:
    """θ ← θ₀ + α·c in place.

    Args:
        params, anchors: as in `deviation`.
        alpha: a number in [0, 1], a tensor of one element, or a tensor with one element for each param. The host never
            reads a tensor. 0 gives θ₀ exactly, 1 leaves the bits as they are.

    CUDA graphs can capture it as they can `project_`.

    Raises ValueError, before anything is written, for a number outside [0, 1], and as `deviation` does.
    Source: WiSE-FT (Wortsman et al., CVPR 2022), Eq. 1.
    """
    params, anchors = as_lists(params, anchors)
    if not isinstance(alpha, Tensor):
        check_number("alpha", alpha, FROM_0_TO_1)
    Ball(params, "l2").pull_(params, anchors, _one_each(alpha, "alpha", params))


class Ball:
    """n ≤ γ for tensors of the shapes of `params`, with one radius a tensor: norms, α, and dL/dγ.

    rows: whether the segments that are measured are rows.
    alpha_by_row: whether each row has its own norm and α. If not, a tensor has one.
    sweeps: makes and keeps the sweeps.

    Raises ValueError for an unknown norm.
    """

    def __init__(self, params: Sequence[Tensor], norm: str, sweeps: SweepCache = SWEEPS) -> None:
        check_norm(norm)
        self.norm = norm
        self.rows = norm != "l2"
        self.alpha_by_row = norm == "mars_rows"
        self._rule = RULES["observe_rows" if self.rows else "observe"]
        self._shapes, self._device, self._sweeps = [param.shape for param in params], _device_of(params), sweeps

    @cached_property
    def counts(self) -> list[int]:
        """How many segments each tensor has."""
        return [self._rule.segments_of(shape) for shape in self._shapes]

    @property
    def lengths(self) -> Tensor:
        """The same on the device."""
        return self._sweeps.lengths(self.counts, self._device)

    def norms(self, params: Sequence[Tensor], anchors: Sequence[Tensor] | None) -> Tensor:
        """n, flat in float64."""
        sizes = self._sweeps.measure(self._rule, params, anchors)["before"]
        if self.norm == "mars":
            return self._fold(sizes, "max", 0)
        return sizes if self.rows else sizes.sqrt()

    def dots(self, params: Sequence[Tensor], anchors: Sequence[Tensor] | None, grads: Sequence[Tensor]) -> Tensor:
        """⟨G, c⟩ of each segment, flat in float64. Takes a part of the tensors too."""
        return self._sweeps.measure(self._rule, params, anchors, grads)["grad_dot_delta"]

    def pull_(self, params: Sequence[Tensor], anchors: Sequence[Tensor] | None, alphas: Tensor) -> None:
        """θ ← θ₀ + α·c in place, with one α for each norm. 1 leaves the bits, and 0 gives θ₀ whatever c is."""
        rule = RULES["given_rows" if self.alpha_by_row else "given"]
        self._sweeps.pull(rule, resharded(params), anchors, alphas=alphas)

    def alphas(self, radii: Tensor, norms: Tensor) -> Tensor:
        """α = min(1, γ/n), or 1 if n is not finite."""
        radii = self._spread(radii)
        return torch.where(_outside(radii, norms), radii.clamp(min=0) / norms, 1.0)

    def rates(self, radii: Tensor, norms: Tensor) -> Tensor:
        """dα/dγ = 1[γ < n]/n."""
        return torch.where(_outside(self._spread(radii), norms), norms.reciprocal(), 0.0)

    def slopes(self, radii: Tensor, norms: Tensor, dots: Tensor) -> Tensor:
        """dL/dγ = ⟨G, c⟩·dα/dγ from the `dots` of all tensors. If rows have their own α, it is summed over them."""
        if self.norm == "mars":
            dots = self._fold(dots, "sum", 0)
        rates = self.rates(radii, norms)
        slopes = torch.where(rates > 0, dots * rates, 0.0)
        return self._fold(slopes, "sum", 0) if self.alpha_by_row else slopes

    def largest(self, norms: Tensor) -> Tensor:
        """The largest norm of each tensor, or 0 for one without rows."""
        return self._fold(norms, "max", 0) if self.alpha_by_row else norms

    def smallest(self, norms: Tensor) -> Tensor:
        """The smallest norm of each tensor, or infinity for one without rows."""
        return self._fold(norms, "min", torch.inf) if self.alpha_by_row else norms

    def mean(self, values: Tensor) -> Tensor:
        """The mean of each tensor's values, with one value for each norm. 0 for a tensor without rows."""
        if not self.alpha_by_row:
            return values
        return self._fold(values, "sum", 0) / self.lengths.clamp(min=1)

    def _fold(self, by_row: Tensor, reduce: str, initial: float) -> Tensor:
        """One value a tensor, folded in a fixed order."""
        return torch.segment_reduce(by_row, reduce, lengths=self.lengths, initial=initial, unsafe=True)

    def _spread(self, by_tensor: Tensor) -> Tensor:
        """One value for each norm."""
        if not self.alpha_by_row:
            return by_tensor
        return by_tensor.repeat_interleave(self.lengths, output_size=sum(self.counts))


def check_norm(norm: str) -> None:
    """Raises ValueError for a norm that is none of `NORMS`."""
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}: choose one of {', '.join(map(repr, NORMS))}")


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, radii: Tensor, params: list[Tensor], anchors: list[Tensor] | None, ball: Ball
    ) -> tuple[Tensor, ...]:
        norms = ball.norms(params, anchors)
        projected = [param.detach().clone() for param in params]
        ball.pull_(projected, anchors, ball.alphas(radii, norms))
        ctx.ball, ctx.anchored = ball, anchors is not None
        ctx.save_for_backward(radii, norms, *params, *(anchors or ()))
        return tuple(projected)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        radii, norms, *tensors = ctx.saved_tensors
        given = iter(tensors)
        params = list(islice(given, len(grads)))
        dots = ctx.ball.dots(params, list(given) if ctx.anchored else None, grads)
        return ctx.ball.slopes(radii, norms, dots), None, None, None


def _outside(radii: Tensor, norms: Tensor) -> Tensor:
    return (radii < norms) & norms.isfinite()


def _device_of(params: Sequence[Tensor]) -> torch.device:
    return params[0].device if params else torch.device("cpu")


_fit: deque[Hashable] = deque(maxlen=16)  # lists that passed the checks last, as `forms` tells them


def as_lists(params: Iterable[Tensor], anchors: Iterable[Tensor] | None) -> tuple[list[Tensor], list[Tensor] | None]:
    """Both as lists, of shards where FSDP2 has any. Raises ValueError naming the first index whose param or anchor is
    unfit, and TypeError for a model."""
    for name, of in (("params", params), ("anchors", anchors)):
        refuse_model(name, of, "model.parameters()")
        if isinstance(of, Mapping):
            raise TypeError(f"{name} is a mapping ({type(of).__name__}); give lists of tensors, parallel to each other")
    params, anchors = shards_of(params), None if anchors is None else shards_of(anchors)
    tensors = [*params, *(anchors or ())]
    form = forms(tensors)
    known = form and (len(params), anchors is None, form)
    if known not in _fit:
        _check(params, anchors)
        if known and len({tensor.device for tensor in tensors}) == 1:  # `forms` does not tell pinned memory from other
            _fit.append(known)
    return params, anchors


def _check(params: list[Tensor], anchors: list[Tensor] | None) -> None:
    for k, param in enumerate(params):
        if not param.is_floating_point():
            raise ValueError(f"params[{k}] is {param.dtype}; a real floating-point tensor is needed")
        if param.device != params[0].device:
            raise ValueError(f"params[{k}] is on {param.device}, params[0] on {params[0].device}; call once a device")
        if not (param.is_contiguous() or is_dense(param)):
            raise ValueError(f"params[{k}] has gaps or overlaps in memory; pass a dense tensor, such as its clone()")
    if anchors is None:
        return
    if len(anchors) != len(params):
        lacking = "anchors" if len(anchors) < len(params) else "params"
        first = min(len(anchors), len(params))
        raise ValueError(f"{len(anchors)} anchors for {len(params)} params: there is no {lacking}[{first}]")
    for k, (param, anchor) in enumerate(zip(params, anchors, strict=True)):
        check_fits(anchor, param, f"params[{k}]")


def _radii(radius: Radius, params: Sequence[Tensor]) -> Tensor:
    """One radius a tensor, flat in float64. Raises ValueError for a number that is NaN or not above 0."""
    given = {f"radius[{k}]": r for k, r in enumerate(radius)} if isinstance(radius, Sequence) else {"radius": radius}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            check_number(name, value, NO_BOUND)
    return _one_each(radius, "radius", params)


def _one_each(values: Radius, name: str, params: Sequence[Tensor]) -> Tensor:
    """One value a param, flat in float64 on their device. Differentiable in the tensors given."""
    device = _device_of(params)
    if not isinstance(values, Sequence):
        flat = _number(values, device).flatten()
    elif any(isinstance(value, Tensor) for value in values):
        flat = torch.cat([_number(value, device).reshape(1) for value in values])
    else:
        flat = staged(torch.tensor(values, dtype=torch.float64, device="cpu"), device)
    if len(flat) != len(params) and (len(flat) != 1 or isinstance(values, Sequence)):
        raise ValueError(f"{name} has {len(flat)} elements for {len(params)} tensors; give one number, or one for each")
    return flat.expand(len(params))


def _number(value: float | Tensor, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((), float(value), dtype=torch.float64, device=device)
    value = value.to(torch.float64)
    if value.is_cpu and device.type != "cpu":
        return staged(value, device)
    return value.to(device, non_blocking=True)
