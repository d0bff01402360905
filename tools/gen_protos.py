#!/usr/bin/env python3
"""Generates libs/contracts/src/pressroom from proto/. usage: gen_protos.py [OUT_DIR]

The generated code is checked in; a test generates it anew into a temporary folder and compares.
"""

import pathlib
import shutil
import sys

import grpc_tools
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> int:
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "libs/contracts/src"
    shutil.rmtree(out / "pressroom", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    protos = sorted(str(p.relative_to(ROOT / "proto")) for p in (ROOT / "proto").rglob("*.proto"))
    google_types = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    return int(
        protoc.main(
            ["protoc", f"-I{ROOT / 'proto'}", f"-I{google_types}"]
            + [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
            + protos
        )
    )


if __name__ == "__main__":
    sys.exit(main())
