"""Which item is on whose screen: in memory, for some time, so that nobody is handed another's item needlessly."""

from __future__ import annotations

import threading
import time
from collections import Counter

__all__ = ["Leases"]


class Leases:
    """One item at most per labeller. `lock` is held by whoever looks first and then takes."""

    def __init__(self, seconds: float) -> None:
        self.lock = threading.RLock()
        self._seconds = seconds
        self._held: dict[str, tuple[str, float]] = {}

    def take(self, labeller: str, item_id: str) -> None:
        """Put the item on the labeller's screen, in place of what is there."""
        with self.lock:
            self._held[labeller] = (item_id, time.monotonic() + self._seconds)

    def release(self, labeller: str, item_id: str) -> None:
        """Take the item from the labeller's screen, if it is the one there."""
        with self.lock:
            if self._held.get(labeller, ("",))[0] == item_id:
                del self._held[labeller]

    def own(self, labeller: str) -> str | None:
        """The item on the labeller's screen."""
        return self._current().get(labeller)

    def of_others(self, labeller: str) -> Counter[str]:
        """On how many other screens each item is."""
        return Counter(item for name, item in self._current().items() if name != labeller)

    def _current(self) -> dict[str, str]:
        with self.lock:
            now = time.monotonic()
            self._held = {name: lease for name, lease in self._held.items() if lease[1] > now}
            return {name: item for name, (item, _) in self._held.items()}
