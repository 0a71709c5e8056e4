"""Typical mistakes of callers: how they are known, and what to do instead."""

import inspect
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from torch import Tensor, nn

from .methods import method_of, rule_of_group

NEAR = 0.82  # the ratio of difflib from which on a key is taken for a misspelt one of ours
LARGE_DECAY = 0.5  # no weight_decay of AdamW in use is larger; the strengths of SPD are
MEANT = {  # what other programs call our arguments
    "learning_rate": "lr", "wd": "weight_decay", "lam": "strength", "lambda_": "strength", "pre": "anchor",
    "pretrained": "anchor",
}  # fmt: skip


def refuse_model(argument: str, value: object, instead: str) -> None:
    """Raises TypeError if `value` is a model. `instead` says what to give."""
    if isinstance(value, nn.Module):
        raise TypeError(f"{argument} is a model ({type(value).__name__}); give {instead}")


def near(key: str, known: Iterable[str]) -> str:
    """The one of `known` that `key` seems to be a slip of, or "".

    A key that is one of `known` with a word or a number added is none: "lr_scale", "max_momentum", "eps2".
    """
    bare = key.lower().replace("-", "_").replace(" ", "_")
    ratio, found = max(((SequenceMatcher(None, bare, of).ratio(), of) for of in known), default=(0.0, ""))
    swapped = [of for of in known if len(of) > 3 and sorted(of) == sorted(bare)]
    if ratio < NEAR and swapped:
        return swapped[0]
    if ratio < NEAR or (re.fullmatch(rf"(\w+_)?{re.escape(found)}(_\w+|\d+)?", bare) and bare != found):
        return ""
    return found


def check_keys(group: Mapping[str, Any], ours: Collection[str], own: Collection[str] = ()) -> None:
    """Raises ValueError for a key of a group that is a slip of one of `ours`. Other keys are the user's.

    own: keys that are not slips, whatever they look like.
    """
    for key in group:
        if isinstance(key, str) and key not in ours and key not in own and (meant := near(key, ours)):
            raise ValueError(
                f"a group has the key {key!r}, which is none of the optimizer's; write {meant!r}, or give a key of "
                "your own a name that is less like it"
            )


def check_keywords(of: type, given: Iterable[str]) -> None:
    """Raises TypeError for a keyword that the constructor of `of` does not have. Tells the one that is meant, or all
    that there are."""
    allowed = inspect.signature(of.__init__).parameters  # type: ignore[misc]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in allowed.values()):
        return
    names = [name for name in allowed if name != "self"]
    for key in given:
        if key not in allowed:
            meant = MEANT.get(key, "") if MEANT.get(key) in names else ""
            meant = meant or near(key, names)
            told = f"write {meant!r}" if meant else f"the arguments are {', '.join(names)}"
            raise TypeError(f"{of.__name__} has no argument {key!r}; {told}")


def check_params(params: object) -> None:
    """Raises TypeError for something else than parameters, of an optimizer or of a group."""
    refuse_model("params", params, "model.parameters(), or model.named_parameters() for messages with names")
    if isinstance(params, Mapping):
        raise TypeError(
            f"params is a mapping ({type(params).__name__}); give model.parameters() or model.named_parameters()"
        )


def check_group(group: Mapping[str, Any]) -> None:
    """Raises ValueError for a group without params, and what `check_params` raises."""
    if "params" not in group:
        raise ValueError("a group has no 'params'; write {'params': model.parameters(), ...}")
    check_params(group["params"])


def check_fresh(params: object, listed: Sequence[object]) -> None:
    """Raises ValueError for an iterator that gave nothing, or that two groups have."""
    if not listed and isinstance(params, Iterator):
        raise ValueError(
            "optimizer got an empty parameter list; an iterator such as model.parameters() gives its tensors only "
            "once, so call it anew for each use"
        )
    iterators = [
        id(of) for group in listed if isinstance(group, dict) and isinstance(of := group.get("params"), Iterator)
    ]
    if len(set(iterators)) < len(iterators):
        raise ValueError(
            "two groups have the same iterator as params, which gives its tensors only once; call model.parameters() "
            "anew for each group"
        )


def warn_of_decay(group: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
    """Warns of a weight_decay that seems to be a strength, unless one of the `others` has one."""
    if _is_strength(group) and not any(map(_is_strength, others)):
        warnings.warn(
            f"robustft_kernels: weight_decay={group['weight_decay']} is decay toward zero, as in torch.optim. If it is "
            "meant as the strength of the pull toward the anchor, which the authors' code of SPD calls weight_decay, "
            f"give strength={group['weight_decay']}",
            UserWarning,
            stacklevel=2,
        )


def warn_of_hold(group: Mapping[str, Any]) -> None:
    """Warns of a gate and a strength that hold every layer where it is. Reads no tensor."""
    method, strength = method_of(group["method"]), group.get("strength", 0.0)
    away = rule_of_group(group).name in method.gated.get("away", {}).values()
    if away and not isinstance(strength, Tensor) and strength >= 1:
        warnings.warn(
            f"robustft_kernels: gate='away' with strength={strength} lets no layer move away from its anchor, and "
            "those that begin there stay there; give a strength below 1, such as 0.5",
            UserWarning,
            stacklevel=2,
        )


def _is_strength(group: Mapping[str, Any]) -> bool:
    decay = group.get("weight_decay", 0.0)
    reads = rule_of_group(group).reads
    return "strength" in reads and not isinstance(decay, Tensor) and bool(decay >= LARGE_DECAY)


def warn_of_no_gradient(groups: Sequence[Mapping[str, Any]]) -> None:
    """Warns that a step finds no gradient, and says why that may be."""
    params = [param for group in groups for param in group["params"]]
    if not params:
        return
    if not any(param.requires_grad for param in params):
        why = "all of them are frozen; set requires_grad=True on what is to be trained"
    else:
        why = "call loss.backward() before step(), and check that the loss depends on these parameters of this model"
    warnings.warn(
        f"robustft_kernels: step() changes nothing, as none of the {len(params)} parameters has a gradient: {why}",
        RuntimeWarning,
        stacklevel=2,
    )
