"""Projector and language model as one: patches and text in, the loss of supervised tokens out.

Letters: R rows, P patches, T positions, S supervised tokens, H width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from train.batching import MicroBatch, attention_mask
from train.language_model import lora_dropouts
from train.projector import Projector


class CaptionModel(nn.Module):
    """A projector in front of a language model, whose layers may carry LoRA."""

    def __init__(self, projector: Projector, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.projector = projector
        self.language_model = language_model

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.projector.parameters()).device

    def train(self, mode: bool = True) -> "CaptionModel":
        """Turn LoRA's dropout on or off; the rest of the language model stays in `eval()`."""
        super().train(False)
        self.projector.train(mode)
        for dropout in lora_dropouts(self.language_model):
            dropout.train(mode)
        return self

    def embed_patches(self, patches_RPD: Tensor) -> Tensor:
        """Project patches into the language model's embeddings: [R, P, H]."""
        weight = next(self.projector.parameters())
        projected: Tensor = self.projector(
            patches_RPD.to(weight.device, weight.dtype, non_blocking=True)
        )
        return projected.to(self.language_model.dtype)

    def embed_text(self, token_ids: Tensor) -> Tensor:
        """Look up token embeddings: [..., H]."""
        embeds: Tensor = self.language_model.get_input_embeddings()(token_ids)
        return embeds

    def logits(self, patches_RPD: Tensor, batch: MicroBatch) -> Tensor:
        """Return the logits at the supervised positions only: [S, V].

        The full [R, T, V] is never made: with 51,200 words it would be most of the memory.
        """
        patches_RPH = self.embed_patches(patches_RPD)
        embeds_RTH = torch.cat([patches_RPH, self.embed_text(batch.token_ids)], dim=1)
        hidden_RTH = self.language_model.model(
            inputs_embeds=embeds_RTH,
            attention_mask=attention_mask(batch.segments),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        hidden_SH = hidden_RTH[batch.target_rows, batch.target_positions]
        logits_SV: Tensor = self.language_model.lm_head(hidden_SH)
        return logits_SV

    def forward(self, patches_RPD: Tensor, batch: MicroBatch) -> Tensor:
        """Return the summed cross entropy of the supervised tokens: float32 []."""
        logits_SV = self.logits(patches_RPD, batch)
        return nn.functional.cross_entropy(logits_SV.float(), batch.targets, reduction="sum")
