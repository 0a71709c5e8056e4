"""New values for the tensors of TUNED, span by span: by WiSE-FT, and by a projection."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.ranges import FROM_0_TO_1, check_number
from ..finetune.projection import NO_BOUND, Ball, check_norm, interpolate_
from ..finetune.wise import wise_ft
from .pairs import Pairs
from .source import Source
from .spans import Norm, Span, spans


class Blend:
    """Values for `Source.write` of TUNED. What has no θ₀ keeps its bytes.

    changed: how many tensors got new values so far.
    """

    def __init__(self, base: Source, tuned: Source, pairs: Pairs) -> None:
        self.base, self.tuned, self.pairs = base, tuned, pairs
        self.changed = 0

    def __call__(self, name: str) -> Iterator[Tensor] | None:
        """The new elements of a tensor, flat and in order, or None if it keeps its bytes."""
        if name not in self.pairs.base_of:
            return None
        new = self.values(name)
        self.changed += new is not None
        return new

    def values(self, name: str) -> Iterator[Tensor] | None:
        raise NotImplementedError

    def both(self, name: str) -> Iterator[tuple[Span, Tensor, Tensor]]:
        """θ and θ₀ of each span, flat. They are valid until the next."""
        for span in spans(self.tuned.entries[name].shape):
            theta_0 = self.base.read(self.pairs.base_of[name], span.start, span.stop)
            yield span, self.tuned.read(name, span.start, span.stop), theta_0


class Wise(Blend):
    """θ₀ + α·(θ − θ₀), as `interpolate_` computes it. α = 1 keeps all bytes.

    `interpolate_` makes ∞ − ∞ no number, and `wise_ft` leaves what is equal on both sides as it is. So a span with what
    is not finite goes to `wise_ft`, which takes up to a hundred times as long.

    Raises ValueError for an α outside [0, 1].
    """

    def __init__(self, base: Source, tuned: Source, pairs: Pairs, alpha: float) -> None:
        super().__init__(base, tuned, pairs)
        check_number("alpha", alpha, FROM_0_TO_1)
        self.alpha = alpha

    def values(self, name: str) -> Iterator[Tensor] | None:
        return None if self.alpha == 1 else self._blended(name)

    def _blended(self, name: str) -> Iterator[Tensor]:
        for _, theta, theta_0 in self.both(name):
            if theta.sum().isfinite():
                interpolate_([theta], [theta_0], self.alpha)
                yield theta
            else:
                yield wise_ft({name: theta_0}, {name: theta}, self.alpha, buffers="interpolate")[name]


class Projection(Blend):
    """θ₀ + min(1, γ/n)·(θ − θ₀), with n and α of `project_`. A tensor that is within its radius keeps its bytes.

    Raises ValueError for a radius that is not above 0, and for an unknown norm.
    """

    def __init__(self, base: Source, tuned: Source, pairs: Pairs, radius: float, norm: str) -> None:
        super().__init__(base, tuned, pairs)
        check_number("radius", radius, NO_BOUND)
        check_norm(norm)
        self.radius, self.norm = torch.tensor([radius], dtype=torch.float64), norm

    def values(self, name: str) -> Iterator[Tensor] | None:
        shape = self.tuned.entries[name].shape
        found = Norm(self.norm, shape)
        for span, theta, theta_0 in self.both(name):
            found.add(span, theta, theta_0)
        whole = Ball([torch.empty(()).expand(shape)], self.norm)  # reads the shape alone
        alphas = whole.alphas(self.radius, found.value)
        return None if bool((alphas == 1).all()) else self._pulled(name, whole, alphas)

    def _pulled(self, name: str, whole: Ball, alphas: Tensor) -> Iterator[Tensor]:
        for span, theta, theta_0 in self.both(name):
            theta, theta_0 = span.by_row(theta), span.by_row(theta_0)
            here = alphas[span.its_rows] if whole.alpha_by_row else alphas
            Ball([theta], self.norm).pull_([theta], [theta_0], here)
            yield theta.view(-1)
