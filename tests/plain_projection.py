"""Norms and projections in plain torch, in float64, differentiable in the radius."""

import torch


def by_rows(c):
    return c.flatten(1) if c.dim() > 1 else c.reshape(1, -1)


def norms_of(c, norm):
    """n of one tensor: 0-d, or [rows]."""
    if norm == "l2":
        return c.square().sum().sqrt()
    rows = by_rows(c.abs()).sum(1)
    return rows if norm == "mars_rows" else torch.cat([rows, rows.new_zeros(1)]).max()


def oracle(theta, theta_0, radius, norm):
    """min(1, γ/n)·c + θ₀ in float64, differentiable in `radius` by autograd."""
    c = theta.double() - theta_0
    n = norms_of(c, norm)
    alpha = torch.where(radius < n, radius / torch.where(n > 0, n, 1), 1)
    return (theta_0 + (alpha.reshape(-1, 1) * by_rows(c)).reshape(c.shape)) if c.numel() else theta.double()
