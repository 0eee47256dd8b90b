"""The laws of every family of language models, on tiny random models.

In float64, packed rows have the loss and gradients of transformers' own pass of one sequence a
text; LoRA is on every linear layer of the blocks; generation with a cache says what it says
without; NF4 is the model of the dequantised weights.
"""

import copy
import itertools
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import train.loop.loop
from tests.conftest import HIDDEN, PATCHES, WIDTH
from tests.train.images import Image, collate_images
from tests.train.model.families import FAMILIES, WINDOW
from tests.train.stage_server import outcome
from train.data.prompts import caption_turns, conversation_turns, tokenize
from train.finetune import finetune
from train.loop.step import optimizer_step
from train.model.captioner import CaptionModel
from train.model.decoder import blocks_of
from train.model.generate import generate
from train.model.language_model import add_lora, load_language_model, load_lora, lora_dropouts
from train.model.projector import seeded_projector
from train.model.supported import Float64, check_supported
from train.pretrain import pretrain
from train.settings import LlmSettings, LoraSettings

LORA = LoraSettings(r=4, alpha=8, dropout=0.5)
CPU = torch.device("cpu")

TEXTS = [
    [caption_turns(c) for c in ("a red cat is on the box", "", "the dog")],
    [conversation_turns([("What is", "yes"), ("how many", "no")]), caption_turns("a red cat")],
    [conversation_turns([("where is the cat", "in the box")])],
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory, phi_dir):
    """Return the folder of a family's model, written on first use."""
    root = tmp_path_factory.mktemp("families")

    def folder_of(family):
        folder = root / family
        return folder if folder.exists() else FAMILIES[family].write(folder, phi_dir)

    return folder_of


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def load(family, folders):
    def load(quantize="none", *, lora=True):
        settings = LlmSettings(model=str(folders(family)), quantize=quantize, dtype="fp32")
        model = load_language_model(settings, CPU)
        if lora:
            add_lora(model, LORA, 0)
            fill_lora(model)
        return model

    return load


def fill_lora(model):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)


def captioner(language_model):
    return CaptionModel(seeded_projector("mlp", WIDTH, HIDDEN, 0), language_model)


@pytest.fixture
def images(prompt_format):
    return [Image(n, tuple(tokenize(texts, prompt_format, 99))) for n, texts in enumerate(TEXTS)]


@pytest.fixture
def patches():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(TEXTS), PATCHES, WIDTH, generator=generator).half().double()


def separate_loss(model, own, patches_1PD, text):
    """Return the loss of one sequence, with the model's own attention, mask and positions."""
    ids = torch.tensor([text.token_ids])
    embeds = torch.cat([model.embed_patches(patches_1PD), model.embed_text(ids)], dim=1)
    logits = own(inputs_embeds=embeds, use_cache=False).logits
    losses = nn.functional.cross_entropy(logits[0, PATCHES - 1 : -1], ids[0], reduction="none")
    return losses[torch.tensor(text.is_target)].sum()


def test_the_family_is_supported(family, folders):
    check_supported(LlmSettings(model=str(folders(family)), quantize="nf4", dtype="fp32"))


def test_packed_rows_have_the_loss_and_gradients_of_one_sequence_a_text(load, images, patches):
    longest = PATCHES + max(len(text.token_ids) for image in images for text in image.texts)
    assert longest > 2 * WINDOW, "a window that no text reaches beyond would show nothing"
    language_model = load()
    model = captioner(language_model).double().eval()
    rows = [images[:2], images[2:]]
    with Float64():
        packed = model(collate_images(rows, patches))
        names = list(model.trainable_parameters())
        found = torch.autograd.grad(packed, list(model.trainable_parameters().values()))
        language_model.set_attn_implementation("eager")
        separate = sum(
            separate_loss(model, language_model, patches[[image.image_id]], text)
            for image in images
            for text in image.texts
        )
        wanted = torch.autograd.grad(separate, list(model.trainable_parameters().values()))
    assert any("lora_A" in name for name in names)
    torch.testing.assert_close(packed, separate, rtol=1e-9, atol=0)
    for name, one, other in zip(names, found, wanted, strict=True):
        assert (one - other).norm() < 1e-9 * other.norm(), name


def test_embedded_text_is_what_the_model_embeds(load, images):
    model = load(lora=False)
    ids = torch.tensor([images[0].texts[0].token_ids])
    embeds = captioner(load(lora=False)).embed_text(ids)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)


def test_lora_is_on_every_linear_layer_of_the_blocks_and_nothing_else(load, tmp_path, images):
    model = load(lora=False)
    own = copy.deepcopy(model)
    adapter = add_lora(model, LORA, 0)
    fill_lora(model)
    everywhere = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        everywhere = get_peft_model(own, everywhere)
    layers = [n for n, module in adapter.named_modules() if hasattr(module, "lora_A")]
    assert layers == [n for n, module in everywhere.named_modules() if hasattr(module, "lora_A")]
    assert len(layers) == sum(hasattr(module, "lora_A") for module in blocks_of(model).modules())
    adapter.save_pretrained(tmp_path, save_embedding_layers=False)
    again = load(lora=False)
    load_lora(again, tmp_path)
    ids = torch.tensor([images[0].texts[0].token_ids])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
        assert not torch.equal(load(lora=False)(ids).logits, model(ids).logits)


def test_generation_with_a_cache_says_what_it_says_without(load, prompt_format, patches):
    model = captioner(load()).eval()
    features = patches.half().numpy()
    questions, tokenizer = [None, "how many of the", "where is"], prompt_format.tokenizer

    class Features:
        def gather(self, image_ids, out=None):
            return features[image_ids]

    found = generate(
        model, prompt_format, Features(), range(len(questions)), questions,
        max_tokens=8, batch_size=3, description="",
    )  # fmt: skip
    for number, ids in enumerate(prompt_format.prompts(questions)):
        wanted = greedy(model, tokenizer, features[[number]], ids, 8)
        assert found[number].text == tokenizer.decode(wanted).strip()
        assert found[number].num_tokens == len(wanted)
    assert len({one.text for one in found}) > 1


@torch.no_grad()
def greedy(model, tokenizer, patches_1PD, ids, most):
    """Choose the likeliest token again and again, from a whole pass each time."""
    chosen = []
    known = sorted(tokenizer.get_vocab().values())
    patches = model.embed_patches(torch.from_numpy(np.asarray(patches_1PD)))
    for _ in range(most):
        text = model.embed_text(torch.tensor([ids + chosen], dtype=torch.int64))
        embeds = torch.cat([patches, text], dim=1)
        logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
        token = known[int(logits[known].argmax())]
        if token == tokenizer.eos_token_id:
            break
        chosen.append(token)
    return chosen


def test_nf4_is_the_model_of_the_dequantised_weights(load, images, patches):
    quantised = load("nf4")
    layers = {n for n, m in quantised.named_modules() if isinstance(m, Linear4bit)}
    plain = load()
    with torch.no_grad():
        for name in layers:
            weight = quantised.get_submodule(name).weight
            values = dequantize_4bit(weight, weight.quant_state)
            layer = plain.get_submodule(name)
            layer.weight.copy_(values.T if isinstance(layer, Conv1D) else values)
    assert layers == {n for n, m in plain.named_modules() if n.endswith("base_layer")}
    batch = collate_images([images], patches.half())
    losses, gradients = [], []
    for language_model in (quantised, plain):
        model = captioner(language_model).eval()
        assert not any(dropout.training for dropout in lora_dropouts(language_model))
        loss = model(batch)
        losses.append(loss.detach())
        parameters = list(model.trainable_parameters().values())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()


@pytest.mark.slow("trains in both stages with every family")
def test_a_resumed_run_equals_an_uninterrupted_one(family, folders, workspace, monkeypatch):
    loop = {"epochs": 2, "validate_every_steps": 3, "samples": 1}
    params = workspace.params(
        llm={"model": str(folders(family)), "quantize": "none", "dtype": "fp32"},
        pretrain=loop,
        finetune=loop,
        checkpoints={"every_steps": 2},
    )
    for name, stage in (("pretrain", pretrain), ("finetune", finetune)):
        stage(params)
        uninterrupted = outcome(name)
        shutil.rmtree(f"runs/{name}")
        with monkeypatch.context() as patch:
            patch.setattr(train.loop.loop, "optimizer_step", interrupting(3))
            with pytest.raises(KeyboardInterrupt):
                stage(params)
        assert list(Path(".work/runs", name).glob("*/checkpoints/step-*.safetensors"))
        stage(params)
        assert outcome(name) == uninterrupted


def interrupting(number):
    """Return an optimizer step that gets a signal in its `number`-th call."""
    calls = itertools.count(1)

    def step(*arguments, **options):
        if next(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return optimizer_step(*arguments, **options)

    return step
