from collections.abc import Callable
from typing import Any

from torch import Tensor

ADAMW_HYPER: list[str]
SGD_HYPER: list[str]
CHUNK: int  # elements of one partial
ISA: str  # "DEFAULT", "AVX2" or "AVX512", as torch names them

def prepare_adamw(
    params: list[Tensor],
    anchors: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    measures: Tensor,
    alphas: Tensor,
    hyper: Tensor,
    group_sizes: list[int],
    rules: list[str],
    seeds: list[int],
) -> Callable[..., None]: ...
def prepare_sgd(
    params: list[Tensor],
    anchors: list[Tensor],
    momentum_buffers: list[Tensor],
    steps: list[Tensor],
    measures: Tensor,
    alphas: Tensor,
    hyper: Tensor,
    group_sizes: list[int],
    rules: list[str],
    seeds: list[int],
) -> Callable[..., None]: ...
def fingerprint(params: list[Tensor], kept: list[dict[str, Any]], addresses: bool) -> bytes: ...
def addresses(tensors: list[Tensor], out: Tensor) -> None: ...
