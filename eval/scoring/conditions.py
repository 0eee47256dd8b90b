"""The conditions under which a model generates: an image's own features, and three controls.

seen       the image's own features
blind      the features of a wrong image: a score reached this way owes nothing to the picture
noise      no image: normal noise with the mean and the deviation of each channel of the store
untrained  the image's own features through a projector of random weights

Letters: B images, P patches, D width of the vision tower.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cache import FeatureStore, Spec
from eval.scoring.evaluated_models import EvaluatedModel
from eval.scoring.score_names import BLIND, NOISE, SEEN, UNTRAINED
from train.data.prefetch import Features
from train.model.captioner import CaptionModel
from workspace.errors import StageError

SAMPLED_IMAGES = 256
"""Images from which the noise takes its means and deviations."""


@dataclass(frozen=True)
class Condition:
    """A model, and the features that it gets for each question."""

    name: str
    model: CaptionModel
    features: Features
    image_ids: list[int]
    """For each question, the image whose features the model gets."""

    def only(self, numbers: Sequence[int]) -> "Condition":
        """Return the condition for some of the questions."""
        return replace(self, image_ids=[self.image_ids[number] for number in numbers])


def make_conditions(model: EvaluatedModel, image_ids: Sequence[int]) -> list[Condition]:
    """Return all conditions for some images, their own features first.

    Raises:
        StageError: The store holds a single image, so the blind control has no other.
    """
    own, others = list(image_ids), other_images(image_ids, model.store)
    return [
        Condition(SEEN, model.model, model.store, own),
        Condition(BLIND, model.model, model.store, [others[i] for i in own]),
        Condition(NOISE, model.model, Noise(model.store, model.seed), own),
        Condition(UNTRAINED, model.untrained, model.store, own),
    ]


def other_images(image_ids: Sequence[int], store: FeatureStore) -> dict[int, int]:
    """Pair each image with the image half a list away in sorted order, wrapping around.

    A single image is paired with an image of the store.

    Raises:
        StageError: The store holds a single image.
    """
    distinct = sorted(set(image_ids))
    if len(distinct) == 1:
        distinct += [int(i) for i in store.image_ids if i != distinct[0]][:1]
    if len(distinct) == 1:
        raise StageError(
            f"{store.root}: holds one image, so there is no other for the wrong-image control."
        )
    half = len(distinct) // 2
    return dict(zip(distinct, distinct[half:] + distinct[:half], strict=True))


class Noise:
    """Random features with a store's means and deviations; a function of seed and image id."""

    def __init__(self, store: FeatureStore, seed: int) -> None:
        """Measure each channel's mean and deviation over some images of the store."""
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
