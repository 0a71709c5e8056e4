"""‖θ₀‖ of each anchor, measured once."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.exchange import Exchange, Segments
from ..core.methods import RULES
from ..core.sharding import has_whole_rows, local, version_of

_known = WeakTensorKeyDictionary()  # of anchors: norm and version that the size is valid for, and the size


def known_size(anchor: Tensor, norm: str) -> Tensor | None:
    """‖θ₀‖, a float64 of shape [1] on its device, if it has been measured."""
    valid_for, size = _known.get(anchor, (None, None))
    return size if valid_for == (norm, version_of(anchor)) else None


@torch.no_grad()
def measure(anchors: Sequence[Tensor], norm: str) -> None:
    """Measures ‖θ₀‖ of these anchors, all on one device.

    norm: "l2" or "mars", the largest Σ|·| of a row.

    All processes that have parts of them must call it together.
    """
    if not anchors:
        return
    device = local(anchors[0]).device
    cut = [anchor for anchor in anchors if norm == "mars" and not has_whole_rows(anchor)]
    for anchor, size in zip(cut, _sizes_of_cut_rows(cut), strict=True):
        _remember(anchor, norm, size)
    rest = [anchor for anchor in anchors if norm != "mars" or has_whole_rows(anchor)]
    sums = [_sums(local(anchor), norm) for anchor in rest]
    here = torch.stack([of.amax() if len(of) else of.new_zeros(()) for of in sums]) if rest else None
    if here is not None:
        exchange = Exchange(rest, [1] * len(rest), device)
        sizes = exchange.sum(here).sqrt() if norm == "l2" else exchange.largest(here)
        for anchor, size in zip(rest, sizes.split(1), strict=True):
            _remember(anchor, norm, size)


def _sizes_of_cut_rows(anchors: Sequence[Tensor]) -> Sequence[Tensor]:
    if not anchors:
        return []
    segments = Segments(anchors, [RULES["observe_rows"]] * len(anchors))
    sums = segments.whole(torch.cat([_sums(local(anchor), "mars") for anchor in anchors])[:, None])
    return [of.amax(0) for of in sums.split(segments.counts)]


def _remember(anchor: Tensor, norm: str, size: Tensor) -> None:
    _known[anchor] = (norm, version_of(anchor)), size


def _sums(anchor: Tensor, norm: str) -> Tensor:
    """Σ a² of a tensor, or Σ|a| of each row."""
    if norm == "l2":
        return torch.linalg.vector_norm(anchor, 2, dtype=torch.float64).square().reshape(1)  # type: ignore[no-any-return]
    rows = anchor.flatten(1) if anchor.dim() > 1 else anchor.reshape(1, -1)
    return torch.linalg.vector_norm(rows, 1, dim=1, dtype=torch.float64)  # type: ignore[no-any-return]
