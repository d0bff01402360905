"""What services say at /metrics: read, and compared between two moments. Blocking."""

import http.client
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_HOST = "127.0.0.1"
_MAX_BYTES = 16 * 1024 * 1024

Labels = Mapping[str, str]


class ScrapeFailed(Exception):
    """A service did not say its metrics; the message says why."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """All samples of one service at one moment, by name."""

    samples: Mapping[str, tuple[tuple[Labels, float], ...]]

    def select(self, name: str, **labels: str) -> Iterator[tuple[Labels, float]]:
        """Yields the samples of a name that carry these labels, and perhaps others."""
        for found, value in self.samples.get(name, ()):
            if labels.items() <= found.items():
                yield found, value

    def total(self, name: str, **labels: str) -> float | None:
        """Returns the sum of the samples; None where the service has none of that name and these labels."""
        values = [value for _, value in self.select(name, **labels)]
        return sum(values) if values else None

    def values_of(self, name: str, label: str, **labels: str) -> set[str]:
        """Returns the values that a label has."""
        return {found[label] for found, _ in self.select(name, **labels) if label in found}


EMPTY = Scrape({})


def parse(text: str) -> Scrape:
    """Reads Prometheus' text format. Raises ScrapeFailed for what is none."""
    from prometheus_client.parser import text_string_to_metric_families

    samples: dict[str, list[tuple[Labels, float]]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    except (ValueError, KeyError, IndexError) as error:
        raise ScrapeFailed(f"its metrics make no sense: {error}") from error
    return Scrape({name: tuple(found) for name, found in samples.items()})


def fetch(port: int, timeout_s: float) -> Scrape:
    """Asks a service on this machine. Raises ScrapeFailed; blocks for `timeout_s` at most between two bytes."""
    connection = http.client.HTTPConnection(_HOST, port, timeout=timeout_s)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        body = answer.read(_MAX_BYTES)
    except TimeoutError as error:
        raise ScrapeFailed(f"no answer within {timeout_s:g} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise ScrapeFailed(getattr(error, "strerror", None) or "no answer") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise ScrapeFailed(f"/metrics answered {answer.status}")
    return parse(body.decode(errors="replace"))


class Change:
    """What happened in a service between two scrapes. After a restart all that it counted is new."""

    def __init__(self, before: Scrape, after: Scrape, interval_s: float) -> None:
        start = "process_start_time_seconds"
        self._before = before if before.total(start) == after.total(start) else EMPTY
        self.after = after
        self._interval_s = interval_s

    def increase(self, name: str, **labels: str) -> float | None:
        """Returns by how much a counter grew; None where there is none."""
        after = self.after.total(name, **labels)
        if after is None:
            return None
        before = self._before.total(name, **labels) or 0.0
        return after - before if after >= before else after  # a label's value may have been forgotten meanwhile

    def rate(self, name: str, **labels: str) -> float | None:
        """Returns a counter's growth per second."""
        grown = self.increase(name, **labels)
        return None if grown is None or self._interval_s <= 0 else grown / self._interval_s

    def mean(self, name: str, **labels: str) -> float | None:
        """Returns the mean of a histogram's new observations; None where there were none."""
        count, total = self.increase(f"{name}_count", **labels), self.increase(f"{name}_sum", **labels)
        return total / count if count and total is not None else None

    def quantile(self, q: float, name: str, **labels: str) -> float | None:
        """Returns a quantile of a histogram's new observations, as Prometheus estimates it; None where there were none.

        What lies beyond the last finite bound is told as that bound.
        """
        buckets: dict[float, float] = {}
        for scrape, sign in ((self.after, 1), (self._before, -1)):
            for found, value in scrape.select(f"{name}_bucket", **labels):
                bound = float(found["le"])
                buckets[bound] = buckets.get(bound, 0.0) + sign * value
        bounds = sorted(buckets)
        if not bounds or buckets[bounds[-1]] <= 0:
            return None
        rank = q * buckets[bounds[-1]]
        low, below = 0.0, 0.0
        for bound in bounds:
            if buckets[bound] >= rank:
                if math.isinf(bound):
                    return low
                inside = buckets[bound] - below
                return low + (bound - low) * (rank - below) / inside if inside > 0 else bound
            low, below = bound, buckets[bound]
        return low
