"""WiSE-FT: weights between the pre-trained and the fine-tuned ones, as a state dict, in place, or in a sweep."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..core.names import unwrapped
from ..core.ranges import FROM_0_TO_1, check_number
from ..core.unsharded import resharded

Weights = nn.Module | Mapping[str, Any]
Buffers = Literal["finetuned", "interpolate", "pretrained"]
Model = TypeVar("Model", bound=nn.Module)
Result = TypeVar("Result")

_ALPHAS = tuple(k / 10 for k in range(11))


@torch.no_grad()
def wise_ft(
    pretrained: Weights,
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
        pretrained, finetuned: θ₀ and θ₁, each a module or its state dict. Wrappers' parts of names are overlooked on
            either side: `module.` (DDP, DataParallel) in front of all names, and anywhere `_orig_mod.` (torch.compile),
            `_fsdp_wrapped_module.` and `_checkpoint_wrapped_module.`. If a side lists a tied tensor under only one of
            its names, it is found by that.
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
    given = _state(finetuned, "finetuned")
    out: OrderedDict[str, Any] = OrderedDict.fromkeys(given)
    vars(out).update(copy.deepcopy(getattr(given, "__dict__", {})))  # the versions of modules, for load_state_dict
    for pair in _match(pretrained, finetuned, "finetuned", buffers, exclude, parameters):
        if pair.theta_0 is None:
            value = pair.theta_1.detach().clone()
        else:
            value = torch.empty_like(pair.theta_1).copy_(pair.at(alpha, pair.theta_1))
        out.update(dict.fromkeys(pair.names, value))
    out.update({name: copy.deepcopy(value) for name, value in given.items() if not isinstance(value, Tensor)})
    return out


@torch.no_grad()
def wise_ft_(
    model: nn.Module,
    pretrained: Weights,
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
    for pair in _match_own(pretrained, model, buffers, exclude):
        pair.theta_1.copy_(pair.at(alpha, pair.theta_1))


def wise_sweep(
    model: Model,
    pretrained: Weights,
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
    pairs = _match_own(pretrained, model, buffers, exclude)
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


@dataclass(frozen=True)
class _Pair:
    """A fine-tuned tensor with its names (several, if it is tied), and its θ₀. θ₀ is None if the tensor stays
    fine-tuned."""

    names: tuple[str, ...]
    theta_1: Tensor
    theta_0: Tensor | None
    interpolated: bool = True  # if not, it becomes θ₀

    def at(self, alpha: float, theta_1: Tensor) -> Tensor:
        return theta_1 if self.theta_0 is None else _blend(self.theta_0, theta_1, alpha if self.interpolated else 0.0)


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


@dataclass(frozen=True)
class _Side:
    """The tensors of one side by their names without wrappers, those names as given, and which are known to be
    buffers."""

    tensors: dict[str, Tensor]
    given: dict[str, str]
    buffers: set[str]

    def below(self, prefix: str) -> set[str]:
        """The names that start with `prefix`, which may be written with or without wrappers."""
        bare = unwrapped(prefix)
        return {
            name
            for name, given in self.given.items()
            if f"{name}.".startswith(f"{bare}.") or f"{given}.".startswith(f"{prefix}.")
        }


def _side(weights: Weights, label: str) -> _Side:
    tensors = {name: value for name, value in _state(weights, label).items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{label} holds no tensors; if it is a checkpoint, give the state dict within")
    if sparse := [name for name, tensor in tensors.items() if tensor.layout != torch.strided]:
        raise ValueError(f"{label} has sparse tensors: {_some(sparse)}; make them dense")
    bare = [unwrapped(name) for name in tensors]
    while all(name.startswith("module.") for name in bare):
        bare = [name.removeprefix("module.") for name in bare]
    if len(set(bare)) < len(bare):
        twice = [given for given, name in zip(tensors, bare, strict=True) if bare.count(name) > 1]
        raise ValueError(f"{label} has entries that differ by a wrapper's prefix alone: {_some(twice)}; remove some")
    given = dict(zip(bare, tensors, strict=True))
    held = {id(buffer) for buffer in weights.buffers()} if isinstance(weights, nn.Module) else set()
    buffers = {name for name in bare if id(tensors[given[name]]) in held}
    return _Side({name: tensors[given[name]] for name in bare}, given, buffers)


def _match_own(pretrained: Weights, model: nn.Module, buffers: Buffers, exclude: str | Iterable[str]) -> list[_Pair]:
    """The pairs that are to be written in `model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a module; for a state dict there is wise_ft")
    pairs = [pair for pair in _match(pretrained, model, "model", buffers, exclude, None) if pair.theta_0 is not None]
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    if foreign := [name for pair in pairs if id(pair.theta_1) not in own for name in pair.names]:
        raise ValueError(f"model's state_dict() holds copies of {_some(foreign)}; use wise_ft and load_state_dict")
    return pairs


def _match(
    pretrained: Weights,
    finetuned: Weights,
    label: str,
    buffers: Buffers,
    exclude: str | Iterable[str],
    parameters: Collection[str] | None,
) -> list[_Pair]:
    """All tensors of `finetuned`, which messages call `label`, each with its θ₀. Makes every check there is."""
    if buffers not in ("finetuned", "interpolate", "pretrained"):
        raise ValueError(f"buffers must be 'finetuned', 'interpolate' or 'pretrained', got {buffers!r}")
    ours, theirs = _side(finetuned, label), _side(pretrained, "pretrained")
    excluded: set[str] = set()
    for prefix in (exclude,) if isinstance(exclude, str) else exclude:
        if not (found := ours.below(prefix) | theirs.below(prefix)):
            raise ValueError(f"exclude names {prefix!r}, which neither {label} nor pretrained has")
        excluded |= found
    known_parameters, known_buffers = _roles(ours, theirs, parameters)

    pairs: list[_Pair] = []
    untold: list[str] = []
    for names, theta_0 in _starts(ours, theirs, label, excluded):
        theta_1, given = ours.tensors[names[0]], tuple(ours.given[name] for name in names)
        interpolated = buffers == "interpolate" or not known_parameters.isdisjoint(names)
        if theta_0 is not None and not interpolated and known_buffers.isdisjoint(names):
            untold += given
        stays = not interpolated and buffers == "finetuned"
        pairs.append(_Pair(given, theta_1, None if stays else theta_0, interpolated))
    if untold:
        raise ValueError(
            f"nothing tells whether {_some(untold)} are parameters or buffers: give a module instead of a state dict, "
            f"the names of the parameters in parameters=, or buffers='interpolate' to interpolate both"
        )
    blended = [pair for pair in pairs if pair.theta_0 is not None and pair.interpolated]
    if blended and all(_place(pair.theta_0) == _place(pair.theta_1) for pair in blended):
        raise ValueError(f"pretrained is the memory of {label}, and moved along with it: copy it before fine-tuning")
    return pairs


def _roles(ours: _Side, theirs: _Side, parameters: Collection[str] | None) -> tuple[set[str], set[str]]:
    """The names known to be of parameters, and those known to be of buffers."""
    names = ours.tensors.keys() | theirs.tensors.keys()
    trained = {n for side in (ours, theirs) for n, tensor in side.tensors.items() if isinstance(tensor, nn.Parameter)}
    if parameters is None:
        return trained, ours.buffers | theirs.buffers
    if isinstance(parameters, str):
        raise TypeError(f"parameters is the string {parameters!r}; give a collection of names")
    meant = {given: name for side in (theirs, ours) for name, given in side.given.items()}
    listed = {given: meant.get(given, unwrapped(given)) for given in parameters}
    if strange := [given for given, name in listed.items() if name not in names]:
        raise ValueError(f"parameters names {_some(strange)}, which neither side has")
    trained.update(listed.values())
    return trained, names - trained


def _starts(ours: _Side, theirs: _Side, label: str, excluded: set[str]) -> list[tuple[list[str], Tensor | None]]:
    """For each tensor of ours, all its names and its θ₀. θ₀ is None if the tensor is excluded or of integers."""
    tied: dict[Any, list[str]] = {}
    for name, tensor in ours.tensors.items():
        tied.setdefault(_place(tensor), []).append(name)
    starts: list[tuple[list[str], Tensor | None]] = []
    lacking: list[str] = []
    unfit: list[str] = []
    for names in tied.values():
        given = [ours.given[name] for name in names]
        apart = excluded.intersection(names)
        if apart and len(apart) < len(names):
            raise ValueError(f"{label} ties {_some(given)}: exclude all of them, or none")
        candidates = [theirs.tensors[name] for name in names if name in theirs.tensors]
        if apart or not candidates:
            starts.append((names, None))
            lacking += [] if apart else given
            continue
        theta_0, theta_1 = candidates[0], ours.tensors[names[0]]
        if not all(_same(theta_0, other) for other in candidates[1:]):
            raise ValueError(f"{label} ties {_some(given)}, which differ in pretrained: untie them, or exclude them")
        if _form(theta_0) != _form(theta_1):
            unfit.append(f"{given[0]!r} is {_described(theta_1)} in {label}, {_described(theta_0)} in pretrained")
        starts.append((names, None if _kind(theta_1) == "integer" else theta_0))

    used = {_place(theirs.tensors[name]) for name in ours.tensors if name in theirs.tensors}
    rest = {n: tensor for n, tensor in theirs.tensors.items() if n not in ours.tensors and n not in excluded}
    surplus = [theirs.given[name] for name, tensor in rest.items() if _place(tensor) not in used]
    objections = [f"pretrained lacks {_some(lacking)}"] if lacking else []
    objections += [f"{label} lacks {_some(surplus)}, which pretrained has"] if surplus else []
    objections += unfit[:10]
    if objections:
        raise ValueError(f"{'; '.join(objections)}. exclude= takes what is to stay fine-tuned, such as a fresh head")
    return starts


def _state(weights: Weights, label: str) -> Mapping[str, Any]:
    if isinstance(weights, nn.Module):
        state: Mapping[str, Any] = weights.state_dict(keep_vars=True)
        return state
    if isinstance(weights, Mapping):
        return weights
    raise TypeError(f"{label} is a {type(weights).__name__}; give a module or a state dict")


def _blend(theta_0: Tensor, theta_1: Tensor, alpha: float) -> Tensor:
    """(1 − alpha)·theta_0 + alpha·theta_1. Alpha 0 and 1 give the tensors themselves. Elements that are equal on both
    sides, infinities too, stay as they are."""
    if alpha in (0, 1):
        return theta_1 if alpha else theta_0
    if theta_1.is_complex():
        start, end = (torch.view_as_real(theta.resolve_conj()) for theta in (theta_0, theta_1))
        return torch.view_as_complex(_blend(start, end, alpha))
    wide = torch.float64 if torch.float64 in (theta_0.dtype, theta_1.dtype) else torch.float32
    start, end = theta_0.to(theta_1.device, wide), theta_1.to(wide)
    return torch.where(start == end, end, start * (1 - alpha) + end * alpha)


def _checked(alpha: float) -> float:
    check_number("alpha", alpha, FROM_0_TO_1)
    return float(alpha)


def _place(tensor: Tensor | None) -> Any:
    """Equal for tensors that are the same memory. Tensor subclasses may hide theirs, and empty tensors have none."""
    if tensor is None or not tensor.data_ptr():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _same(a: Tensor, b: Tensor) -> bool:
    return _place(a) == _place(b) or (
        (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(a.detach(), b.detach().to(a.device))
    )


def _kind(tensor: Tensor) -> str:
    return "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integer"


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, _kind(tensor), _sharded(tensor)


def _sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")  # a DTensor, whose module is slow to import


def _described(tensor: Tensor) -> str:
    sharded = "sharded " if _sharded(tensor) else ""
    return f"{sharded}{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _some(names: Collection[str]) -> str:
    rest = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, list(names)[:10])) + rest


def _bar(alphas: list[float]) -> Iterable[float]:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return alphas
    bar: Iterable[float] = tqdm(alphas, desc="WiSE-FT", unit="alpha")
    return bar
