"""The fixtures that every test may ask for: real servers and the prepared models."""

import gc
import os
from collections.abc import Generator

import pytest

# For every process that a test starts: onnxruntime sends statistics of its use otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

pytest_plugins = ["testkit.fixtures"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, object, object]:
    """Keeps the garbage collector out while a failure is told: that parses the test's source.

    Up to Python 3.11.7 a parser that a finalizer starts (one that logs a traceback does) spoils the one that it
    interrupts: pytest then dies of "AST constructor recursion depth mismatch" (python/cpython#106905).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return (yield)
    finally:
        if was_enabled:
            gc.enable()
