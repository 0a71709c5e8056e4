"""A radius for each parameter: groups that have one radius each, and radii from a run without a bound."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..core import anchors
from ..core.anchors import Anchor
from ..core.methods import rule_of_group
from ..core.names import bare_name, some
from ..core.ranges import POSITIVE, Range, check_number
from .prefixes import names_of
from .projection import check_norm, deviation

Group = dict[str, Any]
Named = Iterable[tuple[str, Tensor]]
Radii = Mapping[str, float | Tensor] | Sequence[float | Tensor] | Tensor  # by name, or parallel to the parameters


def by_radius(params: Named, radius: Radii) -> list[Group]:
    """The parameters in groups of one radius each, in their order: {"params": [(name, param), ...], "radius": γ}.

    Our optimizers take `radius` as it is here, and make these groups themselves. This is for `Anchored`, around an
    optimizer that makes its own.

    Args:
        params: pairs of name and parameter, as of `model.named_parameters()`.
        radius: γ > 0 by the name of a parameter, or by a prefix of whole components. The longest that matches counts,
            and "" matches all. Or a tensor [n] or a sequence, parallel to `params`. Elements of a tensor stay views, so
            what is written there counts from the next step on.

    Raises ValueError naming parameters that get no radius, keys that match none, and a radius that is not above 0.
    """
    pairs = list(params)
    if not all(isinstance(pair, tuple) for pair in pairs):
        raise TypeError("by_radius needs pairs of name and parameter, as of model.named_parameters()")
    return split([{"params": pairs}], radius)[0]


def is_one(radius: Any) -> bool:
    """Whether a radius is for all parameters alike."""
    if isinstance(radius, Tensor):
        return radius.numel() == 1
    return isinstance(radius, str) or not isinstance(radius, Mapping | Sequence)


def for_groups(groups: Sequence[Group], defaults: Mapping[str, Any]) -> list[Group]:
    """Groups as `torch.optim` gets them, with those split that have several radii, of their own or by `defaults`. Only
    groups whose method reads a radius take that of the defaults."""
    shared: Any = defaults.get("radius")
    parts: dict[int, list[Group]] = {}
    if not is_one(shared):
        takers = [k for k, group in enumerate(groups) if _takes({**defaults, **group}, group)]
        parts.update(zip(takers, split([groups[k] for k in takers], shared, groups), strict=True))
    for k, group in enumerate(groups):
        own: Any = group.get("radius")
        if not is_one(own) and not isinstance(group["params"], set):  # torch refuses sets
            (parts[k],) = split([group], own)
    return [part for k, group in enumerate(groups) for part in parts.get(k, [group])]


def split(groups: Sequence[Group], radius: Radii, known: Sequence[Group] = ()) -> list[list[Group]]:
    """For each of these groups, several with one radius each, in the same order of parameters. An anchor that is a list
    is split alike.

    known: groups whose names `radius` may have, too.
    """
    whole = [_listed(group) for group in groups]
    params = [of for group in whole for of in group["params"]]
    each = iter(_by_name(radius, params, known) if isinstance(radius, Mapping) else _in_order(radius, len(params)))
    made: list[list[Group]] = []
    for group in whole:
        radii = [next(each) for _ in group["params"]]
        parts, start = [], 0
        for _, run in groupby(radii, key=lambda of: id(of) if isinstance(of, Tensor) else of):
            stop = start + len(list(run))
            parts.append({**_part(group, start, stop), "radius": radii[start]})
            start = stop
        made.append(parts)
    return made


def suggest_radii(
    params: nn.Module | Named, anchor: Anchor = None, fraction: float = 0.5, norm: str = "l2"
) -> dict[str, float]:
    """γ = fraction·n for each parameter, n = ‖θ − θ₀‖ after a run without a bound: radii for the run that counts.

        rft.AdamPGM(model.named_parameters(), radius=rft.suggest_radii(tuned, anchor=model.state_dict()))

    A parameter that did not move gets the smallest of the others' radii.

    Args:
        params: the model of the free run, or its named parameters.
        anchor: θ₀, as an optimizer takes it: the path of a safetensors file, a state dict, or a list. None is zero.
        fraction: in (0, 1]. A half did best in the experiments of this package (docs/choosing.md).
        norm: the norm that is to be bounded. "mars_rows" takes the largest row of each parameter, as "mars" does.

    Raises ValueError for numbers out of range, an anchor that does not fit, and if nothing has moved.
    """
    check_number("fraction", fraction, Range(high=1, above=True))
    check_norm(norm)
    names = {name[0]: param for param, name in names_of(params).items() if param.is_floating_point()}
    labels = [f"parameter {name!r}" for name in names]
    if isinstance(anchor, str) and anchor == "initial":
        raise ValueError("anchor='initial' would be the weights as they are, from which nothing deviates; give θ₀")
    _, theta_0 = anchors.resolve(anchor, list(names.values()), list(names), labels, anchored=True)
    with torch.no_grad():
        found = deviation(names.values(), theta_0, "mars" if norm == "mars_rows" else norm)
    assert isinstance(found, Tensor)
    sizes = found.tolist()
    moved = [size for size in sizes if 0 < size < float("inf")]
    if not moved:
        raise ValueError("no parameter deviates from its anchor; give the weights of a run, and the anchor before it")
    least = min(moved)
    radii = [fraction * (size if 0 < size < float("inf") else least) for size in sizes]
    return dict(zip(names, radii, strict=True))


def _takes(full: Group, group: Group) -> bool:
    return "radius" not in group and "radius" in rule_of_group(full).reads


def _listed(group: Group) -> Group:
    params = group["params"]
    return {**group, "params": [params] if isinstance(params, Tensor) else list(params)}


def _part(group: Group, start: int, stop: int) -> Group:
    """A group with some of the parameters, and their part of an anchor that is a list."""
    part = {**group, "params": group["params"][start:stop]}
    for key in ("anchor", "pre"):
        if isinstance(given := group.get(key), Sequence) and not isinstance(given, str):
            part[key] = anchors.in_order(given, group["params"])[start:stop]
    return part


def _by_name(
    radius: Mapping[str, float | Tensor], params: Sequence[Any], known: Sequence[Group]
) -> list[float | Tensor]:
    if not all(isinstance(of, tuple) for of in params):
        raise ValueError("radius by name needs named parameters: pass model.named_parameters() as params")
    keys = {bare_name(key): key for key in radius}
    matches = [[keys[prefix] for prefix in _prefixes(name) if prefix in keys] for name, _ in params]
    if lacking := [name for (name, _), own in zip(params, matches, strict=True) if not own]:
        raise ValueError(
            f"radius has none for {some(lacking)}; add one by name, by a prefix of names, or by '' for all the rest"
        )
    others = [of[0] for group in known for of in group["params"] if isinstance(of, tuple)]
    there = {prefix for name in (*(of[0] for of in params), *others) for prefix in _prefixes(name)}
    if strange := [key for bare, key in keys.items() if bare not in there]:
        raise ValueError(f"radius has {some(strange)}, and no parameter has such a name or prefix")
    return [_checked(f"radius[{own[0]!r}]", radius[own[0]]) for own in matches]


def _prefixes(name: str) -> list[str]:
    """A name and its prefixes of whole components, the longest first, "" last."""
    parts = bare_name(name).split(".")
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]


def _in_order(radius: Sequence[float | Tensor] | Tensor, count: int) -> list[float | Tensor]:
    given = list(radius.unbind() if isinstance(radius, Tensor) and radius.dim() == 1 else radius)
    if len(given) != count:
        raise ValueError(
            f"{len(given)} radii for {count} parameters: radius is one number, one for each parameter in their order, "
            "or a mapping by name"
        )
    return [_checked(f"radius[{k}]", of) for k, of in enumerate(given)]


def _checked(label: str, radius: float | Tensor) -> float | Tensor:
    check_number(label, radius, POSITIVE)
    return radius
