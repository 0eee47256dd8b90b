"""Generates text behind the patches of images, with transformers' own KV cache.

Texts are generated in batches; a single text can be streamed.

Letters: B texts of a batch, L tokens of the lead, P patches, D width of the vision tower, T
positions, H width, S rows of a table.
"""

import itertools
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
from transformers import GenerationConfig, TextIteratorStreamer

from cache.errors import SettingsError
from train.data.prefetch import Features
from train.data.prompts import PromptFormat
from train.model.captioner import CaptionModel
from train.model.decoder import position_limit


@dataclass(frozen=True)
class Generation:
    """A generated text."""

    text: str
    num_tokens: int
    """Without the token that ended it."""
    stopped: bool
    """Whether an end token ended it, not the token limit."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters; without them decoding is greedy."""

    temperature: float
    """Divisor of the logits."""
    top_p: float
    """Tokens are drawn from the likeliest ones that together have this probability."""
    seed: int
    """Shared by the texts of a batch, so a sampled text depends on its batch."""

    def __post_init__(self) -> None:
        # Below 0.001 float32 would overflow; decoding is greedy there anyway.
        if not 0.001 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}, wanted 0.001 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, wanted more than 0, up to 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, wanted one from 0 to 2**63 - 1")


def generate(
    model: CaptionModel,
    prompt_format: PromptFormat,
    features: Features,
    image_ids: Sequence[int],
    questions: Sequence[str | None],
    *,
    max_tokens: int,
    batch_size: int,
    description: str,
    sampling: Sampling | None = None,
) -> list[Generation]:
    """Generate a text behind the patches of each image and its question.

    Args:
        model: Put into `eval()` here.
        prompt_format: Of the language model; ids without a token are never generated.
        features: Source of the images' features.
        image_ids: The image of each text; repeats are allowed.
        questions: The question that each text answers; None for a caption without a question.
        max_tokens: Most tokens of a text.
        batch_size: Texts of a batch.
        description: For the progress bar.
        sampling: Sampling parameters; without them decoding is greedy.

    Returns:
        One generation per question, in order.
    """
    model.eval()
    config = _config(model, prompt_format, max_tokens, sampling)
    lead = prompt_format.lead
    generations: list[Generation] = []
    with tqdm(total=len(questions), desc=description, unit="text", disable=None) as bar:
        for start in range(0, len(questions), batch_size):
            part = slice(start, start + batch_size)
            patches_BPD = features.gather(np.asarray(image_ids[part]))
            prompt_ids = prompt_format.prompts(questions[part])
            token_ids = _continue(model, patches_BPD, prompt_ids, config, sampling, lead)
            generations += [_decode(row, prompt_format) for row in token_ids.tolist()]
            bar.update(len(prompt_ids))
    return generations


def stream(
    model: CaptionModel,
    prompt_format: PromptFormat,
    patches_PD: NDArray[np.float16],
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
) -> Generator[str, None, None]:
    """Generate one text and yield it word by word.

    When the caller stops iterating, generation stops after the next token.

    Args:
        model: Put into `eval()` here.
        prompt_format: Of the language model.
        patches_PD: float16, features of the image.
        prompt_ids: Tokens behind the patches.
        max_tokens: Most tokens of the text.
        sampling: Sampling parameters; without them decoding is greedy.

    Yields:
        Pieces that together are the text that `generate` returns.
    """
    model.eval()
    config = _config(model, prompt_format, max_tokens, sampling)
    streamer = _Streamer(prompt_format)
    cancelled = threading.Event()

    def stop(token_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((len(token_ids),), cancelled.is_set(), device=token_ids.device)

    def make() -> None:
        try:
            _continue(
                model, patches_PD[None], [list(prompt_ids)], config, sampling, prompt_format.lead,
                streamer=streamer, stopping_criteria=[stop],
            )  # fmt: skip
        finally:
            # After an error too, or the caller would wait for ever.
            streamer.on_finalized_text("", stream_end=True)

    with ThreadPoolExecutor(1, thread_name_prefix="stream") as thread:
        done = thread.submit(make)
        try:
            yield from _stripped(streamer)
        finally:
            cancelled.set()
        done.result()


class _Streamer(TextIteratorStreamer):  # type: ignore[misc]
    """Yields the text of generated tokens, without the token that ends it."""

    def __init__(self, prompt_format: PromptFormat) -> None:
        super().__init__(prompt_format.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._end_ids = prompt_format.end_ids

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then one token at a time."""
        # An end token that the tokenizer does not call special would be shown.
        if self.next_tokens_are_prompt or int(value) not in self._end_ids:
            super().put(value)


def _stripped(pieces: Iterable[str]) -> Iterator[str]:
    """Yield pieces whose concatenation is that of all pieces, stripped."""
    begun, held = False, ""
    for piece in pieces:
        text = held + piece if begun else piece.lstrip()
        kept = text.rstrip()
        held = text[len(kept) :]
        if kept:
            begun = True
            yield kept


def _config(
    model: CaptionModel, prompt_format: PromptFormat, max_tokens: int, sampling: Sampling | None
) -> GenerationConfig:
    # Phi-2 has 51,200 embedding rows for 50,295 tokens; the others decode to nothing.
    rows = range(model.language_model.config.vocab_size)
    unused = sorted(set(rows) - set(prompt_format.tokenizer.get_vocab().values()))
    parameters: dict[str, float] = {}
    if sampling is not None:
        # By default, transformers draws from the 50 likeliest tokens.
        parameters = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=sampling is not None,
        eos_token_id=list(prompt_format.end_ids),
        pad_token_id=prompt_format.end_ids[0],
        suppress_tokens=unused or None,
        **parameters,
    )


@torch.inference_mode()
def _continue(
    model: CaptionModel,
    patches_BPD: NDArray[np.float16],
    prompt_ids: Sequence[list[int]],
    config: GenerationConfig,
    sampling: Sampling | None,
    lead: Sequence[int],
    **watching: Any,
) -> Tensor:
    """Return the generated tokens, padded with an end token: int64 [B, T]."""
    embeds_BTH, mask_BT = _prompt_embeds(model, patches_BPD, prompt_ids, lead)
    config = _within_positions(model, embeds_BTH.shape[1], config)
    with torch.random.fork_rng(enabled=sampling is not None):
        if sampling is not None:
            torch.manual_seed(sampling.seed)
        token_ids: Tensor = model.language_model.generate(
            inputs_embeds=embeds_BTH, attention_mask=mask_BT, generation_config=config, **watching
        )
    return token_ids


def _within_positions(
    model: CaptionModel, num_given: int, config: GenerationConfig
) -> GenerationConfig:
    """End texts where a table of positions ends, behind which transformers fails."""
    limit = position_limit(model.language_model)
    if limit is None or num_given + config.max_new_tokens <= limit:
        return config
    if num_given >= limit:
        raise SettingsError(
            f"the language model has {limit} positions, and picture and prompt take {num_given}. "
            f"Ask something shorter, or use a model that reads more."
        )
    return GenerationConfig(**config.to_diff_dict() | {"max_new_tokens": limit - num_given})


def _prompt_embeds(
    model: CaptionModel,
    patches_BPD: NDArray[np.float16],
    prompt_ids: Sequence[list[int]],
    lead: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Embed lead, patches and prompts, padded on the left: [B, T, H] and the mask [B, T]."""
    patches_BPH = model.embed_patches(torch.from_numpy(patches_BPD))
    num_patches, width = patches_BPH.shape[1:]
    shared = len(lead) + num_patches
    length = shared + max(map(len, prompt_ids))
    # Rows of a table: nothing at 0, then all patches, the lead, and all prompts.
    sources_BT = np.zeros((len(prompt_ids), length), np.int64)
    first_lead = 1 + len(prompt_ids) * num_patches
    next_text = first_lead + len(lead)
    for row, ids in enumerate(prompt_ids):
        first_text = length - len(ids)
        first_patch = 1 + row * num_patches
        sources_BT[row, first_text - shared : first_text - num_patches] = np.arange(
            first_lead, first_lead + len(lead)
        )
        sources_BT[row, first_text - num_patches : first_text] = np.arange(
            first_patch, first_patch + num_patches
        )
        sources_BT[row, first_text:] = np.arange(next_text, next_text + len(ids))
        next_text += len(ids)
    token_ids = torch.tensor([*lead, *itertools.chain(*prompt_ids)], dtype=torch.int64)
    sources = torch.from_numpy(sources_BT).to(model.device)
    table_SH = torch.cat(
        [
            patches_BPH.new_zeros(1, width),
            patches_BPH.flatten(0, 1),
            model.embed_text(token_ids.to(model.device)),
        ]
    )
    return table_SH[sources], (sources > 0).long()


def _decode(token_ids: list[int], prompt_format: PromptFormat) -> Generation:
    ends = [place for place, token_id in enumerate(token_ids) if token_id in prompt_format.end_ids]
    text_ids = token_ids[: ends[0]] if ends else token_ids
    return Generation(prompt_format.decode(text_ids), len(text_ids), stopped=bool(ends))
