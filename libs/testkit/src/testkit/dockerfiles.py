"""Reads Dockerfiles as far as tests of their rules need it: stages, instructions, what the last stage ends up with."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True)
class Stage:
    """One FROM with what follows it: (INSTRUCTION, rest) pairs, continuation lines joined, comments left out."""

    base: str
    name: str | None
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def last(self, instruction: str) -> str | None:
        """The rest of the last instruction of a kind: the one that holds."""
        found = [rest for kind, rest in self.instructions if kind == instruction]
        return found[-1] if found else None

    def env(self) -> dict[str, str]:
        """What ENV sets."""
        pairs = [pair for kind, rest in self.instructions if kind == "ENV" for pair in shlex.split(rest)]
        return dict(pair.split("=", 1) for pair in pairs)

    def labels(self) -> dict[str, str]:
        """What LABEL sets."""
        pairs = [pair for kind, rest in self.instructions if kind == "LABEL" for pair in shlex.split(rest)]
        return dict(pair.split("=", 1) for pair in pairs)

    def command(self, instruction: str) -> list[str] | None:
        """An instruction in exec form; None where it is absent or in shell form."""
        try:
            loaded = json.loads(self.last(instruction) or "null")
        except ValueError:
            return None
        return loaded if isinstance(loaded, list) else None


def read(path: Path) -> list[Stage]:
    """Returns the stages of a Dockerfile."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    logical = re.sub(r"\\\n", " ", "\n".join(lines)).splitlines()
    stages: list[Stage] = []
    for line in filter(str.strip, logical):
        kind, _, rest = line.strip().partition(" ")
        kind, rest = kind.upper(), rest.strip()
        if kind == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(base.strip(), name.strip() or None))
        elif stages:
            stages[-1].instructions.append((kind, rest))
    return stages
