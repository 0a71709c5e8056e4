"""Pull: θ ← θ₀ + α(θ − θ₀)."""

import triton
import triton.language as tl


@triton.jit
def pull(theta: tl.tensor, anchor: tl.tensor, alpha: tl.tensor):
    """θ₀ + α(θ − θ₀). At α = 0 it is θ₀, wherever θ is."""
    return tl.where(alpha == 0, anchor, anchor + alpha * (theta - anchor))
