"""A mode in which no number may be read by the host."""

from torch.utils._python_dispatch import TorchDispatchMode


class NoReads(TorchDispatchMode):
    """On a device, each of these reads would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "item", "is_nonzero", "unique")
        assert func.overloadpacket.__name__ not in waits, func
        return func(*args, **(kwargs or {}))
