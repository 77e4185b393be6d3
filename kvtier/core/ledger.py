"""Device bytes, counted at every allocation and bounded before it happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvtier.errors import CapacityError
from kvtier.types import format_bytes

__all__ = ["Ledger"]


class Ledger:
    """What kvtier holds on one device, by purpose.

    Parameters
    ----------
    device : str
        For messages.
    limit : int, optional
        Bytes that are never exceeded; None for no bound.

    Attributes
    ----------
    in_use, peak : int
        Bytes held now, and the most that ever were.
    reserved : int
        Bytes expected for everything but pages, which pages must leave free.
    reclaim : callable, optional
        Asked to free bytes before an allocation is refused.

    Notes
    -----
    Not locked: the memory that owns the ledger calls it under its own lock.
    """

    def __init__(self, device: str, limit: int | None) -> None:
        self.device = device
        self.limit = limit
        self.in_use = 0
        self.peak = 0
        self.reserved = 0
        self.by_purpose: Counter[str] = Counter()
        self.reclaim: Callable[[int], None] | None = None

    def page_room(self) -> int | None:
        """Bytes that pages may still take, leaving what is ``reserved`` for the rest; None without a limit."""
        if self.limit is None:
            return None
        pages = self.by_purpose["pages"]
        return self.limit - pages - max(self.reserved, self.in_use - pages)

    def fits(self, nbytes: int) -> bool:
        """Whether ``nbytes`` more stay within the limit."""
        return self.limit is None or self.in_use + nbytes <= self.limit

    def take(self, purpose: str, nbytes: int) -> None:
        """Count an allocation about to be made.

        Raises
        ------
        CapacityError
            When it would pass the limit, also after the tiers gave back what they could.
        """
        if self.limit is not None and self.in_use + nbytes > self.limit:
            self._find_room(purpose, nbytes)
        self.in_use += nbytes
        self.by_purpose[purpose] += nbytes
        if self.in_use > self.peak:
            self.peak = self.in_use

    def give(self, purpose: str, nbytes: int) -> None:
        """Count an allocation that was freed."""
        self.in_use -= nbytes
        self.by_purpose[purpose] -= nbytes

    @contextmanager
    def lent(self, purpose: str, nbytes: int) -> Iterator[None]:
        """Count an allocation that lives as long as the context.

        Raises
        ------
        CapacityError
            As ``take``.
        """
        self.take(purpose, nbytes)
        try:
            yield
        finally:
            self.give(purpose, nbytes)

    def _find_room(self, purpose: str, nbytes: int) -> None:
        if self.reclaim is not None:
            self.reclaim(nbytes)
        if not self.fits(nbytes):
            raise CapacityError(
                f"the device budget of {format_bytes(self.limit or 0)} on {self.device} cannot hold "
                f"{format_bytes(nbytes)} more for {purpose} beside {format_bytes(self.in_use)} in use "
                f"({self.describe()}); raise device="
            )

    def describe(self) -> str:
        """Bytes by purpose, for messages."""
        held = [f"{purpose} {format_bytes(count)}" for purpose, count in sorted(self.by_purpose.items()) if count]
        return ", ".join(held) or "nothing"
