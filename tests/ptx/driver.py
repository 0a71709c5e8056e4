"""A driver of CUDA in this process. Device memory is the host's, and a launch is a call of Python."""

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from robustft_kernels.backends import cuda, native, registry

Launched = Callable[[str, int, int, int], None]  # the kernel, its programs, its threads, the address of its parameters
FAILED = 999


@dataclass(eq=False)
class Driver:
    """What csrc/cuda/driver.h asks for. `functions` are addresses.

    launched: is told of each launch. copies: how many bytes each copy to the device had. pinned: the memory that
    is now. broken: the function that fails. lacks: how the name of a kernel begins that the module does not have.
    capturing: whether streams say so. pending: whether events say that their copies are under way. failed: what a
    function has raised, since C++ only learns that it failed.
    """

    launched: Launched
    copies: list[int] = field(default_factory=list)
    pinned: dict[int, Any] = field(default_factory=dict)
    capturing: bool = False
    pending: bool = False
    broken: str = ""
    lacks: str = "none"
    failed: BaseException | None = None

    def __post_init__(self) -> None:
        self._names: dict[int, str] = {}
        self._handles = count(16)
        self._kept = {
            name: CFUNCTYPE(c_int, *types)(self._guarded(getattr(self, name))) for name, types in SIGNATURES.items()
        }

    @property
    def functions(self) -> dict[str, int]:
        """The addresses by name."""
        return {name: ctypes.cast(of, c_void_p).value or 0 for name, of in self._kept.items()}

    def _guarded(self, function: Callable[..., int | None]) -> Callable[..., int]:
        def call(*args: Any) -> int:
            if function.__name__ == self.broken:
                return FAILED
            try:
                return function(*args) or 0
            except BaseException as error:
                self.failed = self.failed or error
                return FAILED

        return call

    def _handle(self, to: Any, name: str = "") -> None:
        to[0] = next(self._handles)
        self._names[to[0]] = name

    def cuGetErrorName(self, status: int, to: Any) -> None:
        to[0] = b"the feigned driver failed"

    def cuCtxGetCurrent(self, to: Any) -> None:
        to[0] = 1

    def cuCtxSetCurrent(self, context: int) -> None:
        assert context == 1

    def cuDeviceGet(self, to: Any, index: int) -> None:
        to[0] = index

    def cuDevicePrimaryCtxRetain(self, to: Any, device: int) -> None:
        to[0] = 1

    def cuModuleLoadData(self, to: Any, image: int) -> None:
        self._handle(to)

    def cuModuleGetFunction(self, to: Any, module: int, name: bytes) -> int:
        if name.decode().startswith(self.lacks):
            return 500  # CUDA_ERROR_NOT_FOUND
        self._handle(to, name.decode())
        return 0

    def cuLaunchKernel(self, function: int, *rest: Any) -> None:
        x, y, z, threads, more, most, shared, _, parameters, extra = rest
        assert (y, z, more, most, shared, extra) == (1, 1, 1, 1, 0, None)
        self.launched(self._names[function], x, threads, parameters[0])

    def cuMemHostAlloc(self, to: Any, size: int, flags: int) -> None:
        memory = ctypes.create_string_buffer(size)
        to[0] = ctypes.addressof(memory)
        self.pinned[to[0]] = memory

    def cuMemFreeHost(self, address: int) -> None:
        del self.pinned[address]

    def cuMemcpyHtoDAsync_v2(self, to: int, address: int, size: int, stream: int) -> None:
        assert address in self.pinned
        ctypes.memmove(to, address, size)
        self.copies.append(size)

    def cuEventCreate(self, to: Any, flags: int) -> None:
        self._handle(to)

    def cuEventRecord(self, event: int, stream: int) -> None:
        pass

    def cuEventQuery(self, event: int) -> int:
        return 600 if self.pending else 0  # CUDA_ERROR_NOT_READY

    def cuEventDestroy_v2(self, event: int) -> None:
        pass

    def cuStreamIsCapturing(self, stream: int, to: Any) -> None:
        to[0] = int(self.capturing)


HANDLE = POINTER(c_void_p)
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuCtxGetCurrent": (HANDLE,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (HANDLE, c_int),
    "cuModuleLoadData": (HANDLE, c_void_p),
    "cuModuleGetFunction": (HANDLE, c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, HANDLE, c_void_p),
    "cuMemHostAlloc": (HANDLE, c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuEventCreate": (HANDLE, c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventDestroy_v2": (c_void_p,),
    "cuStreamIsCapturing": (c_void_p, POINTER(c_int)),
}


def installed(functions: dict[str, int]) -> None:
    """Makes the backend "cuda" serve CPU tensors by these functions of a driver, for the whole process."""
    native.use_kernels(b"no image", functions)
    cuda._load = lambda: None
    registry.BACKENDS["cuda"] = replace(cuda.BACKEND, missing=lambda: "", device_type=lambda: "cpu", trial=lambda _: "")


@contextmanager
def feigned(driver: Driver) -> Iterator[Driver]:
    """The same for a while."""
    before = registry.BACKENDS["cuda"], cuda._load
    installed(driver.functions)
    try:
        yield driver
    finally:
        registry.BACKENDS["cuda"], cuda._load = before
        gc.collect()  # steps give their memory back to this driver
        native.use_kernels(b"")
        cuda._load.cache_clear()
