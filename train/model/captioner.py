"""Projector and language model in one module, from patches and text to the loss.

Letters: R rows, T positions, N images, P patches, S supervised tokens, H width.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from train.data.packing import PackedBatch
from train.model.attention import use_packed_attention
from train.model.decoder import output_logits
from train.model.language_model import lora_dropouts
from train.model.loss import cross_entropy
from train.model.projector import Projector


class CaptionModel(nn.Module):
    """A projector in front of a language model, whose layers may carry LoRA."""

    def __init__(self, projector: Projector, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.projector = projector
        self.language_model = language_model
        self._masks, self.packs_one_row = use_packed_attention(language_model)
        """Whether a forward pass should be one row: FlexAttention skips the pairs of different
        images, SDPA computes all pairs of a row."""
        use_fused_gelu(language_model)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.projector.parameters()).device

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def train(self, mode: bool = True) -> "CaptionModel":
        """Turn LoRA's dropout on or off; the rest of the language model stays in `eval()`."""
        super().train(False)
        self.projector.train(mode)
        for dropout in lora_dropouts(self.language_model):
            dropout.train(mode)
        return self

    def embed_patches(self, patches_NPD: Tensor) -> Tensor:
        """Project patches into the language model's embeddings: [N, P / pool^2, H]."""
        projected: Tensor = self.projector(patches_NPD.to(self.device, non_blocking=True))
        return projected.to(self.language_model.dtype)

    def embed_text(self, token_ids: Tensor) -> Tensor:
        """Look up token embeddings: [..., H]."""
        embeds: Tensor = self.language_model.get_input_embeddings()(token_ids)
        return embeds

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Return the last hidden states at the slots that predict a supervised token: [S, H]."""
        patches_NPH = self.embed_patches(batch.patches_NPD)
        slots_H = self.embed_text(batch.token_ids.flatten())
        slots_H = slots_H.index_copy(0, batch.patch_slots, patches_NPH.flatten(0, 1))
        hidden_RTH: Tensor = self.language_model.base_model(
            inputs_embeds=slots_H.view(*batch.token_ids.shape, -1),
            **self._masks(batch),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        return hidden_RTH.flatten(0, 1).index_select(0, batch.target_slots)

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """Return the logits that follow from last hidden states: [C, V]."""
        return output_logits(self.language_model, hidden_CH)

    def token_losses(self, batch: PackedBatch) -> Tensor:
        """Return the cross entropy of each supervised token: [S], float32 or float64.

        Logits are computed at supervised positions only, and never for all of them at once.
        """
        return cross_entropy(self.logits, self.hidden(batch), batch.target_ids)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return the summed cross entropy of the supervised tokens: [], float32 or float64."""
        return self.token_losses(batch).sum()


def use_fused_gelu(language_model: PreTrainedModel) -> None:
    """Replace Phi-2's GELU by torch's: the same formula in one operation instead of eight."""
    for module in language_model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
