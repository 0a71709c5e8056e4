"""Our optimizers in timm's registry. `import robustft_kernels.timm`, and timm makes them by name.

A name is that of the class in small letters: "adamspd", "sgdftp", "anchoredadamw". None has a "_", since timm takes
what follows it for the name.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry
from torch import Tensor, nn

from .finetune.param_groups import Group, Part, trained_parts
from .optim.for_model import CLASSES
from .optim.optimizers import AnchoredAdamW


def create(
    optimizer: Callable[..., torch.optim.Optimizer],
    params: Iterable[Any],
    *,
    model: nn.Module | None = None,
    head: Part | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """What timm calls to make one of our optimizers.

    Args:
        optimizer: one of our classes.
        params: the groups that timm made, or what a user gave it.
        model: the model that they are of. They get its names then.
        head: as in `for_model`: what is free, method="none".
        options: of the optimizer.

    Raises:
        ValueError: a head without a model, or one that matches nothing; a parameter that is not the model's.
    """
    if model is not None:
        params = _named(params, model, head)
    elif head is not None:
        raise ValueError("head is known by the names of a model, which timm does not pass on; give model=model too")
    return optimizer(params, **options)


def _named(params: Iterable[Any], model: nn.Module, head: Part | None) -> list[Group]:
    """The groups with names, each with the head's part in a group of its own."""
    listed = list(params)
    groups: list[Group] = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    held, free = ({id(param): name for name, param in part} for part in trained_parts(model, head))
    known = held.keys() | free.keys()
    named: list[Group] = []
    for group in groups:
        tensors = _tensors(group["params"])
        if not known.issuperset(map(id, tensors)):
            raise ValueError("params has a parameter that is not among those of model that require a gradient")
        for names, own in ((held, {}), (free, {"method": "none"})):
            if part := [(names[id(param)], param) for param in tensors if id(param) in names]:
                named.append({**group, **own, "params": part})
    return named


def _tensors(params: Any) -> list[Tensor]:
    listed = [params] if isinstance(params, Tensor) else list(params)
    return [of[1] if isinstance(of, tuple) else of for of in listed]


for _name, _of in CLASSES.items():
    _adam = isinstance(_of, type) and issubclass(_of, AnchoredAdamW)
    default_registry.register(
        OptimInfo(
            _name.lower(),
            partial(create, _of),
            f"robustft_kernels.{_name}",
            has_eps=_adam,
            has_betas=_adam,
            has_momentum=not _adam,  # timm's own momentum is 0.9 then
        )
    )
