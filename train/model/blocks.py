"""How the language model's blocks run in training: compiled, recomputed in the backward pass.

Transformers' own switch works only in `train()`, in which Phi-2's dropout of 0.1 would run too.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from cache.errors import SettingsError
from cache.texts import one_line
from train.model.decoder import blocks_of
from train.settings import LoopSettings

Forward = Callable[..., Tensor]


def set_up_blocks(model: PreTrainedModel, projector: nn.Module, settings: LoopSettings) -> None:
    """Compile and recompute the blocks as the settings say."""
    if settings.compile:
        compile_blocks(model, projector)
    # Afterwards: torch's compiler would take a recomputed block apart.
    if settings.gradient_checkpointing:
        recompute_blocks(model)


def compile_blocks(
    model: PreTrainedModel, projector: nn.Module, *, backend: str = "inductor"
) -> None:
    """Compile the blocks and the projector for passes with gradients, in place, for any length.

    All blocks share their code: one compilation is for the first block, whose input is a view, and
    one for all others. Passes without gradients, like generation with its cache, run as before.

    Args:
        model: LoRA may be there already, or be added later.
        projector: In front of the model.
        backend: torch.compile's.

    Raises:
        SettingsError: Nothing can be compiled here, for lack of a C++ compiler or of Triton.
    """
    # Torch's compiler looks at it itself.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    _check_compiler(model.device, backend)
    for module in (*blocks_of(model), projector):
        # With `fullgraph`, an operation that cannot be compiled is an error, not a slow detour.
        compiled = torch.compile(module.forward, backend=backend, dynamic=True, fullgraph=True)
        module.forward = functools.partial(_compiled, module.forward, compiled)


def _compiled(forward: Forward, compiled: Forward, *inputs: Tensor, **options: Any) -> Tensor:
    chosen = compiled if torch.is_grad_enabled() else forward
    return chosen(*inputs, **options)


def _check_compiler(device: torch.device, backend: str) -> None:
    """Compile something small, forward and backward."""

    @functools.partial(torch.compile, backend=backend)
    def double_and_square(x: Tensor) -> Tensor:
        return (2 * x).square().sum()

    try:
        double_and_square(torch.ones(8, device=device, requires_grad=True)).backward()
    except Exception as error:
        # The compiler's own errors share no class.
        raise SettingsError(
            f"compile: true, but torch.compile does not work here: {one_line(error)[:300]}. "
            f"Install a C++ compiler, like g++, or set compile: false."
        ) from None


def recompute_blocks(model: PreTrainedModel) -> None:
    """Make every block keep its input alone, and compute all else again in the backward pass.

    No bit of loss and gradients changes. LoRA may be there already, or be added later.
    """
    for block in blocks_of(model):
        block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Forward, *inputs: Any, **options: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    # The state of the random generator is restored, so LoRA drops the same inputs again.
    result: Tensor = checkpoint(
        forward, *inputs, use_reentrant=False, preserve_rng_state=True, **options
    )
    return result
