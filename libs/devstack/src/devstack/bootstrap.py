"""Makes the environment (.venv) as the lock files say. Run by the system's python3: standard library only.

usage: python3 bootstrap.py        (make setup; harmless when nothing has changed)

torch comes first and by itself, so that a CPU build of 190 MB is preferred to the default build of several GB.
"""

from __future__ import annotations  # an old python3 must get as far as the message that it is too old

import collections
import fcntl
import hashlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

CHECKOUT = pathlib.Path(__file__).resolve().parents[4]
VENV = CHECKOUT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "pressroom.stamp"
TORCH_LOCK = CHECKOUT / "constraints-torch.txt"
LOCK = CHECKOUT / "constraints.txt"
LOG = pathlib.Path(os.environ.get("PRESSROOM_HOME") or CHECKOUT / ".pressroom").expanduser() / "logs" / "setup.log"

OLDEST_PYTHON = (3, 11)
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Without a network PyTorch's index must cost seconds; what has begun to download may take as long as the package index.
PYTORCH_PATIENCE_S = 15
STEP_TIMEOUT_S = 1800
NUM_SHOWN_LINES = 15
NATIVE_BUILD = CHECKOUT / "services/generator/src/generator/backends/native_runner/build.py"


class SetupFailed(Exception):
    """A step that failed; the message says what to do."""

    def __init__(self, message: str, lines: list[str] | None = None) -> None:
        super().__init__(message)
        self.lines = lines or []


class Progress:
    """One line for the step that runs: live on a terminal, else a line at the start and at the end of a step."""

    def __init__(self) -> None:
        self.is_live = sys.stderr.isatty()
        self.started_at = time.monotonic()
        self.step_started_at = self.started_at
        self.title = ""

    def begin(self, title: str) -> None:
        """A step starts."""
        self.title, self.step_started_at = title, time.monotonic()
        if not self.is_live:
            self._line(f"{title} ...\n")

    def show(self, detail: str) -> None:
        """The step has come further."""
        if self.is_live:
            text = f"  … {self.title}  {time.monotonic() - self.step_started_at:.0f} s  {detail}"
            self._line("\r\033[K" + text[: _columns() - 1])

    def end(self, detail: str = "", mark: str = "✓") -> None:
        """The step is over."""
        text = f"{mark} {self.title}  {time.monotonic() - self.step_started_at:.0f} s  {detail}".rstrip()
        self._line(("\r\033[K  " if self.is_live else "") + text + "\n")

    @staticmethod
    def _line(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def main() -> int:
    """Makes or mends the environment; prints what failed and the next thing to do."""
    try:
        check_python()
        with LOCK.open() as lock:
            wait_for_turn(lock.fileno())
            if STAMP.exists() and STAMP.read_text().strip() == lock_sha256() and PYTHON.exists():
                write_paths()
            else:
                install()
            build_native()
    except SetupFailed as failure:
        for line in failure.lines[-NUM_SHOWN_LINES:]:
            print(f"  | {line}", file=sys.stderr)
        print(f"failed: {failure}\nlog: {LOG}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; make setup goes on from here", file=sys.stderr)
        return 130
    return 0


def check_python() -> None:
    """Raises SetupFailed where this python3 cannot make the environment."""
    if sys.version_info < OLDEST_PYTHON:
        raise SetupFailed(
            f"python3 is {sys.version.split()[0]} and Pressroom needs {'.'.join(map(str, OLDEST_PYTHON))} or newer. "
            "Next: install it and name it, for example make PYTHON=python3.11 up"
        )
    try:
        import ensurepip  # noqa: F401  Debian ships venv without it
        import venv  # noqa: F401
    except ImportError:
        raise SetupFailed("python3 has no venv. Next: install it (Debian: apt install python3-venv)") from None


def wait_for_turn(lock: int) -> None:
    """Takes the lock of the set-up; says so when another set-up has it, and waits."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another set-up is at work on this checkout; waiting for it (Ctrl-C ends the wait)", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)


def lock_sha256() -> str:
    """Returns the sum over the lock files; devstack.environment computes the same."""
    digest = hashlib.sha256()
    for path in (TORCH_LOCK, LOCK):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def install() -> None:
    """Runs the steps. The stamp is written last: whatever interrupts this, the next call goes on."""
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_text("")
    progress = Progress()
    progress.begin("environment")
    STAMP.unlink(missing_ok=True)
    if not has_usable_pip() and run([sys.executable, "-m", "venv", "--clear", str(VENV)], progress):
        raise SetupFailed(f"{VENV} could not be made. Next: check the disk (df -h .) and who owns the folder", tail())
    progress.end()
    progress.begin("torch")
    progress.end(install_torch(progress))
    progress.begin("packages")
    num_packages = len(re.findall(r"^[A-Za-z0-9].*==", LOCK.read_text(), re.MULTILINE))
    if run(pip_install("-r", str(LOCK)), progress, num_packages):
        raise SetupFailed("packages could not be installed. " + next_step(), tail())
    write_paths()
    progress.end(f"{num_packages} packages")
    STAMP.write_text(lock_sha256() + "\n")


def build_native() -> None:
    """Compiles the generator's kernels with the environment's own compiler, unless they are as the sources are."""
    if subprocess.run([str(PYTHON), str(NATIVE_BUILD), "--check"], capture_output=True).returncode == 0:
        return
    LOG.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    progress.begin("native engine")
    if run([str(PYTHON), str(NATIVE_BUILD)], progress):
        raise SetupFailed(
            "the native engine could not be compiled. Next: read the log, or set GENERATOR_ENGINE=torch", tail()
        )
    progress.end()


def has_usable_pip() -> bool:
    """Says whether there is an environment of a fitting version that an install can go on from."""
    code = f"import pip, sys; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])})"
    return PYTHON.exists() and subprocess.run([str(PYTHON), "-c", code], capture_output=True).returncode == 0


def pip_install(*arguments: str) -> list[str]:
    """Returns the command that installs exactly what a lock file says."""
    options = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--no-deps", "--require-hashes"]
    return [str(PYTHON), "-m", "pip", "install", *options, *arguments]


def install_torch(progress: Progress) -> str:
    """Installs torch from the first place that has it; returns which."""
    lock = ["-r", str(TORCH_LOCK)]
    if run(pip_install("--no-index", *lock), progress) == 0:  # pip's configured find-links alone: answers at once
        return "CPU build, from find-links"
    hurried = pip_install("--index-url", PYTORCH_CPU_INDEX, "--timeout", "5", "--retries", "0", *lock)
    if run(hurried, progress, patience_s=PYTORCH_PATIENCE_S) == 0:
        return "CPU build, from PyTorch's index"
    if run(pip_install(*lock), progress):
        raise SetupFailed("torch could not be installed. " + next_step(), tail())
    # The default build needs its CUDA libraries even to be imported. Their exact versions stand in the metadata of the
    # torch file, whose hash was checked; hashes of their own they have none.
    pinned = re.search(r"^torch==\S+", TORCH_LOCK.read_text(), re.MULTILINE)
    assert pinned is not None
    progress.show("the default build: several GB")
    if run([str(PYTHON), "-m", "pip", "install", "--no-input", "--progress-bar", "off", pinned.group()], progress):
        raise SetupFailed("the libraries of torch could not be installed. " + next_step(), tail())
    return "default build"


def next_step() -> str:
    """Says what to do after a failed download or install."""
    return "Next: check the network, the package index (pip config list) and the disk (df -h .), then make up again"


def run(command: list[str], progress: Progress, num_packages: int = 0, patience_s: float = STEP_TIMEOUT_S) -> int:
    """Runs a command with its output going to the log; returns its exit code, 124 where it was ended for silence.

    patience_s: longest time before the first download begins.
    """
    with LOG.open("a") as log:
        log.write(f"$ {' '.join(command)}\n")
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    seen = _Seen(num_packages)
    reader = threading.Thread(target=seen.read, args=(process,), daemon=True)
    reader.start()
    began_at = time.monotonic()
    try:
        while process.poll() is None:
            waited_s = time.monotonic() - began_at
            if waited_s > STEP_TIMEOUT_S or (waited_s > patience_s and not seen.is_downloading):
                return 124
            progress.show(seen.describe())
            time.sleep(0.2)
        reader.join(5)
        return process.returncode
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class _Seen:
    """What pip's output tells of how far it has come. Written by one thread, read by another."""

    def __init__(self, num_packages: int) -> None:
        self._num_packages = num_packages
        self._num_collected = 0
        self._last = ""
        self._is_installing = False
        self.is_downloading = False

    def read(self, process: subprocess.Popen[str]) -> None:
        """Copies the output to the log until its end."""
        assert process.stdout is not None
        with LOG.open("a") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                word, _, rest = line.strip().partition(" ")
                if word in ("Collecting", "Requirement"):
                    self._num_collected += 1
                    self._last = rest.split("==")[0]
                elif word == "Downloading":
                    self.is_downloading = True
                    self._last = rest.rsplit("/", 1)[-1]
                elif line.startswith("Installing collected"):
                    self._is_installing = self.is_downloading = True

    def describe(self) -> str:
        """Returns the progress for people."""
        if self._is_installing:
            num_there = sum(1 for _ in VENV.glob("lib/python*/site-packages/*.dist-info"))
            return f"installing, {num_there} there"
        count = f"{self._num_collected} of {self._num_packages}  " if self._num_packages else ""
        return f"{count}{self._last}"


def write_paths() -> None:
    """Puts our source folders on the environment's path."""
    sources = sorted(str(path) for kind in ("libs", "services") for path in CHECKOUT.glob(f"{kind}/*/src"))
    text = "\n".join(sources) + "\n"
    for site in VENV.glob("lib/python*/site-packages"):
        file = site / "pressroom-dev.pth"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


def tail() -> list[str]:
    """Returns the last lines of the log."""
    with LOG.open(errors="replace") as log:
        return [line.rstrip() for line in collections.deque(log, maxlen=NUM_SHOWN_LINES)]


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        return 80


if __name__ == "__main__":
    sys.exit(main())
