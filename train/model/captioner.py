"""Projector and language model as one: patches and text in, the loss of supervised tokens out.

Letters: R rows, T positions, N images, P patches, S supervised tokens, U slots that
predict them, H width, V vocabulary.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from train.data.packing import PackedBatch
from train.model.attention import use_packed_attention
from train.model.language_model import lora_dropouts
from train.model.loss import summed_cross_entropy
from train.model.projector import Projector


class CaptionModel(nn.Module):
    """A projector in front of a language model, whose layers may carry LoRA."""

    def __init__(self, projector: Projector, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.projector = projector
        self.language_model = language_model
        self._mask = use_packed_attention(language_model)
        use_fused_gelu(language_model)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
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
        """Project patches into the language model's embeddings: [N, P, H]."""
        weight = next(self.projector.parameters())
        projected: Tensor = self.projector(
            patches_NPD.to(weight.device, weight.dtype, non_blocking=True)
        )
        return projected.to(self.language_model.dtype)

    def embed_text(self, token_ids: Tensor) -> Tensor:
        """Look up token embeddings: [..., H]."""
        embeds: Tensor = self.language_model.get_input_embeddings()(token_ids)
        return embeds

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Return the last hidden states at the slots that predict a supervised token: [U, H]."""
        patches_NPH = self.embed_patches(batch.patches_NPD)
        slots_H = self.embed_text(batch.token_ids.flatten())
        slots_H = slots_H.index_copy(0, batch.patch_slots, patches_NPH.flatten(0, 1))
        with only_at(self.language_model.model.layers[-1].mlp, batch.slots, batch.token_ids.shape):
            hidden_RTH: Tensor = self.language_model.model(
                inputs_embeds=slots_H.view(*batch.token_ids.shape, -1),
                attention_mask=self._mask(batch),
                position_ids=batch.positions,
                use_cache=False,
            ).last_hidden_state
        return hidden_RTH.flatten(0, 1).index_select(0, batch.slots)

    def logits(self, batch: PackedBatch) -> Tensor:
        """Return the logits of the supervised tokens: [S, V]."""
        logits_UV: Tensor = self.language_model.lm_head(self.hidden(batch))
        return logits_UV.repeat_interleave(batch.counts, 0)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return the summed cross entropy of the supervised tokens: float32 [].

        Logits are computed at supervised positions only, and never for all of them at once.
        """
        return summed_cross_entropy(
            self.language_model.lm_head, self.hidden(batch), batch.targets, batch.counts
        )


@contextlib.contextmanager
def only_at(module: nn.Module, slots_U: Tensor, shape: torch.Size) -> Iterator[None]:
    """Let a module, which treats every position alone, compute at some slots of [R, T] only.

    Of the last block's outputs only those that predict a supervised token are read.
    """

    def select(_: nn.Module, arguments: tuple[Tensor]) -> Tensor:
        return arguments[0].flatten(0, 1).index_select(0, slots_U)

    def spread(_: nn.Module, arguments: tuple[Tensor], out_UH: Tensor) -> Tensor:
        slots_H = out_UH.new_zeros(shape.numel(), out_UH.shape[1])
        return slots_H.index_copy(0, slots_U, out_UH).view(*shape, -1)

    with module.register_forward_pre_hook(select), module.register_forward_hook(spread):
        yield


def use_fused_gelu(language_model: PreTrainedModel) -> None:
    """Put torch's GELU in place of Phi-2's: the same formula, one operation instead of eight."""
    for module in language_model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
