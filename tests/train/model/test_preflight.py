from dataclasses import replace

import pytest
import torch

from cache.errors import SettingsError
from train.data.examples import Example
from train.data.prompts import caption_turns
from train.loop.step import build_step
from train.model.preflight import check_first_logits, check_language_model, check_vocabulary
from train.settings import LlmSettings
from workspace.errors import StageError


@pytest.fixture
def llm(phi_dir):
    return LlmSettings(model=str(phi_dir), quantize="none", dtype="fp32")


def refused(text):
    return pytest.raises(StageError, match=rf"before the first step: {text}")


def test_the_tokenizer_of_the_checkpoint_is_accepted(tokenizer, llm):
    check_vocabulary(tokenizer, llm)


def test_a_tokenizer_of_more_entries_than_rows_is_refused(llm):
    class Larger:
        def __len__(self):
            return 513

    with refused("entries of the tokenizer: wanted at most 512, found 513"):
        check_vocabulary(Larger(), llm)


def test_an_id_of_the_tokenizer_beyond_the_last_row_is_refused(llm):
    class Sparse:
        def __len__(self):
            return 2

        def get_vocab(self):
            return {"a": 0, "b": 512}

    with refused("ids of the tokenizer: wanted below 512, found 512"):
        check_vocabulary(Sparse(), llm)


def test_texts_beyond_a_models_positions_are_refused(llm):
    checked = check_language_model(llm)
    assert checked.max_positions is None
    checked.check_positions(49, 10**6)
    limited = replace(checked, max_positions=60, prompt_format=lead_of(checked, 3))
    limited.check_positions(49, 8)
    with pytest.raises(SettingsError, match=r"has 60 positions, .* takes up to 61\. Lower"):
        limited.check_positions(49, 9)


def lead_of(checked, length):
    return replace(checked.prompt_format, lead=(0,) * length)


@pytest.fixture
def first_step(prompt_format, store):
    return build_step(
        [Example(100, (caption_turns("a red cat"), caption_turns("the dog")))],
        prompt_format,
        store,
        pass_tokens=99,
        row_tokens=99,
        max_text_tokens=99,
        device=torch.device("cpu"),
    )


def test_logits_that_are_not_finite_are_refused_and_counted(make_model, first_step):
    model = make_model(quantize="nf4", dtype="bf16", lora=0.05)
    check_first_logits(model, first_step)
    assert not any(module.training for module in model.modules())
    model.language_model.lm_head.bias.data[7] = torch.inf
    number = sum(len(batch.target_slots) for batch in first_step.batches)
    text = f"that are not finite: wanted 0, found {number}"
    with refused(f"logits of the first forward pass {text}"):
        check_first_logits(model, first_step)


def test_the_check_leaves_no_trace_in_what_is_learned(make_model, first_step):
    def gradients(checked):
        model = make_model(quantize="nf4", dtype="bf16", lora=0.5)
        torch.manual_seed(3)
        if checked:
            check_first_logits(model, first_step)
        (batch,) = first_step.batches
        model.train()(batch).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    assert all(map(torch.equal, gradients(True), gradients(False)))
