"""The child process that scores: `python -m evaluator.backends.scoring.child`, order on stdin, values on stdout (JSON).

It runs behind all other work, and the memory that its libraries take is given back when it ends.
"""

import dataclasses
import json
import os
import resource
import sys

from chassis import priority


def main(argv: list[str]) -> int:
    """Reads an order, writes the values; returns the exit status. `argv` is the CPU time that it may take, in s."""
    (max_cpu_s,) = argv
    priority.lower()
    resource.setrlimit(resource.RLIMIT_CPU, (int(max_cpu_s), int(max_cpu_s) + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # before numpy starts its threads
    order = json.load(sys.stdin)

    from evaluator.core.results import Scored, ScoringOrder, TextBits
    from evaluator.core.scoring import score

    values = score(
        ScoringOrder(
            metrics=order["metrics"],
            answers=[Scored(**answer) for answer in order["answers"]],
            texts=[TextBits(**text) for text in order["texts"]],
        )
    )
    json.dump({name: dataclasses.asdict(value) for name, value in values.items()}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
