"""Tiny random models of the families of language models that training is tested with.

Each config has the family's own rules: sliding windows shorter than the texts of the tests, soft
caps, scales, tied output layers, shared key heads.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tests.conftest import HIDDEN, ROWS

SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
SHARED = {"num_key_value_heads": 2}
"""Two queries share a key head."""
WINDOW = 6
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Family:
    """A family, and a config of a tiny model."""

    kind: str
    """The name of its classes in transformers, without `Config` and `ForCausalLM`."""
    models: str
    """Known models, for the page."""
    sizes: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    """Its own rules, for the page."""
    export: str = "yes"
    """How it is exported as LLaVA, for the page; "yes": without code of ours."""

    def config(self) -> transformers.PreTrainedConfig:
        """Return the config of the tiny model."""
        sizes = SIZES | {"tie_word_embeddings": False} | self.sizes
        config: transformers.PreTrainedConfig = getattr(transformers, f"{self.kind}Config")(**sizes)
        return config

    def write(self, folder: Path, tokenizer_folder: Path) -> Path:
        """Write a model with random weights, and a tokenizer."""
        config = self.config()
        eos = transformers.AutoTokenizer.from_pretrained(tokenizer_folder).eos_token_id
        config.bos_token_id = config.eos_token_id = eos
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for name, parameter in model.named_parameters():
                # Large enough that every position and every rule matters to every later logit.
                spread = 1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.3
                is_norm = parameter.ndim == 1 and name.endswith("weight")
                nn.init.normal_(parameter, mean=float(is_norm), std=spread)
        model.save_pretrained(folder)
        for path in tokenizer_folder.glob("tokenizer*"):
            shutil.copy(path, folder)
        return folder


FAMILIES = {
    family.kind: family
    for family in (
        Family(
            "Phi",
            "Phi-1, Phi-1.5, Phi-2",
            note="bias in the output layer",
            export="own code",
        ),
        Family(
            "Llama",
            "Llama 2 and 3, SmolLM2, TinyLlama",
            SHARED | {"tie_word_embeddings": True},
        ),
        Family(
            "Qwen2",
            "Qwen2, Qwen2.5",
            SHARED | SLIDING | {"use_sliding_window": True, "tie_word_embeddings": True},
            "sliding windows, where the config has them",
        ),
        Family("Qwen3", "Qwen3", SHARED | {"head_dim": 16}),
        Family("Mistral", "Mistral 7B", SHARED | {"sliding_window": WINDOW}, "sliding window"),
        Family(
            "Gemma",
            "Gemma",
            SHARED | {"head_dim": 16, "tie_word_embeddings": True},
            "scaled embeddings",
        ),
        Family(
            "Gemma2",
            "Gemma 2",
            SHARED | SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16,
                "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
                "tie_word_embeddings": True},
            "scaled embeddings, sliding windows, soft caps of scores and logits",
            export="no: LLaVA lacks the soft cap",
        ),
        Family(
            "Gemma3Text",
            "Gemma 3 (text: 270M, 1B)",
            SHARED | SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16,
                "tie_word_embeddings": True},
            "scaled embeddings, sliding windows",
        ),
        Family(
            "Phi3",
            "Phi-3, Phi-3.5, Phi-4",
            SHARED | {"sliding_window": WINDOW},
            "sliding window",
        ),
        Family("GPTNeoX", "Pythia, GPT-NeoX"),
        Family("Olmo2", "OLMo 2", SHARED),
        Family(
            "GPT2",
            "GPT-2",
            {"tie_word_embeddings": True},
            "learned positions; weights of linear layers are transposed",
        ),
        Family("StableLm", "StableLM 2", SHARED),
        Family(
            "Granite",
            "Granite 3",
            SHARED | {"embedding_multiplier": 3.0, "logits_scaling": 4.0,
                "residual_multiplier": 0.5, "attention_multiplier": 0.2,
                "tie_word_embeddings": True},
            "scaled embeddings, residuals, scores and logits",
        ),
        Family(
            "Cohere",
            "Command R",
            SHARED | {"logit_scale": 0.25, "tie_word_embeddings": True},
            "scaled logits",
        ),
    )
}  # fmt: skip
