"""The oracle: every step in plain torch, one tensor after the other, to be read beside the papers.

Shares no code with a kernel. Runs on any device, never waits for it, and takes `arithmetic=torch.float64` to compute
in double precision whatever the storage: measures are those of the weights as they are stored, so θ̃ is rounded to
the parameter's dtype before it is measured, and float64 arithmetic does not hide that.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .bases import ADAMW, SGD, arithmetic_of

Run = Callable[..., None]  # of grads, grad_scale, found_inf
Row = dict[str, float]


def adamw_base(theta: Tensor, g: Tensor, m: Tensor, v: Tensor, v_max: Tensor | None, t: Tensor, h: Row) -> Tensor:
    """θ̃ = θ(1 − lr·wd) − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε); m, v and v_max move in place.

    Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 2; amsgrad: Reddi et al.,
    ICLR 2018.
    """
    m.mul_(h["beta1"]).add_(g, alpha=1 - h["beta1"])
    v.mul_(h["beta2"]).add_(g * g, alpha=1 - h["beta2"])
    root = v if v_max is None else torch.maximum(v_max, v, out=v_max)
    corrections = [1 - torch.tensor(h[beta], dtype=torch.float64, device=t.device) ** t for beta in ("beta1", "beta2")]
    first, second = (c.to(theta.device, theta.dtype, non_blocking=True) for c in corrections)
    return theta * (1 - h["lr"] * h["weight_decay"]) - h["lr"] / first * m / (root.sqrt() / second.sqrt() + h["eps"])


def sgd_base(theta: Tensor, g: Tensor, b: Tensor | None, t: Tensor | None, h: Row) -> Tensor:
    """θ̃ = θ − lr·b, with b ← μ·b + (1 − dampening)(g + wd·θ), at its first step g + wd·θ; b moves in place.

    As torch.optim.SGD; Sutskever et al., ICML 2013.
    """
    g = g + h["weight_decay"] * theta
    if b is None or t is None:
        return theta - h["lr"] * g
    later = h["momentum"] * b + (1 - h["dampening"]) * g
    b.copy_(torch.where(t.to(b.device) > 1, later, g))
    return theta - h["lr"] * (g + h["momentum"] * b if h["nesterov"] else b)


def keep(_: Tensor, __: Row) -> Tensor | float:
    """α = 1."""
    return 1.0


def l2sp(_: Tensor, h: Row) -> Tensor | float:
    """α = 1 − min(1, strength·lr)."""
    return 1 - min(1.0, h["strength"] * h["lr"])


def spd(measures: Tensor, h: Row) -> Tensor | float:
    """α = 1 − min(1, strength·r) where ⟨g,d⟩ > 0, else 1; r = max(0, ‖c‖ − ‖d‖)/‖c‖, 0 where ‖c‖ = 0.

    Tian et al., "Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models", NeurIPS 2024, Algorithm 2.
    """
    grad_dot_delta, delta_sq, gain = measures
    before, after = delta_sq.sqrt(), (delta_sq + gain).clamp(min=0).sqrt()
    ratio = gain / (before + after) / after
    fires = (grad_dot_delta > 0) & (gain > 0) & ratio.isfinite()
    return torch.where(fires, 1 - (h["strength"] * ratio).clamp(max=1), 1.0)


RULES: dict[str, Callable[[Tensor, Row], Tensor | float]] = {"keep": keep, "l2sp": l2sp, "spd": spd}
MEASURED = {"spd"}


def measure(g: Tensor, d: Tensor, c: Tensor) -> Tensor:
    """⟨g,d⟩, ‖d‖² and ‖c‖² − ‖d‖² = ⟨u, 2d + u⟩ with u = c − d."""
    u = c - d
    return torch.stack([(g * d).sum(), (d * d).sum(), (u * (2 * d + u)).sum()])


def mix(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer on the uint32 that an int64 holds."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return x ^ (x >> 16)


def round_stochastically(values: Tensor, param: Tensor, seed: int, t: Tensor | None, phase: int) -> Tensor:
    """A bfloat16 neighbour of each value, the upper with the probability of the distance from the lower.

    Adds 16 random bits below the last bit that stays; they are a hash of seed, step, phase (0: θ̃, 1: the pull) and the
    element's place in `param`'s memory, so that a repeated run repeats them. Inf and nan stay. Gupta et al., "Deep
    Learning with Limited Numerical Precision", ICML 2015, Section 3.
    """
    count = torch.zeros((), dtype=torch.int64, device=param.device) if t is None else t.to(torch.int64)
    key = mix(mix(seed >> 32 ^ mix(count * 2 + phase)) ^ (seed & 0xFFFFFFFF)).to(param.device)
    places = torch.empty_like(param, dtype=torch.int64, requires_grad=False)
    places.as_strided((param.numel(),), (1,)).copy_(torch.arange(param.numel(), device=param.device))
    chance = mix(mix(places & 0xFFFFFFFF ^ key) + mix(key + (places >> 32) & 0xFFFFFFFF) & 0xFFFFFFFF) >> 16
    single = values.to(torch.float32)
    bits = single.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    moved = (bits + chance & 0xFFFF0000).to(torch.int32).view(torch.float32)
    return torch.where(single.isfinite(), moved, single).to(values.dtype)


def row_norms(params: list[Tensor], anchors: list[Tensor] | None) -> list[Tensor]:
    """nᵢ = Σ|θᵢ − θ₀ᵢ| of each tensor's rows (indices of dimension 0; one row below two dimensions), in float64.

    Gouk et al., "Distance-Based Regularisation of Deep Networks for Fine-Tuning", ICLR 2021, Section 3 (MARS).
    """
    norms = []
    for k, param in enumerate(params):
        c = param.double() if anchors is None else param.double() - anchors[k].double()
        norms.append(c.abs().flatten(1).sum(1) if c.dim() > 1 else c.abs().sum().reshape(1))
    return norms


class _Rounding:
    """How a step's values become what `param` can store: rounded to nearest, or with a seed, stochastically."""

    def __init__(self, param: Tensor, seed: int | None, t: Tensor | None) -> None:
        self.param, self.t = param, t
        self.seed = seed if param.dtype == torch.bfloat16 else None

    def __call__(self, values: Tensor, phase: int) -> Tensor:
        if self.seed is not None:
            values = round_stochastically(values, self.param, self.seed, self.t, phase)
        return values.to(self.param.dtype).to(values.dtype)


class _Writer:
    """Writes what a step found, or nothing where found_inf is set; never waits for the device to know."""

    def __init__(self, found_inf: Tensor | None) -> None:
        self.found_inf = found_inf

    def __call__(self, target: Tensor, value: Tensor) -> None:
        if self.found_inf is not None:
            value = torch.where(self.found_inf.to(target.device) != 0, target, value.to(target.dtype))
        target.copy_(value)


def _finish(
    param: Tensor,
    g: Tensor,
    anchor: Tensor | None,
    theta: Tensor,
    moved: Tensor,
    rule: str,
    h: Row,
    rounded: _Rounding,
    write: _Writer,
    measures_out: Tensor,
    alpha_out: Tensor,
) -> None:
    """Measure, decide, pull, store."""
    theta_0 = torch.zeros_like(theta) if anchor is None else anchor.to(theta.dtype)
    measures = torch.full_like(measures_out, torch.nan)
    if rule in MEASURED:
        moved = rounded(moved, phase=0)
        measures.copy_(measure(g, theta - theta_0, moved - theta_0))
    alpha = torch.as_tensor(RULES[rule](measures, h), dtype=measures.dtype, device=measures.device)
    pulled = theta_0 + alpha.to(theta.dtype) * (moved - theta_0)
    if rule in MEASURED:
        new = torch.where(alpha == 1, moved, rounded(pulled, phase=1))
    else:
        new = rounded(torch.where(alpha == 1, moved, pulled), phase=0)
    write(param, new)
    write(measures_out, measures)
    write(alpha_out, alpha)


def _gradient(grad: Tensor, dtype: torch.dtype, grad_scale: Tensor | None, h: Row) -> Tensor:
    """The gradient of what the step minimizes."""
    g = grad.to(dtype) * (-1 if h["maximize"] else 1)
    return g if grad_scale is None else g / grad_scale.to(g.device, dtype)


def _groups(
    hyper: Tensor, columns: tuple[str, ...], group_sizes: list[int], rules: list[str]
) -> Iterator[tuple[Row, str]]:
    for row, size, rule in zip(hyper.tolist(), group_sizes, rules, strict=True):
        for _ in range(size):
            yield dict(zip(columns, row, strict=True)), rule


@torch.no_grad()
def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    anchors: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    measures: Tensor,
    alphas: Tensor,
    hyper: Tensor,
    group_sizes: list[int],
    rules: list[str],
    seeds: list[int],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    *,
    arithmetic: torch.dtype | None = None,
) -> None:
    """One AdamW step with its pull, for every tensor of the lists; see ops.py for what they are."""
    anchor_feed, max_feed, seed_feed, write = iter(anchors), iter(max_exp_avg_sqs), iter(seeds), _Writer(found_inf)
    for i, (h, rule) in enumerate(_groups(hyper, ADAMW.hyper, group_sizes, rules)):
        param, dtype = params[i], arithmetic or arithmetic_of(params[i].dtype)
        anchor = next(anchor_feed) if h["anchored"] else None
        state = [exp_avgs[i], exp_avg_sqs[i], *([next(max_feed)] if h["amsgrad"] else [])]
        work = [s.to(dtype, copy=True) for s in state]
        t = steps[i] + 1
        theta, g = param.to(dtype), _gradient(grads[i], dtype, grad_scale, h)
        moved = adamw_base(theta, g, work[0], work[1], work[2] if h["amsgrad"] else None, t, h)
        for kept, new in zip((*state, steps[i]), (*work, t), strict=True):
            write(kept, new)
        rounded = _Rounding(param, next(seed_feed) if h["stochastic_rounding"] else None, t)
        _finish(param, g, anchor, theta, moved, rule, h, rounded, write, measures[i], alphas[i])


@torch.no_grad()
def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    anchors: list[Tensor],
    momentum_buffers: list[Tensor],
    steps: list[Tensor],
    measures: Tensor,
    alphas: Tensor,
    hyper: Tensor,
    group_sizes: list[int],
    rules: list[str],
    seeds: list[int],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    *,
    arithmetic: torch.dtype | None = None,
) -> None:
    """One SGD step with its pull, for every tensor of the lists; see ops.py for what they are."""
    anchor_feed, buffer_feed, step_feed = iter(anchors), iter(momentum_buffers), iter(steps)
    seed_feed, write = iter(seeds), _Writer(found_inf)
    for i, (h, rule) in enumerate(_groups(hyper, SGD.hyper, group_sizes, rules)):
        param, dtype = params[i], arithmetic or arithmetic_of(params[i].dtype)
        anchor = next(anchor_feed) if h["anchored"] else None
        theta, g = param.to(dtype), _gradient(grads[i], dtype, grad_scale, h)
        step = next(step_feed) if SGD.counted(h) else None
        t = None if step is None else step + 1
        buffer = next(buffer_feed) if h["momentum"] else None
        work = None if buffer is None else buffer.to(dtype, copy=True)
        moved = sgd_base(theta, g, work, t, h)
        for kept, new in ((buffer, work), (step, t)):
            if kept is not None and new is not None:
                write(kept, new)
        rounded = _Rounding(param, next(seed_feed) if h["stochastic_rounding"] else None, t)
        _finish(param, g, anchor, theta, moved, rule, h, rounded, write, measures[i], alphas[i])


def prepare_adamw(params: list[Tensor], *args: object) -> Run:
    """`adamw_` with everything taken in but the gradients and what the gradient scaler says of them."""
    return lambda grads, *scaler: adamw_(params, grads, *args, *scaler)  # type: ignore[arg-type]


def prepare_sgd(params: list[Tensor], *args: object) -> Run:
    """`sgd_` with everything taken in but the gradients and what the gradient scaler says of them."""
    return lambda grads, *scaler: sgd_(params, grads, *args, *scaler)  # type: ignore[arg-type]
