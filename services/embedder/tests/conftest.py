"""Fixtures of the embedder's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # embedder_suite lies beside the tests
