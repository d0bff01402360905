"""The vllm engine: a vLLM server does the work, for fleets and for models that one process cannot hold."""

from generator.backends.vllm_engine.client import VllmClient
from generator.backends.vllm_engine.engine import VllmEngine, VllmOptions
from generator.backends.vllm_engine.model import make_model

__all__ = ["VllmClient", "VllmEngine", "VllmOptions", "make_model"]
