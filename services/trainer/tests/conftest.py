"""Fixtures of the trainer's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # tiny_base and trainer_fakes lie beside the tests
