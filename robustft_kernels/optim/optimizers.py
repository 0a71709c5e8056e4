"""The optimizers that hold each parameter near its anchor θ₀: AdamW and SGD with a pull."""

import torch
from torch import Tensor

from ..core.anchors import Anchor
from ..core.bases import ADAMW, SGD
from ..core.methods import METHODS, documents
from .anchored import AnchoredOptimizer, Params

Betas = tuple[float | Tensor, float | Tensor]


@documents(METHODS)
class AnchoredAdamW(AnchoredOptimizer):
    r"""AdamW with a pull toward the anchor.

        m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²
        θ̃ = θ(1 − lr·wd) − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)
        θ ← θ₀ + α(θ̃ − θ₀)

    with α chosen by `method` (d = θ − θ₀ before the decay and the step, c = θ̃ − θ₀ after them; nᵢ = Σ|cᵢ| of row i, an
    index of dimension 0; ‖·‖ of the whole tensor):

    {methods}

    With "none" it is equal to torch.optim.AdamW (and Adam, at weight_decay=0).

    Every argument up to `capturable` can be set per group, `method` included.

    Args:
        params: parameters of any floating dtype and dense layout, `model.named_parameters()`, or groups of either.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW; a tensor lr is read at each step.
        method: a name in `robustft_kernels.METHODS`.
        norm: what "spd" and "project" measure with; None for "l2".
        strength: λ ≥ 0, without a unit for "spd" (1 projects onto the previous radius), per unit of lr for "l2sp", the
            penalty's factor in the loss for "l2sp_coupled" and "mars_sp".
        radius: γ > 0 of "project", in units of the weights; a tensor is read at each step.
        k: 0 ≤ k ≤ 1, of "ftp": how much a gradient may tighten a radius; 1 holds most, 0 lets radii only grow.
        radius_lr, radius_betas: of "ftp", the Adam step on a radius, in units of the weights.
        anchor: "initial" (a copy of the weights now), "zero" (for adapters: no memory, no reads), a list of tensors
            parallel to `params`, a mapping from parameter name to tensor, or the path of a safetensors file (or of its
            index, or a directory with either), whose memory map all processes of a machine share.
        anchor_dtype: "exact" copies the weights in the smallest dtype that holds those of the group exactly (a model
            that was stored in bfloat16 costs 2 bytes a parameter), and leaves given anchors as they are; a torch.dtype
            rounds to it; None is the parameter's.
        anchor_device: "cpu" keeps the anchors in (pinned) host memory, from which a GPU reads them at each step, at the
            speed of its bus; None keeps them on the parameters' device.
        state_dtype: torch.float32, or torch.bfloat16, of the moments. Those are rounded stochastically (as below),
            since to nearest a decay of 0.001 of the second moment would always be lost.
        master_weights: keep a float32 copy of bfloat16 and float16 parameters, which the steps go on from; the
            parameters show it, rounded. Where somebody else has written a parameter, that counts.
        stochastic_rounding: round bfloat16 weights up or down at random, in expectation to the exact value, so that
            updates below half a unit in the last place are not lost. Other dtypes are rounded to nearest.
        seed: 0 ≤ seed < 2³¹, of that rounding, which is a function of seed, parameter, step and place: a run repeats
            itself, and replicas agree. Saved with the group.
        capturable: permit the capture of `step` in a CUDA graph (Triton backend, after a step outside it). What is to
            change between replays (lr, strength ...) must then be a tensor on the device; numbers are frozen.
        max_grad_norm: scale all gradients together down to this 2-norm, as torch.nn.utils.clip_grad_norm_, but inside
            the step: one more reading of the gradients, which stay as they are, and no wait for the device. The norm
            they had is then `optimizer.grad_norm`, a tensor.
        backend: "auto" (the fastest that can serve), "triton", "native" or "reference".
        save_anchors: whether `state_dict` carries the anchors (True), their SHA-256 that loading compares ("digest";
            so it always is for a file), or neither (False).

    State: exp_avg and exp_avg_sq, max_exp_avg_sq with amsgrad, all in `state_dtype` (float64 for float64 parameters); a
    float32 step (on the device with the Triton backend); the anchor; with master_weights the float32 master; with "ftp"
    the delta c, in bfloat16 (float64), and radius_state, γ and the moments of its gradient in float64. Arithmetic is
    float32 for every parameter dtype but float64. With torch.amp.GradScaler, gradients are unscaled in the kernel,
    which writes nothing if one is infinite.

    Raises:
        ValueError, TypeError: an argument out of its range, or an anchor that does not fit; the message names it.
        RuntimeError: a backend that is not there, or a sparse gradient.

    Source of AdamW: Loshchilov & Hutter, ICLR 2019; of each method, as given there.
    """

    base = ADAMW

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        method: str = "none",
        norm: str | None = None,
        strength: float = 1.0,
        radius: float | Tensor | None = None,
        k: float = 1.0,
        radius_lr: float = 1e-2,
        radius_betas: Betas = (0.9, 0.999),
        anchor: Anchor = "initial",
        anchor_dtype: torch.dtype | str | None = "exact",
        anchor_device: str | None = None,
        state_dtype: torch.dtype = torch.float32,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        capturable: bool = False,
        max_grad_norm: float | Tensor | None = None,
        backend: str = "auto",
        save_anchors: bool | str = True,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "method": method, "norm": norm, "strength": strength, "radius": radius, "k": k,
            "radius_lr": radius_lr, "radius_betas": radius_betas,
            "anchor_dtype": anchor_dtype, "anchor_device": anchor_device, "state_dtype": state_dtype,
            "master_weights": master_weights, "stochastic_rounding": stochastic_rounding, "seed": seed,
            "capturable": capturable,
        }  # fmt: skip
        super().__init__(
            params, defaults, anchor=anchor, backend=backend, save_anchors=save_anchors, max_grad_norm=max_grad_norm
        )


class AnchoredSGD(AnchoredOptimizer):
    r"""SGD with a pull toward the anchor.

        g' = g + wd·θ;  b ← μb + (1−dampening)g' (g' at its first step);  θ̃ = θ − lr·b, or θ − lr(g' + μb) if nesterov
        θ ← θ₀ + α(θ̃ − θ₀)

    `method` chooses α as in `AnchoredAdamW`; SPD's condition uses the raw g, without wd·θ. Arguments, per-group
    settings and errors are as there and in torch.optim.SGD, to which method="none" is equal.

    State: with momentum, a float32 (float64) momentum_buffer and a float32 step that counts its updates (without
    momentum, with stochastic_rounding, the steps); the anchor.

    Sources: as `AnchoredAdamW`; momentum: Sutskever et al., ICML 2013, in torch.optim.SGD's form.
    """

    base = SGD

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        method: str = "none",
        norm: str | None = None,
        strength: float = 1.0,
        radius: float | Tensor | None = None,
        k: float = 1.0,
        radius_lr: float = 1e-2,
        radius_betas: Betas = (0.9, 0.999),
        anchor: Anchor = "initial",
        anchor_dtype: torch.dtype | str | None = "exact",
        anchor_device: str | None = None,
        state_dtype: torch.dtype = torch.float32,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        capturable: bool = False,
        max_grad_norm: float | Tensor | None = None,
        backend: str = "auto",
        save_anchors: bool | str = True,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize, "method": method, "norm": norm, "strength": strength,
            "radius": radius, "k": k, "radius_lr": radius_lr, "radius_betas": radius_betas,
            "anchor_dtype": anchor_dtype, "anchor_device": anchor_device, "state_dtype": state_dtype,
            "master_weights": master_weights, "stochastic_rounding": stochastic_rounding, "seed": seed,
            "capturable": capturable,
        }  # fmt: skip
        super().__init__(
            params, defaults, anchor=anchor, backend=backend, save_anchors=save_anchors, max_grad_norm=max_grad_norm
        )
