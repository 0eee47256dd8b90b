"""Names the frozen language model and its tokenizer by their content.

What was trained beside one language model means nothing beside another, and neither a hub id nor
a folder says that the files behind it are still the same.
"""

from collections.abc import Iterator

import torch
import xxhash
from bitsandbytes.nn import Params4bit
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def language_model_fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what the language model is made of, and how it cuts text.

    To be called before LoRA is added, which renames the layers.

    Args:
        model: Loaded, on any device, quantised or not. Its tensors are read one by one.
        tokenizer: Its tokenizer.

    Returns:
        xxh3-128, 32 hex digits. CPU and GPU may round differently when they quantise, so a model
        has one fingerprint for each kind of device.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in _tensors(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.cpu().contiguous()
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    rules = f"eos {tokenizer.eos_token_id}\n{tokenizer.backend_tokenizer.to_str()}"
    digest.update(rules.encode())
    return digest.hexdigest()


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name, statistics of the quantised ones included.

    Buffers that no checkpoint holds are among them: the rotary frequencies depend on the config.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        yield name, tensor.data
        if isinstance(tensor, Params4bit):
            for part, state in sorted(tensor.quant_state.as_dict(packed=True).items()):
                yield f"{name}.{part}", state
