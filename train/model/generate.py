"""Generates text behind the patches of images, with transformers' own KV cache.

Texts of many images are made in batches; a single one can be had piece by piece while it is made.

Letters: B texts of a batch, P patches, D width of the vision tower, T positions, H width.
"""

import math
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextIteratorStreamer

from train.data.prefetch import Features
from train.data.prompts import encode
from train.model.captioner import CaptionModel


@dataclass(frozen=True)
class Generation:
    """What the model said about one image."""

    text: str
    num_tokens: int
    """Without the EOS."""
    stopped: bool
    """Whether an EOS ended it, and not the limit."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn, where it is not to be the likeliest."""

    temperature: float
    """Logits are divided by it."""
    top_p: float
    """Drawn from the likeliest tokens that have this share of the probability together."""
    seed: int
    """Texts of a batch share it, so a text depends on what it is made beside."""

    def __post_init__(self) -> None:
        # Below, float32 would run over; the likeliest token has all of the probability anyway.
        if not 0.001 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}, wanted 0.001 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, wanted more than 0, up to 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, wanted one from 0 to 2**63 - 1")


def generate(
    model: CaptionModel,
    tokenizer: PreTrainedTokenizerBase,
    features: Features,
    image_ids: Sequence[int],
    prompts: Sequence[str],
    *,
    max_tokens: int,
    batch_size: int,
    description: str,
    sampling: Sampling | None = None,
) -> list[Generation]:
    """Let the model go on behind the patches of some images.

    Args:
        model: Put into `eval()` here.
        tokenizer: Of the language model; an id beyond its last one is never made.
        features: Has those of the images.
        image_ids: One for each text to make; repeats are allowed.
        prompts: Text between the patches and what is generated; empty for a caption.
        max_tokens: Most tokens of a text.
        batch_size: Texts that are made at the same time.
        description: For the progress bar.
        sampling: How tokens are drawn; without it the likeliest is taken.

    Returns:
        One a prompt, in order.
    """
    model.eval()
    config = _config(model, tokenizer, max_tokens, sampling)
    made: list[Generation] = []
    with tqdm(total=len(prompts), desc=description, unit="text", disable=None) as bar:
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            patches_BPD = features.gather(np.asarray(image_ids[part]))
            prompt_ids = encode(prompts[part], tokenizer)
            token_ids = _continue(model, patches_BPD, prompt_ids, config, sampling)
            made += [_finished(row, tokenizer) for row in token_ids.tolist()]
            bar.update(len(prompt_ids))
    return made


def stream(
    model: CaptionModel,
    tokenizer: PreTrainedTokenizerBase,
    patches_PD: NDArray[np.float16],
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
) -> Generator[str, None, None]:
    """Let the model go on behind one image, and yield its text word by word while it is made.

    Who stops iterating stops the model after its next token.

    Args:
        model: Put into `eval()` here.
        tokenizer: Of the language model.
        patches_PD: Features of the image, float16.
        prompt_ids: Tokens between the patches and what is generated.
        max_tokens: Most tokens of the text.
        sampling: How tokens are drawn; without it the likeliest is taken.

    Yields:
        Pieces that together are what `generate` makes.
    """
    model.eval()
    config = _config(model, tokenizer, max_tokens, sampling)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    given_up = threading.Event()

    def stop(token_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((len(token_ids),), given_up.is_set(), device=token_ids.device)

    def make() -> None:
        try:
            _continue(
                model, patches_PD[None], [list(prompt_ids)], config, sampling,
                streamer=streamer, stopping_criteria=[stop],
            )  # fmt: skip
        finally:
            # Also after an error, or who iterates would wait for ever.
            streamer.on_finalized_text("", stream_end=True)

    with ThreadPoolExecutor(1, thread_name_prefix="stream") as thread:
        done = thread.submit(make)
        try:
            yield from _stripped(streamer)
        finally:
            given_up.set()
        done.result()


def _stripped(pieces: Iterable[str]) -> Iterator[str]:
    """Yield pieces that together are what `str.strip` makes of all pieces."""
    begun, held = False, ""
    for piece in pieces:
        text = held + piece if begun else piece.lstrip()
        kept = text.rstrip()
        held = text[len(kept) :]
        if kept:
            begun = True
            yield kept


def _config(
    model: CaptionModel,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    sampling: Sampling | None,
) -> GenerationConfig:
    # Phi-2 has 51,200 rows of embeddings for 50,295 tokens: the rest decodes to nothing.
    unused = list(range(len(tokenizer), model.language_model.config.vocab_size))
    drawn: dict[str, float] = {}
    if sampling is not None:
        # Transformers would draw from the 50 likeliest only.
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=sampling is not None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        suppress_tokens=unused or None,
        **drawn,
    )


@torch.inference_mode()
def _continue(
    model: CaptionModel,
    patches_BPD: NDArray[np.float16],
    prompt_ids: Sequence[list[int]],
    config: GenerationConfig,
    sampling: Sampling | None,
    **watching: Any,
) -> Tensor:
    """Return the tokens that come, EOS as padding: int64 [B, T]."""
    embeds_BTH, mask_BT = _prompt_embeds(model, patches_BPD, prompt_ids)
    with torch.random.fork_rng(enabled=sampling is not None):
        if sampling is not None:
            torch.manual_seed(sampling.seed)
        token_ids: Tensor = model.language_model.generate(
            inputs_embeds=embeds_BTH, attention_mask=mask_BT, generation_config=config, **watching
        )
    return token_ids


def _prompt_embeds(
    model: CaptionModel, patches_BPD: NDArray[np.float16], prompt_ids: Sequence[list[int]]
) -> tuple[Tensor, Tensor]:
    """Embed patches and prompts, padded on the left: [B, T, H] and the mask [B, T]."""
    patches_BPH = model.embed_patches(torch.from_numpy(patches_BPD))
    num_patches, width = patches_BPH.shape[1:]
    length = num_patches + max(map(len, prompt_ids))
    embeds_BTH = patches_BPH.new_zeros(len(prompt_ids), length, width)
    mask_BT = torch.zeros(len(prompt_ids), length, dtype=torch.int64, device=model.device)
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
