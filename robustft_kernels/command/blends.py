"""New values for the tensors of TUNED, span by span: by WiSE-FT, by a projection, and from several TUNED."""

from collections.abc import Collection, Iterator, Sequence
from math import isnan

import torch
from torch import Tensor

from ..core.ranges import FROM_0_TO_1, check_number
from ..finetune.projection import NO_BOUND, Ball, check_norm, interpolate_
from ..finetune.soups import Angles, mean, pieces, stocked
from ..finetune.wise import wise_ft
from .pairs import Pairs
from .source import Source
from .spans import Norm, Span, spans


class Blend:
    """Values for `Source.write` of TUNED. What is not among the names keeps its bytes.

    changed: how many tensors got new values so far.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names, self.changed = names, 0

    def __call__(self, name: str) -> Iterator[Tensor] | None:
        """The new elements of a tensor, flat and in order, or None if it keeps its bytes."""
        if name not in self.names:
            return None
        new = self.values(name)
        self.changed += new is not None
        return new

    def values(self, name: str) -> Iterator[Tensor] | None:
        raise NotImplementedError


class _OfTwo(Blend):
    """A blend of TUNED and BASE."""

    def __init__(self, base: Source, tuned: Source, pairs: Pairs) -> None:
        super().__init__(pairs.base_of)
        self.base, self.tuned, self.pairs = base, tuned, pairs

    def both(self, name: str) -> Iterator[tuple[Span, Tensor, Tensor]]:
        """θ and θ₀ of each span, flat. They are valid until the next."""
        for span in spans(self.tuned.entries[name].shape):
            theta_0 = self.base.read(self.pairs.base_of[name], span.start, span.stop)
            yield span, self.tuned.read(name, span.start, span.stop), theta_0


class Wise(_OfTwo):
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


class Projection(_OfTwo):
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


class Soup(Blend):
    """The mean of several TUNED, bit for bit that of `soup`. What is written is the first.

    pairs: of the first with each other one.
    """

    def __init__(self, tuned: Sequence[Source], pairs: Sequence[Pairs]) -> None:
        super().__init__(pairs[0].base_of)
        self._sides, self._pairs = tuned, pairs

    def values(self, name: str) -> Iterator[Tensor] | None:
        return (thetas[0].copy_(mean(thetas)) for thetas in self.spans(name))

    def spans(self, name: str) -> Iterator[list[Tensor]]:
        """The spans of a tensor on all sides, flat. They are valid until the next."""
        names = [name, *(pairs.base_of[name] for pairs in self._pairs)]
        for start, stop in pieces(self._sides[0].entries[name].numel):
            yield [side.read(of, start, stop) for side, of in zip(self._sides, names, strict=True)]


class Stock(Soup):
    """Model Stock of several TUNED and BASE, bit for bit that of `model_stock`. A tensor that moved in none keeps its
    bytes.

    pairs: of the first TUNED with each other one, and at last with BASE.
    ratios: the t of each tensor that was asked for.
    """

    def __init__(self, tuned: Sequence[Source], base: Source, pairs: Sequence[Pairs]) -> None:
        super().__init__([*tuned, base], pairs)
        self.ratios: dict[str, float] = {}

    def values(self, name: str) -> Iterator[Tensor] | None:
        angles = Angles(name, len(self._sides) - 1)
        for *thetas, theta_0 in self.spans(name):
            angles.add(theta_0, thetas)
        t = self.ratios[name] = angles.ratio
        if isnan(t):
            return None
        return (thetas[0].copy_(stocked(theta_0, thetas, t)) for *thetas, theta_0 in self.spans(name))
