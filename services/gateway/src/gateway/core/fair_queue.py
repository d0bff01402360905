"""The order in which tenants' requests go on: fair in tokens, by a virtual clock for each tenant.

Every tenant has used so many tokens, divided by its weight; next is the one that has used least. What a request will
use is guessed when it goes on and put right when it ends. Who comes back from a pause starts level with the others:
there is no credit for idling. As in Virtual Token Counter (Sheng et al., OSDI 2024, arXiv 2401.00588): two tenants that
both wait get the same tokens for their weight, within the cost of one request of each. A higher priority goes first,
whatever was used. Knows neither time nor tasks.
"""

from collections import Counter, deque
from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(eq=False, slots=True)
class Entry:
    """One request: its tenant, its class (higher goes first), and what it will use, in tokens."""

    tenant: str
    priority: int
    cost: float
    weight: float = 1.0


E = TypeVar("E", bound=Entry)


class FairQueue(Generic[E]):
    """Requests that wait, and what the tenants have used that have any waiting or running."""

    def __init__(self) -> None:
        self._lines: dict[tuple[int, str], deque[E]] = {}  # by class and tenant; none is empty
        self._waiting: Counter[str] = Counter()
        self._present: Counter[str] = Counter()  # waiting or running
        self._used: dict[str, float] = {}  # of those present, and of those who left in debt
        self._now = 0.0  # never goes back: the most that anyone had used when it was its turn

    def __len__(self) -> int:
        return self._waiting.total()

    def add(self, entry: E) -> None:
        """Lines an entry up behind those of its tenant and class."""
        if not self._waiting[entry.tenant]:
            self._used[entry.tenant] = self._start(entry.tenant)
        self._waiting[entry.tenant] += 1
        self._present[entry.tenant] += 1
        self._lines.setdefault((entry.priority, entry.tenant), deque()).append(entry)

    def first(self) -> E | None:
        """Whose turn it is."""
        if not self._lines:
            return None
        highest = max(priority for priority, _ in self._lines)
        tenants = (tenant for priority, tenant in self._lines if priority == highest)
        return self._lines[highest, min(tenants, key=self._used.__getitem__)][0]

    def take(self, entry: E) -> None:
        """Lets an entry go on, and charges its tenant what it will use; settle() or give_back() ends that."""
        self._remove(entry)
        used = self._used[entry.tenant]
        self._now = max(self._now, used)
        self._used[entry.tenant] = used + entry.cost / entry.weight

    def drop(self, entry: E) -> None:
        """An entry waits no longer, and nothing was used."""
        self._remove(entry)
        self._leave(entry.tenant)

    def settle(self, entry: E, used: float) -> None:
        """An entry that went on has ended and used so many tokens."""
        self._used[entry.tenant] += (used - entry.cost) / entry.weight
        self._leave(entry.tenant)

    def ahead(self, entry: Entry) -> float:
        """Tokens of the entries that would go before this one, were it added now."""
        start = self._used[entry.tenant] if self._waiting[entry.tenant] else self._start(entry.tenant)
        own = self._lines.get((entry.priority, entry.tenant), ())
        start += sum(one.cost for one in own) / entry.weight
        ahead = 0.0
        for (priority, tenant), line in self._lines.items():
            cost = sum(one.cost for one in line)
            if priority > entry.priority or (priority == entry.priority and tenant == entry.tenant):
                ahead += cost
            elif priority == entry.priority:
                # The others go first until they have used as much.
                ahead += min(cost, max(0.0, start - self._used[tenant]) * line[0].weight)
        return ahead

    def last(self) -> E | None:
        """Who makes room where there is none: the newest of the lowest class's tenant with most tokens waiting."""
        if not self._lines:
            return None
        lowest = min(priority for priority, _ in self._lines)
        lines = (line for (priority, _), line in self._lines.items() if priority == lowest)
        return max(lines, key=lambda line: sum(one.cost for one in line) / line[0].weight)[-1]

    def _start(self, tenant: str) -> float:
        return max(self._now, self._used.get(tenant, 0.0))

    def _remove(self, entry: E) -> None:
        place = entry.priority, entry.tenant
        line = self._lines[place]
        line.remove(entry)
        if not line:
            del self._lines[place]
        self._waiting[entry.tenant] -= 1

    def _leave(self, tenant: str) -> None:
        self._present[tenant] -= 1
        if self._present[tenant]:
            return
        del self._present[tenant], self._waiting[tenant]
        if not self._present:  # nobody is here to whom anything could be unfair
            self._used.clear()
            self._now = 0.0
        elif self._used[tenant] <= self._now:
            del self._used[tenant]
