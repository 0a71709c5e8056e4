"""Parameters that are spread over processes: DTensor, as FSDP2 and tensor parallelism make them. This module tells
which part of each is here."""

import sys
from collections.abc import Iterator
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PLAIN = (Tensor, torch.nn.Parameter)  # the types of most tensors, so that others need not be looked for


def version_of(tensor: Tensor) -> int:
    """A number that changes when the elements that are here are written in place."""
    version = 0 if tensor.is_inference() else tensor._version
    return version + version_of(local(tensor)) if is_dtensor(tensor) else version  # an op may count in either


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same elements in memory. For DTensors, it compares the parts that are here."""
    if a is b:
        return True
    alike = a.shape == b.shape and a.dtype == b.dtype and is_dtensor(a) == is_dtensor(b)
    here, there = local(a), local(b)
    return alike and here.shape == there.shape and here.data_ptr() == there.data_ptr() != 0


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor. Imports nothing to know that."""
    if type(tensor) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_flat_part(param: Tensor) -> bool:
    """Whether it is a part of FSDP1's flat parameters, in which a process has a stretch of some of them."""
    return bool(getattr(param, "_fsdp_flattened", False)) or type(param).__name__ == "FlatParameter"


def is_spread(tensor: Tensor) -> bool:
    """Whether other processes have other parts of it."""
    if not is_dtensor(tensor):
        return False
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return any(not place.is_replicate() and mesh.size(dim) > 1 for dim, place in enumerate(placements))


def has_whole_rows(tensor: Tensor) -> bool:
    """Whether each row, an index of dimension 0, lies whole in one process or in several replicas."""
    if tensor.dim() < 2:
        return not is_spread(tensor)
    return not is_spread(tensor) or all(
        place.is_replicate() or getattr(place, "dim", None) == 0
        for place in tensor.placements  # type: ignore[attr-defined]
    )


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is here, in its own memory. Any other tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    here: Any = tensor._local_tensor  # type: ignore[attr-defined]
    return here if type(here) is Tensor or not hasattr(here, "wait") else here.wait()  # type: ignore[no-any-return]


def spec_of_shards(tensor: Tensor | None) -> object:
    """The object by which a DTensor knows how it is spread. None for any other tensor."""
    return tensor._spec if is_dtensor(tensor) else None  # type: ignore[union-attr]


@torch.no_grad()
def placed_as(tensor: Tensor, param: Tensor) -> Tensor:
    """`tensor` spread as `param` is. It comes whole on every process, or as a DTensor. Shards of a whole one are
    copies."""
    if not is_dtensor(param):
        return whole(tensor)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(param, DTensor)
    if isinstance(tensor, DTensor):
        same = tensor.device_mesh == param.device_mesh and tensor.placements == param.placements
        return tensor if same else tensor.redistribute(param.device_mesh, param.placements)
    return distribute_tensor(tensor.detach(), param.device_mesh, param.placements, src_data_rank=None)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts, in every process that has a part."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def parts_of(tensor: Tensor) -> Iterator[tuple[Tensor, list[int]]]:
    """What is here of a tensor, in blocks of neighbours. With each comes the index of its first element in the whole
    tensor, one number a dimension."""
    here = local(tensor)
    runs = [_runs(tensor, dim) for dim in range(tensor.dim())]
    for block in product(*runs):
        part = here[tuple(slice(begin, end) for begin, end, _ in block)] if block else here
        yield part, [first for _, _, first in block]


def _runs(tensor: Tensor, dim: int) -> list[tuple[int, int, int]]:
    """The runs of neighbours along a dimension of what is here. Of each, where it begins and ends here, and where it
    begins in the whole tensor."""
    size = tensor.shape[dim]
    whole = [(0, size, 0)] if size else []
    if mesh_of(tensor) is None:
        return whole
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    along = [p if not p.is_replicate() and p.dim % tensor.dim() == dim else Replicate() for p in placements]
    if all(p.is_replicate() for p in along):
        return whole
    indices = torch.arange(size, device=mesh.device_type)
    indices = indices.view([size if k == dim else 1 for k in range(tensor.dim())])
    indices = local(distribute_tensor(indices, mesh, along, src_data_rank=None)).flatten().cpu()
    if not len(indices):
        return []
    starts = [0, *(indices.diff() != 1).nonzero().add(1).flatten().tolist(), len(indices)]
    return [(begin, end, int(indices[begin])) for begin, end in pairwise(starts)]


def placement_of(tensor: Tensor) -> object:
    """How a DTensor is spread, in a form to compare. None for any other tensor."""
    return (id(tensor.device_mesh), tensor.placements) if is_dtensor(tensor) else None  # type: ignore[attr-defined]


def mesh_of(param: Tensor) -> "DeviceMesh | None":
    """The mesh that a parameter is spread over. None if all of it is here."""
    return param.device_mesh if is_spread(param) else None  # type: ignore[attr-defined]


def weight(param: Tensor) -> float:
    """1 if what is here counts. 0 if it is a replica of what counts in another process."""
    if mesh_of(param) is None:
        return 1.0
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    coordinates = mesh.get_coordinate()
    for place, coordinate in zip(placements, coordinates, strict=True):
        if place.is_partial():
            raise ValueError(f"a parameter is placed as {placements}; a partial sum cannot be stepped")
        if place.is_replicate() and coordinate:
            return 0.0
    return 1.0


def first_row(param: Tensor) -> int:
    """The index of the first row here among all rows."""
    if mesh_of(param) is None:
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return int(offset[0])
