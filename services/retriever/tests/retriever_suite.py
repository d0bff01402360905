"""What every index of chunks must do; the fake and Milvus inherit it."""

from typing import Protocol

import pytest
from retriever_fakes import bag_of_words, make_chunk

from chassis.errors import Code, PlatformError
from retriever.core.documents import Chunk
from retriever.core.ports import ChunkSearch, ChunkStore, Scope, Vector

ACME, RIVAL = "acme", "rival"
HOSTILE = [
    'acme" or tenant != "zzz',
    "acme' or tenant != 'zzz",
    'acme"',
    "acme\\",
    "acme\n",
    "ac me",
    "%",
    "",
    "tenant",
    "a" * 65,
]


class Index(ChunkStore, ChunkSearch, Protocol):
    """Both sides of one index."""


def row(chunk: Chunk) -> tuple[Chunk, Vector]:
    return chunk, bag_of_words(chunk.text)


class IndexSuite:
    """Tests over an `index` fixture that starts empty."""

    async def test_a_written_chunk_is_found_at_once_and_comes_back_whole(self, index: Index) -> None:
        chunk = make_chunk(
            text="Wings in a slipstream.\n\nÜber \"quotes\" & 日本語 \\ 'x'", metadata_json='{"year":1958}'
        )
        await index.write([row(chunk)])
        assert await index.read(ACME, [chunk.key]) == [chunk]
        (hit,) = await index.dense(Scope(ACME, "default"), bag_of_words("wings slipstream"), 5)
        assert (hit.document_id, hit.chunk_id, hit.text, hit.title) == ("d1", "d1-0", chunk.text, "A title")
        assert hit.metadata_json == '{"year":1958}'

    async def test_dense_and_keyword_search_put_the_best_first(self, index: Index) -> None:
        texts = ["heat in a boundary layer", "the zebra runs", "a zebra in a boundary layer", "nothing of the kind"]
        await index.write([row(make_chunk(f"d{i}", text=text)) for i, text in enumerate(texts)])
        dense = await index.dense(Scope(ACME, "default"), bag_of_words("the zebra runs"), 2)
        assert dense[0].document_id == "d1" and len(dense) == 2
        assert dense[0].score == pytest.approx(1.0, abs=1e-3) and dense[0].score > dense[1].score
        keyword = await index.keyword(Scope(ACME, "default"), "zebra runs", 5)
        assert [hit.document_id for hit in keyword] == ["d1", "d2"]
        assert keyword[0].score > keyword[1].score > 0
        assert await index.keyword(Scope(ACME, "default"), "unheard", 5) == []

    async def test_searches_and_reads_see_their_tenant_and_collection_alone(self, index: Index) -> None:
        mine = make_chunk(text="secret plan", external_id="x")
        other = make_chunk("d2", text="secret plan", collection="other")
        theirs = make_chunk(text="secret plan", tenant=RIVAL, external_id="x")
        await index.write([row(mine), row(other), row(theirs)])
        for hits in (
            await index.dense(Scope(ACME, "default"), bag_of_words("secret plan"), 10),
            await index.keyword(Scope(ACME, "default"), "secret plan", 10),
        ):
            assert [hit.key for hit in hits] == [mine.key]
        assert await index.dense(Scope("nobody", "default"), bag_of_words("secret plan"), 10) == []
        found = await index.find(ACME, document_ids=["d1"], external_ids=["x"], upload_id="d1", job_id="job_1")
        assert {ref.key for ref in found} == {mine.key, other.key}
        assert {head.document_id for head in await index.heads(ACME, None)} == {"d1", "d2"}
        assert [head.document_id for head in await index.heads(ACME, "other")] == ["d2"]
        await index.remove(ACME, [mine.key])
        assert await index.read(RIVAL, [theirs.key]) == [theirs]

    @pytest.mark.parametrize("hostile", HOSTILE)
    async def test_hostile_names_never_reach_a_filter(self, index: Index, hostile: str) -> None:
        await index.write([row(make_chunk()), row(make_chunk("d2", tenant=RIVAL))])
        vector = bag_of_words("some text")
        if hostile != "tenant":  # a sound name, of a tenant that has nothing
            for call in (
                lambda: index.dense(Scope(hostile, "default"), vector, 5),
                lambda: index.keyword(Scope(hostile, "default"), "text", 5),
                lambda: index.find(hostile, document_ids=["d1"]),
                lambda: index.heads(hostile, None),
            ):
                with pytest.raises(PlatformError) as raised:
                    await call()
                assert raised.value.code is Code.INVALID_ARGUMENT
        else:
            assert await index.dense(Scope(hostile, "default"), vector, 5) == []
        # A client's own id may be anything: it is never part of a filter.
        assert await index.find(ACME, external_ids=[hostile]) == []

    @pytest.mark.parametrize("hostile", ['d1" or tenant != "x', "d1'] or tenant in ['rival", "", "d1\n"])
    async def test_hostile_document_ids_are_refused(self, index: Index, hostile: str) -> None:
        await index.write([row(make_chunk("d2", tenant=RIVAL))])
        with pytest.raises(PlatformError):
            await index.find(ACME, document_ids=[hostile])

    async def test_writing_twice_leaves_one(self, index: Index) -> None:
        chunks = [make_chunk(ordinal=i, text=f"part {i} of it", num_chunks=3) for i in range(3)]
        for _ in range(3):
            await index.write([row(chunk) for chunk in chunks])
        found = await index.find(ACME, document_ids=["d1"])
        assert sorted(ref.ordinal for ref in found) == [0, 1, 2]
        assert len(await index.dense(Scope(ACME, "default"), bag_of_words("part"), 10)) == 3
        assert len(await index.keyword(Scope(ACME, "default"), "part", 10)) == 3

    async def test_a_rewritten_chunk_shows_its_new_text_alone(self, index: Index) -> None:
        await index.write([row(make_chunk(text="old words"))])
        await index.write([row(make_chunk(text="new phrases"))])
        assert await index.keyword(Scope(ACME, "default"), "old words", 5) == []
        (hit,) = await index.keyword(Scope(ACME, "default"), "phrases", 5)
        assert hit.text == "new phrases"

    async def test_removed_chunks_are_gone_everywhere(self, index: Index) -> None:
        chunks = [make_chunk(f"d{i}", text="zebra crossing") for i in range(4)]
        await index.write([row(chunk) for chunk in chunks])
        await index.remove(ACME, [chunk.key for chunk in chunks[:3]])
        await index.remove(ACME, [chunks[0].key])  # again: no error
        assert [h.document_id for h in await index.heads(ACME, None)] == ["d3"]
        for hits in (
            await index.dense(Scope(ACME, "default"), bag_of_words("zebra"), 10),
            await index.keyword(Scope(ACME, "default"), "zebra", 10),
        ):
            assert [hit.document_id for hit in hits] == ["d3"]
        assert await index.read(ACME, [chunks[0].key]) == []

    async def test_find_takes_many_names_and_none(self, index: Index) -> None:
        await index.write([row(make_chunk(f"d{i}", external_id=f"'{i}\"")) for i in range(5)])
        assert await index.find(ACME) == []
        many = [f"d{i}" for i in range(300)]
        assert len(await index.find(ACME, document_ids=many)) == 5
        assert [ref.document_id for ref in await index.find(ACME, external_ids=["'3\""])] == ["d3"]

    async def test_a_vector_of_other_dimensions_is_refused(self, index: Index) -> None:
        with pytest.raises(PlatformError, match="dimensions") as raised:
            await index.dense(Scope(ACME, "default"), bag_of_words("x")[:100], 5)
        assert raised.value.param == "query_vector"
