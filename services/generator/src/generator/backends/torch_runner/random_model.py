"""Models of any shape with random weights: for benchmarks of sizes that nobody can fetch here."""

import torch
from torch import Tensor

from generator.backends.llama_config import LlamaConfig
from generator.backends.torch_runner.devices import pick_device, pick_dtype
from generator.backends.torch_runner.runner import RunnerOptions, TorchRunner, assemble
from generator.backends.torch_runner.weights import LayerWeights, LlamaWeights


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=8192,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=None,
        ties_embeddings=False,
        eos_token_ids=frozenset(),
    )


# The shapes of Llama 3.2 1B (its head untied, so 1.5 billion weights) and of Llama 2 7B.
SHAPES = {
    "1b": _llama(2048, 8192, 16, 32, 8, 64, 128_256),
    "7b": _llama(4096, 11_008, 32, 32, 32, 128, 32_000),
}


def make_random(config: LlamaConfig, options: RunnerOptions, *, model_id: str = "random") -> TorchRunner:
    """Makes a runner whose weights are drawn on its device: 7 billion take seconds on a GPU, and 14 GB in bf16."""
    device = pick_device(options.device)
    weights = random_weights(config, pick_dtype(options.dtype, device), device)
    return assemble(config, weights, options, model_id=model_id, version="0" * 12)


def random_weights(config: LlamaConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> LlamaWeights:
    """Draws weights that keep hidden states about as large as they come, so that nothing overflows."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        return tensor.normal_(std=shape[-1] ** -0.5, generator=generator)

    def ones() -> Tensor:
        return torch.ones(config.hidden_size, dtype=dtype, device=device)

    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    query, kv = config.num_heads * head, config.num_kv_heads * head
    layers = [
        LayerWeights(
            attention_norm=ones(),
            qkv=random(query + 2 * kv, hidden),
            output=random(hidden, query),
            mlp_norm=ones(),
            gate_up=random(2 * inner, hidden),
            down=random(hidden, inner),
        )
        for _ in range(config.num_layers)
    ]
    embedding = random(config.vocab_size, hidden)
    head_weights = embedding if config.ties_embeddings else random(config.vocab_size, hidden)
    return LlamaWeights(embedding, layers, ones(), head_weights)


def num_weights(config: LlamaConfig) -> int:
    """Returns how many weights a token reads at decode: the embedding's single row aside."""
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * query + 2 * kv + 3 * config.intermediate_size + 2)
    return config.num_layers * layer + config.hidden_size * (config.vocab_size + 1)
