"""The training child at normal priority, so that a test need not wait for idle cores; optionally on a small disk.

usage: child_at_once.py MAX_FILE_BYTES RUN_FOLDER      (0: no limit)
"""

import resource
import sys

import chassis.priority

chassis.priority.lower = lambda: None

from trainer.backends.lora.child import main  # noqa: E402

if limit := int(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
status = main([sys.argv[0], sys.argv[2]])
print(f"torch was loaded: {'torch' in sys.modules}", file=sys.stderr)
sys.exit(status)
