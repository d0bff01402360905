"""The torch runner: Llama-shaped models on the CPU, weights from safetensors, keys and values in paged memory."""

from generator.backends.torch_runner.runner import RunnerOptions, TorchRunner, make_runner

__all__ = ["RunnerOptions", "TorchRunner", "make_runner"]
