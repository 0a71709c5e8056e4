"""Parameters that are spread over processes: DTensor, as FSDP2 and tensor parallelism make them. This module tells
which part of each is here, and sums over all parts."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .methods import Rule

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def version_of(tensor: Tensor) -> int:
    """A number that changes when the elements that are here are written in place."""
    here = local(tensor)
    return 0 if here.is_inference() else here._version


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same elements in memory. For DTensors, it compares the parts that are here."""
    if a is b:
        return True
    alike = a.shape == b.shape and a.dtype == b.dtype and is_dtensor(a) == is_dtensor(b)
    here, there = local(a), local(b)
    return alike and here.shape == there.shape and here.data_ptr() == there.data_ptr() != 0


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor. Imports nothing to know that."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_flat_part(param: Tensor) -> bool:
    """Whether it is a part of FSDP1's flat parameters, in which a process has a stretch of some of them."""
    return bool(getattr(param, "_fsdp_flattened", False)) or type(param).__name__ == "FlatParameter"


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether another process may have another part of any of them."""
    return any(is_dtensor(t) and any(not p.is_replicate() for p in t.placements) for t in tensors)  # type: ignore[attr-defined]


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is here, in its own memory. Any other tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    here: Any = tensor.to_local()  # type: ignore[attr-defined]
    return here.wait() if hasattr(here, "wait") else here  # type: ignore[no-any-return]


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


def agree(flag: bool, params: Iterable[Tensor]) -> bool:
    """Whether a flag is set in all processes that have a part of any of these tensors."""
    for mesh in _meshes(params):
        value = torch.tensor(float(flag), device=mesh.device_type)
        _reduce(value, mesh, "MIN")
        flag = bool(value)
    return flag


def any_infinite(found_inf: Tensor, params: Iterable[Tensor]) -> Tensor:
    """`found_inf`, combined over the processes that have parts or replicas of these parameters."""
    found_inf = local(found_inf).clone()
    for mesh in dict.fromkeys(param.device_mesh for param in params if is_dtensor(param)):  # type: ignore[attr-defined]
        _reduce(found_inf, mesh, "MAX")
    return found_inf


def total(squares: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """The sum over all parts of all tensors, from the sums over the parts that are here. There is one all-reduce a
    mesh."""
    weights = [_weight(param) for param in params]
    stacked = torch.stack(list(squares)).double() * torch.tensor(weights, dtype=torch.float64).to(squares[0].device)
    sums = torch.zeros((), dtype=torch.float64, device=stacked.device)
    meshes = _meshes(params)
    for mesh in meshes:
        on_mesh = [k for k, param in enumerate(params) if _mesh_of(param) == mesh]  # equal ones may be apart
        part = stacked[on_mesh].sum()
        _reduce(part, mesh, "SUM")
        sums = sums + part
    apart = [k for k, param in enumerate(params) if _mesh_of(param) is None]
    return sums + stacked[apart].sum()


@torch.no_grad()
def over_all_parts(sums: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The sums over all parts of each tensor, [tensors, k], from those over the parts that are here, as int64 on the
    CPU. There is one all-reduce a mesh. Sums wrap around."""
    sums = sums * torch.tensor([int(_weight(tensor)) for tensor in tensors], device="cpu")[:, None]
    for mesh in _meshes(tensors):
        on_mesh = [k for k, tensor in enumerate(tensors) if _mesh_of(tensor) == mesh]  # equal ones may be apart
        packed = sums[on_mesh].to(mesh.device_type)
        _reduce(packed, mesh, "SUM")
        sums[on_mesh] = packed.cpu()
    return sums


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
    if _mesh_of(tensor) is None:
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


class Segments:
    """The segments of tensors some of which are spread, each tensor under its own rule.

    counts: how many segments each tensor has, over all its parts.
    here: how many of them this process has a part of.

    A row may be here whole or in part. A tensor that is no DTensor is here whole, and the same in every process.
    """

    def __init__(self, params: Sequence[Tensor], rules: Sequence[Rule]) -> None:
        device = local(params[0]).device if params else torch.device("cpu")
        self.counts = [rule.segments_of(param.shape) for param, rule in zip(params, rules, strict=True)]
        self.here = [rule.segments_of(local(param).shape) for param, rule in zip(params, rules, strict=True)]
        starts = [sum(self.counts[:k]) for k in range(len(params))]
        places, weights = [], []
        by_mesh: dict[Any, list[Tensor]] = {}
        for param, rule, start, n, whole in zip(params, rules, starts, self.here, self.counts, strict=True):
            first = start + (_first_row(param) if rule.by_rows and param.dim() > 1 else 0)
            places.append(torch.arange(first, first + n, device="cpu"))
            weights.append(torch.full((n,), _weight(param), dtype=torch.float64, device="cpu"))
            by_mesh.setdefault(_mesh_of(param), []).append(torch.arange(start, start + whole, device="cpu"))
        self._places = torch.cat([*places, torch.zeros(0, dtype=torch.int64, device="cpu")]).to(device)
        self._weights = torch.cat([*weights, torch.zeros(0, dtype=torch.float64, device="cpu")]).to(device)[:, None]
        self._spread = [(mesh, torch.cat(of).to(device)) for mesh, of in by_mesh.items() if mesh is not None]
        self._all_of_one = len(by_mesh) == 1

    def whole(self, parts: Tensor) -> Tensor:
        """The sums over all parts, [segments, k], from the sums over what is here, [segments here, k] in float64. There
        is one packed all-reduce a mesh. Every process gets the same bits."""
        sums = parts.new_zeros(sum(self.counts), parts.shape[1])
        sums[self._places] = parts * self._weights
        for mesh, of_mesh in self._spread:
            if self._all_of_one:
                _reduce(sums, mesh, "SUM")
            else:
                packed = sums[of_mesh]
                _reduce(packed, mesh, "SUM")
                sums[of_mesh] = packed
        return sums

    def parts(self, whole: Tensor) -> Tensor:
        """What is known of the segments here, from what is known of all segments."""
        return whole[self._places]


def placement_of(tensor: Tensor) -> object:
    """How a DTensor is spread, in a form to compare. None for any other tensor."""
    return (id(tensor.device_mesh), tensor.placements) if is_dtensor(tensor) else None  # type: ignore[attr-defined]


def _mesh_of(param: Tensor) -> "DeviceMesh | None":
    """The mesh that a parameter is spread over. None if all of it is here."""
    return param.device_mesh if any_sharded([param]) else None  # type: ignore[attr-defined]


def _meshes(params: Iterable[Tensor]) -> "list[DeviceMesh]":
    return list(dict.fromkeys(mesh for mesh in map(_mesh_of, params) if mesh is not None))


def _weight(param: Tensor) -> float:
    """1 if what is here counts. 0 if it is a replica of what counts in another process."""
    if _mesh_of(param) is None:
        return 1.0
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    coordinates = mesh.get_coordinate()
    for place, coordinate in zip(placements, coordinates, strict=True):
        if place.is_partial():
            raise ValueError(f"a parameter is placed as {placements}; a partial sum cannot be stepped")
        if place.is_replicate() and coordinate:
            return 0.0
    return 1.0


def _first_row(param: Tensor) -> int:
    """The index of the first row here among all rows."""
    if _mesh_of(param) is None:
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return int(offset[0])


def _reduce(values: Tensor, mesh: "DeviceMesh", how: str) -> None:
    """An all-reduce over a mesh, in place. A single one does it if the mesh is the whole world or has one dimension."""
    import torch.distributed as dist

    if mesh.size() == 1:
        return
    op = getattr(dist.ReduceOp, how)
    if mesh.size() == dist.get_world_size():
        dist.all_reduce(values, op)
        return
    for dim in range(mesh.ndim):
        dist.all_reduce(values, op, group=mesh.get_group(dim))
