"""Composition root of the retriever: the only file that knows every concrete class."""

import sys

from pressroom.retriever.v1 import retriever_pb2_grpc

from chassis import rpc
from chassis.app import App
from chassis.jobs import ACK_WAIT_S, BACKOFF_S, MAX_DELIVER_OF_BUS, Cancellations
from chassis.nats_bus import NatsBus
from chassis.settings import load_settings
from chassis.uploads import GrpcFiles
from contracts.jobs import decode_cancel, open_file
from contracts.subjects import CONTROL_REQUEST_CANCEL, JOBS_INGEST, STREAMS
from retriever.api.consumers import DURABLE, IngestWorker
from retriever.api.grpc import RetrieverServicer
from retriever.backends.extraction.runner import BoundedExtractor
from retriever.backends.grpc_encoder import GrpcEncoder
from retriever.backends.milvus import MilvusChunks, prepare
from retriever.backends.milvus_connection import MilvusConnection
from retriever.core.chunking import ChunkingPolicy
from retriever.core.extraction import Limits
from retriever.core.indexing import IngestPolicy
from retriever.core.ingest import Ingestor
from retriever.core.library import Library
from retriever.core.search import Searcher
from retriever.settings import RetrieverSettings


def main() -> int:
    """Runs the retriever; returns the exit status."""
    settings = load_settings(RetrieverSettings)

    async def setup(app: App) -> None:
        milvus = MilvusConnection(settings.milvus_uri, prepare, timeout_s=settings.milvus_timeout_s)
        app.on_close(milvus.close)
        app.spawn("milvus", milvus.watch())
        app.ready_when("milvus", lambda: milvus.connected)
        chunks = MilvusChunks(milvus)
        app.spawn("settle", chunks.settle())
        encoder = _encoder(app, settings)
        app.add_grpc(
            retriever_pb2_grpc.add_RetrieverServiceServicer_to_server,
            RetrieverServicer(Searcher(encoder, chunks), Library(chunks)),
            "pressroom.retriever.v1.RetrieverService",
        )
        _start_worker(app, settings, encoder, chunks)

    return App("retriever", settings).run(setup)


def _encoder(app: App, settings: RetrieverSettings) -> GrpcEncoder:
    channel = rpc.connect(settings.embedder_addr)
    app.on_close(channel.close)
    return GrpcEncoder(
        channel,
        settings.encoder,
        query_timeout_s=settings.embed_query_timeout_s,
        batch_timeout_s=settings.embed_batch_timeout_s,
    )


def _start_worker(app: App, settings: RetrieverSettings, encoder: GrpcEncoder, chunks: MilvusChunks) -> None:
    """Joins the ingest pipeline and lets it take jobs from the bus."""
    limits = Limits(settings.max_text_chars, settings.max_pdf_pages, settings.max_documents)
    extractor = BoundedExtractor(
        limits, timeout_s=settings.extract_timeout_s, max_memory_bytes=settings.extract_memory_bytes
    )
    app.on_close(extractor.close)
    gateway = rpc.connect(settings.gateway_addr)
    app.on_close(gateway.close)
    files = GrpcFiles(gateway, open_file, timeout_s=settings.extract_timeout_s, max_bytes=settings.max_file_bytes)
    policy = IngestPolicy(
        ChunkingPolicy(settings.chunk_tokens, settings.overlap_tokens),
        settings.ingest_batch_chunks,
        settings.ingest_patience_s,
    )
    bus = NatsBus.connect(settings.nats_url, "retriever", STREAMS)
    app.on_close(bus.close)
    cancellations = Cancellations(decode_cancel)
    ingestor = Ingestor(extractor, encoder, chunks, policy)
    worker = IngestWorker(bus, files, ingestor, cancellations, patience_s=settings.ingest_patience_s)
    app.set_queue_depth(lambda: bus.backlog)
    app.spawn("cancellations", bus.listen(CONTROL_REQUEST_CANCEL, cancellations.handle))
    app.spawn(
        "ingest",
        bus.consume(
            JOBS_INGEST,
            durable=DURABLE,
            handler=worker.handle,
            max_deliver=MAX_DELIVER_OF_BUS,
            ack_wait_s=ACK_WAIT_S,
            concurrency=settings.ingest_concurrency,
            backoff_s=BACKOFF_S,
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
