"""How a loss depends on the deviations: ⟨dL/dθ̃, c⟩ of every segment, by autograd, without keeping the gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.sharding import is_dtensor
from .projection import Ball

NO_GRADIENT = (
    "the loss depends on none of the parameters; loss_fn must compute it by the model TPGM was given, "
    "must not detach it, and leaves the backward pass to TPGM"
)


def dots_of(
    loss: Tensor, params: list[Tensor], theta: list[Tensor], anchors: list[Tensor] | None, ball: Ball
) -> Tensor:
    """⟨dL/dθ̃, θ − θ₀⟩ of every segment. Each gradient lives until it is reduced. No `.grad` is touched."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn returned a {type(loss).__name__}; the loss must be a tensor, without .item()")
    if loss.numel() != 1:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}; one number is needed, such as its mean")
    if any(map(is_dtensor, params)):
        return _by_backward(loss, params, theta, anchors, ball)
    found: dict[int, Tensor] = {}

    def reducer(k: int) -> Callable[[Tensor], Tensor | None]:
        def reduce(grad: Tensor) -> Tensor | None:
            anchor = None if anchors is None else [anchors[k]]
            dense = grad.to_dense() if grad.is_sparse else grad
            found[k] = ball.dots([theta[k]], anchor, [dense])
            return None if grad.is_sparse else grad.new_zeros(()).expand_as(grad)  # this is what autograd holds on to

        return reduce

    asked = [k for k, param in enumerate(params) if param.requires_grad] if loss.requires_grad else []
    users = [param._backward_hooks for param in params]
    try:
        for k in asked:
            params[k]._backward_hooks = None
            params[k].register_hook(reducer(k))
        if asked:
            torch.autograd.grad(loss, [params[k] for k in asked], allow_unused=True)
    finally:
        for param, hooks in zip(params, users, strict=True):
            param._backward_hooks = hooks
    if not found:
        raise ValueError(NO_GRADIENT)
    for k, count in enumerate(ball.counts):
        if k not in found:
            found[k] = torch.zeros(count, dtype=torch.float64, device=theta[k].device)
    return torch.cat([found[k] for k in range(len(theta))])


def _by_backward(
    loss: Tensor, params: list[Tensor], theta: list[Tensor], anchors: list[Tensor] | None, ball: Ball
) -> Tensor:
    """The same for a model that is spread over processes. The gradients come from its own backward pass, and one
    all-reduce sums for all of them."""
    users = [param.grad for param in params]
    try:
        for param in params:
            param.grad = None
        if loss.requires_grad:
            loss.backward()
        grads = [param.grad for param in params]
    finally:
        for param, grad in zip(params, users, strict=True):
            param.grad = grad
    if all(grad is None for grad in grads):
        raise ValueError(NO_GRADIENT)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
    return ball.dots(theta, anchors, filled)
