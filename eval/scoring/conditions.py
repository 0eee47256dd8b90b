"""The ways in which a model is asked: with an image's own features, and three controls.

blind      the features of another image: what is reached with them was not learned from pictures
noise      no image at all: normal noise with the mean and the deviation of the store's channels
untrained  the own features through a projector that never learned

Letters: B images, P patches, D width of the vision tower.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from cache import FeatureStore, Spec
from eval.report.scores import VIEWS
from train.data.prefetch import Features
from train.model.captioner import CaptionModel
from workspace.errors import StageError

SEEN, *_CONTROLS = VIEWS
CONTROLS = tuple(_CONTROLS)

SAMPLED_IMAGES = 256
"""Images from which mean and deviation of the channels are taken."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model, its controls, and how its input is made."""

    name: str
    model: CaptionModel
    untrained: CaptionModel
    """The same language model behind a projector that never learned."""
    tokenizer: PreTrainedTokenizerBase
    store: FeatureStore
    seed: int
    identity: str
    """Hash of all weights and features."""


@dataclass(frozen=True)
class Condition:
    """One way of asking about some images."""

    name: str
    model: CaptionModel
    features: Features
    image_ids: list[int]
    """Whose features are shown."""


def conditions(asked: EvaluatedModel, image_ids: Sequence[int]) -> list[Condition]:
    """Return all ways of asking about some images, the one with their own features first.

    Raises:
        StageError: The store holds a single image, so there is no other.
    """
    own, others = list(image_ids), other_images(image_ids, asked.store)
    return [
        Condition(SEEN, asked.model, asked.store, own),
        Condition("blind", asked.model, asked.store, [others[i] for i in own]),
        Condition("noise", asked.model, Noise(asked.store, asked.seed), own),
        Condition("untrained", asked.untrained, asked.store, own),
    ]


def other_images(image_ids: Sequence[int], store: FeatureStore) -> dict[int, int]:
    """Give each image another one: the one half a round further among them.

    Raises:
        StageError: The store holds a single image, so there is no other.
    """
    distinct = sorted(set(image_ids))
    if len(distinct) == 1:
        distinct += [int(i) for i in store.image_ids if i != distinct[0]][:1]
    if len(distinct) == 1:
        raise StageError(f"{store.root}: holds one image, so there is none for the blind control.")
    half = len(distinct) // 2
    return dict(zip(distinct, distinct[half:] + distinct[:half], strict=True))


class Noise:
    """Features of no picture, as large as those of a store: the same for an id, whoever asks."""

    def __init__(self, store: FeatureStore, seed: int) -> None:
        """Take mean and deviation of each channel from some images of the store."""
        self.spec: Spec = store.spec
        ids = np.asarray(store.image_ids)
        chosen = np.random.default_rng(seed).permutation(len(ids))[:SAMPLED_IMAGES]
        sample = store.gather(ids[np.sort(chosen)]).astype(np.float32)
        self._mean_D, self._deviation_D = sample.mean((0, 1)), sample.std((0, 1))
        self._seed = seed

    def gather(
        self, image_ids: NDArray[np.int64], out: NDArray[np.float16] | None = None
    ) -> NDArray[np.float16]:
        """Return noise for some ids: float16 [B, P, D]."""
        if out is None:
            shape = (len(image_ids), self.spec.patches, self.spec.width)
            out = np.empty(shape, dtype=np.float16)
        for noise_PD, image_id in zip(out, np.asarray(image_ids).tolist(), strict=True):
            random = np.random.default_rng([self._seed, image_id % 2**64])
            drawn_PD = random.standard_normal(noise_PD.shape, dtype=np.float32)
            noise_PD[:] = self._mean_D + self._deviation_D * drawn_PD
        return out
