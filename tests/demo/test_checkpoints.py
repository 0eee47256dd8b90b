import random

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.checkpoints import CHECKPOINTS
from demo.contexts import notes
from demo.draw import draw_scene
from demo.questions import CAPTION_REQUEST, ask
from demo.scenes import scene_at
from demo.tokenizer import chat_tokenizer, prompt, train_tokenizer
from demo.train_clip import NAME, normalised, pixels_of
from demo.train_language_model import CHAT, PHI_2, llama_config, phi_config

MOST_BYTES = 6_000_000
SCENES = [scene_at(2, "test", index) for index in range(40)]


@pytest.fixture(scope="module")
def clip():
    open_clip.add_model_config(CHECKPOINTS / "clip" / f"{NAME}.json")
    weights = str(CHECKPOINTS / "clip" / f"{NAME}.safetensors")
    return open_clip.create_model(NAME, pretrained=weights).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINTS / "phi")


@pytest.fixture(scope="module")
def llama():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "llama", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def phi():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "phi", dtype=torch.float32).eval()


def test_checkpoints_are_small():
    sizes = [path.stat().st_size for path in CHECKPOINTS.rglob("*") if path.is_file()]
    assert len(sizes) >= 6
    assert sum(sizes) <= MOST_BYTES


def test_clip_gives_one_row_per_patch_from_the_block_before_the_last(clip):
    images = torch.zeros(2, 3, 96, 96)
    with torch.no_grad():
        features = clip.visual.forward_intermediates(
            images,
            indices=[-2],
            normalize_intermediates=False,
            output_fmt="NLC",
            intermediates_only=True,
        )["image_intermediates"][0]
    assert features.shape == (2, 9, 128)
    assert features.half().isfinite().all()


def test_clip_finds_the_text_of_a_picture(clip, tokenizer):
    texts = [notes(scene, random.Random(index)) for index, scene in enumerate(SCENES)]
    tokens = torch.zeros(len(texts), clip.context_length, dtype=torch.long)
    for row, text in enumerate(texts):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        tokens[row, : len(ids)] = torch.tensor(ids)
    pixels = np.stack([pixels_of(draw_scene(scene)) for scene in SCENES])
    with torch.no_grad():
        pictures = clip.encode_image(normalised(pixels), normalize=True)
        similarity = pictures @ clip.encode_text(tokens, normalize=True).T
    found = similarity.argmax(1) == torch.arange(len(SCENES))
    assert found.float().mean() >= 0.8


def test_phi_has_phi2_layout(phi, tokenizer):
    config = phi.config
    assert config.model_type == "phi"
    assert config.vocab_size > len(tokenizer)
    assert not config.tie_word_embeddings
    assert phi.lm_head.bias is not None
    linear = [module for module in phi.model.modules() if isinstance(module, torch.nn.Linear)]
    assert linear
    # Blocks of 64 weights share a scale in NF4.
    assert all(module.in_features % 64 == 0 for module in linear)


def test_tokenizer_is_like_phi2s(tokenizer):
    end = tokenizer.eos_token_id
    assert tokenizer.bos_token_id == tokenizer.unk_token_id == end == len(tokenizer) - 1
    assert tokenizer.pad_token is None
    text = prompt("What color is the star?") + " red"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    parts = [prompt("What color is the star?"), " red"]
    assert tokenizer(text)["input_ids"] == [
        id for part in parts for id in tokenizer(part)["input_ids"]
    ]


def test_tokenizer_can_be_rebuilt(tokenizer):
    assert train_tokenizer(seed=0).get_vocab() == tokenizer.get_vocab()


def test_stored_weights_have_the_layout_of_the_code(phi, llama, tokenizer):
    for model, config in (
        (phi, phi_config(tokenizer)),
        (llama, llama_config(chat_tokenizer(tokenizer))),
    ):
        for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"):
            assert getattr(model.config, name) == getattr(config, name)
    assert load_file(CHECKPOINTS / "clip" / f"{NAME}.safetensors")["logit_scale"] > 0


def share_right(model, tokenizer, style, shift):
    """Share of questions that are answered word for word after notes of their or another scene."""
    right = total = 0

    def ids(text):
        return tokenizer(text)["input_ids"]

    for index, scene in enumerate(SCENES):
        told = SCENES[(index + shift) % len(SCENES)]
        context = ids(style.lead) + ids(notes(told, random.Random(index)))
        for question, answer in ask(scene, random.Random(index), 3):
            if question == CAPTION_REQUEST:
                continue
            asked = torch.tensor([context + ids(style.question.format(question))])
            wanted = ids(style.answer.format(answer)) + ids(style.end)
            with torch.no_grad():
                logits = model(torch.cat([asked, torch.tensor([wanted])], dim=1)).logits[0]
            right += logits[asked.shape[1] - 1 : -1].argmax(-1).tolist() == wanted
            total += 1
    assert total > 80
    return right / total


@pytest.mark.parametrize(("name", "style"), [("phi", PHI_2), ("llama", CHAT)])
def test_a_language_model_answers_from_its_context(name, style, request):
    model = request.getfixturevalue(name)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    own, other = (share_right(model, tokenizer, style, shift) for shift in (0, 7))
    assert own > 0.75
    assert own > other + 0.3


def test_the_chat_template_is_the_format_of_the_trained_documents():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "llama")
    turns = [("user", "Where?"), ("assistant", "top left"), ("user", "A dog?"), ("assistant", "no")]
    messages = [{"role": role, "content": text} for role, text in turns]
    answers = [CHAT.question.format(q) + a + CHAT.end for (_, q), (_, a) in (turns[:2], turns[2:])]
    wanted = CHAT.lead + CHAT.turn.join(answers)
    assert tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n") == wanted
