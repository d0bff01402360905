"""The native runner: Llama-shaped models on our own kernels (services/generator/native), the fast engine on a CPU."""

from generator.backends.native_runner.runner import NativeRunner, RunnerOptions, make_runner

__all__ = ["NativeRunner", "RunnerOptions", "make_runner"]
