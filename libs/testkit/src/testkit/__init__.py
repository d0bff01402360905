"""What tests of several packages share: waiting for a condition, free ports, a clock that only moves when told.

Knows nothing of any service. Servers, the fake bus and the contract suites are in modules of their own,
so that a unit test which needs none of them does not import them.
"""

from testkit.clock import FakeClock
from testkit.ports import free_port
from testkit.waiting import eventually, eventually_sync

__all__ = ["FakeClock", "eventually", "eventually_sync", "free_port"]
