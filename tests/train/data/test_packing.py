"""Laws of packing and layout; what the model makes of them stands in test_shared_prefix.py."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from bench.texts import CAPTION_LENGTHS
from tests.train.images import Image, collate_images, length_of, pack_images
from train.data.packing import (
    PADDING,
    Pass,
    collate,
    image_length,
    num_slots,
    pack_one_row_passes,
    padded_length,
)
from train.data.prompts import TokenizedText

PATCHES = 4
BUDGETS = [(1, 1), (12, 12), (40, 40), (40, 100), (25, 10_000), (10_000, 10_000), (100, 30)]


def places(batch):
    """Yield row, number and column of the first position of each image, in the patches' order."""
    for start in batch.patch_slots.view(-1, PATCHES)[:, 0].tolist():
        row, column = divmod(start, batch.image_numbers.shape[1])
        yield row, int(batch.image_numbers[row, column]), column


# Packing


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("row_tokens", "pass_tokens"), BUDGETS)
def test_packing_loses_nothing_and_keeps_to_both_budgets(
    random_images, seed, row_tokens, pass_tokens
):
    images = random_images(seed)
    passes = pack_images(images, PATCHES, row_tokens=row_tokens, pass_tokens=pass_tokens)
    rows = list(itertools.chain(*passes))
    assert Counter(image.image_id for row in rows for image in row) == Counter(range(len(images)))
    assert all(rows)
    for row in rows:
        assert length_of(row, PATCHES) <= row_tokens or len(row) == 1
    for part in passes:
        assert collate_images(part, PATCHES).token_ids.numel() <= pass_tokens or len(part) == 1
    if row_tokens == 10_000:
        assert len(rows) == 1
    if row_tokens == 1:
        assert len(passes) == len(rows) == len(images)


def test_many_rows_fit_in_a_pass_and_several_images_in_a_row(random_images):
    images = random_images(0, count=40)
    (rows,) = pack_images(images, PATCHES, row_tokens=60, pass_tokens=10_000)
    assert len(rows) > 5
    assert sum(len(row) > 1 for row in rows) > 5


@pytest.mark.parametrize("longer_by", [0, 1])
def test_a_row_and_a_pass_may_be_full_to_the_last_position(longer_by):
    text = TokenizedText([1] * 7, [True] * 7)
    images = [Image(number, (text,)) for number in range(6)]
    assert length_of(images[:1], PATCHES) == 10
    passes = pack_images(images, PATCHES, row_tokens=30 - longer_by, pass_tokens=60)
    assert [len(rows) for rows in passes] == [[2], [3]][longer_by]
    passes = pack_images(images, PATCHES, row_tokens=30, pass_tokens=60 - longer_by)
    assert [len(rows) for rows in passes] == [[2], [1, 1]][longer_by]


def test_images_longer_than_a_row_stand_alone():
    lengths = [3, 90, 4, 200, 5, 91]
    images = [Image(n, (TokenizedText([1] * k, [True] * k),)) for n, k in enumerate(lengths)]
    rows = list(itertools.chain(*pack_images(images, PATCHES, row_tokens=50, pass_tokens=1000)))
    assert [image.image_id for row in rows if len(row) == 1 for image in row][:3] == [3, 5, 1]
    assert all(length_of(row, PATCHES) <= 50 for row in rows[3:])
    for alone in images:
        assert pack_images([alone], PATCHES, row_tokens=20, pass_tokens=10) == [[[alone]]]


def test_packing_is_a_function_of_its_input(random_images):
    budgets = {"row_tokens": 40, "pass_tokens": 100}
    for seed in range(5):
        first = pack_images(random_images(seed), PATCHES, **budgets)
        assert pack_images(random_images(seed), PATCHES, **budgets) == first


def coco_like(seed, num_images=51):
    """Five captions an image, of 8 to 50 tokens with 12 on average, EOS included."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(8 + rng.gamma(2.5, 1.6, (num_images, 5)), 8, 50).astype(int)
    return [
        Image(number, tuple(TokenizedText([1] * length, [True] * length) for length in row))
        for number, row in enumerate(lengths.tolist())
    ]


@pytest.mark.parametrize(
    ("row_tokens", "pass_tokens"),
    [(512, 2048), (512, 4096), (512, 8192), (2048, 2048), (8192, 8192)],
)
def test_nearly_every_position_of_a_step_of_coco_is_real(row_tokens, pass_tokens):
    shares = []
    for seed in range(20):
        images = coco_like(seed, num_images=51 + seed % 2)
        passes = pack_images(images, 49, row_tokens=row_tokens, pass_tokens=pass_tokens)
        slots = sum(max(length_of(row, 49) for row in rows) * len(rows) for rows in passes)
        shares.append(length_of(images, 49) / slots)
    assert np.mean(shares) >= 0.95
    assert min(shares) >= 0.95


# Layout


@pytest.mark.parametrize("seed", range(5))
def test_collate_places_every_token_as_if_its_text_were_alone(random_images, seed):
    images = random_images(seed)
    (rows,) = pack_images(images, PATCHES, row_tokens=60, pass_tokens=10_000)
    batch = collate_images(rows, PATCHES)
    in_order = list(itertools.chain(*rows))
    assert batch.image_ids.tolist() == [image.image_id for image in in_order]
    width = batch.token_ids.shape[1]
    wanted_targets = Counter()
    covered = torch.zeros_like(batch.image_numbers, dtype=torch.bool)
    for image, (r, number, start) in zip(in_order, places(batch), strict=True):
        patch_columns = list(range(start, start + PATCHES))
        assert batch.positions[r, patch_columns].tolist() == list(range(PATCHES))
        assert (batch.text_ids[r, patch_columns] == 0).all()
        assert (batch.image_numbers[r, patch_columns] == number).all()
        covered[r, patch_columns] = True
        mine = batch.image_numbers[r] == number
        assert mine.sum() == length_of([image], PATCHES)
        for text_id, text in enumerate(image.texts, start=1):
            columns = (mine & (batch.text_ids[r] == text_id)).nonzero().flatten()
            covered[r, columns] = True
            assert batch.token_ids[r, columns].tolist() == text.token_ids[:-1]
            wanted = list(range(PATCHES, PATCHES + len(text.token_ids) - 1))
            assert batch.positions[r, columns].tolist() == wanted
            # What predicts token n is the token before it, or the last patch.
            chain = [patch_columns[-1], *columns.tolist()]
            for column, token_id, is_target in zip(
                chain, text.token_ids, text.is_target, strict=True
            ):
                if is_target:
                    wanted_targets[r * width + column, token_id] += 1
    found = zip(batch.target_slots.tolist(), batch.target_ids.tolist(), strict=True)
    assert Counter(found) == wanted_targets
    assert torch.equal(covered, batch.image_numbers != PADDING)
    assert (batch.image_numbers != PADDING).any(dim=0)[-1], "no column is padding alone"


def test_a_lead_stands_before_the_patches_of_every_image_and_is_shared_by_its_texts(random_images):
    lead, patches, images = (7, 8, 9), 4, random_images(3, count=3)
    ids, texts = [image.image_id for image in images], [image.texts for image in images]
    features, order = torch.zeros(3, patches, 8), Pass([[2, 0], [1]], 200)
    plain, led = (collate(order, ids, texts, features, lead=tokens) for tokens in ((), lead))
    for (row, number, start), (_, _, led_start) in zip(places(plain), places(led), strict=True):
        end = led_start + image_length(texts[order.rows[row][number]], patches)
        before = slice(led_start - 3, led_start)
        assert led.token_ids[row, before].tolist() == [7, 8, 9]
        assert led.positions[row, before].tolist() == [0, 1, 2]
        assert led.text_ids[row, before].tolist() == [0, 0, 0]
        assert (led.image_numbers[row, before.start : end] == number).all()
        for name, shift in (("token_ids", 0), ("text_ids", 0), ("positions", 3)):
            wanted = getattr(plain, name)[row, start : start + end - led_start] + shift
            assert torch.equal(getattr(led, name)[row, led_start:end], wanted), name
    assert torch.equal(led.target_ids, plain.target_ids)
    moved = (led.target_slots - plain.target_slots).unique().tolist()
    assert moved == [3, 6], "by one lead in a first image, by two in a second"
    assert image_length(texts[0], patches, len(lead)) == 3 + image_length(texts[0], patches)


def test_the_images_of_a_row_are_counted_from_nought(random_images):
    (rows,) = pack_images(random_images(1), PATCHES, row_tokens=60, pass_tokens=10_000)
    batch = collate_images(rows, PATCHES)
    for r, row in enumerate(rows):
        assert batch.image_numbers[r].unique_consecutive().tolist()[: len(row)] == list(range(len(row)))


def test_texts_without_anything_to_learn_give_no_target():
    batch = collate_images([[Image(1, (TokenizedText([3, 4], [False, False]),))]], PATCHES)
    assert batch.target_ids.shape == batch.target_slots.shape == (0,)
    assert batch.target_ids.dtype == batch.target_slots.dtype == torch.int64


def test_moving_a_batch_keeps_all_of_it(random_images):
    batch = collate_images([random_images(0)], PATCHES)
    moved = batch.to(torch.device("meta"))
    assert moved.image_ids is batch.image_ids
    tensors = {name: value for name, value in vars(batch).items() if torch.is_tensor(value)}
    assert len(tensors) == 8
    for name, value in tensors.items():
        assert getattr(moved, name).device.type == "meta", name
        assert getattr(moved, name).shape == value.shape
        wanted = torch.float32 if name == "patches_NPD" else torch.int64
        assert getattr(moved, name).dtype == value.dtype == wanted


# One row a pass


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pass_tokens", [1, 200, 1000, 5000])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_one_row_a_pass_loses_nothing_and_keeps_to_the_budget(seed, pass_tokens, num_processes):
    lengths = np.random.default_rng(seed).integers(50, 400, 30).tolist()
    passes = pack_one_row_passes(lengths, pass_tokens=pass_tokens, num_processes=num_processes)
    assert sorted(image for part in passes for (row,) in [part.rows] for image in row) == [*range(30)]
    for part in passes:
        (row,) = part.rows
        used = sum(lengths[image] for image in row)
        assert used <= part.row_length == padded_length(used)
        assert part.row_length <= pass_tokens or len(row) == 1
    assert len(passes) % num_processes == 0 or len(passes) == 30
    assert num_slots(passes) == sum(part.row_length for part in passes)


def test_more_processes_than_images_get_one_image_each_as_far_as_they_suffice():
    passes = pack_one_row_passes([70, 300], pass_tokens=1000, num_processes=4)
    assert [(part.rows, part.row_length) for part in passes] == [([[0]], 128), ([[1]], 384)]


def test_row_lengths_are_few_multiples_of_a_block():
    lengths = {padded_length(length) for length in range(1, 32_769)}
    assert all(length % 128 == 0 for length in lengths)
    # Up to 2,048 all multiples of 128, then 16 between two powers of two.
    assert len(lengths) == 16 + 4 * 16
    for length in range(2048, 32_769, 77):
        assert length <= padded_length(length) <= length * 17 / 16


CAPTIONS = 49 + np.random.default_rng(0).choice(
    np.repeat([*CAPTION_LENGTHS], [*CAPTION_LENGTHS.values()]), (118_287, 5)
).sum(1)
"""Positions of COCO's training images: 49 patches and five captions."""


@pytest.mark.parametrize(
    ("pass_tokens", "shapes"), [(2048, 4), (4096, 4), (8192, 4), (16_384, 4), (32_768, 4)]
)
def test_an_epoch_of_coco_has_few_shapes_and_little_padding(pass_tokens, shapes):
    images_of_a_step = 52
    rows = Counter()
    for start in range(0, len(CAPTIONS), images_of_a_step):
        step = CAPTIONS[start : start + images_of_a_step].tolist()
        for part in pack_one_row_passes(step, pass_tokens=pass_tokens, num_processes=1):
            assert len(part.rows) == 1
            rows[part.row_length] += 1
    padding = 1 - CAPTIONS.sum() / sum(length * count for length, count in rows.items())
    assert len(rows) <= shapes
    assert padding < 0.05


# One block of memory


def test_a_batch_in_one_block_is_the_same_batch(random_images):
    images = random_images(0)
    features = torch.randn(len(images), PATCHES, 5).half()
    (rows,) = pack_images(images, PATCHES, row_tokens=60, pass_tokens=10_000)
    batch = collate_images(rows, features)
    block = batch.in_one_block(pin_memory=False)
    moved = block.to(torch.device("cpu", 0))
    for copy in (block, moved):
        storage = copy.block.untyped_storage().data_ptr()
        assert copy.number == batch.number
        for name, tensor in vars(batch).items():
            if isinstance(tensor, torch.Tensor):
                found = getattr(copy, name)
                assert found.dtype == tensor.dtype
                assert torch.equal(found, tensor)
                assert found.is_contiguous()
                assert found.untyped_storage().data_ptr() == storage
