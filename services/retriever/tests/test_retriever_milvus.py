"""The contract on a real Milvus Lite, and what happens when it dies."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from retriever_fakes import bag_of_words, make_chunk
from retriever_suite import ACME, IndexSuite, row

from chassis.errors import Code, PlatformError
from retriever.backends.milvus import COLLECTION, MilvusChunks, prepare
from retriever.backends.milvus_connection import MilvusConnection
from retriever.core.chunking import MAX_CHUNK_BYTES
from retriever.core.ports import Scope
from testkit import eventually
from testkit.servers import MilvusServer

pytestmark = pytest.mark.integration


@pytest.fixture
async def connection(milvus: MilvusServer) -> AsyncIterator[MilvusConnection]:
    connection = MilvusConnection(milvus.uri, prepare, timeout_s=10)
    watcher = asyncio.create_task(connection.watch())
    await eventually(lambda: connection.connected, timeout_s=20)
    yield connection
    watcher.cancel()
    await connection.close()


@pytest.fixture
async def index(connection: MilvusConnection) -> AsyncIterator[MilvusChunks]:
    yield MilvusChunks(connection)
    await eventually(lambda: connection.connected, timeout_s=20)
    await connection.write(lambda client, s: client.delete(COLLECTION, filter='key != ""', timeout=s))


class TestMilvusLite(IndexSuite):
    async def test_the_largest_chunk_and_more_rows_than_a_page_fit(self, index: MilvusChunks) -> None:
        await index.write([row(make_chunk(text="日" * (MAX_CHUNK_BYTES // 3)))])
        (chunk,) = await index.read(ACME, [make_chunk().key])
        assert len(chunk.text.encode()) == MAX_CHUNK_BYTES
        vector = bag_of_words("x")
        for start in range(0, 2500, 500):
            await index.write([(make_chunk("d2", i, "x"), vector) for i in range(start, start + 500)])
        found = await index.find(ACME, document_ids=["d2"])
        assert sorted(ref.ordinal for ref in found) == list(range(2500))

    async def test_what_was_written_survives_kill9_and_the_connection_comes_back(
        self, milvus: MilvusServer, connection: MilvusConnection, index: MilvusChunks
    ) -> None:
        await index.write([row(make_chunk(f"d{i}", text=f"zebra {i}")) for i in range(20)])
        await index.remove(ACME, [make_chunk("d19").key])
        milvus.kill9()
        with pytest.raises(PlatformError) as raised:
            await index.heads(ACME, None)
        assert (raised.value.code, raised.value.retryable) == (Code.UNAVAILABLE, True)
        await eventually(lambda: not connection.connected)
        started = asyncio.get_running_loop().time()
        with pytest.raises(PlatformError):
            await index.dense(Scope(ACME, "default"), bag_of_words("zebra"), 5)
        assert asyncio.get_running_loop().time() - started < 0.5, "an absent server is known to be absent"
        milvus.start()
        await eventually(lambda: connection.connected, timeout_s=30)
        assert {h.document_id for h in await index.heads(ACME, None)} == {f"d{i}" for i in range(19)}
        assert len(await index.dense(Scope(ACME, "default"), bag_of_words("zebra"), 50)) == 19
        assert len(await index.keyword(Scope(ACME, "default"), "zebra", 50)) == 19

    async def test_a_frozen_server_costs_a_call_its_deadline_and_no_more(
        self, milvus: MilvusServer, connection: MilvusConnection, index: MilvusChunks
    ) -> None:
        await index.write([row(make_chunk())])
        milvus.pause()
        try:
            with pytest.raises(PlatformError) as raised:
                await asyncio.wait_for(index.heads(ACME, None), 12)
            assert raised.value.code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
            await eventually(lambda: not connection.connected)
        finally:
            milvus.resume()
        await eventually(lambda: connection.connected, timeout_s=30)
        assert len(await index.heads(ACME, None)) == 1
