"""How long to wait before looking again: longer and longer while nothing happens, and never most of the time."""

from __future__ import annotations

# A look may take this share of the time.
_SHARE = 0.1
_GROWTH = 1.5


class Wait:
    """A delay in seconds between `shortest` and `longest`, for one loop that looks again and again."""

    def __init__(self, shortest: float, longest: float) -> None:
        self._shortest = shortest
        self._longest = max(shortest, longest)
        self._delay = shortest
        self._seen: object = None

    def next(self, seen: object, took: float) -> float:
        """Return how long to wait after a look that took `took` seconds and saw `seen`; something else resets it."""
        if seen != self._seen:
            self._seen, self._delay = seen, self._shortest
        else:
            self._delay = min(self._delay * _GROWTH, self._longest)
        return max(self._delay, took * (1 / _SHARE - 1))
