"""The process that trains: `python -m trainer.backends.lora.child RUN_FOLDER`, started by backends.child_processes.

It reads spec.json and training.jsonl in the run's folder, and writes steps.jsonl, checkpoint.safetensors and, last of
all, the folder adapter/. It tells what it does in JSON lines on standard output:
  {"kind": "planned", "plan": {...}, "total_steps", "num_examples", "num_tokens"}   the file is good
  {"kind": "resumed", "step"}      the model is loaded; training goes on behind this step
  {"kind": "step", "step", "loss"}, {"kind": "checkpoint", "step"}
  {"kind": "made", "rank", "alpha", "target_modules", "base_version", "base_weights_sha256"}
      adapter/ stands
  {"kind": "refused", "code", "message"}, {"kind": "no_space", "message"}           and then it ends with REFUSED
It ends by itself when its standard input does: when the trainer has died.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chassis.errors import Code, PlatformError
from modelstore import Manifest
from trainer.backends import child_side, run_files
from trainer.backends.chat_tokens import ChatTokens, TokenSequence
from trainer.backends.durable_files import remove_tree, sync_tree, write_synced
from trainer.core.examples import BadLine, Example, FileLimits, Problems, parse_examples
from trainer.core.hyperparameters import Plan, parse_hyperparameters, plan_of
from trainer.core.runs import Step, unknown_model
from trainer.core.space import no_space_reason

REFUSED = 3
_LOCK_PATIENCE_S = 900.0  # the other one ends when it gets a core for a moment, and it stands behind all others


class Child:
    """One attempt at a run. spec: see backends.child_processes."""

    def __init__(self, folder: Path, spec: dict[str, Any], tell: Any) -> None:
        self._folder = folder
        self._spec = spec
        self._tell = tell

    def run(self) -> None:
        """Validates, trains, leaves the adapter. Raises PlatformError and OSError."""
        manifest = self._base()
        sequences, plan = self._prepared(manifest)
        manifest.verify()
        self._train(manifest, sequences, plan)

    def _base(self) -> Manifest:
        model = self._spec["model"]
        try:
            manifest = Manifest.load(Path(self._spec["store_dir"]) / model)
        except PlatformError as error:
            if error.code is Code.NOT_FOUND:
                raise unknown_model(model) from error
            raise
        if manifest.kind != "llm" or manifest.id != model:
            raise unknown_model(model)
        return manifest

    def _prepared(self, manifest: Manifest) -> tuple[list[TokenSequence], Plan]:
        """Checks all that can be checked before torch is loaded, which takes seconds."""
        spec = self._spec
        asked = parse_hyperparameters(spec["hyperparameters_json"])
        limits = FileLimits(spec["max_file_bytes"], spec["max_examples"])
        examples = parse_examples((self._folder / run_files.INPUT).read_bytes(), limits)
        plan = plan_of(asked, len(examples), spec["seed"])
        max_tokens = min(spec["max_example_tokens"], int(manifest.config.get("context_length", 1 << 30)))
        sequences = encoded(ChatTokens(manifest.root), examples, max_tokens)
        num_tokens = sum(len(sequence.ids) for sequence in sequences)
        self._tell(
            "planned",
            plan=dataclasses.asdict(plan),
            total_steps=plan.total_steps,
            num_examples=len(examples),
            num_tokens=num_tokens,
        )
        return sequences, plan

    def _train(self, manifest: Manifest, sequences: list[TokenSequence], plan: Plan) -> None:
        # Here and not above: a file is refused without waiting for torch, and the imports run at low priority.
        import torch

        from trainer.backends.lora import loop
        from trainer.backends.lora import model as lora

        torch.set_num_threads(self._spec["num_threads"])
        base = lora.LoraModel.load(manifest.root, seed=plan.seed, dtype=self._spec["dtype"])
        with run_files.StepsFile(self._folder) as steps:

            def resumed(step: int) -> None:
                steps.cut_to(step)
                self._tell("resumed", step=step)

            def stepped(step: Step) -> None:
                steps.append(step)
                self._tell("step", step=step.step, loss=step.loss)

            fingerprint = self._fingerprint(manifest, plan)
            options = loop.LoopOptions(self._spec["checkpoint_interval_s"], fingerprint)
            hooks = loop.Hooks(resumed, stepped, steps.sync, lambda step: self._tell("checkpoint", step=step))
            loop.train(base, sequences, plan, self._folder, options, hooks)
        self._leave(base.adapter_files(manifest.id))
        self._tell(
            "made",
            rank=lora.RANK,
            alpha=lora.ALPHA,
            target_modules=list(lora.TARGET_MODULES),
            base_version=manifest.version,
            base_weights_sha256=manifest.weights_sha256,
        )

    def _fingerprint(self, manifest: Manifest, plan: Plan) -> str:
        data = (self._folder / run_files.INPUT).read_bytes()
        parts = [manifest.version, hashlib.sha256(data).hexdigest(), json.dumps(dataclasses.asdict(plan))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _leave(self, files: Any) -> None:
        beside, adapter = self._folder / ".adapter.beside", self._folder / run_files.ADAPTER
        remove_tree(beside)
        try:
            beside.mkdir()
            for name, data in files.items():
                write_synced(beside / name, data)
            sync_tree(beside)
            remove_tree(adapter)
            os.replace(beside, adapter)
        except OSError:
            with contextlib.suppress(OSError):
                remove_tree(beside)
            raise


def encoded(chat_tokens: ChatTokens, examples: list[Example], max_tokens: int) -> list[TokenSequence]:
    """Tokenizes a file. Raises INVALID_ARGUMENT that names the lines that are too long."""
    sequences, problems = [], Problems()
    for example in examples:
        try:
            sequence = chat_tokens.encode(example)
            if len(sequence.ids) > max_tokens:
                raise BadLine(f"the example has {len(sequence.ids)} tokens; the most is {max_tokens}")
            sequences.append(sequence)
        except BadLine as why:
            problems.add(example.line, str(why))
    problems.check()
    return sequences


def main(argv: list[str]) -> int:
    """Returns the exit status: 0 where the adapter stands, REFUSED where the reason was told."""
    child_side.begin()
    tell = _teller()
    folder = Path(argv[1])
    spec = json.loads((folder / run_files.SPEC).read_text())
    # Set before torch is loaded, which reads them once. Passive: a spinning thread takes a core from the chat.
    os.environ |= {
        "OMP_NUM_THREADS": str(spec["num_threads"]),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    try:
        with _only_one(folder):
            Child(folder, spec, tell).run()
    except PlatformError as error:
        tell("refused", code=error.code.value, message=error.message)
        return REFUSED
    except OSError as error:
        if (why := no_space_reason(error)) is None:
            raise
        tell("no_space", message=why)
        return REFUSED
    return 0


def _teller() -> Any:
    """Takes standard output for the messages alone: what a library prints goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(kind: str, **fields: object) -> None:
        out.write(json.dumps({"kind": kind, **fields}) + "\n")
        out.flush()

    return tell


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Waits for a child of a killed trainer that has not noticed yet: two of them must not write one folder."""
    give_up_at = time.monotonic() + _LOCK_PATIENCE_S
    with (folder / run_files.LOCK).open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(0.1)
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv))
