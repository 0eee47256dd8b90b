"""An optimizer step as usual training loops make it, to be measured beside ours.

One padded sequence a text, behind a copy of its image's patches; the language model makes the
logits of all positions, and transformers' own loss leaves out those with the label -100. The
features come from a store, or from CLIP, which is then run on decoded pictures at every step, once
for every text.

Source: LLaVA's recipes, `scripts/v1_5/pretrain.sh` and `finetune.sh`: the first shuffles the texts,
the second has those of like length in a batch.

Letters: B texts of a forward pass, P patches, D width of the vision tower, H width of the language
model, T text positions.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.texts import bare_format
from cache import FeatureStore
from train.data.examples import Example
from train.data.prompts import TokenizedText, tokenize
from train.model.projector import Projector

IGNORE_INDEX = -100
"""Label of a position without a loss, in transformers."""

Features = Callable[[Sequence[int]], Tensor]
"""From B image ids to patches [B, P, D]."""


@dataclass(frozen=True)
class Sample:
    """One sequence: an image and one of its texts."""

    image_id: int
    text: TokenizedText


def shuffled(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples in a random order, always the same."""
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    return [samples[number] for number in order]


def by_length(samples: Sequence[Sample]) -> list[Sample]:
    """Return the shortest samples first, so that batches have little padding."""
    return sorted(samples, key=lambda sample: len(sample.text.token_ids))


def make_samples(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """Return a sample a text, tokenised, of all examples."""
    texts = [text for example in examples for text in example.texts]
    image_ids = [example.image_id for example in examples for _ in example.texts]
    # No text of a benchmark is too long.
    tokenized = tokenize(texts, bare_format(tokenizer), max_tokens=1 << 30)
    return [Sample(*pair) for pair in zip(image_ids, tokenized, strict=True)]


def cached(store: FeatureStore) -> Features:
    """Return features as a loop over cached ones gathers them."""
    return lambda image_ids: torch.from_numpy(store.gather(np.array(image_ids)))


class ClipInTheLoop:
    """Decodes pictures and encodes them at every step, as a loop without cached features does."""

    def __init__(self, pictures: Sequence[bytes]) -> None:
        """Make ViT-B/32 with random weights, which take as long as others.

        Args:
            pictures: Image files; the image i is the picture i modulo their number.
        """
        self._pictures = pictures
        clip = open_clip.create_model("ViT-B-32-quickgelu")
        self._tower = clip.visual.requires_grad_(False).eval()
        self._transform = open_clip.image_transform(224, is_train=False)

    @torch.no_grad()
    def __call__(self, image_ids: Sequence[int]) -> Tensor:
        """Return patches [B, P, D]."""
        pictures = [self._pictures[number % len(self._pictures)] for number in image_ids]
        pixels = torch.stack([self._transform(Image.open(io.BytesIO(p))) for p in pictures])
        found = self._tower.forward_intermediates(
            pixels,
            indices=[-2],
            intermediates_only=True,
            normalize_intermediates=False,
            output_fmt="NLC",
        )
        patches_BPD: Tensor = found["image_intermediates"][0]
        return patches_BPD


def optimizer_step(
    projector: Projector,
    language_model: PreTrainedModel,
    samples: Sequence[Sample],
    features: Features,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
) -> float:
    """Make one optimizer step.

    Args:
        projector: It learns, and LoRA if the language model has it.
        language_model: In `eval()`.
        samples: All that is learned from, in the order in which they make batches.
        features: Of the images.
        optimizer: Of the parameters that learn.
        batch_size: Samples of a forward pass.

    Returns:
        Mean cross entropy of the supervised tokens.
    """
    optimizer.zero_grad(set_to_none=True)
    num_target_tokens = sum(sample.text.num_target_tokens for sample in samples)
    device = language_model.device
    losses = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        patches_BPD = features([sample.image_id for sample in batch]).to(device, torch.float32)
        # Transformers' Trainer has the loss divided by the tokens of the whole step in this way.
        loss = language_model(
            **inputs(projector(patches_BPD), language_model, [sample.text for sample in batch]),
            num_items_in_batch=num_target_tokens,
            use_cache=False,
        ).loss
        loss.backward()
        losses.append(loss.detach())
    finish(optimizer)
    return float(torch.stack(losses).sum())


def inputs(
    patches_BPH: Tensor, language_model: PreTrainedModel, texts: Sequence[TokenizedText]
) -> dict[str, Tensor]:
    """Return embeddings [B, P + T, H], mask and labels [B, P + T], padded on the right."""
    device = patches_BPH.device
    tokens = [torch.tensor(text.token_ids) for text in texts]
    is_target = [torch.tensor(text.is_target) for text in texts]
    ids_BT = pad_sequence(tokens, batch_first=True).to(device)
    is_target_BT = pad_sequence(is_target, batch_first=True).to(device)
    mask_BT = pad_sequence([torch.ones_like(ids) for ids in tokens], batch_first=True).to(device)
    embeds_BTH = language_model.get_input_embeddings()(ids_BT)
    patch_mask_BP = mask_BT.new_ones(patches_BPH.shape[:2])
    labels_BT = ids_BT.masked_fill(~is_target_BT, IGNORE_INDEX)
    return {
        "inputs_embeds": torch.cat([patches_BPH.to(embeds_BTH.dtype), embeds_BTH], dim=1),
        "attention_mask": torch.cat([patch_mask_BP, mask_BT], dim=1),
        "labels": torch.cat([torch.full_like(patch_mask_BP, IGNORE_INDEX), labels_BT], dim=1),
    }


def finish(optimizer: torch.optim.Optimizer) -> None:
    """Measure the gradient's norm, as a loop that clips does, and change the weights."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, math.inf)
    optimizer.step()
