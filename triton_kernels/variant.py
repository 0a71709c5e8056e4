"""Variants: what a kernel is compiled for, and how."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any

import torch
import triton.language as tl

from ..core.bases import NO_STEP, Base, delta_dtype_of
from ..core.methods import RULES, Rule
from .base import BASES
from .chunk import ALL, CHUNK, INTERPRETED, LANES, NONE, SHORT_CHUNK, SOME, TILE
from .decide import FUNCTIONS, LEARN, NUMBERS, TERMS, keep

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,  # of the codes of first moments
}
MAX_STATES = 3
STREAMS = ("grad", "anchor")  # what is only read


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of the tensors of a launch. working: that of the weights, if `param` is their master."""

    param: torch.dtype
    grad: torch.dtype
    anchor: torch.dtype
    state: torch.dtype
    working: torch.dtype | None = None


@dataclass(frozen=True, eq=False)  # variant_of makes each once, so that a launch need not compare fields
class Variant:
    """What a kernel is compiled for. Every field is a tl.constexpr, a device function or a tuple of such.

    READ, BASE: the base's two functions. NO_STEP: whether it makes no step. HAS_GRADS: whether there are gradients.
    HYPERS: how many columns a group's row has. TERMS: the columns that the rules read, in the order of `decide.TERMS`,
    and −1 for others.
    STATES: the most tensors of state. LAST_STATE: which tensors have the last of them. ANCHORED: which have an anchor.
    Both are NONE, SOME or ALL.
    RULES: the functions of the rules in use. NUMBERS, LEARN: how many numbers each learns, and by which function.
    RULE_…: the places among them of rules of one kind, a bit each. TRACKS: whether any keeps its delta.
    STOCHASTIC: whether any tensor's weights are rounded stochastically. MASTERED: whether `param` is the master of the
    working weights. …_DTYPE: the dtypes of the tensors. CODED: whether moments are in 8 bits. ARITHMETIC: the dtype of
    the arithmetic.
    …_ALIGNED: whether addresses of what is only read are counted on to be multiples of 16, as those of what is written
    always are. A tensor that breaks this is taken in narrow accesses altogether. If it is not counted on, that stream
    alone is read so.
    EVICT: the eviction policy of what nobody reads soon: the gradients and the moments. CHUNK: elements of a program.
    LANES: accumulators. ROWS: whether segments are rows. TILE: how many of them share the accumulators. VECTOR:
    neighbours that one thread takes at once: 16 bytes of the arithmetic's dtype, so that all streams are in one layout
    and nothing moves between threads. GRAD_VECTOR: those of a sweep over gradients alone. CODE: names the source, so
    that no older code is taken for it.
    """

    READ: Any
    BASE: Any
    NO_STEP: Any
    HAS_GRADS: Any
    HYPERS: Any
    TERMS: Any
    STATES: Any
    LAST_STATE: Any
    ANCHORED: Any
    RULES: Any
    NUMBERS: Any
    LEARN: Any
    RULE_MEASURES: Any
    RULE_GIVEN: Any
    RULE_TIED: Any
    RULE_CAUTIOUS: Any
    RULE_LINEAR: Any
    RULE_SIGN: Any
    RULE_SURVEYS: Any
    RULE_CONFLICT: Any
    RULE_LEARNS: Any
    TRACKS: Any
    STOCHASTIC: Any
    MASTERED: Any
    PARAM_DTYPE: Any
    WORKING_DTYPE: Any
    GRAD_DTYPE: Any
    ANCHOR_DTYPE: Any
    STATE_DTYPE: Any
    CODED: Any
    DELTA_DTYPE: Any
    ARITHMETIC: Any
    GRAD_ALIGNED: Any
    ANCHOR_ALIGNED: Any
    EVICT: Any
    CHUNK: Any
    LANES: Any
    ROWS: Any
    TILE: Any
    VECTOR: Any
    GRAD_VECTOR: Any
    CODE: Any


@cache
def variant_of(
    base: Base,
    dtypes: Dtypes,
    *,
    states: tuple[int, int],
    rules: tuple[str, ...],
    stochastic: bool,
    anchored: tuple[bool, bool],
    has_grads: bool = True,
    one_launch: bool = False,
    unaligned: frozenset[str] = frozenset(),
    lanes: int = LANES,
) -> Variant:
    """The kernels for tensors of such dtypes; see Variant.

    states: the fewest and the most that any of them keeps. anchored: whether all of them are, and whether any is.
    unaligned: streams with an address that is no multiple of 16, among `STREAMS`.
    """
    c = tl.constexpr
    facts = [RULES[name] for name in rules]

    def places(kind: Callable[[Rule], Any]) -> Any:
        return c(sum(1 << k for k, rule in enumerate(facts) if kind(rule)))

    read, step = BASES[base.name]
    functions = tuple(FUNCTIONS.get(name, keep) for name in rules)
    learn = tuple(LEARN.get(name, keep) for name in rules)
    reads = {key for rule in facts for key in rule.reads}
    fewest, most = states
    by_rows = any(rule.crosses_rows for rule in facts)
    code = "".join(function.cache_key for function in (read, step, *functions, *learn)) if not INTERPRETED else ""
    return Variant(
        READ=read,
        BASE=step,
        NO_STEP=c(base is NO_STEP),
        HAS_GRADS=c(has_grads),
        HYPERS=c(len(base.hyper)),
        TERMS=tuple(c(base.hyper.index(key) if key in reads else -1) for key in TERMS),
        STATES=c(most),
        LAST_STATE=ALL if fewest == most else SOME,
        ANCHORED=ALL if anchored[0] else SOME if anchored[1] else NONE,
        RULES=functions,
        NUMBERS=tuple(c(NUMBERS.get(name, 0)) for name in rules),
        LEARN=learn,
        RULE_MEASURES=places(lambda rule: rule.measures),
        RULE_GIVEN=places(lambda rule: rule.given),
        RULE_TIED=places(lambda rule: rule.tied),
        RULE_CAUTIOUS=places(lambda rule: rule.cautious),
        RULE_LINEAR=places(lambda rule: rule.penalty == "linear"),
        RULE_SIGN=places(lambda rule: rule.penalty == "sign"),
        RULE_SURVEYS=places(lambda rule: rule.surveys),
        RULE_CONFLICT=places(lambda rule: rule.surveys == "conflict"),
        RULE_LEARNS=places(lambda rule: rule.learns),
        TRACKS=c(any(rule.tracks for rule in facts)),
        STOCHASTIC=c(stochastic),
        MASTERED=c(dtypes.working is not None),
        PARAM_DTYPE=c(DTYPES[dtypes.param]),
        WORKING_DTYPE=c(DTYPES[dtypes.working or dtypes.param]),
        GRAD_DTYPE=c(DTYPES[dtypes.grad]),
        ANCHOR_DTYPE=c(DTYPES[dtypes.anchor]),
        STATE_DTYPE=c(DTYPES[dtypes.state]),
        CODED=c(dtypes.state == torch.int8),
        DELTA_DTYPE=c(DTYPES[delta_dtype_of(dtypes.param)]),
        ARITHMETIC=c(tl.float64 if dtypes.param == torch.float64 else tl.float32),
        GRAD_ALIGNED=c("grad" not in unaligned),
        ANCHOR_ALIGNED=c("anchor" not in unaligned),
        EVICT=c("evict_first" if one_launch else ""),
        CHUNK=c(SHORT_CHUNK if one_launch else CHUNK),
        LANES=c(lanes),
        ROWS=c(by_rows),
        TILE=c(4 * TILE if INTERPRETED else TILE),
        VECTOR=c(16 // max(4, dtypes.param.itemsize)),
        GRAD_VECTOR=c(16 // dtypes.grad.itemsize),
        CODE=c(sha256(code.encode()).hexdigest() if code else ""),
    )


def options_of(variant: Any, gpu: tuple[str, int]) -> dict[str, Any]:
    """How a variant is compiled for a GPU, such as ("cuda", 90) or ("hip", 0).

    Without contraction to FMA the bits do not depend on what the compiler fuses. With 64 registers for each thread,
    half the threads that an SM can hold are resident. To spill nothing, some need more. 80: all for Blackwell, the
    one-launch form, master weights, bfloat16 moments, streams in narrow accesses, coupled and cautious rules. 96:
    amsgrad that only some tensors have. 128: float64, moments in 8 bits, and the sweeps of rows. 255: one of the
    first two by rows.
    """
    backend, capability = gpu
    options: dict[str, Any] = {"num_warps": LANES // (64 if backend == "hip" else 32), "enable_fp_fusion": False}
    if backend == "cuda":
        double, by_rows = variant.ARITHMETIC.value == tl.float64, variant.ROWS.value
        low = variant.STATE_DTYPE.value != variant.ARITHMETIC.value
        amsgrad = variant.STATES.value == MAX_STATES
        some = variant.LAST_STATE.value == SOME.value
        coupled = (variant.RULE_LINEAR.value | variant.RULE_CAUTIOUS.value) != 0
        one_launch = variant.CHUNK.value == SHORT_CHUNK
        narrow = not all(getattr(variant, f"{stream.upper()}_ALIGNED").value for stream in STREAMS)
        more = one_launch or variant.MASTERED.value or low or coupled or narrow or capability >= 100
        fewer = 96 if amsgrad and some else 80 if more else 64
        wide = double or variant.CODED.value
        options["maxnreg"] = 255 if wide and by_rows else 128 if wide or by_rows else fewer
    return options


def gpu_of(device: torch.device) -> tuple[str, int]:
    """What kernels are compiled for on this device, as options_of takes it."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "hip" if torch.version.hip else "cpu", 0
    major, minor = torch.cuda.get_device_capability(device)
    return "cuda", 10 * major + minor
