"""What the callbacks of all trainers share. It knows no trainer: held-out data, learned radii, figures, WiSE-FT."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isnan, nan, sqrt
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, default_collate

from .. import telemetry
from ..core.bases import is_anchored
from ..core.files import read
from ..core.methods import method_of
from ..core.names import bare_name
from ..core.ranges import BELOW_1, FROM_0_TO_1, check_number
from ..finetune.pairing import Pretrained, match_own
from ..finetune.projection import deviation
from ..finetune.radii import COUNT
from ..finetune.tpgm import TPGM
from ..finetune.wise import wise_ft_
from ..telemetry import Telemetry

MOMENTS = ("evaluation", "end")
Every = int | str
Loss = Callable[[Any], Tensor]


def hold_out(dataset: Any, share: float, seed: int = 0) -> tuple[Any, Any]:
    """(rest, held out): a part of the training data is taken out by chance, for radii to be learned on.

    Args:
        dataset: with a length and an index. One that has `select`, such as those of the library datasets, is divided by
            that. Any other becomes two `torch.utils.data.Subset`.
        share: of the examples, above 0 and below 1. At least one example is on either side.
        seed: of the choice, which is the same in every run.

    Raises ValueError for a share out of its range, or fewer than two examples. Raises TypeError without a length.
    """
    check_number("share", share, BELOW_1)
    count = _length(dataset, "dataset")
    if share == 0 or count < 2:
        raise ValueError(f"nothing can be held out of {count} examples with share={share}; it takes two, and above 0")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    cut = min(max(round(share * count), 1), count - 1)
    parts = sorted(order[cut:]), sorted(order[:cut])
    rest, held_out = (dataset.select(p) if hasattr(dataset, "select") else Subset(dataset, p) for p in parts)
    return rest, held_out


def check_apart(held_out: Any, others: Mapping[str, Any]) -> None:
    """Raises ValueError if held-out data is known to share an example with other data, which the message names.

    Known are: the same object, two `Subset`s of one dataset with a common index, and a `Subset` of the other.
    others: by what it is called. Loaders, mappings and sequences of them are looked into.
    """
    base, chosen = _chosen(held_out)
    for label, other in others.items():
        for dataset in datasets_of(other):
            other_base, others_chosen = _chosen(dataset)
            if base is other_base and not chosen.isdisjoint(others_chosen):
                raise ValueError(
                    f"held_out shares examples with {label}; radii are learned on training data that is trained on by "
                    "nothing else: train, held_out = robustft_kernels.callbacks.hold_out(train, 0.1)"
                )


def datasets_of(data: Any) -> Iterable[Any]:
    """The datasets of a loader, or of a mapping or sequence of loaders. Anything else is a dataset."""
    if data is None:
        return
    if isinstance(data, DataLoader):
        yield data.dataset
    elif isinstance(data, Mapping):
        for of in data.values():
            yield from datasets_of(of)
    elif isinstance(data, list | tuple) and any(isinstance(of, DataLoader) for of in data):
        for of in data:
            yield from datasets_of(of)
    else:
        yield data


def _chosen(dataset: Any) -> tuple[Any, set[int]]:
    """The dataset behind all subsets, and which of its examples are in."""
    if isinstance(dataset, Subset):
        chosen: list[int] = list(dataset.indices)
        base: Any = dataset.dataset
        while isinstance(base, Subset):
            chosen, base = [base.indices[k] for k in chosen], base.dataset
        return base, set(chosen)
    return dataset, set(range(len(dataset) if hasattr(dataset, "__len__") else 1))


def _length(dataset: Any, label: str) -> int:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(f"{label} is a {type(dataset).__name__}; give a dataset that has a length and an index")
    return len(dataset)


class RadiusLearner:
    """`TPGM` at chosen moments of a training: T_proj = `steps` steps of Adam on the radii γ, then one projection

        θ ← θ₀ + min(1, γ/n)·(θ − θ₀),  n = ‖θ − θ₀‖

    Args:
        held_out: a dataset, or a loader whose dataset, `collate_fn` and batch size are taken.
        every: a number of optimizer steps, "evaluation", or "end".
        steps: T_proj.
        batch_size: None is the loader's, else 8.
        seed: of the order of the examples. Each pass has the same order, so a place in it can be saved.
        options: of `TPGM`.

    Raises ValueError for `every`, `steps`, `batch_size` or options out of their range, and TypeError for data without
    a length.
    """

    def __init__(
        self, held_out: Any, every: Every, steps: int, batch_size: int | None, seed: int, options: Mapping[str, Any]
    ) -> None:
        if isinstance(every, str) and every not in MOMENTS:
            raise ValueError(f"every must be a number of optimizer steps, 'evaluation' or 'end', got {every!r}")
        if not isinstance(every, str):
            check_number("every", every, COUNT)
        check_number("steps", steps, COUNT)
        if timed := sorted({"f_proj", "every_step"} & options.keys()):
            raise ValueError(f"{timed[0]} is TPGM's own clock; here every= tells when radii are learned")
        loader = held_out if isinstance(held_out, DataLoader) else None
        self.dataset: Any = held_out if loader is None else loader.dataset
        count = _length(self.dataset, "held_out")
        size = batch_size or (loader and loader.batch_size) or 8
        check_number("batch_size", size, COUNT)
        if not count:
            raise ValueError("held_out is empty; radii need at least one example")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        self.collate: Callable[[list[Any]], Any] = default_collate if loader is None else loader.collate_fn
        self.batches = [order[k : k + size] for k in range(0, count, size)]
        self.every, self.steps, self.options = every, steps, dict(options)
        self.learned_at = -1  # the optimizer step after which radii were learned last
        self.alphas: dict[str, Tensor] = {}  # of the last projection
        self.tpgm: TPGM | None = None
        self._params: dict[str, Tensor] = {}
        self._pending: Mapping[str, Any] | None = None

    def begin(self, model: nn.Module, **options: Any) -> None:
        """Makes the TPGM over a model, with further options. A state that was loaded before is taken over."""
        self.tpgm = TPGM(model, **{**self.options, **options})
        self._params = {bare_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
        if self._pending is not None:
            self.load_state_dict(self._pending)

    @property
    def weights(self) -> list[Tensor]:
        """The parameters that take part."""
        return [self._params[name] for name in self.tpgm.names] if self.tpgm is not None else []

    def is_due(self, moment: str, step: int) -> bool:
        """Whether radii are to be learned now: at "step", "evaluation" or "end", after so many optimizer steps."""
        if step == self.learned_at or step == 0:
            return False
        return moment == self.every if isinstance(self.every, str) else moment == "step" and step % self.every == 0

    def learn(self, step: int, loss_fn: Loss) -> None:
        """Learns on the next batches, and projects. `loss_fn`: from a collated batch to its loss."""
        assert self.tpgm is not None

        def loss_of(indices: list[int]) -> Tensor:
            return loss_fn(self.collate([self.dataset[k] for k in indices]))

        with torch.inference_mode(False), torch.enable_grad():
            self.tpgm.step(loss_of, self.batches, self.steps, progress=False)
        self.learned_at, self.alphas = step, self.tpgm.alphas

    def telemetry(self) -> dict[str, Telemetry]:
        """n, the mean α, the share of segments with α < 1 at the last projection, and γ, of each parameter. What TPGM
        does not know is nan, and so is n if `save_anchors=False`."""
        assert self.tpgm is not None
        state, names, radii = self.tpgm.state_dict(), self.tpgm.names, self.tpgm.radii
        known = state["anchor"] == "zero" or bool(state["anchors"])
        anchors = list(state["anchors"].values()) or None
        norm = "l2" if self.tpgm.norm == "l2" else "mars"
        sizes = torch.as_tensor(deviation(self.weights, anchors, norm)).tolist() if known else [nan] * len(names)
        told = {}
        for name, size in zip(names, sizes, strict=True):
            alpha = self.alphas.get(name, torch.ones(()))
            share = (alpha < 1).double().mean()
            told[name] = Telemetry(size, nan, float(alpha.mean()), float(share), nan, float(radii[name]))
        return told

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the state of TPGM, when it last learned, and how the held-out data was divided."""
        if self.tpgm is None:
            return {}
        own = {"learned_at": self.learned_at, "alphas": dict(self.alphas), "batches": self._division()}
        return {"tpgm": self.tpgm.state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned, now or when `begin` is called. Raises ValueError if it does not fit."""
        if self.tpgm is None or not state:
            self._pending = state or None
            return
        if list(state["batches"]) != self._division():
            raise ValueError(
                f"the checkpoint's radii were learned on {state['batches']} (examples, batches) of held-out data, here "
                f"there are {self._division()}; give the same held_out and batch_size"
            )
        self.tpgm.load_state_dict(state["tpgm"])
        self.learned_at, self.alphas = int(state["learned_at"]), dict(state["alphas"])
        self._pending = None

    def _division(self) -> list[int]:
        return [len(self.dataset), len(self.batches)]


class Interpolation:
    """WiSE-FT: θ ← (1 − alpha)·θ₀ + alpha·θ, once, in place; bit for bit what `robustft_kernels.wise_ft` gives.

    Args:
        alpha: from 0 (pre-trained) to 1 (fine-tuned).
        pretrained: θ₀. None takes the anchors of the optimizers. What has none, such as a head with method="none" and
            all buffers, stays fine-tuned. Else it is a module, a state dict, or the path of a safetensors file.
        options: `exclude` and `buffers` of `wise_ft`. They need a `pretrained`.
    """

    def __init__(self, alpha: float, pretrained: Pretrained | None, options: Mapping[str, Any]) -> None:
        check_number("alpha", alpha, FROM_0_TO_1)
        if pretrained is None and options:
            raise ValueError(f"{next(iter(options))} needs pretrained=; without it all that has an anchor is pulled")
        self.alpha, self.options = alpha, dict(options)
        self.pretrained = read(pretrained) if isinstance(pretrained, str | PathLike) else pretrained

    def check(self, model: nn.Module, optimizers: Iterable[Any]) -> None:
        """Raises what `apply` would raise, before training."""
        if self.pretrained is not None:
            match_own(self.pretrained, model, **{"buffers": "finetuned", "exclude": (), **self.options})
            return
        groups = [group for of in optimizers for group in unwrapped(of).param_groups]
        if not any("method" in group and method_of(group["method"]).anchored for group in groups):
            raise ValueError(
                "no optimizer here has anchors to interpolate toward: give pretrained= (a state dict, a module, or the "
                "path of safetensors), or train with one that has, such as robustft_kernels.AdamSPD"
            )

    @torch.no_grad()
    def apply(self, model: nn.Module, optimizers: Iterable[Any]) -> None:
        """Interpolates the weights of `model`."""
        if self.pretrained is not None:
            wise_ft_(model, self.pretrained, self.alpha, **self.options)
            return
        found: dict[Tensor, Tensor] = {}
        for optimizer in map(unwrapped, optimizers):
            found.update(_anchors(optimizer))
        named = dict(model.named_parameters(remove_duplicate=False))
        anchors = {name: found[param] for name, param in named.items() if param in found}
        wise_ft_(model, anchors, self.alpha, exclude=model.state_dict().keys() - anchors.keys())


def _anchors(optimizer: Any) -> Iterable[tuple[Tensor, Tensor]]:
    """The parameters of an optimizer of ours with their anchors."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if "method" not in group or not method_of(group["method"]).anchored:
                continue
            if not is_anchored(group):
                yield param, torch.zeros_like(param)
            elif "anchor" in (kept := optimizer.state.get(param, {})):
                yield param, kept["anchor"]


def unwrapped(optimizer: Any) -> Any:
    """The optimizer within wrappers such as Accelerate's. `Anchored` is ours, and stays."""
    while not hasattr(optimizer, "telemetry") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def telemetry_of(optimizers: Sequence[Any]) -> dict[str, Telemetry]:
    """The telemetry of those optimizers that have any. Raises TypeError if none has."""
    ours = [of for of in map(unwrapped, optimizers) if hasattr(of, "telemetry")]
    if not ours:
        kinds = ", ".join(type(unwrapped(of)).__name__ for of in optimizers) or "no optimizer"
        raise TypeError(
            f"{kinds} has no telemetry: train with an optimizer of robustft_kernels, such as AdamSPD, or put "
            "robustft_kernels.Anchored around yours"
        )
    return {name: told for of in ours for name, told in of.telemetry().items()}


def summary(told: Mapping[str, Telemetry]) -> dict[str, float]:
    """Three numbers for all parameters: deviation = √Σ n², the mean of α, and selected, how many have α ≠ 1."""
    sizes = [of.deviation for of in told.values() if not isnan(of.deviation)]
    alphas = [of.alpha for of in told.values()]
    whole = {"alpha": sum(alphas) / len(alphas), "selected": float(sum(of.selected > 0 for of in told.values()))}
    return {"deviation": sqrt(sum(n * n for n in sizes)), **whole} if sizes else whole


def scalars(told: Mapping[str, Telemetry], prefix: str, *, by_parameter: bool) -> dict[str, float]:
    """The summary under "{prefix}{number}". Also "{prefix}{number}/{parameter}", as `telemetry.log` writes them, if
    asked for."""
    found = {f"{prefix}{key}": value for key, value in summary(told).items()}
    if by_parameter:
        telemetry.log(told, _Entries(found), 0, prefix)
    return found


class _Entries:
    """A writer, as SummaryWriter is, into a dictionary."""

    def __init__(self, entries: dict[str, float]) -> None:
        self.entries = entries

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.entries[tag] = scalar_value
