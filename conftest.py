"""The fixtures that every test may ask for: real servers and the prepared models."""

import os

# For every process that a test starts: onnxruntime sends statistics of its use otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

pytest_plugins = ["testkit.fixtures"]
