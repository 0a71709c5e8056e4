"""Whether a tensor's numbers are in its memory, so that kernels that read addresses can take it. And that memory
itself."""

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .sharding import is_dtensor, local


def without_memory(tensor: Tensor) -> str:
    """What kind of tensor it is, if its numbers are not in a memory of its own. Otherwise ""."""
    if is_lazy(tensor):
        return "an uninitialized lazy parameter; run the model once before the step"
    if is_dtensor(tensor):
        return without_memory(local(tensor))
    if tensor.device.type == "meta":
        return "on the meta device, without numbers; give it memory and load its weights before the step"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ or is_traceable_wrapper_subclass(tensor):
        return (
            f"a {type(tensor).__name__}, whose numbers are not in its own memory; a plain tensor or DTensor is needed"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "inside a torch.func transform"
    return ""


def unowned(tensor: Tensor) -> Tensor:
    """A dense tensor of the same memory that does not keep it alive. Not to be read or written after it is freed."""
    size = tensor.numel() * tensor.element_size()
    # torch's own CUDA graph trees make such storages for their inputs.
    storage = torch._C._construct_storage_from_data_pointer(tensor.data_ptr(), tensor.device, size)
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(storage, 0, tensor.shape, tensor.stride())


def in_memory(tensor: Tensor) -> Tensor:
    """A gradient with its numbers in memory as they are. Torch may mark a tensor as one that is negated when it is
    read, or as zeros that are not written out. Both are resolved here. Returns the tensor itself if it has no such
    mark."""
    if is_dtensor(tensor):
        return tensor
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.resolve_neg()


def is_lazily_read(tensor: Tensor) -> bool:
    """Whether `in_memory` would make another tensor of it."""
    return not is_dtensor(tensor) and (tensor._is_zerotensor() or tensor.is_neg())
