"""Images with tokenised texts, and their packing, for tests."""

import itertools
from typing import NamedTuple

import torch

from train.data.packing import Pass, collate, image_length, pack
from train.data.prompts import TokenizedText


class Image(NamedTuple):
    image_id: int
    texts: tuple[TokenizedText, ...]


def length_of(row, patches):
    return sum(image_length(image.texts, patches) for image in row)


def pack_images(images, patches, **budgets):
    """Pack images; return them in the rows of each pass."""
    passes = pack([image_length(image.texts, patches) for image in images], **budgets)
    return [[[images[number] for number in row] for row in part.rows] for part in passes]


def logits_of(model, batch):
    """Return the logits of the supervised tokens: [S, V]."""
    return model.language_model.lm_head(model.hidden(batch))


def collate_images(rows, patches, pool=1):
    """Lay out rows of images; `patches` is their number, or features [N, P, D] by image id."""
    images = list(itertools.chain(*rows))
    ids = [image.image_id for image in images]
    numbers = iter(range(len(images)))
    features = torch.zeros(len(ids), patches, 8) if isinstance(patches, int) else patches[ids]
    places = [[next(numbers) for _ in row] for row in rows]
    count = features.shape[1] // pool**2
    row_length = max(length_of(row, count) for row in rows)
    texts = [image.texts for image in images]
    return collate(Pass(places, row_length), ids, texts, features, pool=pool)
