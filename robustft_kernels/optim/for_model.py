"""An optimizer's class and its options, to be made over a model later: for trainers that make optimizers themselves."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..finetune.param_groups import Group, Options, Part, trained_parts
from . import named, optimizers

CLASSES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    name: of
    for module in (named, optimizers)
    for name, of in vars(module).items()
    if isinstance(of, type) and issubclass(of, torch.optim.Optimizer) and of.__module__ == module.__name__
}


@dataclass(frozen=True)
class ForModel:
    """What `for_model` returns."""

    name: str
    head: Part | None = None
    head_options: Options = field(default_factory=dict)
    options: Options = field(default_factory=dict)

    def __call__(self, *given: Any, **more: Any) -> Any:
        """The optimizer over a model's parameters.

        given: the model. What follows it is passed over, as axolotl gives its own arguments there. Without a model,
            this object itself, since Trainer calls a factory before it gives the model.
        more: further options, which take the place of those given before. A `model` among them counts if none is given.

        Raises TypeError for anything but a model, since only a model tells the names.
        """
        if not given and not more:
            return self
        named = more.pop("model", None)
        model = given[0] if given else named
        if not isinstance(model, nn.Module):
            kind = "parameters" if isinstance(model, Iterable) else f"a {type(model).__name__}"
            raise TypeError(
                f"for_model({self.name!r}) makes the optimizer of a model, and got {kind}; with Trainer, give "
                'optimizer_cls_and_kwargs=(rft.for_model(...), {"model": model})'
            )
        options = {**self.options, **more}
        return CLASSES[self.name](self.groups(model, options.get("weight_decay", 0.0)), **options)

    def groups(self, model: nn.Module, weight_decay: float) -> list[Group]:
        """Its groups of named parameters, the head last. If there is a decay, biases and vectors are apart, and have
        none."""
        rest, head = trained_parts(model, self.head)
        chosen: list[tuple[Any, Group]] = [(rest, {}), (head, {"method": "none", **self.head_options})]
        if weight_decay:
            chosen = [
                (part, {**options, **spared})
                for params, options in chosen
                for part, spared in (
                    ([of for of in params if of[1].dim() > 1], {}),
                    ([of for of in params if of[1].dim() <= 1], {"weight_decay": 0.0}),
                )
            ]
        groups = [{"params": params, **options} for params, options in chosen if params]
        if not groups:
            raise ValueError("model has no parameter that requires a gradient")
        return groups


def for_model(
    optimizer: str = "AdamSPD", *, head: Part | None = None, head_options: Options | None = None, **options: Any
) -> ForModel:
    """One of our optimizers as a function of a model, for trainers that make the optimizer themselves.

    Called with a model, it makes named groups: all parameters that require a gradient, the head apart and free
    (method="none"), and with weight_decay biases and vectors apart and without it. Its call may bring further options,
    such as lr, as a configuration file has them.

    Args:
        optimizer: a class by its name, such as "AdamSPD", "SGDFTP" or "AnchoredAdamW".
        head: a module of the model, the name of a module or parameter, or several of either. None: nothing is free.
        head_options: further keys of the head's group, such as lr.
        options: of the optimizer. `anchor` may be the path of the base model's safetensors. A trainer that resumes from
            a checkpoint of the model alone needs it: the optimizer that it makes would take those weights for θ₀, and
            cannot tell.

    Raises:
        ValueError: an unknown class, or `params` among the options. When called, a head that matches nothing, and a
            model without a parameter to train.
        TypeError: when called with anything but a model.
    """
    if optimizer not in CLASSES:
        raise ValueError(f"unknown optimizer {optimizer!r}: choose one of {', '.join(map(repr, sorted(CLASSES)))}")
    if "params" in options:
        raise ValueError("params come from the model; leave them out, and freeze what is not to be trained")
    return ForModel(optimizer, head, dict(head_options or {}), options)
