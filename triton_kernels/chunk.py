"""Movement: how a tensor stands in the table, and how a block of it is loaded as numbers and stored again. No method is
known here."""

import triton
import triton.language as tl

from .eight_bit import load_coded, store_coded

CHUNK = 16384  # elements that share one partial, and one program
SHORT_CHUNK = 4096  # in the one-launch form, so that little is under way between a step and its pull
LANES = 256  # accumulators of a chunk's sums: eight warps' worth of threads
TILE = 8  # rows that are worked on together, a warp each
INTERPRETED = triton.knobs.runtime.interpret
CALLERS = ["grad_scale", "found_inf"]  # arguments of kernels that are another tensor at each step

# The columns of the int64 table of tensors. Addresses come first, 0 if absent. Layout and settings follow.
COLUMNS = (
    "param", "working", "anchor", "state0", "state1", "state2", "delta", "learned", "step",
    "scales0", "scales1", "scales2",
    "numel", "rows", "stride", "first", "chunks", "row", "rule", "seed", "dithered", "segment", "factor",
)  # fmt: skip
WIDTH = tl.constexpr(len(COLUMNS))
PARAM = tl.constexpr(COLUMNS.index("param"))
WORKING = tl.constexpr(COLUMNS.index("working"))  # the 16-bit weights, when param is their float32 master
ANCHOR = tl.constexpr(COLUMNS.index("anchor"))
STATE = tl.constexpr(COLUMNS.index("state0"))
SCALES = tl.constexpr(COLUMNS.index("scales0"))  # of moments in 8 bits
DELTA = tl.constexpr(COLUMNS.index("delta"))
LEARNED = tl.constexpr(COLUMNS.index("learned"))  # the numbers that its rule learns
STEP = tl.constexpr(COLUMNS.index("step"))
NUMEL = tl.constexpr(COLUMNS.index("numel"))
ROWS = tl.constexpr(COLUMNS.index("rows"))  # indices of dimension 0, for a rule that goes by rows
STRIDE = tl.constexpr(COLUMNS.index("stride"))  # of dimension 0
FIRST = tl.constexpr(COLUMNS.index("first"))  # its first chunk in the class
CHUNKS = tl.constexpr(COLUMNS.index("chunks"))
ROW = tl.constexpr(COLUMNS.index("row"))  # its row of hyper
RULE = tl.constexpr(COLUMNS.index("rule"))  # its place in the RULES of the variant
SEED = tl.constexpr(COLUMNS.index("seed"))  # of its random bits
DITHERED = tl.constexpr(COLUMNS.index("dithered"))  # whether its weights are rounded stochastically
SEGMENT = tl.constexpr(COLUMNS.index("segment"))  # its first row of results, and first place in alphas
FACTOR = tl.constexpr(COLUMNS.index("factor"))  # what a survey makes of its penalty, the bits of a float64

# How many tensors of a launch have something.
NONE, SOME, ALL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

_BY_BITS = tl.constexpr(INTERPRETED)  # the interpreter casts bfloat16 wrongly: it truncates, and flushes subnormals


@triton.jit
def present(address, n, HAVE: tl.constexpr):
    """How many of n elements there are at an address. When only SOME tensors HAVE one, an address of 0 means none."""
    limit = n
    if HAVE == SOME:
        limit = tl.where(address != 0, n, 0)
    return limit


# A default must be a constexpr by itself: Triton 3.6 does not make it one for the annotation.
NO_HINT = tl.constexpr("")


@triton.jit
def load(address, offsets, mask, DTYPE: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr,
         EVICT: tl.constexpr = NO_HINT):  # fmt: skip
    """Elements as numbers of the arithmetic type, zero when masked. ALIGNED: the address is a multiple of 16. EVICT: as
    in `tl.load`.

    This hint must be on the pointer. On the integer it is lost.
    """
    if _BY_BITS and DTYPE == tl.bfloat16:
        bits = tl.load(address.to(tl.pointer_type(tl.uint16)) + offsets, mask=mask, other=0)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return tl.load(pointer + offsets, mask=mask, other=0.0, eviction_policy=EVICT).to(T)


@triton.jit
def store(address, offsets, mask, values, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
          EVICT: tl.constexpr = NO_HINT):  # fmt: skip
    """Stores numbers in memory. DTYPE must hold them exactly, as `as_stored` sees to."""
    if _BY_BITS and DTYPE == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True) >> 16
        tl.store(address.to(tl.pointer_type(tl.uint16)) + offsets, bits.to(tl.uint16), mask=mask)
        return
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    tl.store(pointer + offsets, values.to(DTYPE), mask=mask, eviction_policy=EVICT)


@triton.jit
def as_stored(values, DTYPE: tl.constexpr, T: tl.constexpr):
    """What values become once they are stored: rounded to nearest, ties to even."""
    if _BY_BITS and DTYPE == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(values == values, rounded, 0x7FC00000).to(tl.uint32).to(tl.float32, bitcast=True)
    return values.to(DTYPE).to(T)


@triton.jit
def mix(x, amid=0):
    """The finalizer of MurmurHash3: every bit of a uint32 affects every bit of the result. amid: is added between its
    rounds."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B + amid
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def aligned(tensor, grad, V: tl.constexpr):
    """Whether what the variant takes to be multiples of 16 are. It is looked at anew, since a caller's tensors move."""
    addresses = tl.load(tensor + PARAM) | tl.load(tensor + STATE)
    addresses |= tl.load(tensor + STATE + 1) | tl.load(tensor + STATE + 2)
    if V.MASTERED:  # otherwise even the load of a 0 would cost registers
        addresses |= tl.load(tensor + WORKING)
    if V.TRACKS:
        addresses |= tl.load(tensor + DELTA)
    if V.GRAD_ALIGNED:
        addresses |= grad
    if V.ANCHOR_ALIGNED:
        addresses |= tl.load(tensor + ANCHOR)
    return addresses % 16 == 0


@triton.jit
def load_weights(param, working, offsets, mask, ALIGNED: tl.constexpr, V: tl.constexpr):
    """What a step begins from. A master weight counts as long as it rounds to the working weight. If someone else has
    written the working weight, the step begins from that."""
    theta = load(param, offsets, mask, V.PARAM_DTYPE, V.ARITHMETIC, ALIGNED)
    if V.MASTERED:
        shown = load(working, offsets, mask, V.WORKING_DTYPE, V.ARITHMETIC, ALIGNED)
        theta = tl.where(as_stored(theta, V.WORKING_DTYPE, V.ARITHMETIC) == shown, theta, shown)
    return theta


@triton.jit
def store_weights(param, working, offsets, mask, values, ALIGNED: tl.constexpr, V: tl.constexpr):
    """Stores weights, as `as_stored` makes them, with their master."""
    store(param, offsets, mask, values, V.PARAM_DTYPE, ALIGNED)
    if V.MASTERED:
        store(working, offsets, mask, as_stored(values, V.WORKING_DTYPE, V.ARITHMETIC), V.WORKING_DTYPE, ALIGNED)


STEP_KEY, PULL_KEY, MOMENTS_KEY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def rounding_key(seed, t, PHASE: tl.constexpr):
    """The key of what is rounded stochastically in one phase of a step."""
    turn = mix(t.to(tl.uint32) * 4 + PHASE)
    return mix((seed & 0xFFFFFFFF).to(tl.uint32) ^ mix((seed >> 32).to(tl.uint32) ^ turn))


@triton.jit
def rounding_keys(tensor, t):
    """The keys for step t of a tensor: for its θ̃, its pull and its moments."""
    seed = tl.load(tensor + SEED)
    return rounding_key(seed, t, STEP_KEY), rounding_key(seed, t, PULL_KEY), rounding_key(seed, t, MOMENTS_KEY)


@triton.jit
def random_bits(offsets, start, key):
    """32 bits for each element. The counter is the element's place in memory.

    start: a place before each, by less than 2³² elements. One for many elements spares half of the work.
    """
    low, high = offsets.to(tl.uint32), (start >> 32).to(tl.uint32)
    carried = low < start.to(tl.uint32)
    upper = tl.where(carried, mix(key + high + 1), mix(key + high))
    return mix(low ^ key, upper)


@triton.jit
def dither(values, chance):
    """Rounds float32 values to a bfloat16 neighbour, by 16 random bits. The probability of the upper neighbour is the
    distance from the lower one. Inf and nan stay."""
    bits = values.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, (bits + chance) & 0xFFFF0000, bits).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def scales_of(tensor, V: tl.constexpr):
    """Where the scales of the moments are, 0 if these are not in 8 bits."""
    zero = tl.full((), 0, tl.int64)
    if V.CODED:
        return tl.load(tensor + SCALES), tl.load(tensor + SCALES + 1), tl.load(tensor + SCALES + 2)
    return zero, zero, zero


@triton.jit
def load_moment(address, scales, offsets, mask, INDEX: tl.constexpr, ALIGNED: tl.constexpr, EVICT: tl.constexpr,
                V: tl.constexpr):  # fmt: skip
    """The moment of that index as numbers, zero when masked."""
    if V.CODED:
        return load_coded(address, scales, offsets, mask, INDEX == 0, ALIGNED, EVICT)
    return load(address, offsets, mask, V.STATE_DTYPE, V.ARITHMETIC, ALIGNED, EVICT)


@triton.jit
def store_moment(address, scales, offsets, mask, values, bits, INDEX: tl.constexpr, ALIGNED: tl.constexpr,
                 EVICT: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """Stores it, if the variant has one. In bfloat16 and in 8 bits the first two are rounded stochastically: to
    nearest, small changes would be lost. They take the upper and the lower half of `bits`."""
    if V.STATES > INDEX:
        chance = bits & 0xFFFF if INDEX == 1 else bits >> 16
        if V.CODED:
            if INDEX == 2:
                chance = tl.zeros_like(chance) + 0x8000
            store_coded(address, scales, offsets, mask, values, chance, INDEX == 0, ALIGNED, EVICT)
        else:
            if V.STATE_DTYPE != V.ARITHMETIC:
                values = as_stored(values, V.STATE_DTYPE, V.ARITHMETIC) if INDEX == 2 else dither(values, chance)
            store(address, offsets, mask, values, V.STATE_DTYPE, ALIGNED, EVICT)


@triton.jit
def moment_bits(offsets, start, keys, V: tl.constexpr):
    """The random bits by which moments are rounded, if they are."""
    if V.STATE_DTYPE != V.ARITHMETIC:
        return random_bits(offsets, start, keys[MOMENTS_KEY])
    return offsets.to(tl.uint32)
