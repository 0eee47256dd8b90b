"""Laws of every vision tower, whichever library loads it."""

import numpy as np
import torch


def relative(found, wanted):
    """Return the relative difference of two arrays in the L2 norm."""
    found, wanted = (np.asarray(v, dtype=np.float64) for v in (found, wanted))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def random_pixels(encoder, num_images):
    """Return images of noise: uint8 [B, S, S, 3]."""
    rng = np.random.default_rng(0)
    side = encoder.spec.image_size
    return torch.from_numpy(rng.integers(0, 256, (num_images, side, side, 3), dtype=np.uint8))


def assert_what_comes_with_an_image_does_not_matter(encoder, pixels):
    """Compare three images that are encoded together with each of them alone."""
    together = encoder.encode(pixels)
    alone = np.concatenate([encoder.encode(pixels[n : n + 1]) for n in range(3)])
    assert relative(alone, together) < 1e-3
    assert relative(together[0], together[1]) > 1e-2


def assert_patches_run_row_by_row_from_the_top_left(encoder, first_block, side, prefix):
    """Before any attention mixes them, a patch changes where its own pixels change.

    Args:
        encoder: Of the tower.
        first_block: Its first block.
        side: Patches in a row.
        prefix: Number of tokens before the patches.
    """
    seen = []
    first_block.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append([*args, *kwargs.values()][0]), with_kwargs=True
    )
    step = encoder.spec.image_size // side
    plain = torch.zeros(1, *[encoder.spec.image_size] * 2, 3, dtype=torch.uint8)
    encoder.encode(plain)
    for row, column in ((0, 0), (0, side - 1), (side - 1, 0), (1, 2)):
        marked = plain.clone()
        marked[0, row * step : (row + 1) * step, column * step : (column + 1) * step] = 255
        encoder.encode(marked)
        differs = (seen[0] != seen.pop()).any(dim=2)[0, prefix:]
        assert differs.nonzero().flatten().tolist() == [row * side + column]
