"""`python -m loadtest [OPTIONS]` runs Locust with our locustfile; `report` and `trace` do without it.

    python -m loadtest --steps 1,2,4,8                       users, closed loop
    python -m loadtest --arrivals trace --trace FILE         open loop
    python -m loadtest --page                                Locust's page in place of a headless run
    python -m loadtest report FOLDER                         writes report.html again, from requests.csv and run.json
    python -m loadtest trace FILE --seed 7                   makes a trace of our own

All options of Locust work too; `python -m loadtest --help` lists them.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtest import arrivals, recording, report, tables

_LOCUSTFILE = Path(__file__).with_name("locustfile.py")
# So long a stop waits for answers under way, unless the user says otherwise: one that is cut off tells nothing.
_STOP_TIMEOUT_S = "120"


def locust_command(arguments: Sequence[str]) -> list[str]:
    """The command line for Locust: what is given, and what is left out filled in."""
    given = {argument.split("=", 1)[0] for argument in arguments}
    command = [sys.executable, "-m", "locust", "-f", str(_LOCUSTFILE)]
    if "--page" in given:
        command += [] if "--web-host" in given else ["--web-host", "127.0.0.1"]
    elif not given & {"--help", "-h", "--version", "-V"}:
        command += ["--headless", "--only-summary"]
    if not given & {"-s", "--stop-timeout"}:
        command += ["--stop-timeout", _STOP_TIMEOUT_S]
    return command + [argument for argument in arguments if argument != "--page"]


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status, unless Locust takes the process over."""
    if arguments and arguments[0] == "report":
        return _report(arguments[1:])
    if arguments and arguments[0] == "trace":
        return _trace(arguments[1:])
    command = locust_command(arguments)
    os.execv(command[0], command)


def _report(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m loadtest report")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(arguments).folder
    try:
        figures = report.Figures(recording.read(folder))
    except FileNotFoundError as error:
        print(f"loadtest: {error.filename} is not there; a test leaves it in its folder", file=sys.stderr)
        return 2
    path = report.write(figures.recorded, folder)
    print(
        tables.as_text(figures.steps, figures.recorded.offered_unit),
        *report.verdict(figures),
        f"Report: {path}",
        sep="\n",
    )
    return 0


def _trace(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m loadtest trace")
    parser.add_argument("file", type=Path)
    parser.add_argument("--rate", type=float, default=1.0, help="arrivals per second, on the average")
    parser.add_argument("--duration", type=float, default=120.0, help="seconds")
    parser.add_argument("--seed", type=int, required=True)
    wanted = parser.parse_args(arguments)
    found = arrivals.bursty(wanted.rate, wanted.duration, wanted.seed)
    arrivals.write_trace(found, wanted.file)
    print(f"{len(found)} arrivals in {wanted.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
