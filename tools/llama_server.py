#!/usr/bin/env python3
"""Compiles llama.cpp's server for this processor: .venv-peers-llamacpp-native/llama-server. Standard library only.

usage: python3 tools/llama_server.py     (make llama-server; needs cmake and a C++ compiler; once)

The wheel that bench-engine takes otherwise is built for AVX2. The source is the one that llama-cpp-python carries,
pinned by hash; the binding itself is not built. Half an hour on two cores, at the lowest priority.
"""

from __future__ import annotations  # an old python3 must get as far as the message that it is too old

import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints-llama-server.txt"
FOLDER = ROOT / ".venv-peers-llamacpp-native"
STAMP = FOLDER / "llama-server.stamp"
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_CURL=OFF",
)


def main() -> int:
    wanted = LOCK.read_text()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return 0
    missing = [name for name in ("cmake", "c++", "tar") if shutil.which(name) is None]
    if missing:
        print(f"{' and '.join(missing)} cannot be found. Next: apt install cmake g++", file=sys.stderr)
        return 1
    # Kept until all is made: a build that was interrupted goes on where it was.
    unpacked, build = FOLDER / "source", FOLDER / "build"
    if not unpacked.exists():
        partial = FOLDER / "source.part"
        shutil.rmtree(partial, ignore_errors=True)
        fetch(partial)
        partial.rename(unpacked)
    (source,) = unpacked.glob("*/vendor/llama.cpp")
    print("llama.cpp: configuring and compiling, half an hour ...", file=sys.stderr, flush=True)
    run("cmake", "-S", str(source), "-B", str(build), *OPTIONS)
    jobs = str(len(os.sched_getaffinity(0)))
    run("nice", "-n", "19", "cmake", "--build", str(build), "--target", "llama-server", "-j", jobs)
    shutil.copy(build / "bin" / "llama-server", FOLDER / "llama-server")
    shutil.rmtree(build)
    shutil.rmtree(unpacked)
    STAMP.write_text(wanted)
    print(f"llama.cpp: {FOLDER.name}/llama-server is made", file=sys.stderr)
    return 0


def fetch(folder: pathlib.Path) -> None:
    """Downloads the source, checks its hash and unpacks it."""
    folder.mkdir(parents=True)
    options = ("--no-deps", "--no-binary", ":all:", "--require-hashes", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "download", *options, "-d", str(folder), "-r", str(LOCK))
    (archive,) = folder.glob("*.tar.gz")
    run("tar", "-xzf", str(archive), "-C", str(folder))


def run(*command: str) -> None:
    """Runs one step; its output is the user's to see when it fails."""
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / "build.log").open("ab") as log:
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
            raise SystemExit(f"failed: {' '.join(command[:4])}; see {FOLDER / 'build.log'}")


if __name__ == "__main__":
    sys.exit(main())
