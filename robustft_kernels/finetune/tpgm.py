"""TPGM: learns on validation data how far each parameter may move from θ₀, by gradient descent on the radii."""

import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..core import anchors
from ..core.checkpoint import check_names, check_saved, loaded_anchor
from ..core.names import bare_name
from ..core.ranges import NOT_NEGATIVE, POSITIVE, Range, check_number
from ..core.sharding import local
from ..core.state import is_dense
from .evaluation import Feed, as_found, evaluation_mode, put
from .prefixes import matching, names_of
from .projection import Ball, as_lists
from .slopes import dots_of

COUNT = Range(1, finite=False)
Loss = Callable[[Any], Tensor]
FLOOR = 1e-8  # no radius is smaller
LONG = 20  # steps, from which on a terminal gets a progress bar


class TPGM:
    r"""Trainable projections: θ ← θ₀ + α·c, α = min(1, γ/n), with one learned radius γ a parameter.

        c = θ − θ₀,  n = ‖c‖,  G = dL/dθ at the projected weights, L the loss of a validation batch
        dL/dγ = 1[γ < n]·⟨G, c⟩/n                          ("mars_rows": the sum of that over the rows)
              + 2·radius_penalty·γ                          (TPGM-C: radius_penalty·‖γ‖²)
              + tv·d/dγ Σ_groups Σᵢ |αᵢ − αᵢ₋₁|             ("mars_rows": α the mean over the rows)
        γ ← max(1e-8, Adam(γ, dL/dγ))

    Train with any optimizer, and call `step` after each of its steps, or `update` and `project_` when you like.

    Args:
        model_or_named_parameters: the model, or pairs as of `model.named_parameters()`. Parameters that require a
            gradient now and have elements take part. With pairs, evaluation mode and buffers are for `loss_fn`.
        norm: "l2" (Frobenius), "mars" (the largest row sum of |c|), or "mars_rows" (each row scaled by its own, as the
            released code does).
        anchor: θ₀: "initial" (a copy of the weights now), "zero", or a mapping by name with an entry for every
            parameter that takes part, such as the pretrained model's state dict (other entries are passed over, and
            its tensors used as they are), or the path of a safetensors file.
        lr: of Adam on γ. It is absolute: a step moves γ by about lr, whatever the size of n. With lr = 1e-2 and a
            layer that deviates by 0.02, two steps end the constraint. From γ ≥ n on the loss has no slope in γ: only
            the penalties, what is left of Adam's momentum, or a growing n bind the layer again.
        init: γ at first: a number, or "half_min", half of the smallest norm (of each parameter, among its rows for
            "mars_rows") at the first update or projection. A γ that starts above n starts unconstrained, and stays
            so as long as n does not outgrow it.
        radius_penalty: μ ≥ 0 of TPGM-C. The paper sweeps it from 4e-3 down to 0.
        tv: μ ≥ 0 of the total variation of α along each of `groups`.
        groups: each is a name or prefix, whose parameters are neighbours in the order of the model, or a list of
            names and prefixes, in that order.
        exclude: names or prefixes of parameters that stay as they are.
        clamp: hold γ at or below n (the largest row's for "mars_rows") whenever it is used, as the released code does.
        f_proj, every_step: see `step`.
        save_anchors: whether `state_dict` carries the anchors.

    A prefix matches whole components: "blocks.1" is `blocks.1.attn.weight`, not `blocks.10.attn.weight`. What
    DataParallel, DDP, FSDP, torch.compile and activation checkpointing put into names (`module.` in front,
    `_fsdp_wrapped_module.`, `_orig_mod.`, `_checkpoint_wrapped_module.` anywhere) is left out of all names, given or
    found. A shared parameter goes by its first name, and answers to all.

    Memory: the anchors; during an update a copy of the trained weights, and one gradient at a time.

    Raises:
        ValueError: an argument out of its range; a name that matches nothing; two parameters of one name or of one
            memory; parameters on several devices; an anchor that does not fit. The message names it.
        TypeError: something else than a model or pairs.

    Source: Tian et al., "Trainable Projected Gradient Method for Robust Fine-tuning", CVPR 2023, Algorithms 1 and 2,
    Eq. 3 and 4; TPGM-C: Section 4.2; total variation: Appendix 5.3.
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
    ) -> None:
        _check_numbers(lr, init, radius_penalty, tv, f_proj)
        given = model_or_named_parameters
        self._model = given if isinstance(given, nn.Module) else None
        names = names_of(given)
        excluded = set(matching(exclude, names, "exclude"))
        self._params = [p for p in names if p.requires_grad and p.numel() and p not in excluded]
        self.names = [names[param][0] for param in self._params]
        _check_params(self._params, self.names)
        self.norm, self.radius_penalty, self.tv = norm, radius_penalty, tv
        self.clamp, self.f_proj, self.every_step, self.save_anchors = clamp, f_proj, every_step, save_anchors
        self._ball = Ball(self._params, norm)
        device = self._params[0].device
        pairs = self._neighbours(groups, names)
        self._neighbour_pairs = torch.tensor(pairs, dtype=torch.int64, device=device).reshape(-1, 2).T

        if isinstance(anchor, Mapping):
            bare = {bare_name(name): value for name, value in anchor.items()}
            aliases = {names[p][0]: next((n for n in names[p] if n in bare), None) for p in self._params}
            anchor = {name: bare[alias] for name, alias in aliases.items() if alias is not None}
        elif not isinstance(anchor, str | PathLike):
            raise TypeError(f"anchor must be 'initial', 'zero', a path or a mapping, not a {type(anchor).__name__}")
        labels = [f"parameter {name!r}" for name in self.names]
        self._anchor, self._anchors = anchors.resolve(anchor, self._params, self.names, labels, anchored=True)

        self.calls = 0
        self._started = not isinstance(init, str)  # or the radii wait for the first norms
        start = torch.nan if isinstance(init, str) else max(init, FLOOR)
        radii = torch.full((len(self.names),), start, dtype=torch.float64, device=device)
        self._adam = torch.optim.Adam([radii], lr=lr)
        self._alphas: Tensor | None = None
        self._feed = Feed()

    @property
    def radii(self) -> dict[str, Tensor]:
        """γ by parameter name: 0-d, float64, copies. NaN where init="half_min" has yet seen no norms."""
        return dict(zip(self.names, _radii_of(self._adam).clone().unbind(), strict=True))

    @property
    def alphas(self) -> dict[str, Tensor]:
        """α of the last update or projection by parameter name: 0-d, or [rows] for "mars_rows". Empty before it."""
        if self._alphas is None:
            return {}
        each = self._alphas.split(self._ball.counts) if self._ball.alpha_by_row else self._alphas.unbind()
        return dict(zip(self.names, each, strict=True))

    def step(self, loss_fn: Loss, batches: Iterable[Any], steps: int = 1, progress: bool | None = None) -> bool:
        """What TPGM does after a training step; counts its calls, and returns whether this one updated the radii.

        - every_step=False, Algorithm 1: every f_proj-th call is an `update` and a projection, the others do nothing.
          f_proj=1, steps=1 and norm="mars" are the paper's setting for ResNets. f_proj = T, the number of training
          steps, and steps=200 are that for ViTs: one projection, after training (the paper writes T − 1, for steps
          that count from 0).
        - every_step=True, the released code: every call projects; calls 1, 1 + f_proj, 1 + 2·f_proj ... update before.

        Arguments and errors are those of `update`; a call that raises is not counted.
        """
        due = self.calls % self.f_proj == (0 if self.every_step else self.f_proj - 1)
        norms = self._learn(loss_fn, batches, steps, progress) if due else None
        if due or self.every_step:
            self._project(norms)
        self.calls += 1
        return due

    def update(self, loss_fn: Loss, batches: Iterable[Any], steps: int = 1, progress: bool | None = None) -> None:
        """Algorithm 2: `steps` steps of Adam on γ, each on the next batch. The weights are not projected by it.

        Args:
            loss_fn: from a batch to the loss, a tensor with one element, by your model as it is: for the time of the
                call its parameters hold the projected weights. It leaves the backward pass to TPGM.
            batches: any iterable: begun again at its end, and gone on with where the last update left it. A generator
                serves as long as it lasts.
            steps: T_proj.
            progress: a tqdm bar; None shows one on a terminal from 20 steps on.

        Afterwards, and whatever is raised, KeyboardInterrupt included, weights, training flags, buffers, `.grad`s and
        torch's random states (CPU and the parameters' device) are as they were, bit for bit. If something is raised,
        so are the radii and Adam's state. Modules are in evaluation mode by their flags: `train()` is not called.
        Hooks on parameters do not run. A parameter without a gradient has slope 0. Of a model that is spread over
        processes (FSDP2, DTensor) all learn the same radii, from all of their batches; of replicas (DDP) nothing is
        exchanged: give all of them the same batches, or their radii part. Waits for the device once, at the end.

        Raises:
            ValueError: no batch (left), steps below 1, a loss of several elements or independent of the parameters.
            TypeError: a loss that is no tensor.
            RuntimeError: under torch.no_grad() or torch.inference_mode(), or the parameters have moved elsewhere.
            FloatingPointError: a radius has become infinite or NaN; the message names its parameter.
        """
        self._learn(loss_fn, batches, steps, progress)

    @torch.no_grad()
    def project_(self) -> None:
        """θ ← θ₀ + min(1, γ/n)·c in place, with the radii as they are. Never waits for the device."""
        self._project(None)

    def state_dict(self) -> dict[str, Any]:
        """Radii, Adam's state, counts, and unless `save_anchors=False` the anchors; for torch.save, and
        torch.load(weights_only=True). The place within `batches` is kept for a list or tuple alone."""
        return {
            "norm": self.norm,
            "names": list(self.names),
            "radii": _radii_of(self._adam).clone(),
            "started": self._started,
            "adam": copy.deepcopy(self._adam.state_dict()),
            "calls": self.calls,
            "taken": self._feed.taken,
            "anchor": self._anchor,
            "anchors": dict(zip(self.names, self._anchors, strict=True)) if self.save_anchors and self._anchors else {},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a copy of what `state_dict` returned; what follows is what would have followed there.

        Adam's lr is the checkpoint's; anchors are, if it has them. Raises ValueError, before anything is changed,
        where names, norm or shapes differ.
        """
        if state_dict["norm"] != self.norm:
            raise ValueError(f"the checkpoint is of norm {state_dict['norm']!r}, here it is {self.norm!r}")
        check_names(self.names, list(state_dict["names"]))
        adam = copy.deepcopy(self._adam)
        adam.load_state_dict(state_dict["adam"])
        _radii_of(adam).copy_(state_dict["radii"])
        kind, loaded = self._anchor, self._anchors
        if state_dict["anchors"]:
            saved = [state_dict["anchors"][name] for name in self.names]
            for param, name, anchor in zip(self._params, self.names, saved, strict=True):
                check_saved(param, f"parameter {name!r}", {"anchor": anchor}, None)
            kind = state_dict["anchor"]
            loaded = [loaded_anchor(p, anchor) for p, anchor in zip(self._params, saved, strict=True)]
        elif state_dict["anchor"] == "zero":
            kind, loaded = "zero", None
        self._adam, self._anchor, self._anchors, self._alphas = adam, kind, loaded, None
        self._started, self.calls = bool(state_dict["started"]), int(state_dict["calls"])
        self._feed = Feed(int(state_dict["taken"]))

    def _learn(self, loss_fn: Loss, batches: Iterable[Any], steps: int, progress: bool | None) -> Tensor:
        """`update`; returns the norms of the weights."""
        check_number("steps", steps, COUNT)
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "an update differentiates the loss; call it outside torch.no_grad() and inference_mode()"
            )
        norms = self._norms()
        adam, feed = copy.deepcopy(self._adam), copy.copy(self._feed)
        radii = _radii_of(adam)
        self._begin(radii, norms)
        with as_found(self._model, self._params) as theta:
            for step in _bar(steps, progress):
                batch = feed.next(batches)
                if step:
                    put(self._params, theta)
                alphas = self._ball.alphas(radii, norms)
                with torch.no_grad():
                    self._ball.pull_(self._params, self._anchors, alphas)
                torch.clear_autocast_cache()
                evaluation_mode(self._model)
                dots = dots_of(loss_fn(batch), self._params, theta, self._anchors, self._ball)
                radii.grad = self._ball.slopes(radii, norms, dots) + self._penalty_slopes(radii, norms, alphas)
                adam.step()
                self._bound(radii, norms)
        radii.grad = None
        if not bool(radii.isfinite().all()):
            name = self.names[int((~radii.isfinite()).nonzero()[0])]
            raise FloatingPointError(
                f"the radius of parameter {name!r} is no longer finite, because the loss or its gradient is not; "
                "nothing has been changed"
            )
        self._adam, self._feed, self._started = adam, feed, True
        self._alphas = self._ball.alphas(radii, norms)
        return norms

    @torch.no_grad()
    def _project(self, norms: Tensor | None) -> None:
        norms = self._norms() if norms is None else norms
        radii = _radii_of(self._adam)
        self._begin(radii, norms)
        self._started = True
        self._alphas = self._ball.alphas(radii, norms)
        self._ball.pull_(self._params, self._anchors, self._alphas)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """Of the weights as they are now. Raises where they no longer fit the anchors."""
        device = _radii_of(self._adam).device
        if moved := [name for name, p in zip(self.names, self._params, strict=True) if p.device != device]:
            raise RuntimeError(f"parameter {moved[0]!r} has left {device} since TPGM was made; make it after the move")
        as_lists(self._params, self._anchors)
        return self._ball.norms(self._params, self._anchors)

    def _begin(self, radii: Tensor, norms: Tensor) -> None:
        if not self._started:
            half = self._ball.smallest(norms) / 2
            radii.copy_(torch.where(half.isfinite(), half, 0.0))
        self._bound(radii, norms)

    def _bound(self, radii: Tensor, norms: Tensor) -> None:
        if self.clamp:
            largest = self._ball.largest(norms)
            radii.copy_(torch.where(radii > largest, largest, radii))
        radii.clamp_(min=FLOOR)

    def _penalty_slopes(self, radii: Tensor, norms: Tensor, alphas: Tensor) -> Tensor:
        """d/dγ of radius_penalty·‖γ‖² + tv·Σ|αᵢ − αᵢ₋₁|."""
        slopes = 2 * self.radius_penalty * radii
        if self.tv:
            left, right = self._neighbour_pairs
            mean = self._ball.mean(alphas)
            signs = (mean[right] - mean[left]).sign()
            pulls = torch.zeros_like(mean).index_add(0, right, signs).index_add(0, left, -signs)  # exact in any order
            slopes += self.tv * pulls * self._ball.mean(self._ball.rates(radii, norms))
        return slopes

    def _neighbours(self, groups: Sequence[str | Sequence[str]], names: Mapping[Tensor, list[str]]) -> list[Any]:
        """The indices of αᵢ₋₁ and αᵢ for each term of the total variation."""
        if self.tv and not groups:
            raise ValueError("tv needs groups: names or prefixes of the parameters to smooth along")
        places = {param: k for k, param in enumerate(self._params)}
        pairs: list[Any] = []
        for group in groups:
            members = [places[p] for p in dict.fromkeys(matching(group, names, "groups")) if p in places]
            if len(members) < 2:
                raise ValueError(f"the group {group!r} has {len(members)} trained parameters; it takes two to smooth")
            pairs += pairwise(members)
        return pairs


def _bar(steps: int, progress: bool | None) -> Iterable[int]:
    if progress is None:
        progress = steps >= LONG and sys.stderr.isatty() and find_spec("tqdm") is not None
    if not progress:
        return range(steps)
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(range(steps), desc="TPGM", unit="step")  # type: ignore[no-any-return]


def _radii_of(adam: torch.optim.Adam) -> Tensor:
    radii: Tensor = adam.param_groups[0]["params"][0]
    return radii


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
