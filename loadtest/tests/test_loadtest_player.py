"""The open loop, with a clock of its own: on time whatever the latency, bounded, honest about what was not sent."""

from collections.abc import Callable

from loadtest.arrivals import Arrival
from loadtest.player import Player


class World:
    """A clock that moves when somebody sleeps, and workers that take latency_s each."""

    def __init__(self, latency_s: float) -> None:
        self.now_s = 100.0
        self.latency_s = latency_s
        self.running: list[float] = []
        self.sent: list[tuple[float, float]] = []
        self.overflown: list[float] = []

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds

    def num_running(self) -> int:
        self.running = [end_s for end_s in self.running if end_s > self.now_s]
        return len(self.running)

    def start(self, work: Callable[[], None]) -> None:
        work()
        self.running.append(self.now_s + self.latency_s)

    def player(self, max_in_flight: int = 100) -> Player:
        return Player(
            self,
            request=lambda arrival, due_s: self.sent.append((due_s, self.now_s)),
            overflow=lambda arrival, due_s: self.overflown.append(due_s),
            clock=self.clock,
            sleep=self.sleep,
            max_in_flight=max_in_flight,
        )


ARRIVALS = [Arrival(at_s, 10, 10) for at_s in (0.0, 0.3, 0.4, 2.0, 2.1)]


def test_arrivals_are_sent_when_due_however_slow_the_answers_are():
    slow, fast = World(latency_s=1000), World(latency_s=0.01)
    for world in (slow, fast):
        world.player().play(ARRIVALS, 100.0, 103.0)
        assert [round(due_s, 6) for due_s, _ in world.sent] == [100.0, 100.3, 100.4, 102.0, 102.1]
        assert all(abs(sent_s - due_s) < 1e-9 for due_s, sent_s in world.sent)
        assert round(world.now_s, 6) == 103.0


def test_what_finds_the_bound_reached_is_told_and_not_sent_late():
    world = World(latency_s=1.0)
    world.player(max_in_flight=2).play(ARRIVALS, 100.0, 103.0)
    assert [round(due_s, 6) for due_s, _ in world.sent] == [100.0, 100.3, 102.0, 102.1]
    assert [round(due_s, 6) for due_s in world.overflown] == [100.4]


def test_one_that_is_late_itself_is_sent_at_once_with_its_own_due_time():
    world = World(latency_s=0.0)
    world.now_s = 101.0
    world.player().play(ARRIVALS[:2], 100.0, 101.5)
    assert world.sent == [(100.0, 101.0), (100.3, 101.0)]


def test_a_stop_is_noticed_within_a_moment_and_nothing_more_is_sent():
    world = World(latency_s=0.0)
    player = world.player()
    real_sleep = world.sleep

    def sleep(seconds: float) -> None:
        real_sleep(seconds)
        if world.now_s > 101.0:
            player.stop()

    player._sleep = sleep
    player.play(ARRIVALS, 100.0, 110.0)
    assert len(world.sent) == 3
    assert world.now_s < 101.5


def test_drain_waits_for_what_is_under_way_but_not_for_ever():
    world = World(latency_s=3.0)
    player = world.player()
    player.play(ARRIVALS[:1], 100.0, 100.5)
    assert not player.drain(1.0)
    assert player.drain(5.0)
    assert 103.0 <= world.now_s < 103.2
