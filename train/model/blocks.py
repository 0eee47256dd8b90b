"""How the language model's blocks run in training: recomputed in the backward pass.

Transformers' own switch works only in `train()`, in which Phi-2's dropout of 0.1 would run too.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def recompute_blocks(model: PreTrainedModel) -> None:
    """Make every block keep its input alone, and compute all else again in the backward pass.

    No bit of loss and gradients changes. LoRA may be there already, or be added later.
    """
    for block in model.model.layers:
        block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Tensor], hidden_RTH: Tensor, **options: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(hidden_RTH, **options)
    # The state of the random generator is restored, so LoRA drops the same inputs again.
    result: Tensor = checkpoint(
        forward, hidden_RTH, use_reentrant=False, preserve_rng_state=True, **options
    )
    return result
