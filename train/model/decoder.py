"""The parts of a language model of transformers, found by what they are and not by their names.

Letters: C tokens, H width, V vocabulary.
"""

import copy

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D
"""A linear layer; those of bitsandbytes are of the first kind."""


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the blocks of a decoder: the only list of modules in its base model.

    Raises:
        ValueError: No such list, or several.
    """
    lists = [m for m in model.base_model.children() if isinstance(m, nn.ModuleList)]
    if len(lists) != 1:
        raise ValueError(f"wanted one list of blocks, found {len(lists)}")
    return lists[0]


def linear_names(model: PreTrainedModel) -> set[str]:
    """Return the last part of the names of the linear layers of all blocks, like "q_proj"."""
    return {
        name.rpartition(".")[2]
        for name, module in blocks_of(model).named_modules()
        if isinstance(module, Linear)
    }


def position_limit(model: PreTrainedModel) -> int | None:
    """Return the positions for which a model has a table; None for positions that it computes."""
    words = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    if not tables:
        return None
    # A table may have a few rows that stand for no position.
    return min(int(model.config.max_position_embeddings), *(t.num_embeddings for t in tables))


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Return the width of a linear layer's input and of its output."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return layer.in_features, layer.out_features  # type: ignore[return-value]


class _PassedThrough(nn.Module):
    """Stands for a base model, and returns its input as the last hidden states."""

    def forward(
        self, *_: object, inputs_embeds: Tensor, **__: object
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


def output_logits(model: PreTrainedModel, hidden_CH: Tensor) -> Tensor:
    """Return the logits that a model computes from last hidden states: [C, V].

    The model's own forward pass computes them, with its scales, soft caps and biases.
    """
    output_part = copy.copy(model)
    output_part._modules = {**model._modules, model.base_model_prefix: _PassedThrough()}
    output = type(model).forward(output_part, inputs_embeds=hidden_CH[None], use_cache=False)
    logits_1CV: Tensor = output.logits
    return logits_1CV[0]
