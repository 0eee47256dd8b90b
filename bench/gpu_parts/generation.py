"""How fast the evaluation's texts are made, in large batches."""

import time

import torch

from bench.generate import prompt
from bench.gpu_parts.report import Row
from bench.step import Stage
from bench.texts import bare_format
from train.model.attention import NAME as OUR_ATTENTION
from train.model.captioner import use_fused_gelu
from train.model.generate import Generation, generate


def measure_generation(stage: Stage, batch: int, max_tokens: int) -> Row:
    """Generate a batch of texts by a model that does not stop.

    Args:
        stage: Model, tokenizer and features.
        batch: Texts.
        max_tokens: Of a text.
    """
    stage.model.language_model.set_attn_implementation(OUR_ATTENTION)
    use_fused_gelu(stage.model.language_model)
    # Chooses kernels.
    _generate(stage, batch, 2)
    started = time.perf_counter()
    made = _generate(stage, batch, max_tokens)
    seconds = time.perf_counter() - started
    row = {
        "tokens_per_second": round(sum(text.num_tokens for text in made) / seconds, 1),
        "texts_per_second": round(batch / seconds, 1),
        "seconds_per_token_of_a_batch": round(seconds / max_tokens, 5),
        "max_tokens": max_tokens,
    }
    if stage.model.device.type == "cuda":
        row["peak_gib_of_all_models"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


def _generate(stage: Stage, batch: int, max_tokens: int) -> list[Generation]:
    return generate(
        stage.model,
        bare_format(stage.tokenizer),
        stage.store,
        [number % len(stage.store) for number in range(batch)],
        [prompt()] * batch,
        max_tokens=max_tokens,
        batch_size=batch,
        description="texts",
    )
