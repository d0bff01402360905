"""The error envelope of the Open Inference Protocol: a text."""

from chassis.errors import PlatformError


def is_spoken(path: str) -> bool:
    """Says whether clients of the path read this envelope."""
    return path == "/v2" or path.startswith("/v2/")


def envelope(error: PlatformError) -> dict[str, object]:
    """What the client is told."""
    return {"error": error.message}
