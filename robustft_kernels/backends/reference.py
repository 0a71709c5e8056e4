"""The oracle: every step in plain torch, one tensor after the other, to be read beside the papers.

It shares no code with a kernel. It runs on any device, and never waits for it. `arithmetic=torch.float64` computes in
double precision, whatever the storage. Measures are those of the weights as they are stored. So θ̃ is rounded to the
parameter's dtype before it is measured, and float64 arithmetic does not hide that.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..core.bases import arithmetic_of
from ..core.contract import StepTable, StepTensors, own_gradients
from ..core.methods import MEASURES, Rule
from .backend import Backend
from .reference_rounding import Rounding, chance_of, from_8_bit, round_stochastically, to_8_bit

Row = Mapping[str, float]
Measured = Mapping[str, Tensor]  # the measures by name, each with one number a segment


def adamw_base(theta: Tensor, g: Tensor, kept: dict[str, Tensor], t: Tensor | None, h: Row) -> Tensor:
    """θ̃ = θ(1 − lr·wd) − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε). m, v and its maximum move in place.

    Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 2. amsgrad: Reddi et al., ICLR
    2018.
    """
    assert t is not None
    m, v, v_max = kept["exp_avg"], kept["exp_avg_sq"], kept.get("max_exp_avg_sq")
    m.mul_(h["beta1"]).add_(g, alpha=1 - h["beta1"])
    v.mul_(h["beta2"]).add_(g * g, alpha=1 - h["beta2"])
    root = v if v_max is None else torch.maximum(v_max, v, out=v_max)
    corrections = [1 - torch.tensor(h[beta], dtype=torch.float64, device=t.device) ** t for beta in ("beta1", "beta2")]
    first, second = (c.to(theta.device, theta.dtype, non_blocking=True) for c in corrections)
    return theta * (1 - h["lr"] * h["weight_decay"]) - h["lr"] / first * m / (root.sqrt() / second.sqrt() + h["eps"])


def sgd_base(theta: Tensor, g: Tensor, kept: dict[str, Tensor], t: Tensor | None, h: Row) -> Tensor:
    """θ̃ = θ − lr·b, with b ← μ·b + (1 − dampening)(g + wd·θ), at its first step g + wd·θ. b moves in place.

    As torch.optim.SGD. Sutskever et al., ICML 2013.
    """
    g, b = g + h["weight_decay"] * theta, kept.get("momentum_buffer")
    if b is None or t is None:
        return theta - h["lr"] * g
    later = h["momentum"] * b + (1 - h["dampening"]) * g
    b.copy_(torch.where(t.to(b.device) > 1, later, g))
    return theta - h["lr"] * (g + h["momentum"] * b if h["nesterov"] else b)


def no_step(theta: Tensor, _: Tensor, __: dict[str, Tensor], ___: Tensor | None, ____: Row) -> Tensor:
    """θ̃ = θ."""
    return theta


STEPS = {"adamw": adamw_base, "sgd": sgd_base, "no_step": no_step}


def keep(m: Measured, _: Row) -> Tensor:
    """α = 1."""
    return torch.ones_like(m["before"])


def l2sp(m: Measured, h: Row) -> Tensor:
    """α = 1 − min(1, strength·lr)."""
    return torch.full_like(m["before"], 1 - min(1.0, h["strength"] * h["lr"]))


def held(theta: Tensor, moved: Tensor, theta_0: Tensor, hold: Tensor) -> Tensor:
    """θ̃ − hold·d on each element with (θ − θ̃)·d ≥ 0, else θ̃. d = θ − θ₀.

    Chen et al., "Cautious Weight Decay", ICLR 2026 (arXiv 2510.12402), Algorithm 1: x ← x − lr(u + λ·1[u∘x ≥ 0]∘x),
    where the step is −lr·u. Here with d for x.
    """
    d = theta - theta_0
    return torch.where((theta - moved) * d >= 0, moved - hold.to(d.dtype) * d, moved)


def norm(m: Measured) -> Tensor:
    """‖c‖ of each tensor, from ‖d‖² and ‖c‖² − ‖d‖²."""
    return (m["before"] + m["gain"]).clamp(min=0).sqrt()


def row_norm(m: Measured) -> Tensor:
    """Σ|c| of each row, from Σ|d| and Σ|c| − Σ|d|."""
    return m["before"] + m["gain"]


def shrink(ratio: Tensor, m: Measured, h: Row) -> Tensor:
    """α = 1 − min(1, strength·ratio) when the segment moved away, else 1."""
    fires = (m["gain"] > 0) & ratio.isfinite()
    return torch.where(fires, 1 - (h["strength"] * ratio).clamp(max=1), 1.0)


def inconsistent(m: Measured, alpha: Tensor) -> Tensor:
    """α when ⟨g,d⟩ > 0, else 1."""
    return torch.where(m["grad_dot_delta"] > 0, alpha, 1.0)


def spd_away(m: Measured, h: Row) -> Tensor:
    """α = 1 − min(1, strength·r). r = max(0, ‖c‖ − ‖d‖)/‖c‖, or 0 when ‖c‖ = 0."""
    after = norm(m)
    return shrink(m["gain"] / (m["before"].sqrt() + after) / after, m, h)


def spd_away_rows(m: Measured, h: Row) -> Tensor:
    """`spd_away` of each row, with Σ|·| for ‖·‖."""
    return shrink(m["gain"] / row_norm(m), m, h)


def spd(m: Measured, h: Row) -> Tensor:
    """α = 1 − min(1, strength·r) when ⟨g,d⟩ > 0, else 1.

    Tian et al., "Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models", NeurIPS 2024, Algorithm 2.
    """
    return inconsistent(m, spd_away(m, h))


def spd_rows(m: Measured, h: Row) -> Tensor:
    """`spd` of each row, with Σ|·| for ‖·‖."""
    return inconsistent(m, spd_away_rows(m, h))


def within(n: Tensor, radius: float | Tensor) -> Tensor:
    """α = min(1, radius/n), or 1 when n is not finite."""
    return torch.where((n > radius) & n.isfinite(), radius / n, 1.0)


def project(m: Measured, h: Row) -> Tensor:
    """α = min(1, radius/‖c‖). Gouk et al., ICLR 2021, Section 3; Tian et al., "TPGM", CVPR 2023, Eq. 3."""
    return within(norm(m), h["radius"])


def project_rows(m: Measured, h: Row) -> Tensor:
    """α = min(1, radius/nᵢ) of each row. Gouk et al., ICLR 2021, Section 3 (MARS)."""
    return within(row_norm(m), h["radius"])


def project_mars(m: Measured, h: Row) -> Tensor:
    """α = min(1, radius/maxᵢ nᵢ), the same for all rows of a tensor, or 1 when one nᵢ is not finite. TPGM, Eq. 4."""
    n = row_norm(m)
    return within(n.max(), h["radius"]).expand_as(n) if len(n) else n


def ftp(m: Measured, h: Row) -> Tensor:
    """α = min(1, γ/nᵢ) of each row. Tian et al., "Fast Trainable Projection", NeurIPS 2023, Algorithm 1."""
    return within(row_norm(m) + 1e-8, h["radius"])


RULES: dict[str, Callable[[Measured, Row], Tensor]] = {
    "l2sp": l2sp, "l2sp_cautious": l2sp, "spd": spd, "spd_rows": spd_rows, "spd_away": spd_away,
    "spd_away_rows": spd_away_rows, "project": project, "project_mars": project_mars, "project_rows": project_rows,
    "ftp": ftp, "ftp_learned": ftp,
}  # fmt: skip


def segments(tensor: Tensor, rule: Rule) -> Tensor:
    """The segments of a tensor: rows of dimension 0 or the whole, flat."""
    return tensor.flatten(1) if rule.by_rows and tensor.dim() > 1 else tensor.reshape(1, -1)


def summands(g: Tensor, d: Tensor, u: Tensor, rule: Rule) -> dict[str, Tensor]:
    """What each element adds to each of `MEASURES`: ⟨g,d⟩, the size of d, and what the step u adds to that size, c = d
    + u.

    If sizes are ‖·‖², the gain is ⟨u, 2d + u⟩. If they are Σ|·| of rows, it is Σ(|c| − |d|), which is ±u when no sign
    changes.
    """
    if rule.measures == "magnitudes":
        before, gain = d.abs(), torch.where(u.abs() <= d.abs(), d.sign() * u, (d + u).abs() - d.abs())
    else:
        before, gain = d * d, u * (2 * d + u)
    return {"grad_dot_delta": g * d, "before": before, "gain": gain}


def measure(g: Tensor, d: Tensor, u: Tensor, rule: Rule) -> dict[str, Tensor]:
    """`MEASURES` of each segment, in float64."""
    of_elements = summands(g, d, u, rule)
    return {name: segments(of_elements[name], rule).sum(1, dtype=torch.float64) for name in MEASURES}


def conflict(g: Tensor, d: Tensor, h: Row) -> Tensor:
    """What d is multiplied with, so that the step leads less away: −ω⟨g,d⟩/‖d‖² when ⟨g,d⟩ < 0, else 0, or when it is
    not finite. ω = min(1, strength).

    Huang et al., "Directional Gradient Projection for Robust Fine-Tuning of Foundation Models", ICLR 2025, Algorithm 1.
    """
    dot, size = (of.sum(dtype=torch.float64) for of in (g * d, d * d))
    factor = -min(1.0, h["strength"]) * dot / size
    return torch.where((dot < 0) & factor.isfinite(), factor, 0.0)


def penalty(g: Tensor, d: Tensor, rule: Rule, h: Row) -> Tensor | float:
    """What the rule adds to the gradient g at θ₀ + d.

    The penalty ½·strength·‖d‖² (Li et al., "L2-SP", ICML 2018, Eq. 3) adds strength·d. The penalty strength·maxᵢ nᵢ
    (Gouk et al., ICLR 2021, Section 3) adds strength·sign(d) on the first row of largest nᵢ.
    """
    if rule.surveys == "conflict":
        return conflict(g, d, h).to(d.dtype) * d
    if rule.penalty == "linear":
        return h["strength"] * d
    if rule.penalty == "sign" and d.numel():
        rows = d.flatten(1) if d.dim() > 1 else d.reshape(1, -1)
        largest = torch.zeros_like(rows)
        largest[rows.abs().sum(1, dtype=torch.float64).nan_to_num(nan=-1).argmax()] = 1
        return h["strength"] * d.sign() * largest.reshape(d.shape)
    return 0.0


def slope_of(g: Tensor, delta: Tensor) -> Tensor:
    """h = Σᵢ⟨gᵢ, cᵢ⟩/nᵢ over the rows, c being the last step's delta. FTP, NeurIPS 2023, Section 3.2."""
    g_rows, rows = (of.double().flatten(1) if of.dim() > 1 else of.double().reshape(1, -1) for of in (g, delta))
    return ((g_rows * rows).sum(1) / (rows.abs().sum(1) + 1e-8)).sum()


def learn_radius(kept: Tensor, slope: Tensor, t: Tensor | None, h: Row) -> Tensor:
    """γ and its moments M, V after one step of Adam on the slope h.

    h ← k·h when h > 0; M ← β₁M + (1−β₁)h; V ← β₂V + (1−β₂)h²; γ ← max(1e-8, γ − lr·M̂/(√V̂ + 1e-8)).

    The first step sets γ to 1e-8. An h that is not finite leaves all as it is. FTP, NeurIPS 2023, Section 3.2 and
    Algorithm 1.
    """
    assert t is not None
    slope = torch.where(slope > 0, h["k"] * slope, slope)
    radius, first, second = kept
    first = h["radius_beta1"] * first + (1 - h["radius_beta1"]) * slope
    second = h["radius_beta2"] * second + (1 - h["radius_beta2"]) * slope * slope
    count = t.to(kept.device, torch.float64)
    m, v = (
        x / (1 - torch.tensor(h[beta], dtype=torch.float64, device=kept.device) ** count)
        for x, beta in ((first, "radius_beta1"), (second, "radius_beta2"))
    )
    moved = torch.stack([(radius - h["radius_lr"] * m / (v.sqrt() + 1e-8)).clamp(min=1e-8), first, second])
    fresh = torch.tensor([1e-8, 0, 0], dtype=torch.float64, device=kept.device)
    return torch.where(radius == 0, fresh, torch.where(slope.isfinite(), moved, kept))


LEARN = {"ftp": learn_radius}


def row_norms(params: list[Tensor], anchors: list[Tensor] | None) -> list[Tensor]:
    """nᵢ = Σ|θᵢ − θ₀ᵢ| of each tensor's rows, in float64. Rows are indices of dimension 0. Below two dimensions there
    is one row.

    Gouk et al., "Distance-Based Regularisation of Deep Networks for Fine-Tuning", ICLR 2021, Section 3 (MARS).
    """
    norms = []
    for k, param in enumerate(params):
        c = param.double() if anchors is None else param.double() - anchors[k].double()
        norms.append(c.abs().flatten(1).sum(1) if c.dim() > 1 else c.abs().sum().reshape(1))
    return norms


class _Writer:
    """Writes what a step found, or nothing if found_inf is set. Never waits for the device to know."""

    def __init__(self, found_inf: Tensor | None) -> None:
        self.found_inf = found_inf

    def __call__(self, target: Tensor, value: Tensor) -> None:
        if self.found_inf is not None:
            value = torch.where(self.found_inf.to(target.device) != 0, target, value.to(target.dtype))
        target.copy_(value)


@torch.no_grad()
def step_(
    table: StepTable,
    grads: list[Tensor],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    arithmetic: torch.dtype | None = None,
) -> None:
    """One step with its pull for every tensor of the table. It computes in `arithmetic`, or in the tensor's own
    arithmetic dtype.

    Without gradients, if the base needs none, ⟨g,d⟩ is nan.
    """
    write = _Writer(found_inf)
    rows = [dict(zip(table.base.hyper, values, strict=True)) for values in table.hyper.tolist()]
    firsts = table.firsts
    for k, of in enumerate(table.tensors):
        h, grad, segments_of = rows[of.row], grads[k] if grads else None, slice(firsts[k], firsts[k + 1])
        _step_one(table, of, grad, h, segments_of, grad_scale, write, arithmetic or arithmetic_of(of.param.dtype))


def _step_one(
    table: StepTable,
    of: StepTensors,
    grad: Tensor | None,
    h: Row,
    at: slice,
    grad_scale: Tensor | None,
    write: _Writer,
    dtype: torch.dtype,
) -> None:
    base, rule, spec = table.base, of.spec.rule, of.spec
    results, alphas = table.results[at], table.alphas[at]
    t = None if of.step is None else of.step + base.moves
    work = {
        key: from_8_bit(kept, of.state[f"{key}_scale"]).to(dtype) if kept.dtype in (torch.int8, torch.uint8)
        else kept.to(torch.float64 if key == rule.learns else dtype, copy=True)
        for key, kept in of.state.items() if not key.endswith("_scale")
    }  # fmt: skip
    theta = of.param.to(dtype)
    stored = of.param
    if (master := of.state.get("master")) is not None:  # it counts as far as the parameter shows it
        stored = master
        theta = torch.where(master.to(of.param.dtype) == of.param, master.to(dtype), theta)
    theta_0 = torch.zeros_like(theta) if of.anchor is None else of.anchor.to(dtype)
    g = torch.zeros_like(theta)
    if grad is not None:
        g = grad.to(dtype) * (-1 if h["maximize"] else 1)
        g = g if grad_scale is None else g / grad_scale.to(g.device, dtype)
    if rule.learns:
        learned = LEARN[rule.name](work[rule.learns], slope_of(g, work["delta"]), t, h)
        work[rule.learns] = learned
        h = {**h, "radius": learned[0]}  # type: ignore[dict-item]
    moved = STEPS[base.name](theta, g + penalty(g, theta - theta_0, rule, h), work, t, h)

    rounded = Rounding(stored, of.seed if spec.stochastic_rounding else None, t)
    found = dict.fromkeys(MEASURES, torch.full_like(alphas, torch.nan))
    if rule.measures:
        moved = rounded(moved, phase=0)
        found = measure(g, theta - theta_0, moved - theta, rule)
        if grad is None:
            found["grad_dot_delta"] = torch.full_like(alphas, torch.nan)
    choose = RULES[rule.name] if rule.pulls and not rule.given else keep
    alpha = alphas.clone() if rule.given else choose(found, h)
    if rule.tracks:
        work["delta"] = moved - theta_0
    if rule.learns:
        radius = work[rule.learns][0].clone()
        largest = (row_norm(found) + 1e-8).amax() if len(alphas) else alphas.new_tensor(torch.inf)
        work[rule.learns][0].copy_(torch.where(largest.isfinite(), radius.minimum(largest), radius))
    scale = alpha.to(dtype).reshape([-1, *[1] * (theta.dim() - 1)] if theta.dim() else [])
    pulled = torch.where(scale == 0, theta_0, theta_0 + scale * (moved - theta_0))
    pulled = held(theta, moved, theta_0, 1 - alpha[0]) if rule.cautious else torch.where(scale == 1, moved, pulled)
    if rule.measures:
        new = torch.where(scale == 1, moved, rounded(pulled, phase=1))
    else:
        new = rounded(pulled, phase=0 if base.moves else 1)
    write(of.param, new.to(stored.dtype))
    if master is not None:
        work["master"] = new
    for phase, key in enumerate(base.moments, start=2):
        if key not in work:
            continue
        kept = of.state[key]
        if kept.dtype == torch.bfloat16 and phase < 4:
            work[key] = round_stochastically(work[key], kept, of.seed, t, phase)
        elif not kept.is_floating_point():  # the maximum of second moments is rounded to nearest
            chance = (
                chance_of(kept, of.seed, t, phase) if phase < 4 else torch.full_like(kept, 2**15, dtype=torch.int64)
            )
            work[key], scales = to_8_bit(work[key], kept, chance)
            work[f"{key}_scale"] = scales.reshape(of.state[f"{key}_scale"].shape)
    selected, inconsistent = results[:, len(MEASURES) :].T
    counts = selected + (alpha != 1), inconsistent + (found["grad_dot_delta"] > 0)
    write(results, torch.stack([*(found[name] for name in MEASURES), *counts], dim=1))
    write(alphas, alpha)
    for key, kept in of.state.items():
        write(kept, work[key])
    if of.step is not None:
        assert t is not None
        write(of.step, t)


class PreparedStep:
    """`step_` of a table, as a function of the gradients."""

    def __init__(self, table: StepTable) -> None:
        self._table = table

    def __call__(
        self, grads: list[Tensor] | None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        step_(self._table, own_gradients(self._table) if grads is None else grads, grad_scale, found_inf)

    def squared_norm(self, grads: list[Tensor] | None) -> Tensor:
        """Σ g² over all gradients, in float64."""
        grads = own_gradients(self._table) if grads is None else grads
        return torch.stack([(g.double() ** 2).sum() for g in grads]).sum()


BACKEND = Backend("reference", PreparedStep, lambda: "")
