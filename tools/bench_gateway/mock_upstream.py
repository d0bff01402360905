"""A mock upstream: OpenAI's chat completions, 16 chunks at a set pace. Standard library only, as light as it can be.

usage: python mock_upstream.py PORT [SECONDS_BETWEEN_CHUNKS]

Without a pace all chunks are written at once; with one, the first comes after one pause as well.
"""

import asyncio
import json
import sys

NUM_CHUNKS = 16
USAGE = {"prompt_tokens": 10, "completion_tokens": NUM_CHUNKS, "total_tokens": 10 + NUM_CHUNKS}
HEAD = {"id": "chatcmpl-mock", "created": 1, "model": "mock"}
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _event(delta: dict[str, str], finish_reason: str | None, **rest: object) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    chunk = HEAD | {"object": "chat.completion.chunk", "choices": [choice]} | rest
    return _framed(b"data: " + json.dumps(chunk).encode() + b"\n\n")


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


TOKEN = _event({"content": "tok "}, None)
LAST = _event({}, "stop", usage=USAGE) + _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"
MESSAGE = {"role": "assistant", "content": "tok " * NUM_CHUNKS}
WHOLE = json.dumps(
    HEAD
    | {"object": "chat.completion", "usage": USAGE}
    | {"choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}]}
).encode()
WHOLE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(WHOLE)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pace_s: float) -> None:
    """Answers the requests of one connection, one after the other."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            _, _, length = head.partition(b"content-length:")
            body = await reader.readexactly(int(length.split(b"\r\n", 1)[0] or 0))
            if not json.loads(body or b"{}").get("stream"):
                writer.write(WHOLE_HEAD + WHOLE)
            elif pace_s:
                writer.write(STREAM_HEAD)
                for _ in range(NUM_CHUNKS):
                    await asyncio.sleep(pace_s)
                    writer.write(TOKEN)
                    await writer.drain()
                writer.write(LAST)
            else:
                writer.write(STREAM_HEAD + TOKEN * NUM_CHUNKS + LAST)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main(port: int, pace_s: float) -> None:
    """Serves until the process is ended."""
    server = await asyncio.start_server(lambda r, w: serve(r, w, pace_s), "127.0.0.1", port, backlog=2048)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0))
