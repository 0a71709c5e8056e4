"""Base: the update of the underlying optimizer, from param, grad and state to the next param.

A base is two functions, by its name in `BASES`. One reads a group's row of hyper-parameters into scalars. The other
applies them to a block.
"""

import triton
import triton.language as tl

from ..core.bases import ADAMW, NO_STEP, SGD

_A_LR, _A_BETA1, _A_BETA2, _A_EPS, _A_DECAY, _A_MAXIMIZE = (
    tl.constexpr(ADAMW.hyper.index(name)) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")
)
_S_LR, _S_MOMENTUM, _S_DAMPENING, _S_DECAY, _S_NESTEROV, _S_MAXIMIZE = (
    tl.constexpr(SGD.hyper.index(name))
    for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
)
_N_MAXIMIZE = tl.constexpr(NO_STEP.hyper.index("maximize"))


@triton.jit
def read_hyper(table, live, at):
    """A hyper-parameter in float64, from the table. If a tensor of the user's holds it, `live` has the address of that
    tensor. The last bit of the address is set if the tensor is float64."""
    value = tl.load(table + at)
    if live is not None:
        address = tl.load(live + at)
        if address % 2 != 0:
            value = tl.load((address - 1).to(tl.pointer_type(tl.float64)))
        elif address != 0:
            value = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return value


@triton.jit
def exact_root(x):
    """√x, rounded to nearest. For float32, `tl.sqrt` is an approximation that takes subnormals for 0."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    return tl.sqrt(x)


@triton.jit
def exact_ratio(x, y):
    """x/y, rounded to nearest. For float32, `/` is off by up to two units in the last place."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    return x / y


@triton.jit
def power(beta, t):
    """βᵗ in float64, by squaring. It takes few registers, and at most two roundings for each binary digit of t."""
    result = tl.full((), 1.0, tl.float64)
    n = t.to(tl.int32)
    while n > 0:
        result = tl.where(n % 2 == 1, result * beta, result)
        beta = beta * beta
        n = n // 2
    return result


@triton.jit
def adamw_scalars(table, live, row, t, T: tl.constexpr):
    """−1 to maximize, else 1, and what `adamw` needs. t counts from 1."""
    lr = read_hyper(table, live, row + _A_LR)
    beta1, beta2 = read_hyper(table, live, row + _A_BETA1), read_hyper(table, live, row + _A_BETA2)
    scalars = (
        (1 - lr * read_hyper(table, live, row + _A_DECAY)).to(T),
        tl.where(beta1 > 0.5, 1 - beta1, -beta1).to(T),
        beta2.to(T),
        (1 - beta2).to(T),
        (lr / (1 - power(beta1, t))).to(T),
        (1 / tl.sqrt(1 - power(beta2, t))).to(T),
        read_hyper(table, live, row + _A_EPS).to(T),
    )
    return (1 - 2 * tl.load(table + row + _A_MAXIMIZE)).to(T), scalars


@triton.jit
def adamw(theta, g, m, v, v_max, scalars, STATES: tl.constexpr):
    """θ(1 − lr·wd) − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε), and the new m, v, v_max.

    An absent v_max is read as 0, so that v takes its place.
    """
    decay, blend, beta2, beta2_rest, step_size, root_scale, eps = scalars
    # β₁m + (1 − β₁)g, from the end with the larger weight: exactly g when β₁ is 0
    m = tl.where(blend > 0, m, g) + blend * (g - m)
    v = beta2 * v + beta2_rest * g * g
    root = v
    if STATES > 2:
        root = tl.where((v > v_max) | (v != v), v, v_max)  # nan wins, as in torch.maximum
    return decay * theta - step_size * exact_ratio(m, exact_root(root) * root_scale + eps), m, v, root


@triton.jit
def sgd_scalars(table, live, row, t, T: tl.constexpr):
    """−1 to maximize, else 1, and what `sgd` needs. t counts the updates of the momentum buffer from 1."""
    lr, momentum = read_hyper(table, live, row + _S_LR), read_hyper(table, live, row + _S_MOMENTUM)
    nesterov = tl.load(table + row + _S_NESTEROV)
    later = (t > 1) & (momentum != 0)
    scalars = (
        lr.to(T),
        read_hyper(table, live, row + _S_DECAY).to(T),
        tl.where(later, momentum, 0.0).to(T),
        tl.where(later, 1 - read_hyper(table, live, row + _S_DAMPENING), 1.0).to(T),
        tl.where(nesterov != 0, momentum, 1.0).to(T),
        tl.where(nesterov != 0, 1.0, 0.0).to(T),
    )
    return (1 - 2 * tl.load(table + row + _S_MAXIMIZE)).to(T), scalars


@triton.jit
def sgd(theta, g, b, unused1, unused2, scalars, STATES: tl.constexpr):
    """θ − lr·b, or θ − lr(g' + μb) with nesterov, and the new b.

    g' = g + wd·θ. b ← μb + (1−dampening)g', and at its first step b ← g'.
    """
    lr, weight_decay, keep, take, buffer_weight, grad_weight = scalars
    g = g + weight_decay * theta
    b = keep * b + take * g
    return theta - lr * (grad_weight * g + buffer_weight * b), b, unused1, unused2


@triton.jit
def no_step_scalars(table, live, row, t, T: tl.constexpr):
    """−1 to maximize, else 1, and a placeholder: `no_step` needs nothing."""
    factor = (1 - 2 * tl.load(table + row + _N_MAXIMIZE)).to(T)
    return factor, (factor,)


@triton.jit
def no_step(theta, g, unused0, unused1, unused2, scalars, STATES: tl.constexpr):
    """θ."""
    return theta, unused0, unused1, unused2


BASES = {"adamw": (adamw_scalars, adamw), "sgd": (sgd_scalars, sgd), "no_step": (no_step_scalars, no_step)}
