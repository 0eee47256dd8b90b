"""In which order an epoch reads the rows: pure functions of the rows, a seed and the epoch.

`global_order` is an even shuffle. It reads at random all over the store: right when the store fits
memory, or lies on a disk for which random reads of a row are no effort.

`windowed_order` shuffles the shards, and then the rows of so many shards at a time. It reads each
shard once, as a whole, and close in time: right for a store larger than memory on a spinning or a
network disk. What lies in one shard then meets what lies in the same window only.
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
        shards: [N], the number of the shard in which each row lies.
        window_shards: Shards of a window.
        seed: Of the run.
        epoch: Counted from 0.

    Returns:
        int64 [N], a permutation of 0 to N - 1 that finishes one window before the next.
    """
    generator = np.random.default_rng((seed, epoch))
    numbers, shard_of_row = np.unique(shards, return_inverse=True)
    windows = generator.permutation(len(numbers)) // window_shards
    # By window, and at random within.
    return np.lexsort((generator.random(len(shards)), windows[shard_of_row]))
