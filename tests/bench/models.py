"""Language models that are small enough to train with every loop of a benchmark."""

from transformers import LlamaConfig, PhiConfig

from bench.step_llama import LLAMA

TINY_PHI = PhiConfig(
    vocab_size=51_200,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=1024,
    partial_rotary_factor=0.5,
)

TINY_LLAMA = LlamaConfig(
    **LLAMA.to_dict()
    | {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
    }
)
