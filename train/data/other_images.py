"""Features of other images, for a control that learns the texts without the pictures.

Letters: B images asked for, N images, P patches, D width of the vision tower.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cache import FeatureStore
from train.data.examples import Examples
from train.data.prefetch import StoredFeatures
from train.settings import CONTROL
from workspace.errors import StageError

RANDOM_STREAM = 1 << 60
"""Beside the seed, where the order of an epoch has its number: the orders of the images owe nothing
to the pairs."""


def derangement(image_ids: NDArray[np.int64], seed: int) -> dict[int, int]:
    """Pair each image with another one, so that each image is the other one of exactly one image.

    Args:
        image_ids: int64 [N], in any order; a repeated id counts once.
        seed: Of the run.

    Raises:
        StageError: A single image.
    """
    distinct = np.unique(image_ids)
    if len(distinct) == 1:
        raise StageError(
            f"controls.trained_blind: image {distinct[0]} is the only one with texts and features, "
            f"so there is no other to learn from. Set it to false, or add images."
        )
    # A single cycle through all images, so that no image keeps its own features.
    cycle = np.random.default_rng((seed, RANDOM_STREAM)).permutation(distinct)
    return dict(zip(cycle.tolist(), np.roll(cycle, -1).tolist(), strict=True))


class OtherImages:
    """A view of a store in which every image has the features of another one.

    The pairs are fixed, within the images of training and within those of validation. All else is
    the store's, so that texts and order are those of a run on the store itself.
    """

    def __init__(
        self,
        store: FeatureStore,
        train: NDArray[np.int64],
        validation: NDArray[np.int64],
        seed: int,
    ) -> None:
        """Pair the images.

        Args:
            store: Holds the features of all images.
            train: Image ids to learn from.
            validation: Image ids to validate on.
            seed: Of the run.

        Raises:
            StageError: A single image to learn from.
        """
        self._store = store
        self.root, self.spec, self.num_shards = store.root, store.spec, store.num_shards
        self._others = derangement(train, seed)
        new = np.setdiff1d(validation, train)
        if len(new) == 1:
            # No pair within: one image of training stands in.
            self._others |= dict(zip(new.tolist(), train[:1].tolist(), strict=True))
        else:
            self._others |= derangement(new, seed)

    def gather(
        self, image_ids: NDArray[np.int64], out: NDArray[np.float16] | None = None
    ) -> NDArray[np.float16]:
        """Return the features of the other images, in the order asked: float16 [B, P, D]."""
        return self._store.gather(self._ids_of_others(image_ids), out)

    def _ids_of_others(self, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        others = [self._others[image_id] for image_id in np.asarray(image_ids).tolist()]
        return np.array(others, dtype=np.int64)

    def shards_of(self, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the shard of each image itself, which decides a windowed order: int64 [B]."""
        return self._store.shards_of(image_ids)

    def read_ahead(self, shards: Sequence[int]) -> None:
        """Do nothing: the other images lie in any shard, so rows are read as they are gathered."""

    def prefetch_rows(self, image_ids: NDArray[np.int64]) -> None:
        """Begin to fetch the features of the other images, if the store is behind a URL."""
        if self._store.is_remote:
            self._store.prefetch_rows(self._ids_of_others(image_ids))


def learned_features(
    name: str, store: FeatureStore, train: Examples, validation: Examples, seed: int
) -> StoredFeatures:
    """Return the features that a run learns from: the store, or a control's view of it.

    Args:
        name: Of the run.
        store: Holds the features of all images.
        train: The run learns from them.
        validation: The run is validated on them.
        seed: Of the run.

    Raises:
        StageError: A control with a single image to learn from.
    """
    if name != CONTROL:
        return store
    return OtherImages(store, train.image_ids, validation.image_ids, seed)
