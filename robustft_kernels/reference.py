"""The oracle: every step in plain torch, one tensor after the other, to be read beside the papers.

Shares no code with a kernel. Runs on any device, never waits for it, and takes `arithmetic=torch.float64` to compute
in double precision whatever the storage: measures are those of the weights as they are stored, so θ̃ is rounded to
the parameter's dtype before it is measured, and float64 arithmetic does not hide that.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .bases import ADAMW, SGD

Run = Callable[[list[Tensor]], None]
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


def _finish(
    param: Tensor,
    g: Tensor,
    anchor: Tensor | None,
    theta: Tensor,
    moved: Tensor,
    rule: str,
    h: Row,
    measures: Tensor,
    alpha_out: Tensor,
) -> None:
    """Measure, decide, pull, store."""
    theta_0 = torch.zeros_like(theta) if anchor is None else anchor.to(theta.dtype)
    measures.fill_(torch.nan)
    if rule in MEASURED:
        moved = moved.to(param.dtype).to(theta.dtype)
        measures.copy_(measure(g, theta - theta_0, moved - theta_0))
    alpha = torch.as_tensor(RULES[rule](measures, h), dtype=measures.dtype, device=measures.device)
    alpha_out.copy_(alpha)
    pulled = theta_0 + alpha.to(theta.dtype) * (moved - theta_0)
    param.copy_(torch.where(alpha == 1, moved, pulled))


def _groups(
    hyper: Tensor, columns: tuple[str, ...], group_sizes: list[int], rules: list[str]
) -> Iterator[tuple[Row, str]]:
    for row, size, rule in zip(hyper.tolist(), group_sizes, rules, strict=True):
        for _ in range(size):
            yield dict(zip(columns, row, strict=True)), rule


def arithmetic_of(dtype: torch.dtype) -> torch.dtype:
    """What a parameter of `dtype` is computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    *,
    arithmetic: torch.dtype | None = None,
) -> None:
    """One AdamW step with its pull, for every tensor of the lists; see ops.py for what they are."""
    anchor_feed, max_feed = iter(anchors), iter(max_exp_avg_sqs)
    for i, (h, rule) in enumerate(_groups(hyper, ADAMW.hyper, group_sizes, rules)):
        param, dtype = params[i], arithmetic or arithmetic_of(params[i].dtype)
        anchor = next(anchor_feed) if h["anchored"] else None
        state = [exp_avgs[i], exp_avg_sqs[i], *([next(max_feed)] if h["amsgrad"] else [])]
        work = [s.to(dtype) for s in state]
        steps[i].add_(1)
        theta, g = param.to(dtype), grads[i].to(dtype) * (-1 if h["maximize"] else 1)
        moved = adamw_base(theta, g, work[0], work[1], work[2] if h["amsgrad"] else None, steps[i], h)
        for kept, new in zip(state, work, strict=True):
            kept.copy_(new)
        _finish(param, g, anchor, theta, moved, rule, h, measures[i], alphas[i])


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
    *,
    arithmetic: torch.dtype | None = None,
) -> None:
    """One SGD step with its pull, for every tensor of the lists; see ops.py for what they are."""
    anchor_feed, buffer_feed, step_feed = iter(anchors), iter(momentum_buffers), iter(steps)
    for i, (h, rule) in enumerate(_groups(hyper, SGD.hyper, group_sizes, rules)):
        param, dtype = params[i], arithmetic or arithmetic_of(params[i].dtype)
        anchor = next(anchor_feed) if h["anchored"] else None
        theta, g = param.to(dtype), grads[i].to(dtype) * (-1 if h["maximize"] else 1)
        if h["momentum"]:
            buffer, t = next(buffer_feed), next(step_feed).add_(1)
            work = buffer.to(dtype)
            moved = sgd_base(theta, g, work, t, h)
            buffer.copy_(work)
        else:
            moved = sgd_base(theta, g, None, None, h)
        _finish(param, g, anchor, theta, moved, rule, h, measures[i], alphas[i])


def prepare_adamw(params: list[Tensor], *args: object) -> Run:
    """`adamw_` with everything but the gradients taken in."""
    return lambda grads: adamw_(params, grads, *args)  # type: ignore[arg-type]


def prepare_sgd(params: list[Tensor], *args: object) -> Run:
    """`sgd_` with everything but the gradients taken in."""
    return lambda grads: sgd_(params, grads, *args)  # type: ignore[arg-type]
