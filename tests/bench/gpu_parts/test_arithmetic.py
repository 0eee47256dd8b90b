import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PhiConfig

from bench.gpu_parts import arithmetic
from bench.gpu_parts.arithmetic import Rates, Work, count_work, recipe_hours, step_flops
from bench.gpu_parts.models import make_caption_model, make_language_model
from bench.make_phi2 import PHI2, tensor_shapes
from tests.train.images import Image, collate_images
from train.data.prompts import TokenizedText
from train.model.attention import dense_mask
from train.settings import LoraSettings

ROOT = Path(__file__).parents[3]
COCO = (ROOT / "configs/coco.yaml").read_text()
PATCHES, WIDTH, RANK = 4, 6, 3
PHI = PhiConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=64,
)


class CountProducts(TorchDispatchMode):
    """Counts the operations of matrix products, forward and backward."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.flops += 2 * out.numel() * args[-1].shape[0]
        return out


def text(length, num_targets):
    return TokenizedText(
        list(range(length)), [False] * (length - num_targets) + [True] * num_targets
    )


IMAGES = [[text(5, 5), text(9, 4)], [text(2, 1)]]


def test_positions_targets_and_pairs_are_those_of_a_packed_pass():
    images = [Image(number, texts) for number, texts in enumerate(IMAGES)]
    batch = collate_images([images], PATCHES)
    work = count_work(IMAGES, PATCHES)
    assert work.texts == 3
    assert work.positions == (batch.image_numbers >= 0).sum()
    assert work.patches == len(batch.patch_slots)
    assert work.targets == len(batch.target_ids)
    assert work.pairs == (dense_mask(batch, torch.float32) == 0).sum()


def test_one_sequence_a_text_repeats_the_patches():
    shared = count_work(IMAGES, PATCHES)
    single = count_work([[one] for texts in IMAGES for one in texts], PATCHES)
    assert single.positions == shared.positions + PATCHES
    assert (single.texts, single.targets) == (shared.texts, shared.targets)


@pytest.mark.parametrize("rank", [0, RANK])
def test_the_products_of_a_step_are_those_that_torch_counts(rank):
    base = make_language_model(PHI, quantize=False, dtype=torch.float32, device=torch.device("cpu"))
    lora = LoraSettings(r=rank, alpha=1, dropout=0.0) if rank else None
    model = make_caption_model(base, vision_width=WIDTH, lora=lora)
    images = [Image(number, texts) for number, texts in enumerate(IMAGES)]
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(2, PATCHES, WIDTH)))
    # A single image: a pass without padding.
    batch = collate_images([images[:1]], features.half())
    with CountProducts() as counter:
        torch.autograd.backward(model(batch))
    work = count_work(IMAGES[:1], PATCHES)
    without_attention = Work(work.texts, work.positions, work.patches, 0, work.targets)
    assert counter.flops == step_flops(without_attention, PHI, WIDTH, rank)


def test_attention_has_three_times_the_operations_of_its_forward_pass():
    none, some = (Work(1, 0, 0, pairs, 0) for pairs in (0, 7))
    found = step_flops(some, PHI, WIDTH, 0) - step_flops(none, PHI, WIDTH, 0)
    # Scores and values: a multiplication and an addition for each number of a head.
    forward = PHI.num_hidden_layers * 7 * 2 * (2 * PHI.hidden_size)
    assert found == 3 * forward


def test_the_parameters_of_phi_2_are_those_of_its_tensors():
    blocks = {k: s for k, s in tensor_shapes(PHI2).items() if ".layers." in k and len(s) == 2}
    assert arithmetic.block_parameters(PhiConfig(**PHI2)) == sum(a * b for a, b in blocks.values())
    assert arithmetic.lora_parameters(PhiConfig(**PHI2), 128) == sum(
        128 * (a + b) for a, b in blocks.values()
    )


def test_the_recipe_is_that_of_coco_yaml():
    params = YAML(typ="safe").load(COCO)
    header = COCO.replace(",", "")
    images = sum(map(int, re.search(r"(\d+) \+ (\d+) images", header).groups()))
    captions = int(re.search(r"(\d+) captions", header).group(1))
    conversations = int(re.search(r"(\d+) conversations", header).group(1))
    assert images == arithmetic.IMAGES
    # Validation images have five captions, and 14 of them one more.
    assert captions - 25_014 == arithmetic.TRAIN_CAPTIONS
    share = 1 - params["data"]["instruct_holdout"]
    assert round(conversations * share) == arithmetic.CONVERSATIONS
    assert {s: params[s]["epochs"] for s in arithmetic.EPOCHS} == arithmetic.EPOCHS
    evaluate = params["evaluate"]
    assert evaluate["batch_size"] == arithmetic.GENERATION_BATCH
    texts = [texts for texts, _ in arithmetic.GENERATED]
    # Six questions an image in each of three subsets.
    wanted = [2 * evaluate["caption_images"], evaluate["questions"], 18 * evaluate["pope_images"]]
    assert texts == wanted
    assert arithmetic.GENERATED[1][1] == evaluate["answer_tokens"]


def test_hours_follow_from_the_rates():
    batches = -(-10_000 // 64) * 26 + -(-2000 // 64) * 256 + -(-9000 // 64) * 2
    rates = Rates(
        captions_per_second=591_753 / 3600,
        conversations_per_second=arithmetic.CONVERSATIONS / 7200,
        images_per_second=123_287 / 1800,
        seconds_per_token=3600 / (4 * batches),
    )
    assert recipe_hours(rates) == {
        "extract": 0.5, "pretrain": 3.0, "finetune": 2.0, "evaluate": 1.0, "total": 6.5,
    }  # fmt: skip


def test_hours_of_what_was_not_measured_are_unknown():
    found = recipe_hours(Rates(591_753 / 3600, None, None, None))
    assert found["pretrain"] == 3.0
    assert {name for name, hours in found.items() if hours is None} == {
        "extract", "finetune", "evaluate", "total",
    }  # fmt: skip
