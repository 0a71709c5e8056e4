"""Digests of anchors: 32 bytes that tell an anchor from any other. They guard against accidents, not against intent.

A digest is two sums modulo 2⁶⁴ of a function of each element's index and bits, and a hash of dtype and shape. Sums add
up over shards. So each process reads what it has, and all have the same digest as of the whole tensor.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import and_
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.exchange import Exchange
from ..core.files import file_of
from ..core.sharding import is_flat_part, is_spread, local, parts_of, same_memory, version_of, whole
from . import native

PIECE, PIECE_ON_CPU = 2**22, 2**15  # elements; on the CPU they stay in the cache
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
WEYL = (0x9E3779B97F4A7C15 - 2**64, 0xD1B54A32D192ED03 - 2**64)
MIX = (0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64)  # of MurmurHash3
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class _Known:
    """The digest of an anchor, as long as the anchor has this version. shown: the copy of it that was handed out last,
    and the version of that."""

    version: int
    digest: Tensor
    shown: tuple[Tensor, int] | None = None


_known = WeakTensorKeyDictionary()  # of anchors


def digest(anchor: Tensor) -> Tensor:
    """The digest of an anchor: 32 bytes, on the CPU."""
    return digests([anchor])[0]


def digests(anchors: Sequence[Tensor], *, anew: bool = False) -> list[Tensor]:
    """The digest of each anchor. They are computed once, as long as nobody writes the anchor.

    For anchors that are spread over processes, there is one all-reduce a mesh. If one of them is not known yet, it is
    for all: a process whose shard is empty cannot know that others were written.

    anew: compute those of spread anchors in any case.
    """
    versions = [version_of(anchor) for anchor in anchors]
    known: list[_Known | None] = [_known.get(anchor) for anchor in anchors]
    spread = [is_spread(anchor) for anchor in anchors]
    unknown = [not is_known(anchor) for anchor in anchors]
    anew |= any(map(and_, spread, unknown))
    todo = [k for k in range(len(anchors)) if unknown[k] or (anew and spread[k])]
    if todo:
        new = [anchors[k] for k in todo]
        here = torch.stack([sums_here(anchor) for anchor in new])
        sums = Exchange(new, [1] * len(new), here.device).sum(here)
        for k, of_anchor in zip(todo, sums, strict=True):
            content = torch.cat([of_anchor.view(torch.uint8), _head(anchors[k].dtype, anchors[k].shape)])
            before = known[k]
            known[k] = _known[anchors[k]] = _Known(versions[k], content, before.shown if before else None)
    return [of.digest for of in known if of is not None]


def copy_for(anchor: Tensor, param: Tensor) -> Tensor:
    """A copy of an anchor's digest, on the parameter's device."""
    content = digest(anchor)
    return torch.empty_like(content, device=local(param).device).copy_(content)


def taken(anchors: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """The anchors, by parameter, that have a digest. It is known from here on. A part of FSDP1's flat parameters has
    none, since each process has another."""
    whole_ones = {param: anchor for param, anchor in anchors.items() if not is_flat_part(param)}
    digests(list(whole_ones.values()))
    return whole_ones


def shown(anchor: Tensor, param: Tensor) -> Tensor:
    """A copy of an anchor's digest to be handed out. torch.distributed.checkpoint writes into what it finds."""
    content = copy_for(anchor, param)
    _known[anchor].shown = content, content._version
    return content


def is_known(anchor: Tensor) -> bool:
    """Whether the digest of an anchor is known in this process, and nobody has written the anchor here."""
    of: _Known | None = _known.get(anchor)
    return of is not None and of.version == version_of(anchor)


def is_of(told: Tensor | None, anchor: Tensor) -> bool:
    """Whether a digest is that of an anchor."""
    return told is not None and torch.equal(told.cpu(), digest(anchor))


def check_saved(states: Sequence[tuple[str, Mapping[str, Any], Tensor | None]]) -> None:
    """Raises ValueError naming the first parameter whose digest in a checkpoint is of another anchor. A digest beside
    an anchor is of that one. A digest alone is of the anchor that is here.

    states: what a parameter is called, its saved state, and the anchor that is here.
    """
    subjects: list[tuple[str, Tensor, Tensor, Tensor | None]] = []
    for label, saved, present in states:
        if (told := saved.get("anchor_digest")) is None:
            continue
        if (anchor := saved.get("anchor")) is not None:
            if not _is_untouched(told, present):
                subjects.append((label, told.cpu(), _as_told(anchor, told.cpu()), anchor))
        elif present is None:
            raise ValueError(
                f"the checkpoint leaves the anchor of {label} to a file; make the optimizer with that anchor"
            )
        else:
            subjects.append((label, told.cpu(), present, None))
    found = digests([anchor for _, _, anchor, _ in subjects], anew=True)
    for (label, told, anchor, loaded), content in zip(subjects, found, strict=True):
        if torch.equal(content, told):
            continue
        if loaded is not None:
            dtype, why = _dtype_of(told, loaded), ""
            if dtype != loaded.dtype:
                why = f", or rounded: it was loaded into {loaded.dtype}; make the optimizer with anchor_dtype={dtype}"
            raise ValueError(f"the checkpoint's anchor of {label} is damaged{why}")
        if not torch.equal(_sha256(anchor), told):
            raise ValueError(f"the anchor of {label} is not the one that the checkpoint was made with: another file?")


def _is_untouched(told: Tensor, present: Tensor | None) -> bool:
    """Whether a digest is the one that was shown of our own anchor, and nobody has written it. It then says nothing of
    a checkpoint, which has no digests."""
    of: _Known | None = None if present is None else _known.get(present)
    if of is None or of.shown is None:
        return False
    shown, version = of.shown
    return same_memory(shown, told) and shown._version == version


def _as_told(anchor: Tensor, told: Tensor) -> Tensor:
    """A saved anchor in the dtype that its digest is of. A checkpoint that is loaded in place takes the dtype of what
    it finds. The anchor itself if it has other numbers than it would have there."""
    dtype = _dtype_of(told, anchor)
    if dtype == anchor.dtype:
        return anchor
    there = anchor.detach().to(dtype)
    return there if torch.equal(local(there).to(anchor.dtype), local(anchor)) else anchor


def _dtype_of(told: Tensor, anchor: Tensor) -> torch.dtype:
    """The dtype that a digest is of."""
    dtypes = (anchor.dtype, *FLOATS)
    return next((of for of in dtypes if torch.equal(_head(of, anchor.shape), told[16:])), anchor.dtype)


def _head(dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """16 bytes that tell a dtype and a shape."""
    content = hashlib.blake2b(f"{dtype} {tuple(shape)}".encode(), digest_size=16).digest()
    return torch.tensor(list(content), dtype=torch.uint8, device="cpu")


def _sha256(anchor: Tensor) -> Tensor:
    """What checkpoints up to 0.3.0 have in place of a digest."""
    content = whole(anchor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy()
    sha = hashlib.sha256(f"{anchor.dtype} {tuple(anchor.shape)} ".encode())
    sha.update(content.data)
    return torch.tensor(list(sha.digest()), dtype=torch.uint8, device="cpu")


@torch.no_grad()
def sums_here(anchor: Tensor) -> Tensor:
    """Both sums over what is here of an anchor, on the CPU. Raises RuntimeError if its file was written."""
    file = file_of(anchor)
    if file is not None:
        file.check()
    steps = [1] * anchor.dim()  # of the index of an element in the whole tensor, along each dimension
    for dim in reversed(range(anchor.dim() - 1)):
        steps[dim] = steps[dim + 1] * anchor.shape[dim + 1]
    sums = torch.zeros(2, dtype=torch.int64, device="cpu")
    for part, offsets in parts_of(anchor):
        if part.numel():
            first = sum(offset * step for offset, step in zip(offsets, steps, strict=True))
            sums += sums_of(*_flattened(part.detach(), steps), first).cpu()
    if file is not None:
        file.check()
    return sums


def _flattened(part: Tensor, steps: Sequence[int]) -> tuple[Tensor, list[int], list[int]]:
    """The bits of a part as they lie in memory, and its sizes and steps in that order, neighbours joined."""
    order = sorted((k for k in range(part.dim()) if part.shape[k] > 1), key=part.stride, reverse=True)
    ones = [k for k in range(part.dim()) if part.shape[k] == 1]
    sizes, joined = [1], [1]
    for k in order:
        if sizes[-1] == 1 or joined[-1] == steps[k] * part.shape[k]:
            sizes[-1] *= part.shape[k]
            joined[-1] = steps[k]
        else:
            sizes.append(part.shape[k])
            joined.append(steps[k])
    flat = part.permute(ones + order).reshape(-1).contiguous()
    return flat.view(BITS[part.itemsize]), sizes, joined


def sums_of(flat: Tensor, sizes: list[int], steps: list[int], first: int, *, in_torch: bool = False) -> Tensor:
    """Σ mix(bits + index·w) modulo 2⁶⁴ for both w of `WEYL`, over a part of a tensor.

    flat: its elements as integers, without gaps in memory.
    sizes, steps, first: the index in the whole tensor. It begins with `first`, and grows by steps[k] along the k-th of
        these dimensions. The last one is innermost in memory.
    """
    if not in_torch and (found := native.digest(flat, sizes, steps, first)) is not None:
        return found
    sums = torch.zeros(2, dtype=torch.int64, device=flat.device)
    mask = -1 if flat.itemsize == 8 else 2 ** (8 * flat.itemsize) - 1
    piece = PIECE_ON_CPU if flat.device.type == "cpu" else PIECE
    for begin in range(0, flat.numel(), piece):
        bits = flat[begin : begin + piece].to(torch.int64) & mask
        at = torch.arange(begin, begin + bits.numel(), device=flat.device)
        index = torch.full_like(at, first)
        for size, step in zip(reversed(sizes[1:]), reversed(steps[1:]), strict=True):
            index += at % size * step
            at //= size
        index += at * steps[0]
        for k, weyl in enumerate(WEYL):
            sums[k] += _mixed(bits + index * weyl).sum()
    return sums


def _mixed(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer for 64 bits, on the uint64 that an int64 holds."""
    for factor in MIX:
        x = (x ^ (x >> 33 & 2**31 - 1)) * factor
    return x ^ (x >> 33 & 2**31 - 1)
