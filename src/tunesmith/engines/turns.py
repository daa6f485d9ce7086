"""What waits, in turns among callers: who has much waiting delays nobody's first."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

_Item = TypeVar("_Item")


class Turns(Generic[_Item]):
    """Items of several callers; each caller's keep their order. Not safe to share between threads."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[_Item]] = {}
        """Of each caller who has something waiting; whose turn was the longest ago comes first."""

    def add(self, caller: str, items: Iterable[_Item]) -> None:
        """Put items behind those of the same caller."""
        if added := [*items]:
            self._waiting.setdefault(caller, deque()).extend(added)

    def next(self, under_way: Mapping[str, int]) -> tuple[str, _Item] | None:
        """Return whose turn it is, and with what; None when nothing waits.

        Args:
            under_way: How much of each caller's is being done: who has least comes first.
        """
        if not self._waiting:
            return None
        caller = min(self._waiting, key=lambda one: under_way.get(one, 0))
        return caller, self._waiting[caller][0]

    def take(self, caller: str) -> _Item:
        """Take out a caller's first item; all others then come before their next."""
        items = self._waiting.pop(caller)
        item = items.popleft()
        if items:
            self._waiting[caller] = items
        return item

    def ahead(self, caller: str) -> int:
        """Return how many items come before the next one that the caller would put here."""
        own = len(self._waiting.get(caller, ()))
        return own + sum(min(len(items), own + 1) for one, items in self._waiting.items() if one != caller)

    def give_up(self, caller: str) -> _Item | None:
        """Take out the last item of whoever has most; None when that is the caller, with one more."""
        most = max(self._waiting, key=lambda one: len(self._waiting[one]), default=caller)
        if len(self._waiting.get(most, ())) <= len(self._waiting.get(caller, ())) + 1:
            return None
        return self._waiting[most].pop()

    def keep(self, wanted: Callable[[_Item], bool]) -> None:
        """Drop the items that are not wanted."""
        kept = {caller: deque(filter(wanted, items)) for caller, items in self._waiting.items()}
        self._waiting = {caller: items for caller, items in kept.items() if items}

    def __iter__(self) -> Iterator[_Item]:
        return (item for items in self._waiting.values() for item in items)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))
