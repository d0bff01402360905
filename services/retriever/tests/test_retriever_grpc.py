"""The gRPC service through a real server and channel, over an index in memory."""

import json
from collections.abc import AsyncIterator

import grpc
import pytest
from pressroom.retriever.v1 import retriever_pb2 as pb
from pressroom.retriever.v1 import retriever_pb2_grpc
from retriever_fakes import FakeEncoder, FakeIndex, bag_of_words, make_chunk

from chassis import context, rpc
from chassis.errors import Code, PlatformError
from retriever.api.grpc import RetrieverServicer
from retriever.core.library import Library
from retriever.core.search import Searcher


class Client:
    """Calls as a tenant."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = retriever_pb2_grpc.RetrieverServiceStub(channel)

    async def call(self, method: str, request: object, tenant: str = "acme") -> object:
        with context.use(context.RequestContext("req_1", tenant)):
            async with rpc.call(f"retriever.{method}", timeout_s=5) as call:
                return await getattr(self._stub, method)(request, timeout=call.timeout_s, metadata=call.metadata)


@pytest.fixture
async def index() -> FakeIndex:
    index = FakeIndex()
    chunks = [
        make_chunk("d1", i, f"zebra part {i}", num_chunks=3, external_id="x", metadata_json='{"year":1958}')
        for i in range(3)
    ]
    chunks.append(make_chunk("d2", text="heat layer", indexed_unix_s=1_800_000_000, collection="papers"))
    chunks += [make_chunk(f"line{i}", text=f"line number {i}", upload_id="up", indexed_unix_s=i) for i in range(5)]
    chunks.append(make_chunk("d1", text="zebra of another", tenant="rival"))
    chunks.append(make_chunk("half", 1, "an unfinished document", num_chunks=2))
    await index.write([(chunk, bag_of_words(chunk.text)) for chunk in chunks])
    return index


@pytest.fixture
async def client(index: FakeIndex) -> AsyncIterator[Client]:
    server = rpc.make_server("retriever")
    servicer = RetrieverServicer(Searcher(FakeEncoder(), index), Library(index))
    retriever_pb2_grpc.add_RetrieverServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = rpc.connect(f"127.0.0.1:{port}")
    yield Client(channel)
    await channel.close()
    await server.stop(0)


async def test_search_maps_every_field_of_a_hit(client: Client) -> None:
    for mode in (pb.SEARCH_MODE_UNSPECIFIED, pb.SEARCH_MODE_DENSE, pb.SEARCH_MODE_KEYWORD, pb.SEARCH_MODE_HYBRID):
        response = await client.call("Search", pb.SearchRequest(query="zebra part 1", mode=mode, top_k=1))
        (hit,) = response.hits
        assert (hit.document_id, hit.chunk_id, hit.ordinal, hit.text) == ("d1", "d1-1", 1, "zebra part 1")
        assert (hit.external_id, hit.title, hit.collection, hit.metadata_json) == (
            "x",
            "A title",
            "default",
            '{"year":1958}',
        )
        assert hit.score > 0


async def test_search_takes_filter_group_least_score_vector_and_collection(client: Client) -> None:
    condition = pb.FilterCondition(key="year", operator=pb.FILTER_OPERATOR_GE, values_json=["1958"])
    request = pb.SearchRequest(query="part", top_k=10, filter=[condition], group_by_document=True)
    assert [hit.document_id for hit in (await client.call("Search", request)).hits] == ["d1"]
    request = pb.SearchRequest(query="part", top_k=10, min_score=1.01)
    assert not (await client.call("Search", request)).hits
    vector = bag_of_words("heat layer").tolist()
    request = pb.SearchRequest(query="x", collection="papers", query_vector=vector)
    assert [hit.document_id for hit in (await client.call("Search", request)).hits] == ["d2"]
    assert not (await client.call("Search", pb.SearchRequest(query="x", collection="unknown"))).hits


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (pb.SearchRequest(query=""), "query"),
        (pb.SearchRequest(query="x", top_k=4_000_000_000), "top_k"),
        (pb.SearchRequest(query="x", collection='a" or "b'), "collection"),
        (pb.SearchRequest(query="x", mode=99), "mode"),
        (pb.SearchRequest(query="x", query_vector=[1.0, 2.0]), "query_vector"),
        (pb.SearchRequest(query="x", filter=[pb.FilterCondition(key="a", values_json=["1"])]), "filter"),
        (pb.SearchRequest(query="x", filter=[pb.FilterCondition(key="a", operator=99, values_json=["1"])]), "filter"),
    ],
)
async def test_a_bad_search_names_its_field(client: Client, request_: pb.SearchRequest, param: str) -> None:
    with pytest.raises(PlatformError) as raised:
        await client.call("Search", request_)
    assert (raised.value.code, raised.value.param) == (Code.INVALID_ARGUMENT, param)


@pytest.mark.parametrize("tenant", ["", "rival' or '1"])
async def test_every_method_needs_a_sound_tenant(client: Client, tenant: str) -> None:
    for method, request in (
        ("Search", pb.SearchRequest(query="x")),
        ("GetDocument", pb.GetDocumentRequest(document_id="d1")),
        ("ListDocuments", pb.ListDocumentsRequest()),
        ("DeleteDocument", pb.DeleteDocumentRequest(document_id="d1")),
    ):
        with pytest.raises(PlatformError) as raised:
            await client.call(method, request, tenant)
        assert raised.value.code is Code.INVALID_ARGUMENT


async def test_a_document_is_told_with_its_counted_chunks(client: Client) -> None:
    document = (await client.call("GetDocument", pb.GetDocumentRequest(document_id="d1"))).document
    assert (document.document_id, document.num_chunks, document.num_documents) == ("d1", 3, 1)
    assert (document.external_id, document.collection, document.indexed_unix_s) == ("x", "default", 1_700_000_000)
    assert json.loads(document.metadata_json) == {"year": 1958} and len(document.content_sha256) == 64
    upload = (await client.call("GetDocument", pb.GetDocumentRequest(document_id="up"))).document
    assert (upload.document_id, upload.num_chunks, upload.num_documents) == ("up", 5, 5)


@pytest.mark.parametrize("document_id", ["gone", "half", "d2-0"])
async def test_a_document_that_is_not_there_or_not_finished_is_not_found(client: Client, document_id: str) -> None:
    with pytest.raises(PlatformError) as raised:
        await client.call("GetDocument", pb.GetDocumentRequest(document_id=document_id))
    assert raised.value.code is Code.NOT_FOUND


async def test_documents_are_listed_newest_first_in_pages(client: Client) -> None:
    first = await client.call("ListDocuments", pb.ListDocumentsRequest(limit=3))
    assert [d.document_id for d in first.documents] == ["d2", "d1", "line4"] and first.has_more
    rest = await client.call("ListDocuments", pb.ListDocumentsRequest(limit=100, after="line4"))
    assert [d.document_id for d in rest.documents] == ["line3", "line2", "line1", "line0"] and not rest.has_more
    papers = await client.call("ListDocuments", pb.ListDocumentsRequest(collection="papers"))
    assert [d.document_id for d in papers.documents] == ["d2"]
    for bad in (pb.ListDocumentsRequest(limit=1001), pb.ListDocumentsRequest(after="gone")):
        with pytest.raises(PlatformError) as raised:
            await client.call("ListDocuments", bad)
        assert raised.value.code is Code.INVALID_ARGUMENT


async def test_deleting_removes_a_document_or_an_upload_of_this_tenant_alone(client: Client, index: FakeIndex) -> None:
    assert (await client.call("DeleteDocument", pb.DeleteDocumentRequest(document_id="d1"))).num_chunks == 3
    assert (await client.call("DeleteDocument", pb.DeleteDocumentRequest(document_id="up"))).num_chunks == 5
    with pytest.raises(PlatformError) as raised:
        await client.call("DeleteDocument", pb.DeleteDocumentRequest(document_id="d1"))
    assert raised.value.code is Code.NOT_FOUND
    assert [c.document_id for c, _ in index.rows.values() if c.tenant == "rival"] == ["d1"]


async def test_an_index_that_is_away_is_unavailable_and_worth_a_retry(client: Client, index: FakeIndex) -> None:
    index.is_away = True
    with pytest.raises(PlatformError) as raised:
        await client.call("Search", pb.SearchRequest(query="x"))
    assert (raised.value.code, raised.value.retryable) == (Code.UNAVAILABLE, True)


async def test_features_are_not_served_yet(client: Client) -> None:
    with pytest.raises(PlatformError) as raised:
        await client.call("GetFeatures", pb.GetFeaturesRequest())
    assert raised.value.code is Code.UNIMPLEMENTED
