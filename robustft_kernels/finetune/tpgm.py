"""TPGM: learns on validation data how far each parameter may move from θ₀, by gradient descent on the radii."""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..core import anchors
from ..core.mistakes import refuse_model
from ..core.names import bare_name
from ..core.ranges import NOT_NEGATIVE, POSITIVE, check_number
from ..core.sharding import local
from ..core.state import is_dense
from ..step.sweep_cache import SweepCache
from .evaluation import Feed
from .prefixes import matching, names_of
from .projection import Ball
from .radii import COUNT, FLOOR, LearnedRadii, Loss


class TPGM(LearnedRadii):
    r"""Trainable projections: θ ← θ₀ + α·c, α = min(1, γ/n), with one learned radius γ a parameter.

        c = θ − θ₀,  n = ‖c‖,  G = dL/dθ at the projected weights, L the loss of a validation batch
        dL/dγ = 1[γ < n]·⟨G, c⟩/n                          ("mars_rows": the sum of that over the rows)
              + 2·radius_penalty·γ                          (TPGM-C: radius_penalty·‖γ‖²)
              + tv·d/dγ Σ_groups Σᵢ |αᵢ − αᵢ₋₁|             ("mars_rows": α the mean over the rows)
        γ ← max(1e-8, Adam(γ, dL/dγ))

    Train with any optimizer, and call `step` after each of its steps. Or call `update` and `project_` when you like.

    Args:
        model_or_named_parameters: the model, or pairs as of `model.named_parameters()`. A parameter takes part if it
            requires a gradient now and has elements. With pairs, `loss_fn` must see to evaluation mode and buffers.
        norm: "l2" (Frobenius), "mars" (the largest row sum of |c|), or "mars_rows" (each row is scaled by its own, as
            in the released code).
        anchor: θ₀. It is one of
            - "initial": a copy of the weights now.
            - "zero".
            - A mapping by name, such as the pretrained model's state dict. It needs an entry for every parameter that
              takes part. Other entries are passed over. Its tensors are used as they are.
            - The path of a safetensors file.
        lr: of Adam on γ. It is absolute: a step moves γ by about lr, whatever the size of n. With lr = 1e-2 and a layer
            that deviates by 0.02, two steps end the constraint. From γ ≥ n on the loss has no slope in γ. Then only the
            penalties, what is left of Adam's momentum, or a growing n bind the layer again.
        init: γ at first. It is a number, or "half_min": half of n at the first update or projection. For "mars_rows"
            that is the n of the parameter's smallest row. A γ that starts above n starts unconstrained, and stays so
            as long as n does not outgrow it.
        radius_penalty: μ ≥ 0 of TPGM-C. The paper sweeps it from 4e-3 down to 0.
        tv: μ ≥ 0 of the total variation of α along each of `groups`.
        groups: each is a name or prefix, or a list of them. The parameters of a name or prefix are neighbours in the
            order of the model. Those of a list are neighbours in the order of the list.
        exclude: names or prefixes of parameters that stay as they are.
        clamp: hold γ at or below n whenever it is used, as the released code does. For "mars_rows", n is the largest
            row's.
        f_proj, every_step: see `step`.
        save_anchors: whether `state_dict` carries the anchors.
        process_group: the processes that have replicas of the model, each with its own batches. The slopes of the radii
            are averaged over them, so that all learn the same radii. None is DistributedDataParallel's, if the model is
            that, else no process but this one.

    A prefix matches whole components: "blocks.1" is `blocks.1.attn.weight`, not `blocks.10.attn.weight`. What wrappers
    put into names is left out of all names, given or found. That is `module.` in front (DataParallel, DDP), and
    anywhere `_fsdp_wrapped_module.` (FSDP), `_orig_mod.` (torch.compile) and `_checkpoint_wrapped_module.` (activation
    checkpointing). A shared parameter goes by its first name, and answers to all.

    Memory: the anchors. During an update also a copy of the trained weights, and one gradient at a time.

    Raises:
        ValueError: an argument out of its range, a name that matches nothing, or an anchor that does not fit. Also two
            parameters of one name or of one memory, or parameters on several devices. The message names it.
        TypeError: something else than a model or pairs.

    Source: Tian et al., "Trainable Projected Gradient Method for Robust Fine-tuning", CVPR 2023, Algorithms 1 and 2,
    Eq. 3 and 4. TPGM-C: Section 4.2. Total variation: Appendix 5.3.
    """

    def __init__(
        self,
        model_or_named_parameters: nn.Module | Iterable[tuple[str, Tensor]],
        *,
        norm: str = "l2",
        anchor: str | PathLike[str] | Mapping[str, Tensor] = "initial",
        lr: float = 1e-2,
        init: float | str = FLOOR,
        radius_penalty: float = 0.0,
        tv: float = 0.0,
        groups: Sequence[str | Sequence[str]] = (),
        exclude: Sequence[str] = (),
        clamp: bool = False,
        f_proj: int = 1,
        every_step: bool = False,
        save_anchors: bool = True,
        process_group: Any = None,
    ) -> None:
        _check_numbers(lr, init, radius_penalty, tv, f_proj)
        given = model_or_named_parameters
        self._model = given if isinstance(given, nn.Module) else None
        if process_group is None and isinstance(given, nn.parallel.DistributedDataParallel):
            process_group = given.process_group
        self._replicas = process_group
        names = names_of(given)
        excluded = set(matching(exclude, names, "exclude"))
        self._params = [p for p in names if p.requires_grad and p.numel() and p not in excluded]
        self.names = [names[param][0] for param in self._params]
        _check_params(self._params, self.names)
        self.norm, self.radius_penalty, self.tv = norm, radius_penalty, tv
        self.clamp, self.f_proj, self.every_step, self.save_anchors = clamp, f_proj, every_step, save_anchors
        # One sweep for each gradient that an update reduces, and a few for all parameters.
        self._ball = Ball(self._params, norm, SweepCache(len(self._params) + 16))
        device = self._params[0].device
        pairs = self._neighbours(groups, names)
        self._neighbour_pairs = torch.tensor(pairs, dtype=torch.int64, device=device).reshape(-1, 2).T

        if isinstance(anchor, Mapping):
            bare = {bare_name(name): value for name, value in anchor.items()}
            aliases = {names[p][0]: next((n for n in names[p] if n in bare), None) for p in self._params}
            anchor = bare | {name: bare[alias] for name, alias in aliases.items() if alias is not None}
        elif not isinstance(anchor, str | PathLike):
            refuse_model("anchor", anchor, "its state_dict()")
            raise TypeError(f"anchor must be 'initial', 'zero', a path or a mapping, not a {type(anchor).__name__}")
        labels = [f"parameter {name!r}" for name in self.names]
        self._anchor, self._anchors = anchors.resolve(anchor, self._params, self.names, labels, anchored=True)

        self.calls = 0
        self._started = not isinstance(init, str)  # if not, the radii wait for the first norms
        start = torch.nan if isinstance(init, str) else max(init, FLOOR)
        radii = torch.full((len(self.names),), start, dtype=torch.float64, device=device)
        self._adam = torch.optim.Adam([radii], lr=lr)
        self._alphas: Tensor | None = None
        self._feed = Feed()

    def step(self, loss_fn: Loss, batches: Iterable[Any], steps: int = 1, progress: bool | None = None) -> bool:
        """What TPGM does after a training step. It counts its calls, and returns whether this one updated the radii.

        - every_step=False, Algorithm 1: every f_proj-th call is an `update` and a projection. The others do nothing.
          f_proj=1, steps=1 and norm="mars" are the paper's setting for ResNets. For ViTs the paper sets f_proj = T, the
          number of training steps, and steps=200: one projection, after training. (The paper writes T − 1, for steps
          that count from 0.)
        - every_step=True, the released code: every call projects. Calls 1, 1 + f_proj, 1 + 2·f_proj ... update before
          that.

        Arguments and errors are those of `update`. A call that raises is not counted.
        """
        due = self.calls % self.f_proj == (0 if self.every_step else self.f_proj - 1)
        norms = self._learn(loss_fn, batches, steps, progress) if due else None
        if due or self.every_step:
            self._project(norms)
        self.calls += 1
        return due

    def update(self, loss_fn: Loss, batches: Iterable[Any], steps: int = 1, progress: bool | None = None) -> None:
        """Algorithm 2: `steps` steps of Adam on γ, each on the next batch. It does not project the weights.

        Args:
            loss_fn: from a batch to the loss, a tensor with one element. It calls your model as it is, whose parameters
                hold the projected weights during the call. It leaves the backward pass to TPGM.
            batches: any iterable. It is begun again at its end, and continued where the last update left it. A
                generator serves as long as it lasts.
            steps: T_proj.
            progress: whether to show a tqdm bar. None shows one on a terminal from 20 steps on.

        Afterwards these are as they were, bit for bit: weights, training flags, buffers, `.grad`s, and torch's random
        states (CPU and the parameters' device). That holds whatever is raised, KeyboardInterrupt included. If something
        is raised, the radii and Adam's state are as they were too.

        Modules are in evaluation mode by their flags: `train()` is not called. Hooks on parameters do not run. A
        parameter without a gradient has slope 0. Waits for the device once, at the end.

        If a model is spread over processes (FSDP2, DTensor), all learn the same radii, from all of their batches.
        Replicas (DDP) may each have their own batches: their slopes are averaged, see `process_group`.

        Raises:
            ValueError: no batch (left), steps below 1, a loss of several elements or independent of the parameters.
            TypeError: a loss that is no tensor.
            RuntimeError: under torch.no_grad() or torch.inference_mode(), or the parameters have moved elsewhere.
            FloatingPointError: a radius has become infinite or NaN. The message names its parameter.
        """
        self._learn(loss_fn, batches, steps, progress)

    @torch.no_grad()
    def project_(self) -> None:
        """θ ← θ₀ + min(1, γ/n)·c in place, with the radii as they are. Never waits for the device.

        A CUDA graph can capture a second call. Each replay then reads the radii of that time, also those that an update
        has learned since. After `load_state_dict`, capture it anew.
        """
        self._project(None)


def _check_params(params: list[Tensor], names: list[str]) -> None:
    if not params:
        raise ValueError("no parameter takes part: none is left that requires a gradient and has elements")
    owners: dict[int, str] = {}
    for param, name in zip(params, names, strict=True):
        if not param.is_leaf or not param.is_floating_point() or not is_dense(local(param)):
            raise ValueError(f"parameter {name!r} must be a dense leaf tensor of a real floating dtype")
        if param.device != params[0].device:
            raise ValueError(
                f"parameter {name!r} is on {param.device}, {names[0]!r} on {params[0].device}; use one TPGM a device"
            )
        here = local(param)
        if here.numel() and (other := owners.setdefault(here.data_ptr(), name)) != name:
            raise ValueError(f"the parameters {other!r} and {name!r} share their memory; exclude one of them")


def _check_numbers(lr: float, init: float | str, radius_penalty: float, tv: float, f_proj: int) -> None:
    if isinstance(init, str) and init != "half_min":
        raise ValueError(f"unknown init {init!r}: use a number above 0, or 'half_min'")
    if not isinstance(init, str):
        check_number("init", init, POSITIVE)
    check_number("lr", lr, POSITIVE)
    check_number("radius_penalty", radius_penalty, NOT_NEGATIVE)
    check_number("tv", tv, NOT_NEGATIVE)
    check_number("f_proj", f_proj, COUNT)
