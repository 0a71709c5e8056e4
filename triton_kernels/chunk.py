"""Movement: what a tensor is in the table, and how a block of it becomes numbers and goes back. No method is known
here."""

import triton
import triton.language as tl

CHUNK = 16384  # elements that share one partial, and one program
LANES = 256  # accumulators of a chunk's sums: eight warps' worth of threads
TILE = 8  # rows that are worked on together, a warp each
INTERPRETED = triton.knobs.runtime.interpret

# The columns of a tensor's row in the table, int64: addresses first (0: absent), then where its parts lie.
COLUMNS = (
    "param", "working", "anchor", "state0", "state1", "state2", "delta", "radius", "step",
    "numel", "rows", "stride", "first", "chunks", "group", "rule", "seed", "dithered", "index",
)  # fmt: skip
WIDTH = tl.constexpr(len(COLUMNS))
PARAM = tl.constexpr(COLUMNS.index("param"))
WORKING = tl.constexpr(COLUMNS.index("working"))  # where param is the float32 master of 16-bit weights: those
ANCHOR = tl.constexpr(COLUMNS.index("anchor"))
STATE = tl.constexpr(COLUMNS.index("state0"))
DELTA = tl.constexpr(COLUMNS.index("delta"))
RADIUS = tl.constexpr(COLUMNS.index("radius"))
STEP = tl.constexpr(COLUMNS.index("step"))
NUMEL = tl.constexpr(COLUMNS.index("numel"))
ROWS = tl.constexpr(COLUMNS.index("rows"))  # indices of dimension 0, where the rule goes by rows
STRIDE = tl.constexpr(COLUMNS.index("stride"))  # of dimension 0
FIRST = tl.constexpr(COLUMNS.index("first"))  # chunk of the class
CHUNKS = tl.constexpr(COLUMNS.index("chunks"))
GROUP = tl.constexpr(COLUMNS.index("group"))  # row of hyper
RULE = tl.constexpr(COLUMNS.index("rule"))  # of the kernel's RULES
SEED = tl.constexpr(COLUMNS.index("seed"))  # of what is rounded stochastically
DITHERED = tl.constexpr(COLUMNS.index("dithered"))  # whether that are the weights
INDEX = tl.constexpr(COLUMNS.index("index"))  # of its first segment in measures and alphas

# Which tensors of a launch have something.
NONE, SOME, ALL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

_BY_BITS = tl.constexpr(INTERPRETED)  # the interpreter casts bfloat16 wrongly: it truncates, and flushes subnormals


@triton.jit
def present(address, n, WHERE: tl.constexpr):
    """How many of n elements there are to read at an address that may be absent, 0, for SOME tensors."""
    limit = n
    if WHERE == SOME:
        limit = tl.where(address != 0, n, 0)
    return limit


@triton.jit
def load(address, offsets, mask, DTYPE: tl.constexpr, T: tl.constexpr, VECTOR: tl.constexpr):
    """Elements as numbers of the arithmetic type; zero where masked. VECTOR: the address is a multiple of 16.

    The hint must stand on the pointer: on the integer it is lost.
    """
    if _BY_BITS and DTYPE == tl.bfloat16:
        bits = tl.load(address.to(tl.pointer_type(tl.uint16)) + offsets, mask=mask, other=0)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    pointer = address.to(tl.pointer_type(DTYPE))
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(T)


@triton.jit
def store(address, offsets, mask, values, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Numbers that DTYPE holds, as `as_stored` makes them, to memory."""
    if _BY_BITS and DTYPE == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True) >> 16
        tl.store(address.to(tl.pointer_type(tl.uint16)) + offsets, bits.to(tl.uint16), mask=mask)
        return
    pointer = address.to(tl.pointer_type(DTYPE))
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    tl.store(pointer + offsets, values.to(DTYPE), mask=mask)


@triton.jit
def as_stored(values, DTYPE: tl.constexpr, T: tl.constexpr):
    """What values become once they are stored: rounded to nearest, ties to even."""
    if _BY_BITS and DTYPE == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(values == values, rounded, 0x7FC00000).to(tl.uint32).to(tl.float32, bitcast=True)
    return values.to(DTYPE).to(T)


@triton.jit
def mix(x):
    """The finalizer of MurmurHash3: every bit of a uint32 sways every bit of the result."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def weights_at(tensor, V: tl.constexpr):
    """The addresses of a tensor's weights, in one: whatever divides it divides them."""
    address = tl.load(tensor + PARAM)
    if V.MASTERED:  # or even the load of a 0 would cost registers
        address |= tl.load(tensor + WORKING)
    return address


@triton.jit
def load_weights(param, working, offsets, mask, WIDE: tl.constexpr, V: tl.constexpr):
    """What a step begins from. A master weight counts as long as it rounds to the weight that is worked with: who
    writes that, writes both."""
    theta = load(param, offsets, mask, V.P, V.T, WIDE)
    if V.MASTERED:
        shown = load(working, offsets, mask, V.W, V.T, WIDE)
        theta = tl.where(as_stored(theta, V.W, V.T) == shown, theta, shown)
    return theta


@triton.jit
def store_weights(param, working, offsets, mask, values, WIDE: tl.constexpr, V: tl.constexpr):
    """Weights, as `as_stored` makes them, where they belong."""
    store(param, offsets, mask, values, V.P, WIDE)
    if V.MASTERED:
        store(working, offsets, mask, as_stored(values, V.W, V.T), V.W, WIDE)


STEP_KEY, PULL_KEY, MOMENTS_KEY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def rounding_key(seed, t, PHASE: tl.constexpr):
    """The key of what is rounded stochastically in one phase of a step."""
    turn = mix(t.to(tl.uint32) * 4 + PHASE)
    return mix((seed & 0xFFFFFFFF).to(tl.uint32) ^ mix((seed >> 32).to(tl.uint32) ^ turn))


@triton.jit
def rounding_keys(tensor, t):
    """The keys of a tensor's step t: of its θ̃, its pull and its moments."""
    seed = tl.load(tensor + SEED)
    return rounding_key(seed, t, STEP_KEY), rounding_key(seed, t, PULL_KEY), rounding_key(seed, t, MOMENTS_KEY)


@triton.jit
def random_bits(offsets, key):
    """32 for each element; the counter is its place in memory."""
    low, high = (offsets & 0xFFFFFFFF).to(tl.uint32), (offsets >> 32).to(tl.uint32)
    return mix(mix(low ^ key) + mix(key + high))


@triton.jit
def dither(values, chance):
    """float32 values rounded to a bfloat16 neighbour, by 16 random bits up with the probability of their distance from
    the lower one. Inf and nan stay."""
    bits = values.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, (bits + chance) & 0xFFFF0000, bits).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def keep_moments(s0, s1, s2, offsets, keys, V: tl.constexpr):
    """Moments as they can be stored: in bfloat16 the first two rounded stochastically, or small changes were lost."""
    if V.S != V.T:
        bits = random_bits(offsets, keys[MOMENTS_KEY])
        s0, s1 = dither(s0, bits >> 16), dither(s1, bits & 0xFFFF)
        s2 = as_stored(s2, V.S, V.T)
    return s0, s1, s2
