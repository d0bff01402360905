"""The trainer with children at normal priority, so that a test need not wait for idle cores."""

import sys
from pathlib import Path

import trainer.backends.child_processes
from trainer.main import main

child = str(Path(__file__).with_name("child_at_once.py"))
trainer.backends.child_processes._COMMAND = (sys.executable, child, "0")
sys.exit(main())
