"""WiSE-FT: weights between the pre-trained and the fine-tuned ones, as a state dict, in place, or in a sweep."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core.ranges import FROM_0_TO_1, check_number
from ..core.unsharded import resharded
from .pairing import Buffers, Pair, Pretrained, Weights, match, match_own, state_dict_like, state_of

Model = TypeVar("Model", bound=nn.Module)
Result = TypeVar("Result")

_ALPHAS = tuple(k / 10 for k in range(11))


@torch.no_grad()
def wise_ft(
    pretrained: Pretrained,
    finetuned: Weights,
    alpha: float,
    *,
    buffers: Buffers = "finetuned",
    exclude: str | Iterable[str] = (),
    parameters: Collection[str] | None = None,
) -> OrderedDict[str, Any]:
    """θ = (1 − alpha)·θ₀ + alpha·θ₁ over two state dicts, as a new one that `finetuned` loads.

    It is computed in float32 (float64 if either side is float64), and rounded once, to the dtype of θ₁. Bit for bit,
    alpha=0 gives θ₀ (in that dtype) and alpha=1 gives θ₁. An element that is equal on both sides stays as it is.

    Names, order, devices and dtypes are those of `finetuned`. No memory is shared with either side. Tensors tied in
    `finetuned` are tied in the result. Integer and bool entries, and what is not a tensor, keep their fine-tuned value.

    Args:
        pretrained, finetuned: θ₀ and θ₁, each a module or its state dict. θ₀ may also be the path of a safetensors
            file, its index, or their directory. One prefix may be on one side alone, such as the "bert." that a model
            with a head puts before its names. Wrappers' parts of names are overlooked on either side: `module.` (DDP,
            DataParallel) in front of all names, and anywhere `_orig_mod.` (torch.compile), `_fsdp_wrapped_module.` and
            `_checkpoint_wrapped_module.`. If a side lists a tied tensor under only one of its names, it is found by
            that.
        alpha: from 0 (pre-trained) to 1 (fine-tuned).
        buffers: what floating-point buffers, such as batch-norm statistics, become: "finetuned", "interpolate" (as the
            parameters), or "pretrained". The statistics of neither end fit the weights between: estimate them anew on
            training data.
        exclude: names, or prefixes of names, of what stays fine-tuned, such as a fresh head. It need not be in
            `pretrained`, nor have the same shape there. A prefix may also name what only `pretrained` has, such as the
            old head.
        parameters: the names of the parameters. The other entries are buffers. Needed if both sides are plain state
            dicts and `buffers` is not "interpolate", as a state dict does not tell the two apart.

    Raises:
        ValueError: an alpha outside [0, 1], entries that one side lacks, or of different shapes or kinds, a name that
            matches nothing, or buffers that cannot be told from parameters. Also `pretrained` being the memory of
            `finetuned`.
        TypeError: a side that is neither a module nor a mapping.

    Source: Wortsman et al., CVPR 2022, Section 3 (weight-space ensembling).
    """
    alpha = _checked(alpha)
    pairs = match(pretrained, finetuned, "finetuned", buffers, exclude, parameters)

    def value(pair: Pair) -> Tensor:
        if pair.theta_0 is None:
            return pair.theta_1.detach().clone()
        return torch.empty_like(pair.theta_1).copy_(pair.at(alpha, pair.theta_1))

    return state_dict_like(state_of(finetuned, "finetuned"), ((pair.names, value(pair)) for pair in pairs))


@torch.no_grad()
def wise_ft_(
    model: nn.Module,
    pretrained: Pretrained,
    alpha: float,
    *,
    buffers: Buffers = "finetuned",
    exclude: str | Iterable[str] = (),
) -> None:
    """θ ← (1 − alpha)·θ₀ + alpha·θ in place. `model` is fine-tuned, and holds the interpolated weights afterwards.

    The result is bit for bit what loading `wise_ft(pretrained, model, alpha, ...)` gives. It goes tensor by tensor,
    without a second copy of the model. Arguments, errors and source are those of `wise_ft`. If an error is raised,
    nothing is written. Buffers that are not in the state dict stay as they are.
    """
    alpha = _checked(alpha)
    for pair in match_own(pretrained, model, buffers, exclude):
        pair.theta_1.copy_(pair.at(alpha, pair.theta_1))


def wise_sweep(
    model: Model,
    pretrained: Pretrained,
    evaluate: Callable[[Model], Result],
    alphas: Iterable[float] = _ALPHAS,
    *,
    buffers: Buffers = "finetuned",
    exclude: str | Iterable[str] = (),
    progress: bool = True,
) -> dict[float, Result]:
    """{alpha: evaluate(model with (1 − alpha)·θ₀ + alpha·θ₁)} for each of `alphas`, with θ₁ being what `model` holds.

    `model` gets its parameters, buffers (those outside the state dict as well) and training modes back bit for bit.
    That happens before each interpolation, and at the end even if it was interrupted. Whatever `evaluate` did to their
    values is undone. It costs one copy of the model. `evaluate` is called as it is: it must see to `model.eval()` and
    `torch.no_grad()` itself.

    Args:
        alphas: different numbers in [0, 1], in any order.
        progress: show a bar, if tqdm is installed.

    The other arguments, errors and source are those of `wise_ft`. If an error is raised, nothing is evaluated.
    """
    steps = [_checked(alpha) for alpha in alphas]
    if not steps or len(set(steps)) < len(steps):
        raise ValueError(f"alphas must be one or more different numbers, got {steps}")
    pairs = match_own(pretrained, model, buffers, exclude)
    backup = _Backup(model)
    results = {}
    try:
        for alpha in _bar(steps) if progress else steps:
            backup.restore()
            with torch.no_grad():
                for pair in pairs:
                    pair.theta_1.copy_(pair.at(alpha, backup.copies[id(pair.theta_1)]))
            results[alpha] = evaluate(model)
    finally:
        backup.restore()
    return results


class _Backup:
    """What a model holds, to be restored: its tensors with their places and values, and its training modes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modes = [(module, module.training) for module in model.modules()]
        self.places = [
            (module, name, tensor)
            for module in model.modules()
            for of in (module.named_parameters, module.named_buffers)
            for name, tensor in of(recurse=False, remove_duplicate=False)
        ]
        self.copies = {id(tensor): tensor.detach().clone() for _, _, tensor in self.places}

    @torch.no_grad()
    def restore(self) -> None:
        resharded(self.model.parameters())
        for module, training in self.modes:
            module.training = training
        for module, name, tensor in self.places:
            if getattr(module, name, None) is not tensor:
                setattr(module, name, tensor)
            kept = self.copies[id(tensor)]
            if (tensor.shape, tensor.dtype, tensor.device) == (kept.shape, kept.dtype, kept.device):
                tensor.copy_(kept)
            else:  # after model.half(), for one, the values need their own memory again
                tensor.data = kept.clone()


def _checked(alpha: float) -> float:
    check_number("alpha", alpha, FROM_0_TO_1)
    return float(alpha)


def _bar(alphas: list[float]) -> Iterable[float]:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return alphas
    bar: Iterable[float] = tqdm(alphas, desc="WiSE-FT", unit="alpha")
    return bar
