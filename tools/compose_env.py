#!/usr/bin/env python3
"""Makes what docker-compose.yml asks for: `.env` at the root, with the secrets, mode 0600. Values that it has are kept.

usage: python3 tools/compose_env.py      (make compose-env; standard library alone, so that a machine that only has a
                                          container engine needs no environment)
PRESSROOM_PORT: the port on 127.0.0.1 that the gateway is published on, 8000 unless told.
"""

import os
import pathlib
import secrets
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "libs" / "devstack" / "src"))

from devstack.home import new_key, read_pairs, write_private  # noqa: E402

ENV_FILE = ROOT / ".env"
# Hexadecimal: they stand in URLs.
MADE = {
    "KEY_PEPPER": lambda: secrets.token_hex(24),
    "NATS_PASSWORD": lambda: secrets.token_hex(24),
    "VALKEY_PASSWORD": lambda: secrets.token_hex(24),
    "PRESSROOM_API_KEY": new_key,
    "PRESSROOM_ADMIN_KEY": new_key,
}


def main() -> int:
    """Writes the file; says where it is and nothing of what is in it."""
    had = read_pairs(ENV_FILE)
    port = os.environ.get("PRESSROOM_PORT") or had.get("PRESSROOM_PORT") or "8000"
    if not port.isdecimal() or not 1 <= int(port) <= 65535:
        print(f"PRESSROOM_PORT is {port!r}; set it to a number from 1 to 65535", file=sys.stderr)
        return 1
    place = {"PRESSROOM_PORT": port, "PRESSROOM_BASE_URL": f"http://127.0.0.1:{port}/v1"}
    pairs = had | {name: had.get(name) or make() for name, make in MADE.items()} | place
    write_private(ENV_FILE, "".join(f"{name}={value}\n" for name, value in pairs.items()))
    print(f"{ENV_FILE.name}: {len(pairs)} values; docker compose up -d --build goes on from here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
