"""Waits until a model stands whole in the volume: usage: wait_for_model.py FOLDER. Ends with 1 after ten minutes.

A model is made beside its place and renamed, so that its manifest is there only with all the rest.
"""

import pathlib
import sys
import time

TIMEOUT_S = 600


def main() -> int:
    manifest = pathlib.Path(sys.argv[1]) / "manifest.json"
    deadline_s = time.monotonic() + TIMEOUT_S
    while not manifest.exists():
        if time.monotonic() > deadline_s:
            print(f"{manifest} is not there after {TIMEOUT_S} s. Next: kubectl logs job/models", file=sys.stderr)
            return 1
        time.sleep(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
