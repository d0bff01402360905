"""Composition root of the embedder: the only file that knows every concrete class."""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

from pressroom.embedder.v1 import embedder_pb2_grpc

from chassis.app import App
from chassis.settings import load_settings
from embedder.api.grpc import EmbedderServicer
from embedder.backends.onnx_encoder import OnnxEncoder
from embedder.core.batcher import Batcher, BatchLimits
from embedder.core.pooling import Floats
from embedder.core.service import EmbedderCore
from embedder.settings import EmbedderSettings


def main() -> int:
    settings = load_settings(EmbedderSettings)

    async def setup(app: App) -> None:
        # One thread: the runtime computes one batch at a time with all the threads that it was given.
        thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")

        async def stop_thread() -> None:
            await asyncio.to_thread(thread.shutdown, cancel_futures=True)

        app.on_close(stop_thread)
        loop = asyncio.get_running_loop()
        encoder = await loop.run_in_executor(
            thread, OnnxEncoder.load, settings.model_dir, settings.num_threads, settings.device
        )
        await loop.run_in_executor(thread, encoder.encode, [[100] * 8])  # warm-up: allocates before the first caller

        async def compute(batch: list[list[int]]) -> Floats:
            return await loop.run_in_executor(thread, encoder.encode, batch)

        limits = BatchLimits(
            settings.max_batch_texts,
            settings.max_batch_tokens,
            settings.batch_window_ms / 1000,
            settings.max_queued_texts,
        )
        batcher = Batcher(compute, limits)
        app.spawn("batcher", batcher.run())
        app.set_queue_depth(lambda: batcher.depth)
        app.add_grpc(
            embedder_pb2_grpc.add_EmbedderServiceServicer_to_server,
            EmbedderServicer(EmbedderCore(encoder, batcher)),
            "pressroom.embedder.v1.EmbedderService",
        )

    return App("embedder", settings).run(setup)


if __name__ == "__main__":
    sys.exit(main())
