"""How many retries there may be: a part of the requests, so that they never are the load that keeps a service down."""


class RetryBudget:
    """A bucket that requests fill and retries empty; it begins full. Retries are at most `most` + part * requests."""

    def __init__(self, part: float = 0.1, most: float = 10.0) -> None:
        self._part = part
        self._most = most
        self._left = most

    @property
    def allows(self) -> bool:
        """There is one left."""
        return self._left >= 1

    def earn(self) -> None:
        """A request came."""
        self._left = min(self._most, self._left + self._part)

    def spend(self) -> None:
        """A retry is made."""
        assert self.allows
        self._left -= 1
