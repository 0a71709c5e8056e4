"""The tensors of a fine-tuned model with their θ₀, or with those of other models: sides, matched by name."""

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.files import Path_, read
from ..core.names import some, under_one_prefix, unwrapped

Weights = nn.Module | Mapping[str, Any]
Pretrained = Weights | Path_
Buffers = Literal["finetuned", "interpolate", "pretrained"]


@dataclass(frozen=True)
class Pair:
    """A fine-tuned tensor with its names (several, if it is tied), and its θ₀. θ₀ is None if the tensor stays
    fine-tuned."""

    names: tuple[str, ...]
    theta_1: Tensor
    theta_0: Tensor | None
    interpolated: bool = True  # if not, it becomes θ₀

    def at(self, alpha: float, theta_1: Tensor) -> Tensor:
        return theta_1 if self.theta_0 is None else blend(self.theta_0, theta_1, alpha if self.interpolated else 0.0)


@dataclass(frozen=True)
class Joint:
    """A tensor of the first of several fine-tuned models with its names there, and the others'.

    others: the same tensor of the other models, in their order. None if it stays as it is in the first.
    theta_0: its θ₀. None if it stays, or if there is no pre-trained side.
    interpolated: whether it is computed from all. If not, it becomes θ₀.
    """

    names: tuple[str, ...]
    first: Tensor
    others: tuple[Tensor, ...] | None
    theta_0: Tensor | None
    interpolated: bool = True


@dataclass(frozen=True)
class _Side:
    """The tensors of one side by their names without wrappers, those names as given, and which are known to be
    buffers. Messages call it `label`."""

    label: str
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

    def take_names(self, tied: Iterable[list[str]]) -> None:
        """Takes names of another side for the tensors that differ from them by one prefix. Each is of tied names."""
        alone = [names[0] for names in tied if self.tensors.keys().isdisjoint(names)]
        for name, other in (under_one_prefix(alone, self.tensors) or {}).items():
            self.tensors[name], self.given[name] = self.tensors.pop(other), self.given.pop(other)
            if other in self.buffers:
                self.buffers.add(name)


def _read(weights: Pretrained) -> Weights:
    return read(weights) if isinstance(weights, str | PathLike) else weights


def _side(weights: Weights, label: str) -> _Side:
    tensors = {name: value for name, value in state_of(weights, label).items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{label} holds no tensors; if it is a checkpoint, give the state dict within")
    if sparse := [name for name, tensor in tensors.items() if tensor.layout != torch.strided]:
        raise ValueError(f"{label} has sparse tensors: {some(sparse)}; make them dense")
    bare = [unwrapped(name) for name in tensors]
    while all(name.startswith("module.") for name in bare):
        bare = [name.removeprefix("module.") for name in bare]
    if len(set(bare)) < len(bare):
        twice = [given for given, name in zip(tensors, bare, strict=True) if bare.count(name) > 1]
        raise ValueError(f"{label} has entries that differ by a wrapper's prefix alone: {some(twice)}; remove some")
    given = dict(zip(bare, tensors, strict=True))
    held = {id(buffer) for buffer in weights.buffers()} if isinstance(weights, nn.Module) else set()
    buffers = {name for name in bare if id(tensors[given[name]]) in held}
    return _Side(label, {name: tensors[given[name]] for name in bare}, given, buffers)


def _tied(side: _Side) -> Collection[list[str]]:
    """The names of each tensor of a side: several, if it is tied."""
    names: dict[Any, list[str]] = {}
    for name, tensor in side.tensors.items():
        names.setdefault(_place(tensor), []).append(name)
    return names.values()


def match_own(pretrained: Pretrained, model: nn.Module, buffers: Buffers, exclude: str | Iterable[str]) -> list[Pair]:
    """The pairs that are to be written in `model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a module; for a state dict there is wise_ft")
    pairs = [pair for pair in match(pretrained, model, "model", buffers, exclude, None) if pair.theta_0 is not None]
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    if foreign := [name for pair in pairs if id(pair.theta_1) not in own for name in pair.names]:
        raise ValueError(f"model's state_dict() holds copies of {some(foreign)}; use wise_ft and load_state_dict")
    return pairs


def match(
    pretrained: Pretrained,
    finetuned: Weights,
    label: str,
    buffers: Buffers,
    exclude: str | Iterable[str],
    parameters: Collection[str] | None,
) -> list[Pair]:
    """All tensors of `finetuned`, which messages call `label`, each with its θ₀. Makes every check there is."""
    if buffers not in ("finetuned", "interpolate", "pretrained"):
        raise ValueError(f"buffers must be 'finetuned', 'interpolate' or 'pretrained', got {buffers!r}")
    sides = [_side(finetuned, label), _side(_read(pretrained), "pretrained")]
    return [
        Pair(row.names, row.first, row.others[0] if row.others else None, row.interpolated)
        for row in _matched(sides, buffers, exclude, parameters)
    ]


def models_of(finetuned: Iterable[Pretrained]) -> list[Weights]:
    """Two or more fine-tuned models, read if they are given by path."""
    if isinstance(finetuned, nn.Module | Mapping | str | PathLike):
        raise TypeError(f"finetuned is one model ({type(finetuned).__name__}); give a list of two or more")
    models = list(map(_read, finetuned))
    if len(models) < 2:
        raise ValueError(
            f"finetuned must be two or more models, got {len(models)}; for one and its θ₀ there is wise_ft"
        )
    return models


def match_many(
    pretrained: Pretrained | None,
    models: Sequence[Weights],
    buffers: str,
    exclude: str | Iterable[str],
    parameters: Collection[str] | None,
) -> list[Joint]:
    """All tensors of the first model, each with those of the others, and with its θ₀ unless `pretrained` is None. Makes
    every check there is."""
    allowed = ("finetuned", "interpolate") + (() if pretrained is None else ("pretrained",))
    if buffers not in allowed:
        raise ValueError(f"buffers must be {' or '.join(map(repr, allowed))}, got {buffers!r}")
    sides = [_side(model, f"finetuned[{k}]") for k, model in enumerate(models)]
    sides += [] if pretrained is None else [_side(_read(pretrained), "pretrained")]
    joints = []
    for row in _matched(sides, buffers, exclude, parameters):
        theta_0 = row.others[-1] if row.others and pretrained is not None else None
        others = None if row.others is None else row.others[: len(models) - 1]
        joints.append(Joint(row.names, row.first, others, theta_0, row.interpolated))
    return joints


def _matched(
    sides: Sequence[_Side], buffers: str, exclude: str | Iterable[str], parameters: Collection[str] | None
) -> list[Joint]:
    """The tensors of the first side, each with those of all other sides as `others`."""
    ours, *rest = sides
    excluded = _excluded(sides, exclude)
    for side in rest:
        side.take_names(of for of in _tied(ours) if excluded.isdisjoint(of))
    known_parameters, known_buffers = _roles(sides, parameters)
    columns = [_counterparts(ours, side, excluded) for side in rest]

    rows: list[Joint] = []
    untold: list[str] = []
    for names, *others in zip(_tied(ours), *columns, strict=True):
        first, given = ours.tensors[names[0]], tuple(ours.given[name] for name in names)
        found = tuple(other for other in others if other is not None)  # all, or none
        interpolated = buffers == "interpolate" or not known_parameters.isdisjoint(names)
        if found and not interpolated and known_buffers.isdisjoint(names):
            untold += given
        stays = not found or (not interpolated and buffers == "finetuned")
        rows.append(Joint(given, first, None if stays else found, None, interpolated))
    if untold:
        raise ValueError(
            f"nothing tells whether {some(untold)} are parameters or buffers: give a module instead of a state dict, "
            f"the names of the parameters in parameters=, or buffers='interpolate' to interpolate both"
        )
    computed = [(row.first, *row.others) for row in rows if row.others is not None and row.interpolated]
    for (a, one), (b, other) in combinations(enumerate(sides), 2):
        if computed and all(_place(tensors[a]) == _place(tensors[b]) for tensors in computed):
            raise ValueError(_same_memory(one.label, other.label))
    return rows


def _same_memory(label: str, other: str) -> str:
    if other == "pretrained":
        return f"pretrained is the memory of {label}, and moved along with it: copy it before fine-tuning"
    return f"{other} is the memory of {label}, and moved along with it: copy a state dict before the model trains on"


def _excluded(sides: Sequence[_Side], exclude: str | Iterable[str]) -> set[str]:
    """The names that are excluded. Raises ValueError for a prefix that no side has."""
    excluded: set[str] = set()
    for prefix in (exclude,) if isinstance(exclude, str) else exclude:
        if not (found := set().union(*(side.below(prefix) for side in sides))):
            *most, last = (side.label for side in sides)
            raise ValueError(f"exclude names {prefix!r}, which neither {', '.join(most)} nor {last} has")
        excluded |= found
    return excluded


def _roles(sides: Sequence[_Side], parameters: Collection[str] | None) -> tuple[set[str], set[str]]:
    """The names known to be of parameters, and those known to be of buffers."""
    names = {name for side in sides for name in side.tensors}
    trained = {n for side in sides for n, tensor in side.tensors.items() if isinstance(tensor, nn.Parameter)}
    if parameters is None:
        return trained, {name for side in sides for name in side.buffers}
    if isinstance(parameters, str):
        raise TypeError(f"parameters is the string {parameters!r}; give a collection of names")
    meant = {given: name for side in reversed(sides) for name, given in side.given.items()}
    listed = {given: meant.get(given, unwrapped(given)) for given in parameters}
    if strange := [given for given, name in listed.items() if name not in names]:
        raise ValueError(f"parameters names {some(strange)}, which neither side has")
    trained.update(listed.values())
    return trained, names - trained


def _counterparts(ours: _Side, theirs: _Side, excluded: set[str]) -> list[Tensor | None]:
    """For each tensor of ours, that of theirs. None if the tensor is excluded or of integers."""
    found: list[Tensor | None] = []
    lacking: list[str] = []
    unfit: list[str] = []
    for names in _tied(ours):
        given = [ours.given[name] for name in names]
        apart = excluded.intersection(names)
        if apart and len(apart) < len(names):
            raise ValueError(f"{ours.label} ties {some(given)}: exclude all of them, or none")
        candidates = [theirs.tensors[name] for name in names if name in theirs.tensors]
        if apart or not candidates:
            found.append(None)
            lacking += [] if apart else given
            continue
        other, own = candidates[0], ours.tensors[names[0]]
        if not all(_same(other, same) for same in candidates[1:]):
            raise ValueError(
                f"{ours.label} ties {some(given)}, which differ in {theirs.label}: untie them, or exclude them"
            )
        if _form(other) != _form(own):
            unfit.append(f"{given[0]!r} is {_described(own)} in {ours.label}, {_described(other)} in {theirs.label}")
        found.append(None if _kind(own) == "integer" else other)

    used = {_place(theirs.tensors[name]) for name in ours.tensors if name in theirs.tensors}
    rest = {n: tensor for n, tensor in theirs.tensors.items() if n not in ours.tensors and n not in excluded}
    surplus = [theirs.given[name] for name, tensor in rest.items() if _place(tensor) not in used]
    objections = [f"{theirs.label} lacks {some(lacking)}"] if lacking else []
    objections += [f"{ours.label} lacks {some(surplus)}, which {theirs.label} has"] if surplus else []
    objections += unfit[:10]
    if objections:
        raise ValueError(f"{'; '.join(objections)}. exclude= takes what is to stay fine-tuned, such as a fresh head")
    return found


def state_of(weights: Weights, label: str) -> Mapping[str, Any]:
    if isinstance(weights, nn.Module):
        state: Mapping[str, Any] = weights.state_dict(keep_vars=True)
        return state
    if isinstance(weights, Mapping):
        return weights
    raise TypeError(f"{label} is a {type(weights).__name__}; give a module or a state dict")


def state_dict_like(
    given: Mapping[str, Any], values: Iterable[tuple[tuple[str, ...], Tensor]]
) -> OrderedDict[str, Any]:
    """A state dict with the names and the order of `given`. Each of `values` is a tensor with all its names. What is no
    tensor is copied from there."""
    out: OrderedDict[str, Any] = OrderedDict.fromkeys(given)
    vars(out).update(copy.deepcopy(getattr(given, "__dict__", {})))  # the versions of modules, for load_state_dict
    for names, value in values:
        out.update(dict.fromkeys(names, value))
    out.update({name: copy.deepcopy(value) for name, value in given.items() if not isinstance(value, Tensor)})
    return out


def blend(theta_0: Tensor, theta_1: Tensor, alpha: float) -> Tensor:
    """(1 − alpha)·theta_0 + alpha·theta_1. Alpha 0 and 1 give the tensors themselves. Elements that are equal on both
    sides, infinities too, stay as they are."""
    if alpha in (0, 1):
        return theta_1 if alpha else theta_0
    if theta_1.is_complex():
        start, end = (torch.view_as_real(theta.resolve_conj()) for theta in (theta_0, theta_1))
        return torch.view_as_complex(blend(start, end, alpha))
    wide = torch.float64 if torch.float64 in (theta_0.dtype, theta_1.dtype) else torch.float32
    start, end = theta_0.to(theta_1.device, wide), theta_1.to(wide)
    return torch.where(start == end, end, start * (1 - alpha) + end * alpha)


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
