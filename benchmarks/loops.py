"""What this package replaces: the methods as one writes them from the formulas.

They loop over parameters, and decide for each on the host. TPGM makes a deep copy of the model.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class LoopAdam(torch.optim.Optimizer):
    """Adam in a loop. A method decides what becomes of a parameter p that Adam's step would have `moved`."""

    def __init__(self, params: list[nn.Parameter], lr: float, anchors: list[Tensor | None], **options: Any) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, **options})
        self.anchors = anchors

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p, anchor in zip(group["params"], self.anchors, strict=True):
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                t, m, v = state["step"], state["m"], state["v"]
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                denominator = (v / (1 - beta2**t)).sqrt().add_(group["eps"])
                moved = torch.addcdiv(p, m, denominator, value=-group["lr"] / (1 - beta1**t))
                self.pull(p, moved, torch.zeros_like(p) if anchor is None else anchor, group, state)

    def pull(self, p: Tensor, moved: Tensor, start: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        raise NotImplementedError


class LoopSPD(LoopAdam):
    def __init__(self, params: list[nn.Parameter], lr: float, anchors: list[Tensor | None]) -> None:
        super().__init__(params, lr, anchors, strength=1.0)

    def pull(self, p: Tensor, moved: Tensor, start: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        condition = -torch.sum(p.grad * (p - start))
        if condition < 0:
            now, then = torch.norm(moved - start), torch.norm(p - start)
            ratio = torch.clamp((now - then) / now, min=0)
            moved = moved - group["strength"] * ratio * (moved - start)
        p.copy_(moved)


class LoopFTP(LoopAdam):
    def pull(self, p: Tensor, moved: Tensor, start: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        c = moved - start
        rows = c.flatten(1) if c.dim() > 1 else c.reshape(1, -1)
        n = rows.abs().sum(1) + 1e-8
        t, radius = state["step"], 1e-8
        h, s = state.get("h", 0.0), state.get("s", 0.0)
        if t > 1:
            slope = float(((p.grad.reshape(rows.shape) * state["c"]).sum(1) / state["n"]).sum())
            h = 0.9 * h + 0.1 * slope
            s = 0.999 * s + 0.001 * slope**2
            step = h / (1 - 0.9**t) / ((s / (1 - 0.999**t)) ** 0.5 + 1e-8)
            radius = min(max(state["radius"] - 0.01 * step, 1e-8), float(n.max()))
        state.update(radius=radius, c=rows.clone(), n=n, h=h, s=s)
        p.copy_(start + ((radius / n).clamp(max=1)[:, None] * rows).reshape(p.shape))


class Given(torch.autograd.Function):
    """A loss whose gradients are there already. So an update of TPGM does nothing but its own work."""

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        return None, *ctx.grads


def loop_update(model: nn.Module, anchors: list[Tensor], adam: torch.optim.Optimizer, grads: list[Tensor]) -> None:
    """One step on TPGM's radii, as the authors' algorithm goes. It makes a deep copy of the model, and copies each
    parameter's projection into it with its graph. It checks the radius on the host, and takes the deviation twice."""
    projected = list(copy.deepcopy(model).parameters())
    for p, a, radius in zip(projected, anchors, adam.param_groups[0]["params"], strict=True):
        p.requires_grad_(False)
        n = torch.norm(p - a) + 1e-8
        with torch.no_grad():
            if radius <= 0:
                radius.fill_(1e-8)
            if radius > n:
                radius.copy_(n)
        p.copy_(torch.clamp(radius / n, max=1) * (p - a) + a)
    adam.zero_grad()
    torch.autograd.backward(Given.apply(grads, *projected))
    adam.step()
