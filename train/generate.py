"""Generates text behind the patches of images: batched, greedy, with transformers' own KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from cache import FeatureStore
from train.model import CaptionModel
from train.prompts import encode


@dataclass(frozen=True)
class Generation:
    """What the model said about one image."""

    text: str
    num_tokens: int
    """Without the EOS."""
    stopped: bool
    """Whether an EOS ended it, and not the limit."""


def generate(
    model: CaptionModel,
    tokenizer: PreTrainedTokenizerBase,
    store: FeatureStore,
    image_ids: Sequence[int],
    prompts: Sequence[str],
    *,
    max_tokens: int,
    batch_size: int,
    description: str,
) -> list[Generation]:
    """Let the model go on behind the patches of some images.

    Args:
        model: Put into `eval()` here.
        tokenizer: Of the language model.
        store: Holds the features.
        image_ids: One for each text to make; repeats are allowed.
        prompts: Text between the patches and what is generated; empty for a caption.
        max_tokens: Most tokens of a text.
        batch_size: Texts that are made at the same time.
        description: For the progress bar.

    Returns:
        One a prompt, in order.
    """
    model.eval()
    config = _greedy(model, tokenizer, max_tokens)
    made: list[Generation] = []
    with tqdm(total=len(prompts), desc=description, unit="text", disable=None) as bar:
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            patches_BPD = store.gather(np.asarray(image_ids[part]))
            made += _generate_batch(model, tokenizer, patches_BPD, prompts[part], config)
            bar.update(len(prompts[part]))
    return made


def _greedy(
    model: CaptionModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> GenerationConfig:
    # Phi-2 has 51,200 rows of embeddings for 50,295 tokens: the rest decodes to nothing.
    unused = list(range(len(tokenizer), model.language_model.config.vocab_size))
    return GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        suppress_tokens=unused or None,
    )


@torch.inference_mode()
def _generate_batch(
    model: CaptionModel,
    tokenizer: PreTrainedTokenizerBase,
    patches_BPD: NDArray[np.float16],
    prompts: Sequence[str],
    config: GenerationConfig,
) -> list[Generation]:
    embeds_BTH, mask_BT = _prompt_embeds(model, tokenizer, patches_BPD, prompts)
    token_ids = model.language_model.generate(
        inputs_embeds=embeds_BTH, attention_mask=mask_BT, generation_config=config
    )
    return [_finished(row, tokenizer) for row in token_ids.tolist()]


def _prompt_embeds(
    model: CaptionModel,
    tokenizer: PreTrainedTokenizerBase,
    patches_BPD: NDArray[np.float16],
    prompts: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Embed patches and prompts, padded on the left: [B, T, H] and the mask [B, T]."""
    patches_BPH = model.embed_patches(torch.from_numpy(patches_BPD))
    prompt_ids = encode(prompts, tokenizer)
    num_patches, width = patches_BPH.shape[1:]
    length = num_patches + max(map(len, prompt_ids))
    embeds_BTH = patches_BPH.new_zeros(len(prompts), length, width)
    mask_BT = torch.zeros(len(prompts), length, dtype=torch.int64, device=model.device)
    for row, ids in enumerate(prompt_ids):
        start = length - len(ids) - num_patches
        embeds_BTH[row, start : start + num_patches] = patches_BPH[row]
        if ids:
            embeds_BTH[row, start + num_patches :] = model.embed_text(
                torch.tensor(ids, device=model.device)
            )
        mask_BT[row, start:] = 1
    return embeds_BTH, mask_BT


def _finished(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Generation:
    eos = tokenizer.eos_token_id
    stopped = eos in token_ids
    kept = token_ids[: token_ids.index(eos)] if stopped else token_ids
    return Generation(tokenizer.decode(kept).strip(), len(kept), stopped)
