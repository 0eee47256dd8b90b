"""What docs/gpu.md counts is counted here again, and what it reasons follows from the counts."""

import re

import numpy as np
import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM

from bench.gpu_parts.arithmetic import EPOCHS, PEAK_FLOPS, block_parameters
from bench.make_phi2 import PHI2
from bench.texts import CAPTION_LENGTHS, CAPTIONS_AN_IMAGE, KINDS
from tests.documents.pages import ROOT
from tests.documents.test_figures import agrees, result, table
from train.data.packing import PackedBatch
from train.model.captioner import CaptionModel
from train.model.language_model import add_lora, compute_lora_in_input_dtype
from train.model.projector import seeded_projector
from train.settings import LoraSettings

PAGE = (ROOT / "docs/gpu.md").read_text()
PROSE = " ".join(PAGE.split())

BLOCKS = 32
BLOCK_PARAMETERS = block_parameters(PhiConfig(**PHI2))
PATCHES, WIDTH = 49, 768
"""Of ViT-B/32."""
LORA = LoraSettings(r=128, alpha=256, dropout=0.05)
LORA_PARAMETERS = BLOCKS * LORA.r * (4 * (2560 + 2560) + 2 * (2560 + 10240))
ENDS = 2 * 51200 * 2560
"""Weights of the embeddings and of the output layer, which stay as they are."""
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight: four bits, a byte for each 64 of them, a float32 for each 256 bytes."""
ADAMW = 16
"""Bytes of a trainable float32 weight: itself, its gradient, two moments."""
COPY = 2
"""Bytes of a weight of LoRA in the dtype in which it multiplies."""
FREE = 0.15
BUSY = 0.4
OTHER_RATES = {"T4 (fp16)": 65e12, "RTX 4090": 165e12}
"""Dense, with float32 sums, of NVIDIA's data sheets; `PEAK_FLOPS` has the others."""
CAPTIONS, CONVERSATIONS = 591_753, 0.98 * 157_712
"""Texts to train on: those of train2017, and those of images that are not held out."""


def number(pattern):
    (shown,) = re.findall(pattern, PROSE)
    return shown


def test_the_bytes_of_weights_follow_from_their_number():
    assert agrees(number(r"take ([\d.]+) GB in NF4"), (BLOCK_PARAMETERS * NF4 + 2 * ENDS) / 1e9)
    assert agrees(number(r"NF4 and ([\d.]+) GB in bf16"), 2 * (BLOCK_PARAMETERS + ENDS) / 1e9)
    assert agrees(number(r"moments take ([\d.]+) GB"), ADAMW * LORA_PARAMETERS / 1e9)
    assert agrees(number(r"copies in bf16 take ([\d.]+) GB"), COPY * LORA_PARAMETERS / 1e9)


def some_images(count, text=79):
    """A row of images with a text each."""
    length = PATCHES + text
    starts = torch.arange(count)[:, None] * length
    one_text = torch.cat([torch.zeros(PATCHES), torch.ones(text)]).long()
    return PackedBatch(
        number=0,
        image_ids=np.arange(count),
        patches_NPD=torch.zeros(count, PATCHES, WIDTH, dtype=torch.float16),
        token_ids=torch.zeros(1, count * length, dtype=torch.int64),
        positions=torch.arange(length).repeat(count)[None],
        image_numbers=torch.arange(count).repeat_interleave(length)[None],
        text_ids=one_text.repeat(count)[None],
        patch_slots=(starts + torch.arange(PATCHES)).flatten(),
        target_slots=(starts + PATCHES - 1 + torch.arange(text)).flatten(),
        target_ids=torch.zeros(count * text, dtype=torch.int64),
    )


def kept_bytes(num_blocks, *, lora):
    """Bytes that autograd keeps for each position of a pass; those of any pass are left out."""
    config = PhiConfig(**PHI2 | {"num_hidden_layers": num_blocks, "vocab_size": 8})
    language_model = PhiForCausalLM(config).to(torch.bfloat16).requires_grad_(False).eval()
    if lora:
        compute_lora_in_input_dtype(add_lora(language_model, LORA, seed=0))
    model = CaptionModel(seeded_projector("mlp", WIDTH, 2560, 0), language_model).train()
    small, large = some_images(4), some_images(8)
    more = large.token_ids.numel() - small.token_ids.numel()
    return (kept_of(model, large) - kept_of(model, small)) / more


def kept_of(model, batch):
    """Bytes that autograd keeps of a pass."""
    kept = {}

    def keep(tensor):
        # The tensor itself, so that no other one takes its address.
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.fixture(scope="module")
def counted():
    """Bytes a position in each block and outside of the blocks, in both stages."""
    found = {}
    for stage, lora in (("stage 1", False), ("stage 2", True)):
        one, two = (kept_bytes(num_blocks, lora=lora) for num_blocks in (1, 2))
        found[stage] = two - one, 2 * one - two
    return found


@pytest.fixture(scope="module")
def bytes_a_position(counted):
    whole = {stage: BLOCKS * block + rest for stage, (block, rest) in counted.items()}
    block, rest = counted["stage 2"]
    # Inputs of the blocks, in bf16, and one block that is computed again.
    return whole | {"checkpointed": BLOCKS * 2 * 2560 + block + rest}


@pytest.mark.slow("builds blocks of Phi-2's width")
def test_the_bytes_that_a_position_keeps_are_counted(counted, bytes_a_position):
    rows = table(PAGE, "| | bytes in each of the 32 blocks")
    in_blocks = [block for block, _ in counted.values()]
    for (label, in_block, whole), block, total in zip(
        rows, [*in_blocks, 2 * 2560], bytes_a_position.values(), strict=True
    ):
        assert agrees(in_block, block), f"{label}: {block}"
        assert agrees(whole, total / 1e6), f"{label}: {total}"


@pytest.mark.slow("builds blocks of Phi-2's width")
def test_what_fits_a_card_follows_from_the_counts(bytes_a_position):
    projector = sum(p.numel() for p in seeded_projector("mlp", WIDTH, 2560, 0).parameters())
    weights = {
        "`nf4`": BLOCK_PARAMETERS * NF4 + 2 * ENDS,
        "`none`": 2 * (BLOCK_PARAMETERS + ENDS),
    }
    assert number(r"With (\d+) % of the memory free") == f"{FREE:.0%}"[:-1]
    for gigabytes, _, quantize, *shown in table(PAGE, "| memory, GB "):
        free = (1 - FREE) * int(gigabytes) * 1e9 - weights[quantize] - ADAMW * projector
        checkpointed = free - ADAMW * LORA_PARAMETERS
        with_lora = checkpointed - COPY * LORA_PARAMETERS
        for count, room, size in zip(
            shown, (free, with_lora, checkpointed), bytes_a_position.values(), strict=True
        ):
            # Two digits say enough of a calculation.
            assert int(count.replace(",", "")) == float(f"{room / size:.2g}"), gigabytes


def positions_of_images():
    """Positions of an image with its captions, and with its conversations; texts of the latter."""
    caption = np.average(list(CAPTION_LENGTHS), weights=list(CAPTION_LENGTHS.values()))
    shares = np.array([share for share, _ in KINDS])
    lengths = [np.mean([np.sum(turns) for turns in texts]) for _, texts in KINDS]
    some = 1 - np.prod(1 - shares)
    with_conversations = PATCHES + shares @ lengths / some
    return PATCHES + CAPTIONS_AN_IMAGE * caption, with_conversations, shares.sum() / some


def test_positions_follow_from_the_lengths_of_real_texts():
    captioned, discussed, conversations = positions_of_images()
    assert agrees(number(r"captions takes about (\d+) positions"), float(captioned))
    assert agrees(number(r"conversations (\d+); a step"), float(discussed))
    in_a_step = [256 / CAPTIONS_AN_IMAGE * captioned, 128 / conversations * discussed]
    for shown, found in zip(
        re.findall(r"([\d,]+) in stage", PROSE[PROSE.index("a step of") :]), in_a_step, strict=True
    ):
        assert agrees(shown, float(found))
    whole = positions_of_stages()
    assert agrees(number(r"has (\d+) million positions, stage 2"), whole["stage 1"] / 1e6)
    assert agrees(number(r"stage 2 has (\d+) million"), whole["stage 2"] / 1e6)


def positions_of_stages():
    captioned, discussed, conversations = positions_of_images()
    return {
        "stage 1": float(EPOCHS["pretrain"] * CAPTIONS / CAPTIONS_AN_IMAGE * captioned),
        "stage 2": float(EPOCHS["finetune"] * CONVERSATIONS / conversations * discussed),
    }


def test_hours_follow_from_positions_and_rates():
    weights = {
        "stage 1": 4 * BLOCK_PARAMETERS,
        "stage 2": 4 * BLOCK_PARAMETERS + 6 * LORA_PARAMETERS,
    }
    known = set(PEAK_FLOPS.values())
    for card, rate, *hours in table(PAGE, "| card | rate"):
        peak = float(rate) * 1e12
        assert peak == OTHER_RATES.get(card) or peak in known, card
        for shown, (stage, operations) in zip(hours, weights.items(), strict=True):
            found = positions_of_stages()[stage] * operations / (BUSY * peak) / 3600
            assert agrees(shown, found), f"{card}, {stage}: {found}"


def test_the_rate_of_decoding_is_that_of_the_result_file():
    rate = result("encode_cpu")["median"]["decode 640x480 JPEG, one process"]
    assert agrees(number(r"decodes (\d+) photographs"), rate)
    assert agrees(number(r"Extraction takes (\d+) minutes"), 123_287 / rate / 60)


def test_the_page_says_that_nothing_was_shown_on_a_gpu_until_something_was():
    shown = [path for path in (ROOT / "bench/results").glob("gpu_*.json") if "dry" not in path.stem]
    assert ("Nothing here was ever shown on a GPU" in PROSE) is not bool(shown)
