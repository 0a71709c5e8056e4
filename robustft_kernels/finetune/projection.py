"""Projections toward θ₀ over lists of tensors: measure the deviation, bring it within a radius, interpolate.

θ ← θ₀ + α·c with c = θ − θ₀. A *segment* is a tensor or a row of it. It is what is measured, and it has one α.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import registry
from ..core.anchors import check_fits
from ..core.bases import NO_STEP, GroupSpec
from ..core.contract import StepTensors
from ..core.exchange import Segments
from ..core.methods import MEASURES, NORMS, RULES, Rule, rule_of
from ..core.ranges import FROM_0_TO_1, Range, check_number
from ..core.sharding import is_dtensor, local, placed_as
from ..core.state import beside, is_dense
from ..core.unsharded import resharded, shards_of
from ..step.no_step import NoStep

NO_BOUND = Range(above=True, finite=False)  # an infinite radius holds nothing back
Radius = float | Tensor | Sequence[float | Tensor]


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

    Arithmetic is float32 (float64 for float64 params), and sums are float64. Never waits for the device.

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
        _sweep(rule_of("project", norm), params, anchors, radii=radii)


def project(
    params: Iterable[Tensor], anchors: Iterable[Tensor] | None, radius: Radius, norm: str = "l2"
) -> list[Tensor]:
    """θ̃ = θ₀ + min(1, γ/n)·c as new tensors, differentiable (once) in γ and in nothing else.

        dL/dγ = 1[γ < n]·⟨dL/dθ̃, c⟩/n    for a tensor; for "mars_rows" the sum of that over its rows

    Arguments and errors are those of `project_`. The gradient goes to a tensor `radius`, or to the tensors in a
    sequence. `params` and `anchors` must not be written until it is taken.
    """
    params, anchors = as_lists(params, anchors)
    return list(_Project.apply(_radii(radius, params), params, anchors, Ball(params, norm)))  # type: ignore[no-untyped-call]


@torch.no_grad()
def interpolate_(params: Iterable[Tensor], anchors: Iterable[Tensor] | None, alpha: float | Tensor) -> None:
    """θ ← θ₀ + α·c in place.

    Args:
        params, anchors: as in `deviation`.
        alpha: a number in [0, 1], a tensor of one element, or a tensor with one element for each param. The host never
            reads a tensor. 0 gives θ₀ exactly, 1 leaves the bits as they are.

    Raises ValueError, before anything is written, for a number outside [0, 1], and as `deviation` does.
    Source: WiSE-FT (Wortsman et al., CVPR 2022), Eq. 1.
    """
    params, anchors = as_lists(params, anchors)
    if not isinstance(alpha, Tensor):
        check_number("alpha", alpha, FROM_0_TO_1)
    _pull(params, anchors, _one_each(alpha, "alpha", params), rows=False)


class Ball:
    """n ≤ γ for tensors of the shapes of `params`, with one radius a tensor: norms, α, and dL/dγ.

    rows: whether the segments that are measured are rows.
    counts: how many of them each tensor has.
    alpha_by_row: whether each row has its own norm and α. If not, a tensor has one.

    Raises ValueError for an unknown norm.
    """

    def __init__(self, params: Sequence[Tensor], norm: str) -> None:
        check_norm(norm)
        self.norm = norm
        self.rows = norm != "l2"
        self.alpha_by_row = norm == "mars_rows"
        rule = _observing(self.rows)
        self.counts = [rule.segments_of(param.shape) for param in params]
        self.lengths = (
            torch.tensor(self.counts, dtype=torch.int64).to(_device_of(params), non_blocking=True)
            if self.rows
            else None
        )

    def norms(self, params: Sequence[Tensor], anchors: Sequence[Tensor] | None) -> Tensor:
        """n, flat in float64."""
        sizes, _ = _measure(params, anchors, None, self.rows)
        if self.norm == "mars":
            return self._fold(sizes, "max", 0)
        return sizes if self.rows else sizes.sqrt()

    def dots(self, params: Sequence[Tensor], anchors: Sequence[Tensor] | None, grads: Sequence[Tensor]) -> Tensor:
        """⟨G, c⟩ of each segment, flat in float64. Takes a part of the tensors too."""
        _, dots = _measure(params, anchors, grads, self.rows)
        assert dots is not None
        return dots

    def pull_(self, params: Sequence[Tensor], anchors: Sequence[Tensor] | None, alphas: Tensor) -> None:
        """θ ← θ₀ + α·c in place."""
        _pull(params, anchors, alphas, self.alpha_by_row)

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
        if self.lengths is None or not self.alpha_by_row:
            return values
        return self._fold(values, "sum", 0) / self.lengths.clamp(min=1)

    def _fold(self, by_row: Tensor, reduce: str, initial: float) -> Tensor:
        """One value a tensor, folded in a fixed order."""
        return torch.segment_reduce(by_row, reduce, lengths=self.lengths, initial=initial, unsafe=True)

    def _spread(self, by_tensor: Tensor) -> Tensor:
        """One value for each norm."""
        if self.lengths is None or not self.alpha_by_row:
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


def _observing(rows: bool) -> Rule:
    return RULES["observe_rows" if rows else "observe"]


def _measure(
    params: Sequence[Tensor], anchors: Sequence[Tensor] | None, grads: Sequence[Tensor] | None, rows: bool
) -> tuple[Tensor, Tensor | None]:
    """‖c‖² of each segment, or Σ|c| if segments are rows. With grads, ⟨grad, c⟩ too. Both are flat, in float64."""
    found = _sweep(_observing(rows), params, anchors, grads or [])
    return found["before"], None if grads is None else found["grad_dot_delta"]


def _pull(params: Sequence[Tensor], anchors: Sequence[Tensor] | None, alphas: Tensor, rows: bool) -> None:
    """θ ← θ₀ + α·c with one α a segment, flat in float64. 1 leaves the bits, and 0 gives θ₀ whatever c is."""
    _sweep(RULES[_observing(rows).pull_half], resharded(params), anchors, alphas=alphas.detach().clone())


@torch.no_grad()
def _sweep(
    rule: Rule,
    params: Sequence[Tensor],
    anchors: Sequence[Tensor] | None,
    grads: Sequence[Tensor] = (),
    alphas: Tensor | None = None,
    radii: Tensor | None = None,
) -> dict[str, Tensor]:
    """A sweep without a step, by the fastest backend. Returns what it measured, by name.

    alphas: one a segment, for a rule that is given them.
    radii: one a tensor, for a rule that reads them. Each tensor is then a group of its own. On a GPU its radius stays
        on the device.
    """
    if any(map(is_dtensor, params)):
        return _sweep_shards(rule, params, anchors, grads, alphas)
    device = _device_of(params)
    beside_params = [beside(p, a) for p, a in zip(params, anchors, strict=True)] if anchors is not None else []
    backend = registry.choose_backend("auto", device, {t.dtype for t in (*params, *beside_params, *grads)})
    spec = GroupSpec(rule, anchored=anchors is not None)
    tensors = [
        StepTensors(spec, 0 if radii is None else k, param, beside_params[k] if beside_params else None)
        for k, param in enumerate(params)
    ]
    hyper = torch.zeros(1 if radii is None else len(params), len(NO_STEP.hyper), dtype=torch.float64, device="cpu")
    live = {}
    if radii is not None:
        column, radii = NO_STEP.hyper.index("radius"), radii.detach().clamp(min=0)
        if backend.keeps_addresses:
            live = {k * len(NO_STEP.hyper) + column: radius for k, radius in enumerate(radii.unbind())}
        else:
            hyper[:, column] = radii
    sweep = NoStep(backend, tensors, hyper, live, alphas=alphas)
    if params:
        sweep(grads)
    return dict(zip(MEASURES, sweep.results.T, strict=False))


def _sweep_shards(
    rule: Rule,
    params: Sequence[Tensor],
    anchors: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    alphas: Tensor | None,
) -> dict[str, Tensor]:
    """The same over the shards that are here. One all-reduce sums what it measured over all shards."""
    segments = Segments(params, [rule] * len(params))
    found = _sweep(
        rule,
        [local(param) for param in params],
        None if anchors is None else [local(beside(p, placed_as(a, p))) for p, a in zip(params, anchors, strict=True)],
        [local(placed_as(grad, param)) for grad, param in zip(grads, params, strict=False)],
        None if alphas is None else segments.parts(alphas),
    )
    if alphas is not None:
        return found
    sums = segments.whole(torch.stack([found[name] for name in MEASURES], 1))
    return dict(zip(MEASURES, sums.T, strict=True))


def _outside(radii: Tensor, norms: Tensor) -> Tensor:
    return (radii < norms) & norms.isfinite()


def _device_of(params: Sequence[Tensor]) -> torch.device:
    return params[0].device if params else torch.device("cpu")


def as_lists(params: Iterable[Tensor], anchors: Iterable[Tensor] | None) -> tuple[list[Tensor], list[Tensor] | None]:
    """Both as lists, of shards where FSDP2 has any. Raises ValueError naming the first index whose param or anchor is
    unfit."""
    params = shards_of(params)
    for k, param in enumerate(params):
        if not param.is_floating_point():
            raise ValueError(f"params[{k}] is {param.dtype}; a real floating-point tensor is needed")
        if param.device != params[0].device:
            raise ValueError(f"params[{k}] is on {param.device}, params[0] on {params[0].device}; call once a device")
        if not (param.is_contiguous() or is_dense(param)):
            raise ValueError(f"params[{k}] has gaps or overlaps in memory; pass a dense tensor, such as its clone()")
    if anchors is None:
        return params, None
    anchors = shards_of(anchors)
    if len(anchors) != len(params):
        lacking = "anchors" if len(anchors) < len(params) else "params"
        first = min(len(anchors), len(params))
        raise ValueError(f"{len(anchors)} anchors for {len(params)} params: there is no {lacking}[{first}]")
    for k, (param, anchor) in enumerate(zip(params, anchors, strict=True)):
        check_fits(anchor, param, f"params[{k}]")
    return params, anchors


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
    if isinstance(values, Sequence) and any(isinstance(value, Tensor) for value in values):
        each = [torch.as_tensor(value, dtype=torch.float64).to(device, non_blocking=True) for value in values]
        flat = torch.cat([value.reshape(1) for value in each])
    else:
        flat = torch.as_tensor(values, dtype=torch.float64).flatten().to(device, non_blocking=True)
    if len(flat) != len(params) and (len(flat) != 1 or isinstance(values, Sequence)):
        raise ValueError(f"{name} has {len(flat)} elements for {len(params)} tensors; give one number, or one for each")
    return flat.expand(len(params))
