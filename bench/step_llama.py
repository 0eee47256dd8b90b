"""How fast an optimizer step is with a Llama of SmolLM2-135M's sizes, deep and narrow.

    python -m bench.step_llama

As `bench.step`, beside the usual loops on cached features.
"""

import dataclasses

from transformers import LlamaConfig

from bench.command import benchmark_parser, run_benchmark
from bench.step import (
    BY_LENGTH,
    FINETUNE,
    FULL,
    OURS,
    PRETRAIN,
    QUICK,
    SMALL,
    USUAL,
    measure,
)

CACHED = dict.fromkeys((PRETRAIN, FINETUNE), (OURS, USUAL, BY_LENGTH))
"""The contenders that read cached features."""

LLAMA = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
SMALL_LLAMA = LlamaConfig(
    **LLAMA.to_dict() | SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
)
FULL_LLAMA = dataclasses.replace(
    FULL, images={PRETRAIN: 8, FINETUNE: 6}, config=LLAMA, contenders=CACHED
)
QUICK_LLAMA = dataclasses.replace(QUICK, config=SMALL_LLAMA, contenders=CACHED)


def main() -> None:
    """Measure and write the result file."""
    run_benchmark(
        "step_llama",
        lambda arguments: measure(QUICK_LLAMA if arguments.quick else FULL_LLAMA),
        benchmark_parser(__doc__),
        minutes=12,
        quick_seconds=60,
        libraries=("torch", "transformers", "peft"),
    )


if __name__ == "__main__":
    main()
