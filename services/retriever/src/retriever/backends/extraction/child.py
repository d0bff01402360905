"""The child process that reads files which could loop or eat memory: `python -m retriever.backends.extraction.child`.

Its arguments are the kind and the bounds; the file comes on stdin, one JSON object goes to stdout. Whatever it does,
only it dies of it.
"""

import dataclasses
import json
import resource
import sys

from chassis.errors import PlatformError
from retriever.backends.extraction.readers import read
from retriever.core.extraction import Kind, Limits, refused


def main(argv: list[str]) -> int:
    """Reads stdin; returns the exit status, 0 also for a file that was refused."""
    kind, max_memory_bytes, max_cpu_s, max_chars, max_pages, max_documents = argv
    resource.setrlimit(resource.RLIMIT_AS, (int(max_memory_bytes), int(max_memory_bytes)))
    resource.setrlimit(resource.RLIMIT_CPU, (int(max_cpu_s), int(max_cpu_s) + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    data = sys.stdin.buffer.read()
    try:
        result = _read(Kind(kind), data, Limits(int(max_chars), int(max_pages), int(max_documents)))
    except PlatformError as error:
        result = {"error": error.message, "param": error.param}
    sys.stdout.write(json.dumps(result))
    return 0


def _read(kind: Kind, data: bytes, limits: Limits) -> dict[str, object]:
    try:
        extraction = read(kind, data, limits)
    except MemoryError:
        raise refused("file: reading it takes more memory than allowed") from None
    return dataclasses.asdict(extraction)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
