"""Trains the tiny CLIP with its contrastive loss alone.

Its pictures have nine patches, as large as the cells in which things stand: a patch shows little
more than one thing, which a tower of this size can learn in minutes.

Letters: B pairs in a batch, T text tokens. Half of the pairs in a batch are near twins of the other
half, so that telling them apart takes colours, counts and places.
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from demo.captions import caption
from demo.contexts import notes
from demo.draw import draw_scene
from demo.scenes import Scene, scene_at
from demo.twins import near_twin

NAME = "ViT-demo-32"
"""Name of the architecture, which open_clip takes from the name of its JSON file."""

IMAGE_SIZE = 96
_CONTEXT = 32
_NUM_SCENES = 12_000
_STEPS = 2400
_BATCH = 128
_LEARNING_RATE = 1.5e-3
_WEIGHT_DECAY = 0.02
_WARM_UP = 60
_NOTES_SHARE = 0.9


def architecture(vocab_size: int) -> dict[str, Any]:
    """Return the open_clip config of the model."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "patch_size": 32,
            "layers": 4,
            "width": 128,
            "head_width": 32,
            "pool_type": "avg",
        },
        "text_cfg": {
            "context_length": _CONTEXT,
            "vocab_size": vocab_size,
            "width": 96,
            "heads": 3,
            "layers": 2,
        },
    }


def train_clip(out: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Train, and write `<NAME>.json` and `<NAME>.safetensors` (float16) to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    description = out / f"{NAME}.json"
    description.write_text(json.dumps(architecture(len(tokenizer)), indent=2) + "\n")
    open_clip.add_model_config(description)
    torch.manual_seed(seed)
    model = open_clip.create_model(NAME)
    scenes, pixels = _render(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), _LEARNING_RATE, betas=(0.9, 0.98), weight_decay=_WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate_at)
    progress = tqdm(_batches(len(scenes), seed), total=_STEPS, desc="clip")
    for rows in progress:
        rng = random.Random(f"{seed}/clip texts/{rows[0]}/{schedule.last_epoch}")
        tokens_BT = _tokens([scenes[row] for row in rows], tokenizer, rng)
        loss = _contrast(model, normalised(pixels[rows]), tokens_BT)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        progress.set_postfix(loss=f"{loss.item():.3f}")
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, out / f"{NAME}.safetensors")


def pixels_of(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """Return a picture as the tower takes it before normalisation: uint8 [3, 96, 96]."""
    scale = IMAGE_SIZE / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - IMAGE_SIZE) / 2), round((height - IMAGE_SIZE) / 2)
    square = resized.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
    return np.asarray(square, np.uint8).transpose(2, 0, 1)


def _render(seed: int) -> tuple[list[Scene], npt.NDArray[np.uint8]]:
    """Return scenes, each followed by its twin, and their pixels: uint8 [scenes, 3, 96, 96]."""
    scenes = []
    for index in range(_NUM_SCENES):
        scene = scene_at(seed, "clip", index)
        scenes += [scene, near_twin(scene, random.Random(f"{seed}/twin/{index}"))]
    pixels = np.empty((len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for row, scene in enumerate(tqdm(scenes, desc="render")):
        pixels[row] = pixels_of(draw_scene(scene))
    return scenes, pixels


def _batches(num_scenes: int, seed: int) -> Iterator[list[int]]:
    """Yield the rows of scenes and their twins, batch by batch, in another order each epoch."""
    rng = random.Random(f"{seed}/clip order")
    firsts: list[int] = []
    for _ in range(_STEPS):
        if len(firsts) < _BATCH // 2:
            firsts = rng.sample(range(0, num_scenes, 2), num_scenes // 2)
        chosen, firsts = firsts[: _BATCH // 2], firsts[_BATCH // 2 :]
        yield [row + twin for row in chosen for twin in (0, 1)]


def _tokens(
    scenes: Sequence[Scene], tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> torch.Tensor:
    """Write new texts for scenes; return ids [B, T] with the end token last, padded with zeros."""
    texts = [(notes if rng.random() < _NOTES_SHARE else caption)(scene, rng) for scene in scenes]
    tokens_BT = torch.zeros(len(texts), _CONTEXT, dtype=torch.long)
    for row, ids in enumerate(tokenizer(texts)["input_ids"]):
        ids = [*ids[: _CONTEXT - 1], tokenizer.eos_token_id]
        tokens_BT[row, : len(ids)] = torch.tensor(ids)
    return tokens_BT


def normalised(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Return normalised pixels, float32 [B, 3, 96, 96]."""
    mean = torch.tensor(OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(OPENAI_DATASET_STD).view(3, 1, 1)
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


def _contrast(
    model: torch.nn.Module, images: torch.Tensor, tokens_BT: torch.Tensor
) -> torch.Tensor:
    """Return CLIP's loss: the cross-entropy of picture to text and of text to picture."""
    image_features, text_features, scale = model(images, tokens_BT)
    logits_BB = scale * image_features @ text_features.T
    targets = torch.arange(len(logits_BB))
    both = (logits_BB, logits_BB.T)
    return sum(
        (torch.nn.functional.cross_entropy(logits, targets) / 2 for logits in both),
        start=torch.zeros(()),
    )


def _learning_rate_at(step: int) -> float:
    """Return the factor of the learning rate: a linear warm-up, then a cosine decay."""
    if step < _WARM_UP:
        return (step + 1) / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - _WARM_UP) / (_STEPS - _WARM_UP)))
