"""The exact cache in Valkey: what goes in comes out, within its bounds, and its absence costs next to nothing."""

import math
import time
import uuid

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.backends.entry_codec import decoded, encoded
from gateway.backends.valkey_cache import ValkeyCache
from gateway.backends.valkey_client import ValkeyClient
from gateway.core.repeats import Entry
from gateway.core.services import Delta, Done, Finished, Started, TokenLogprob, TopLogprob, Usage
from testkit.servers import ValkeyServer, valkey_server
from testkit.waiting import eventually

ANSWER = Entry(
    "v1", (Started(3, "v1"), Delta(0, "Grüße \N{GRINNING FACE}", 2), Finished(0, "stop"), Done(Usage(3, 2, 1)))
)
FLOATS = st.floats(allow_nan=False)
BYTES = st.binary(max_size=4)
TOPS = st.lists(st.builds(TopLogprob, st.integers(0, 9), FLOATS, st.text(max_size=3), BYTES), max_size=2).map(tuple)
TOKENS = st.lists(st.builds(TokenLogprob, st.integers(0, 9), FLOATS, st.text(max_size=3), BYTES, TOPS), max_size=2).map(
    tuple
)
EVENTS = st.one_of(
    st.builds(Started, st.integers(0, 9), st.text(max_size=3), TOKENS, st.integers(0, 3)),
    st.builds(Delta, st.integers(0, 3), st.text(max_size=5), st.integers(0, 3), TOKENS),
    st.builds(Finished, st.integers(0, 3), st.sampled_from(["stop", "length"])),
    st.builds(Done, st.builds(Usage, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))),
)


def incompressible(num_bytes):
    return Entry("v1", tuple(Delta(0, uuid.uuid4().hex, 1) for _ in range(num_bytes // 18)))


def key():
    return f"acme:{uuid.uuid4().hex}"


@given(st.builds(Entry, st.text(max_size=3), st.lists(EVENTS, max_size=6).map(tuple)))
def test_what_goes_in_comes_out(entry):
    assert decoded(encoded(entry), max_bytes=100_000) == entry


def test_log_probability_that_is_none_survives():
    entry = Entry("v", (Started(1, "v", (TokenLogprob(1, math.nan, "a", b"a"),)),))
    assert math.isnan(decoded(encoded(entry), max_bytes=1000).events[0].prompt_logprobs[0].logprob)


@settings(max_examples=300)
@given(st.binary(max_size=200) | st.integers(0, 60).map(lambda cut: encoded(ANSWER)[:cut]))
def test_anything_else_is_refused_and_never_run(packed):
    with pytest.raises(ValueError, match="entry"):
        decoded(packed, max_bytes=100_000)


def test_bomb_is_not_unpacked():
    bomb = encoded(Entry("v", (Delta(0, "a" * 10_000_000, 1),)))
    assert len(bomb) < 64 * 1024
    with pytest.raises(ValueError, match="too large"):
        decoded(bomb, max_bytes=4_000_000)


@pytest.fixture(scope="module")
def valkey():
    with valkey_server() as server:
        yield server


@pytest.mark.integration
class TestInValkey:
    @pytest.fixture
    async def cache(self, valkey: ValkeyServer):
        connected = ValkeyCache.connect(valkey.url, ttl_s=60.0, timeout_s=2.0)
        yield connected
        connected.close()

    @pytest.fixture
    def look(self, valkey: ValkeyServer):
        """For the tests' eyes."""
        with redis.Redis.from_url(valkey.url) as client:
            yield client

    async def test_entry_is_found_by_its_key_alone(self, cache):
        kept = key()
        await cache.put(kept, ANSWER)
        assert await cache.get(kept) == ANSWER
        assert await cache.get(key()) is None

    async def test_entry_goes_after_its_time(self, valkey):
        cache = ValkeyCache.connect(valkey.url, ttl_s=1.0, timeout_s=2.0)
        kept = key()
        await cache.put(kept, ANSWER)
        assert await cache.get(kept) == ANSWER

        async def is_gone():
            return await cache.get(kept) is None

        await eventually(is_gone)
        cache.close()

    async def test_large_entries_are_not_kept(self, cache):
        for entry in (incompressible(200_000), Entry("v", (Delta(0, "", 1),) * 5000)):
            kept = key()
            await cache.put(kept, entry)
            assert await cache.get(kept) is None

    async def test_large_ones_within_the_bound_are(self, cache):
        kept, entry = key(), incompressible(40_000)
        await cache.put(kept, entry)
        assert await cache.get(kept) == entry

    async def test_together_they_stay_within_their_bytes_and_the_oldest_goes_first(self, valkey, look):
        small = ValkeyCache(ValkeyClient(valkey.url), ttl_s=60.0, timeout_s=2.0, max_total_bytes=200_000)
        keys = [key() for _ in range(12)]
        for one in keys:
            await small.put(one, incompressible(40_000))
        found = [await small.get(one) is not None for one in keys]
        assert found[-1] and not found[0] and found == sorted(found)
        sizes = [look.strlen(f"pressroom:cache:{one}") for one in keys]
        assert 100_000 < sum(sizes) <= 200_000
        small.close()

    async def test_writing_one_entry_again_and_again_takes_no_more_room(self, cache, look):
        kept = key()
        for _ in range(20):
            await cache.put(kept, ANSWER)
        one = look.strlen(f"pressroom:cache:{kept}")
        assert int(look.hget("pressroom:cache:sizes", f"pressroom:cache:{kept}")) == one

    async def test_what_somebody_else_wrote_there_is_a_miss(self, cache, look):
        kept = key()
        look.set(f"pressroom:cache:{kept}", b"cos\nsystem\n(S'true'\ntR.")
        assert await cache.get(kept) is None


@pytest.mark.integration
async def test_frozen_valkey_costs_one_time_out_and_then_nothing():
    with valkey_server() as server:
        cache = ValkeyCache.connect(server.url, ttl_s=60.0)
        kept = key()

        async def is_kept():
            await cache.put(kept, ANSWER)
            return await cache.get(kept) == ANSWER

        await eventually(is_kept)
        server.pause()
        started = time.monotonic()
        assert await cache.get(kept) is None
        assert time.monotonic() - started < 0.5
        started = time.monotonic()
        for _ in range(100):
            assert await cache.get(kept) is None
            await cache.put(kept, ANSWER)
        assert time.monotonic() - started < 1.0
        server.resume()
        await eventually(is_kept)
        cache.close()


async def test_valkey_that_is_not_there_is_a_miss():
    cache = ValkeyCache.connect("redis://127.0.0.1:1/0", ttl_s=60.0)
    assert await cache.get(key()) is None
    await cache.put(key(), ANSWER)
    cache.close()
