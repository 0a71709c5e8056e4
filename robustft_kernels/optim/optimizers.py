"""The optimizers that hold each parameter near its anchor θ₀: AdamW and SGD with a pull."""

import torch
from torch import Tensor

from ..core.anchors import Anchor
from ..core.bases import ADAMW, SGD
from ..core.methods import METHODS, documents, gate_key
from ..finetune.by_radius import Radii
from .anchored import AnchoredOptimizer, Params

Betas = tuple[float | Tensor, float | Tensor]


@documents(METHODS)
class AnchoredAdamW(AnchoredOptimizer):
    r"""AdamW with a pull toward the anchor θ₀.

        m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²
        θ̃ = θ(1 − lr·wd) − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)
        θ ← θ₀ + α(θ̃ − θ₀)

    `method` chooses α. It looks at d = θ − θ₀ before the decay and the step, and at c = θ̃ − θ₀ after them. ‖·‖ is the
    norm of the whole tensor. nᵢ = Σ|cᵢ| is the norm of row i, an index of dimension 0. The methods are:

    {methods}

    With "none" it equals torch.optim.AdamW (and Adam, at weight_decay=0).

    Every argument up to `capturable` can be set per group, `method` included.

    Args:
        params: parameters of any floating dtype and dense layout, `model.named_parameters()`, or groups of either.
            Those that are frozen in integers are passed over.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW. A tensor lr is read at each step.
        method: a name in `robustft_kernels.METHODS`. None is the class's own: "none", or as its name says.
        norm: what "spd" and "project" measure with. None is "l2".
        gate: which steps "spd" may hold back: "inconsistent", those with ⟨g,d⟩ > 0, as in the paper, or "away", all
            that lead away from θ₀. With "away", the distance of a layer grows by 1 − strength of what a step adds to
            it. So strength=1 lets none grow, and a layer that begins at θ₀ stays there.
        strength: λ ≥ 0. For "spd" it has no unit, and 1 projects onto the previous radius. For "l2sp" and
            "l2sp_cautious" it is per unit of lr. For "l2sp_coupled" and "mars_sp" it is the penalty's factor in the
            loss. For "digrap" it is the share of the gradient's part along d, from 0 to 1.
        radius: γ > 0 of "project", in units of the weights: one number, or one for each parameter. By name, a key is
            also a prefix of whole components, the longest counts, and "" matches all. A sequence or tensor [n] is
            parallel to the parameters. There is one group for each radius then. A tensor is read at each step.
        k: 0 ≤ k ≤ 1, of "ftp": how much a gradient may tighten a radius. 1 holds most, 0 lets radii only grow.
        radius_lr, radius_betas: of "ftp", the Adam step on a radius, in units of the weights.
        anchor: θ₀. It is one of
            - "initial": a copy of the weights now, or at their first step if they are written before it, or have no
              memory (meta, lazy) or are frozen until then; see `reanchor` for later.
            - "zero": for adapters. It needs no memory and no reads.
            - A list of tensors parallel to `params`.
            - A mapping from parameter name to tensor.
            - The path of a safetensors file, of its index, or of a directory with either. It is read into memory.
        anchor_dtype: "exact" copies the weights in the smallest dtype that holds those of the group exactly. A model
            that was stored in bfloat16 then costs 2 bytes a parameter. Given anchors stay as they are. A torch.dtype
            rounds to that dtype. None is the parameter's dtype.
        anchor_device: "cpu" keeps the anchors in (pinned) host memory. A GPU reads them there at each step, at the
            speed of its bus. "disk" leaves them in their file, for parameters on the CPU. The file is mapped, which
            takes no memory, and all processes of a machine share it. It must not be written in place: the next step
            raises RuntimeError then. None keeps them on the parameters' device.
        state_dtype: how moments are kept: torch.float32, torch.bfloat16, such a dtype's name, or "8bit". bfloat16 and
            8-bit moments are rounded stochastically (as below). Rounding to nearest would always lose a decay of 0.001
            of the second moment. "8bit" is 1.03 bytes for each number: int8 codes of exp_avg and uint8 codes of
            exp_avg_sq, code k for k² parts of a scale that 32 neighbours of a row share. A parameter whose rows are
            not multiples of 32 elements, side by side in memory, keeps float32.
        master_weights: keep a float32 copy of bfloat16 and float16 parameters. The steps continue from the copy, and
            the parameters show it, rounded. If somebody else writes a parameter, what they wrote counts.
        stochastic_rounding: round bfloat16 weights up or down at random, in expectation to the exact value. So updates
            below half a unit in the last place are not lost. Other dtypes are rounded to nearest.
        seed: 0 ≤ seed < 2³¹, of that rounding, which is a function of seed, parameter, step and place. So a run repeats
            itself, and replicas agree. The seed is saved with the group.
        capturable: permit the capture of `step` in a CUDA graph. That takes the CUDA or the Triton backend, and one
            step before the capture. What changes between replays (lr, strength ...) must be a tensor on the device.
            Numbers are frozen.
        max_grad_norm: scale all gradients together down to this 2-norm, as torch.nn.utils.clip_grad_norm_ does, but
            inside the step. The gradients are read once more and stay as they are. Nothing waits for the device.
            `optimizer.grad_norm` is then the norm that they had, a tensor.
        backend: "auto" (the fastest that can serve), "cuda", "triton", "native" or "reference".
        save_anchors: what `state_dict` carries: the anchors with a digest of each (True), the digests ("digest"), or
            neither (False). Loading compares digests. For anchors from a file, True means "digest" too.

    State, for each parameter:
        exp_avg, exp_avg_sq: in `state_dtype` (float64 for float64 parameters). With amsgrad, max_exp_avg_sq too.
        exp_avg_scale, exp_avg_sq_scale (and of amsgrad's): the scales of 8-bit moments, uint8, [rows, row length / 32].
            A byte e stands for 2^(e − 127), 255 for nan.
        step: a float32, on the device with the Triton backend.
        anchor: θ₀, if the parameter has one.
        master: the float32 copy, with master_weights.
        delta: c of the last step, with "ftp", in bfloat16 (float64 for float64 parameters).
        radius_state: γ and the moments of its gradient, with "ftp", in float64.

    Arithmetic is float32 for every parameter dtype but float64. With torch.amp.GradScaler the kernel unscales the
    gradients. It writes nothing if one of them is infinite.

    Raises:
        ValueError, TypeError: an argument out of its range, or an anchor that does not fit. The message names it.
        RuntimeError: a backend that is not there, a sparse gradient, or anchors on disk whose file was written.

    Source of AdamW: Loshchilov & Hutter, ICLR 2019. The source of each method is given there.
    """

    base = ADAMW
    default_method = "none"

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
        method: str | None = None,
        norm: str | None = None,
        gate: str = "inconsistent",
        strength: float = 1.0,
        radius: float | Tensor | Radii | None = None,
        k: float = 1.0,
        radius_lr: float = 1e-2,
        radius_betas: Betas = (0.9, 0.999),
        anchor: Anchor = "initial",
        anchor_dtype: torch.dtype | str | None = "exact",
        anchor_device: str | None = None,
        state_dtype: torch.dtype | str = torch.float32,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        capturable: bool = False,
        max_grad_norm: float | Tensor | None = None,
        backend: str = "auto",
        save_anchors: bool | str = True,
    ) -> None:
        method = self.default_method if method is None else method
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "method": method, "norm": norm, **gate_key(gate), "strength": strength,
            "radius": radius, "k": k, "radius_lr": radius_lr, "radius_betas": radius_betas,
            "anchor_dtype": anchor_dtype, "anchor_device": anchor_device, "state_dtype": state_dtype,
            "master_weights": master_weights, "stochastic_rounding": stochastic_rounding, "seed": seed,
            "capturable": capturable,
        }  # fmt: skip
        super().__init__(
            params, defaults, anchor=anchor, backend=backend, save_anchors=save_anchors, max_grad_norm=max_grad_norm
        )


class AnchoredSGD(AnchoredOptimizer):
    r"""SGD with a pull toward the anchor θ₀.

        g' = g + wd·θ;  b ← μb + (1−dampening)g' (g' at its first step);  θ̃ = θ − lr·b, or θ − lr(g' + μb) if nesterov
        θ ← θ₀ + α(θ̃ − θ₀)

    `method` chooses α as in `AnchoredAdamW`. SPD's condition uses the raw g, without wd·θ. Arguments, per-group
    settings and errors are those of `AnchoredAdamW` and torch.optim.SGD. method="none" equals torch.optim.SGD.

    State, for each parameter:
        momentum_buffer: with momentum, in `state_dtype` (float64 for float64 parameters). Of 8 bits, its scales too.
        step: a float32. With momentum it counts the updates of the buffer. Without, it counts the steps, and is kept
            only with stochastic_rounding or "ftp".
        anchor, master, delta, radius_state: as in `AnchoredAdamW`.

    Sources: as in `AnchoredAdamW`. Momentum: Sutskever et al., ICML 2013, in torch.optim.SGD's form.
    """

    base = SGD
    default_method = "none"

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
        method: str | None = None,
        norm: str | None = None,
        gate: str = "inconsistent",
        strength: float = 1.0,
        radius: float | Tensor | Radii | None = None,
        k: float = 1.0,
        radius_lr: float = 1e-2,
        radius_betas: Betas = (0.9, 0.999),
        anchor: Anchor = "initial",
        anchor_dtype: torch.dtype | str | None = "exact",
        anchor_device: str | None = None,
        state_dtype: torch.dtype | str = torch.float32,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        capturable: bool = False,
        max_grad_norm: float | Tensor | None = None,
        backend: str = "auto",
        save_anchors: bool | str = True,
    ) -> None:
        method = self.default_method if method is None else method
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize, "method": method, "norm": norm, **gate_key(gate),
            "strength": strength, "radius": radius, "k": k, "radius_lr": radius_lr, "radius_betas": radius_betas,
            "anchor_dtype": anchor_dtype, "anchor_device": anchor_device, "state_dtype": state_dtype,
            "master_weights": master_weights, "stochastic_rounding": stochastic_rounding, "seed": seed,
            "capturable": capturable,
        }  # fmt: skip
        super().__init__(
            params, defaults, anchor=anchor, backend=backend, save_anchors=save_anchors, max_grad_norm=max_grad_norm
        )
