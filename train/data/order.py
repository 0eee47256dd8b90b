"""The order of an epoch: pure functions of the rows, a seed and the epoch.

`global_order` is a uniform shuffle, with random reads all over the store: right for a store that
fits memory, or lies on a disk with fast random reads.

`windowed_order` shuffles the shards, then the rows within windows of shards. It reads each shard
once, within a short time: right for a store larger than memory on a spinning or a network disk.
Images of a batch then come from one window.
"""

import numpy as np
from numpy.typing import NDArray


def global_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Shuffle all rows.

    Args:
        num_rows: N.
        seed: Of the run.
        epoch: Counted from 0.

    Returns:
        int64 [N], a permutation of 0 to N - 1.
    """
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def windowed_order(
    shards: NDArray[np.int64], window_shards: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Shuffle the shards, then the rows of each window of shards.

    Args:
        shards: int64 [N], the shard number of each row.
        window_shards: Shards of a window.
        seed: Of the run.
        epoch: Counted from 0.

    Returns:
        int64 [N], a permutation of 0 to N - 1 that finishes one window before the next.
    """
    generator = np.random.default_rng((seed, epoch))
    numbers, shard_of_row = np.unique(shards, return_inverse=True)
    windows = generator.permutation(len(numbers)) // window_shards
    # Sorted by window, random within.
    return np.lexsort((generator.random(len(shards)), windows[shard_of_row]))
