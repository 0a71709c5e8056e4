"""Pull: θ ← θ₀ + α(θ − θ₀), or a part of it for some elements."""

import triton
import triton.language as tl


@triton.jit
def pull(theta: tl.tensor, anchor: tl.tensor, alpha: tl.tensor):
    """θ₀ + α(θ − θ₀). At α = 0 it is θ₀, wherever θ is."""
    return tl.where(alpha == 0, anchor, anchor + alpha * (theta - anchor))


@triton.jit
def held(theta: tl.tensor, new: tl.tensor, anchor: tl.tensor, hold: tl.tensor):
    """θ̃ − hold·d where the step from θ leads toward θ₀ or nowhere, else θ̃. d = θ − θ₀."""
    d = theta - anchor
    return tl.where((theta - new) * d >= 0, new - hold * d, new)
