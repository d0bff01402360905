"""Compiles the native engine (services/generator/native) for the processors that it may meet. Standard library only.

usage: python build.py [--into FOLDER]        harmless when nothing has changed
       python build.py --check                builds nothing; exits with 1 where something is to be built

The compiler is clang as the package ziglang carries it: the same everywhere, and no system compiler is needed.
"""

import argparse
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).parents[4] / "native"
FOLDER = Path(__file__).parent / "_builds"
STAMP = "sources.sha256"
TIMEOUT_S = 600
FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-s"),
    # A sum may not depend on how the compiler likes to contract it: batched must equal one by one.
    *("-ffp-contract=off", "-fno-math-errno"),
    *("-fno-exceptions", "-fno-rtti", "-nostdlib++"),
    *("-Wall", "-Wno-psabi"),
)
TARGETS: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {
    ("Linux", "x86_64"): {
        "avx512": ("-target", "x86_64-linux-gnu.2.17", "-mcpu=x86_64_v4+avx512vnni"),
        "avx2": ("-target", "x86_64-linux-gnu.2.17", "-mcpu=x86_64_v3"),
    },
    ("Linux", "aarch64"): {"neon": ("-target", "aarch64-linux-gnu.2.17", "-mcpu=generic+v8_2a+dotprod+fullfp16")},
    ("Darwin", "arm64"): {"neon": ("-target", "aarch64-macos", "-mcpu=apple_m1")},
}


def main() -> int:
    """Builds what is missing; prints what it did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=FOLDER)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    folder: Path = arguments.into
    builds = TARGETS.get((platform.system(), platform.machine()))
    if builds is None:
        print(f"no native engine for {platform.system()} on {platform.machine()}: the torch engine serves")
        return 0
    wanted = sources_sha256(builds)
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text().strip() == wanted:
        return 0
    if arguments.check:
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    for name, flags in builds.items():
        target = folder / f"libpressroom-{name}.so"
        staging = target.with_suffix(f".{os.getpid()}.tmp")  # a running engine keeps the file that it has mapped
        command = [sys.executable, "-m", "ziglang", "c++", *flags, *FLAGS, "-o", str(staging), "model.cpp", "-lpthread"]
        done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode:
            staging.unlink(missing_ok=True)
            print(done.stderr[-4000:], file=sys.stderr)
            print(f"failed: the native engine could not be compiled for {name}", file=sys.stderr)
            return 1
        staging.replace(target)
        print(f"native engine: built for {name}")
    stamp.write_text(wanted + "\n")
    return 0


def sources_sha256(builds: dict[str, tuple[str, ...]]) -> str:
    """Returns the sum over everything that a build depends on."""
    digest = hashlib.sha256(repr((FLAGS, builds)).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
