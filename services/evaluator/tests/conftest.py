"""Fixtures of the evaluator's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # evaluator_fakes lies beside the tests

from testkit.fixtures import nats

__all__ = ["nats"]
