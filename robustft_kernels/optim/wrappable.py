"""Which optimizers `Anchored` can be put around."""

from collections.abc import Collection, Iterator
from typing import Any

from torch.optim import Optimizer

from .anchored import AnchoredOptimizer
from .around import SETTINGS
from .wrapping import WrappingOptimizer

# Methods by which optimizers put other weights in the place of those that they step: Schedule-Free and others of two
# modes, averages (torchcontrib, NeMo) and Lookahead.
EXCHANGES = (("train", "eval"), ("swap_swa_sgd",), ("swap_ema_weights",), ("backup_and_load_cache",))
PASSED_ON = ("AcceleratedOptimizer",)  # these have such methods whatever they hold


def check_wrappable(optimizer: object) -> None:
    """Raises TypeError for what is no torch.optim.Optimizer, and ValueError for one that a pull cannot go around."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Anchored wraps a torch.optim.Optimizer, not a {name}")
    if isinstance(optimizer, AnchoredOptimizer | WrappingOptimizer):
        raise ValueError(f"{name} has methods and anchors of its own: set them there")
    if clashing := [key for key in SETTINGS if key in optimizer.defaults]:
        raise ValueError(f"{name} has a hyper-parameter {clashing[0]!r} of its own, which its groups need for it")
    for of in (optimizer, *_within(optimizer, ())):
        if methods := _exchanged_by(of):
            raise ValueError(
                f"{type(of).__name__} exchanges the weights that it steps for others, by {' and '.join(methods)}, and "
                "a pull around it would leave those unpulled; average what is pulled instead: put "
                "schedulefree.ScheduleFreeWrapper around AnchoredAdamW or AnchoredSGD, or take "
                "torch.optim.swa_utils.AveragedModel"
            )


def _within(optimizer: Any, above: Collection[int]) -> Iterator[Any]:
    """The optimizers that this one holds, and those that they hold."""
    above = (*above, id(optimizer))
    for value in getattr(optimizer, "__dict__", {}).values():
        for of in value if isinstance(value, list | tuple) else (value,):
            if id(of) not in above and (isinstance(of, Optimizer) or hasattr(of, "param_groups")):
                yield of
                yield from _within(of, above)


def _exchanged_by(optimizer: Any) -> list[str]:
    """The methods of an optimizer by which its weights are exchanged, as a message has them."""
    if type(optimizer).__name__ in PASSED_ON:
        return []
    for names in EXCHANGES:
        if all(callable(getattr(optimizer, name, None)) for name in names):
            return [f"{name}()" for name in names]
    return []
