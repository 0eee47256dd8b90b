"""Transformers' own classes load an exported model of each family, with the logits of the run."""

import dataclasses
import json

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from tests.eval.llava.exported_run import (
    BFLOAT16,
    FLOAT16,
    KERNELS,
    QUESTIONS,
    Made,
    distance,
    inputs_of,
    our_answers,
    our_logits,
    their_answers,
    their_logits,
)
from tests.pipeline.towers.conftest import KINDS, build
from tests.train.model.families import FAMILIES

pytestmark = pytest.mark.usefixtures("copied_code")

PLAIN = sorted(FAMILIES.keys() - {"Phi", "Gemma2"})
"""Families whose output layer has neither a bias nor a soft cap."""

TIED = {"Llama", "Qwen2", "Gemma", "Gemma3Text"}
"""Families whose tiny model has a tied output layer that LLaVA can tie: the others scale it, or
have another name for their embeddings."""


# The tiny models of the families magnify every difference of their inputs more than Phi does.
ROUNDED_FEATURES, ALL_BFLOAT16 = 8 * FLOAT16, 4 * BFLOAT16


def export(root, family, phi_dir, **changes):
    return Made(root, family.write(root / "model", phi_dir)).write(**changes).export()


def load(out, **options):
    """Load an export with transformers' own classes, and without code that comes with it."""
    assert not list(out.glob("*.py"))
    for path in out.glob("*.json"):
        assert "auto_map" not in path.read_text(), path
    model, loading = LlavaForConditionalGeneration.from_pretrained(
        out, output_loading_info=True, **options
    )
    assert not any(loading.values()), loading
    assert type(model) is LlavaForConditionalGeneration
    return model, LlavaProcessor.from_pretrained(out, backend="pil")


def assert_same_logits(made, model, processor, *, bf16=False):
    """Compare an exported model with its run; not its answers in bf16.

    Random weights decide by less than bf16 rounds.
    """
    kernels, float16 = (ALL_BFLOAT16,) * 2 if bf16 else (KERNELS, ROUNDED_FEATURES)
    tokens = len(made.trained.tokenizer)
    for image_id, question in enumerate(QUESTIONS):
        # Without the row of the image token, which only the export may have.
        found = their_logits(model, inputs_of(processor, [image_id], [question]))[:, :tokens]
        exact = our_logits(made, made.features.unrounded(image_id), question)[:, :tokens]
        assert distance(found, exact) < kernels
        cached = torch.from_numpy(made.features.gather([image_id]))
        assert distance(found, our_logits(made, cached, question)[:, :tokens]) < float16
    if not bf16:
        assert their_answers(model, processor) == our_answers(made)


@pytest.mark.parametrize("kind", PLAIN)
def test_transformers_own_classes_give_the_logits_of_the_run(tmp_path, phi_dir, kind):
    made = export(tmp_path, FAMILIES[kind], phi_dir)
    model, processor = load(made.out)
    assert_same_logits(made, model, processor)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (kind in TIED)
    rows = made.trained.model.language_model.config.vocab_size
    assert model.get_input_embeddings().num_embeddings == rows


@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX", "Granite"])
def test_a_full_vocabulary_gets_a_row_for_the_image_token(tmp_path, phi_dir, tokenizer, kind):
    """Tied, untied, and tied in the run but scaled in the export."""
    full = len(tokenizer)
    family = dataclasses.replace(FAMILIES[kind], sizes=FAMILIES[kind].sizes | {"vocab_size": full})
    made = export(tmp_path, family, phi_dir)
    assert made.trained.model.language_model.config.vocab_size == full
    model, processor = load(made.out)
    assert model.config.text_config.vocab_size == full + 1
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == full + 1
    assert processor.image_token_id == model.config.image_token_id == full
    assert model.generation_config.suppress_tokens == [full]
    assert_same_logits(made, model, processor)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (kind == "Llama")
    logits = their_logits(model, inputs_of(processor, [0], QUESTIONS[:1]))
    # The mean is never the greatest, even where nothing is suppressed.
    scale = logits.abs().max()
    assert (logits[:, full] - logits[:, :full].mean(1)).abs().max() < KERNELS * scale


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_without_lora_is_exported_too(tmp_path, phi_dir, dtype):
    made = export(tmp_path, FAMILIES["Llama"], phi_dir, stage="pretrain", llm={"dtype": dtype})
    assert not (made.out / "chat_template.jinja").exists()
    model, _ = load(made.out)
    for (name, wanted), (_, found) in zip(
        made.trained.model.language_model.base_model.named_parameters(),
        model.model.language_model.named_parameters(),
        strict=True,
    ):
        assert torch.equal(found, wanted), name


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX"])
def test_a_quantised_model_is_exported_dequantised(tmp_path, phi_dir, family):
    """GPT-2's linear layers hold their weights transposed."""
    made = export(tmp_path, FAMILIES[family], phi_dir, llm={"quantize": "nf4"})
    model, processor = load(made.out)
    assert_same_logits(made, model, processor)


def test_a_bf16_export_is_loaded_in_bf16_and_exactly_in_float32(tmp_path, phi_dir):
    made = export(tmp_path, FAMILIES["Llama"], phi_dir, llm={"quantize": "nf4", "dtype": "bf16"})
    config = json.loads((made.out / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    model, processor = load(made.out)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_same_logits(made, model, processor, bf16=True)
    exact, _ = load(made.out, dtype=torch.float32)
    assert_same_logits(made, exact, processor, bf16=True)
    projector = made.trained.model.projector.layers[0].weight
    assert torch.equal(exact.model.multi_modal_projector.linear_1.weight, projector)
    assert not torch.equal(model.model.multi_modal_projector.linear_1.weight.float(), projector)
    # What the language model gets is the run's to the last digits, or rounded by the tower.
    pixels = inputs_of(processor, [0], QUESTIONS[:1])["pixel_values"]
    with torch.inference_mode():
        wanted = made.trained.model.projector(made.features.unrounded(0))[0]
        found = [m.get_image_features(pixels).pooler_output[0].float() for m in (exact, model)]
    assert distance(found[0], wanted) < KERNELS
    assert 100 * KERNELS < distance(found[1], wanted) < ALL_BFLOAT16


@pytest.mark.parametrize(
    ("name", "layer"), [("clip", -2), ("siglip", -2), ("dinov2", -1), ("aimv2", -2)]
)
def test_a_tower_of_transformers_is_exported_as_it_is(tmp_path, phi_dir, name, layer):
    tower = {"model": f"hf:{build(name, tmp_path / 'tower')}", "pretrained": "main"}
    made = export(tmp_path, FAMILIES["Llama"], phi_dir, tower=tower, layer=layer)
    model, processor = load(made.out)
    assert type(model.model.vision_tower).__name__ == KINDS[name].model
    assert_same_logits(made, model, processor)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_code_of_ours_takes_a_tower_of_transformers_too(tmp_path, phi_dir, precision):
    """With its crop, and in the precision of its features."""
    tower = {"model": f"hf:{build('dinov2', tmp_path / 'tower')}", "pretrained": "main"}
    llm = {"dtype": precision}
    made = Made(tmp_path, phi_dir).write(tower=tower, precision=precision, llm=llm).export()
    options = {"trust_remote_code": True}
    model = AutoModelForImageTextToText.from_pretrained(made.out, **options)
    processor = AutoProcessor.from_pretrained(made.out, **options)
    assert type(processor.image_processor).__name__ == "UprightImageProcessor"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    found = {parameter.dtype for parameter in model.model.vision_tower.parameters()}
    assert found == {dtypes[precision]}
    assert_same_logits(made, model, processor, bf16=precision == "bf16")


def test_a_chat_model_is_exported_with_its_format(tmp_path, phi_dir):
    """Its lead stands before the picture, and every end token stops it."""
    folder = FAMILIES["Llama"].write(tmp_path / "model", phi_dir)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|end|>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|user|>{{ message['role'] }}: {{ message['content'] }}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    made = Made(tmp_path, folder).write().export()
    prompts = made.trained.prompt_format
    assert (prompts.name, len(prompts.end_ids)) == ("chat", 2)
    assert prompts.lead
    model, processor = load(made.out)
    assert model.generation_config.eos_token_id == list(prompts.end_ids)
    assert_same_logits(made, model, processor)
