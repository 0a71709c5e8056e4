"""The plans that were used last. Where a few sets of gradients alternate, each plan is made once."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

ROOM = 16  # a plan keeps no weights or gradients, but the addresses of all tensors, and sums of their chunks


class Keyed(Protocol):
    """What was made from `key`, and holds as long as that is the same."""

    @property
    def key(self) -> Hashable: ...


T = TypeVar("T", bound=Keyed)


class Plans(Generic[T]):
    """Plans by what they were made from.

    current: the one that was used last.
    room: how many are kept.
    """

    def __init__(self, room: int = ROOM) -> None:
        self._room = room
        self._by_key: OrderedDict[Hashable, T] = OrderedDict()
        self.current: T | None = None

    def find(self, key: Hashable) -> T | None:
        """The plan that was made from `key`, if it is still here. It is then the current one."""
        if self.current is not None and self.current.key == key:
            return self.current
        if (found := self._by_key.get(key)) is not None:
            self._by_key.move_to_end(key)
            self.current = found
        return found

    def add(self, plan: T) -> None:
        """Adds a plan, which is then the current one. Drops the one whose last use is longest ago, if there are
        many."""
        self._by_key[plan.key] = self.current = plan
        if len(self._by_key) > self._room:
            self._by_key.popitem(last=False)

    def clear(self) -> None:
        """Drops all plans."""
        self._by_key.clear()
        self.current = None
