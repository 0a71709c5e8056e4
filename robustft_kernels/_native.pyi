from collections.abc import Callable
from typing import Any

from torch import Tensor

ADAMW_HYPER: list[str]
SGD_HYPER: list[str]
STILL_HYPER: list[str]
CHUNK: int  # elements of one partial
ISA: str  # "DEFAULT", "AVX2" or "AVX512", as torch names them

# The op's lists, as ops.py and Base.schema have them, without grads, grad_scale and found_inf.
def prepare_adamw(params: list[Tensor], *lists: Any) -> Callable[..., None]: ...
def prepare_sgd(params: list[Tensor], *lists: Any) -> Callable[..., None]: ...
def prepare_still(params: list[Tensor], *lists: Any) -> Callable[..., None]: ...
def fingerprint(params: list[Tensor], kept: list[dict[str, Any]], addresses: bool) -> bytes: ...
def addresses(tensors: list[Tensor], out: Tensor) -> None: ...
