"""The oracle's numbers as they are stored, in bfloat16 and in 8 bits, rounded to nearest or stochastically. It shares
no code with a kernel."""

import torch
from torch import Tensor


def mix(x: Tensor, amid: Tensor | int = 0) -> Tensor:
    """MurmurHash3's finalizer, on the uint32 that an int64 holds. amid: is added between its rounds."""
    for shift, factor, added in ((16, 0x85EBCA6B, amid), (13, 0xC2B2AE35, 0)):
        x = (x ^ (x >> shift)) * factor + added & 0xFFFFFFFF
    return x ^ (x >> 16)


def chance_of(param: Tensor, seed: int, t: Tensor | None, phase: int) -> Tensor:
    """16 random bits for each element: a hash of seed, step, phase and the element's place in `param`'s memory, so that
    a repeated run repeats them.

    Phase 0 is θ̃, and 1 is the pull. 2 and 3 are the first and the second moment, which take the upper and the lower
    half of one hash.
    """
    count = torch.zeros((), dtype=torch.int64, device=param.device) if t is None else t.to(torch.int64)
    key = mix(mix(seed >> 32 ^ mix(count * 4 + min(phase, 2))) ^ (seed & 0xFFFFFFFF)).to(param.device)
    places = torch.empty_like(param, dtype=torch.int64, requires_grad=False)
    in_memory(places).copy_(torch.arange(param.numel(), device=param.device))
    bits = mix(places & 0xFFFFFFFF ^ key, mix(key + (places >> 32) & 0xFFFFFFFF))
    return bits & 0xFFFF if phase == 3 else bits >> 16


def round_stochastically(values: Tensor, param: Tensor, seed: int, t: Tensor | None, phase: int) -> Tensor:
    """A bfloat16 neighbour of each value. The upper one comes with the probability of the value's distance from the
    lower.

    Adds 16 random bits below the last bit that stays. Inf and nan stay. Gupta et al., "Deep Learning with Limited
    Numerical Precision", ICML 2015, Section 3.
    """
    chance = chance_of(param, seed, t, phase)
    single = values.to(torch.float32)
    bits = single.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    moved = (bits + chance & 0xFFFF0000).to(torch.int32).view(torch.float32)
    return torch.where(single.isfinite(), moved, single).to(values.dtype)


def in_memory(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def from_8_bit(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers that codes stand for, in float64: ±(k/√u)²·2^(e − 127), u = 2¹⁴ for int8 and 2¹⁶ for uint8. 32
    neighbours share the byte e, which is 255 for nan."""
    numbers = torch.empty_like(codes, dtype=torch.float64)
    e = scales.reshape(-1).repeat_interleave(32).double()
    k = in_memory(codes).double()
    value = k.sign() * k**2 / (2**14 if codes.dtype == torch.int8 else 2**16) * 2 ** (e - 127)
    in_memory(numbers).copy_(torch.where(e == 255, torch.nan, value))
    return numbers


def to_8_bit(numbers: Tensor, codes: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """The codes and scales of numbers, rounded stochastically by 16 random bits each.

    2^(e − 127) is the smallest power of two of which the block's largest number is at most the part that the largest
    code stands for. Of the two codes around a number, the upper one comes with the probability of the number's distance
    from what the lower stands for. Without a sign, a number above 0 has a code above 0.
    """
    most, units = (127, 2.0**14) if codes.dtype == torch.int8 else (255, 2.0**16)
    x = in_memory(numbers).reshape(-1, 32)
    largest = x.abs().amax(1, keepdim=True)
    part = largest.float() * torch.tensor(units / most**2 * (1 - 2.0**-20), dtype=torch.float32)
    e = (torch.frexp(part).exponent + 127).where(part > 0, 1).clamp(1, 253)
    finite = largest.isfinite()
    squares = torch.where(finite, x.abs() * 2.0 ** (127 - e.double()) * units, 0)
    lower = squares.sqrt().floor().clamp(max=most)
    share = (squares - lower**2) / (2 * lower + 1)
    k = (lower + (in_memory(chance).reshape(-1, 32) / 2**16 < share)).clamp(max=most)
    k = torch.where((codes.dtype == torch.uint8) & finite & (x > 0), k.clamp(min=1), k)
    out = torch.empty_like(codes)
    in_memory(out).copy_((k * torch.where(x < 0, -1, 1)).reshape(-1))
    return out, torch.where(finite, e, 255)


class Rounding:
    """Makes a step's values into what `stored` can hold. Rounds to nearest, or with a seed, stochastically."""

    def __init__(self, stored: Tensor, seed: int | None, t: Tensor | None) -> None:
        self.stored, self.t = stored, t
        self.seed = seed if stored.dtype == torch.bfloat16 else None

    def __call__(self, values: Tensor, phase: int) -> Tensor:
        if self.seed is not None:
            values = round_stochastically(values, self.stored, self.seed, self.t, phase)
        return values.to(self.stored.dtype).to(values.dtype)
