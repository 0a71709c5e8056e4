"""FSDP2's forms of a parameter. It trains shards. A forward pass puts unsharded copies in their place, and an
evaluation may leave them there."""

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor

FORMS = ("sharded_param", "_unsharded_param", "_sharded_post_forward_param")


def shards_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same tensors, but the shard in place of each unsharded copy. Touches nothing."""
    return _exchanged(list(tensors), _forms())


def resharded(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`shards_of`, for tensors that are to be written. Frees the unsharded copies, so that the next forward pass sees
    what the shards hold. Not for use inside a forward pass."""
    tensors, forms = list(tensors), _forms()
    for group in [forms[id(tensor)][0] for tensor in tensors if id(tensor) in forms]:
        group._to_sharded()  # reshard() may do nothing after a forward pass that was interrupted
    return _exchanged(tensors, forms)


def _exchanged(tensors: list[Tensor], forms: dict[int, tuple[Any, Tensor]]) -> list[Tensor]:
    return [forms.get(id(tensor), (None, tensor))[1] for tensor in tensors] if forms else tensors


def _forms() -> dict[int, tuple[Any, Tensor]]:
    """The group and the shard of every parameter under FSDP2, by the id of each of its forms. They are found in torch's
    own table of modules, which is empty without FSDP2."""
    table = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    forms: dict[int, tuple[Any, Tensor]] = {}
    for state in [reference() for reference in table.values()]:
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:
            groups = [getattr(state, "_fsdp_param_group", None)]  # torch 2.10
        for group in filter(None, groups):
            for of in group.fsdp_params:
                own = [getattr(of, name, None) for name in FORMS]
                forms.update({id(form): (group, of.sharded_param) for form in own if form is not None})
    return forms
