"""Fixtures of the generator's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # engine_suite and tiny_llama lie beside the tests
