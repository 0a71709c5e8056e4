"""Moments in 8 bits: codes with a scale for each block of neighbours. core/eight_bit.py says what they stand for."""

import triton
import triton.language as tl

from ..core.eight_bit import BLOCK as _BLOCK
from .base import exact_root

BLOCK = tl.constexpr(_BLOCK)


@triton.jit
def _scale(e):
    """2^(e − 127), or nan for 255."""
    bits = tl.where(e == 255, 0x7FC00000, e.to(tl.uint32) << 23)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def load_coded(address, scales, offsets, mask, SIGNED: tl.constexpr, ALIGNED: tl.constexpr, EVICT: tl.constexpr):
    """The numbers that codes stand for, zero when masked."""
    CODES: tl.constexpr = tl.int8 if SIGNED else tl.uint8
    UNITS: tl.constexpr = 16384.0 if SIGNED else 65536.0
    pointer = address.to(tl.pointer_type(CODES))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    k = tl.load(pointer + offsets, mask=mask, other=0, eviction_policy=EVICT).to(tl.float32)
    e = tl.load(scales.to(tl.pointer_type(tl.uint8)) + offsets // BLOCK, mask=mask, other=0)
    return k * tl.abs(k) * (1 / UNITS) * _scale(e)


@triton.jit
def store_coded(address, scales, offsets, mask, values, chance, SIGNED: tl.constexpr, ALIGNED: tl.constexpr,
                EVICT: tl.constexpr):  # fmt: skip
    """Stores numbers as codes. Each is one of the two around the number, by 16 random bits. The last dimension consists
    of whole blocks, side by side, which `mask` has or has not."""
    CODES: tl.constexpr = tl.int8 if SIGNED else tl.uint8
    MOST: tl.constexpr = 127.0 if SIGNED else 255.0
    UNITS: tl.constexpr = 16384.0 if SIGNED else 65536.0
    PART: tl.constexpr = UNITS / (MOST * MOST) * (1 - 2.0**-20)
    size = values.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    largest = _of_blocks(tl.where(mask, size, 0))
    scaled = (largest.to(tl.float32, bitcast=True) * PART).to(tl.uint32, bitcast=True)
    finite = largest < 0x7F800000
    e = tl.where(finite, tl.minimum((scaled >> 23) + 1, 253), 255)
    inverse = ((254 - e) << 23).to(tl.uint32).to(tl.float32, bitcast=True)
    squares = tl.where(finite, size, 0).to(tl.uint32).to(tl.float32, bitcast=True) * inverse * UNITS
    k = tl.minimum(exact_root(squares), MOST).to(tl.int32).to(tl.float32)
    draw = chance.to(tl.float32) * (1.0 / 65536)
    k = tl.minimum(tl.where(draw * (k + k + 1) < squares - k * k, k + 1, k), MOST)
    k = tl.where(values < 0, -k, k) if SIGNED else tl.where(finite & (size > 0), tl.maximum(k, 1.0), k)
    pointer = address.to(tl.pointer_type(CODES))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    tl.store(pointer + offsets, k.to(tl.int32).to(CODES), mask=mask, eviction_policy=EVICT)
    first = mask & (offsets % BLOCK == 0)
    tl.store(scales.to(tl.pointer_type(tl.uint8)) + offsets // BLOCK, e.to(tl.uint8), mask=first)


@triton.jit
def _of_blocks(values):
    """For each element, the largest of its block."""
    last: tl.constexpr = values.shape[len(values.shape) - 1]
    if len(values.shape) == 1:
        blocks = tl.reshape(values, [last // BLOCK, BLOCK])
    else:
        blocks = tl.reshape(values, [values.shape[0], last // BLOCK, BLOCK])
    largest = tl.max(blocks, axis=len(blocks.shape) - 1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(largest, blocks.shape), values.shape)
