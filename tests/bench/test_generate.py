import dataclasses

import pytest
import torch

from bench import generate
from bench.generate import CONTENDERS, LEAST, MAX_TOKENS, NO_CACHE, ONE_BY_ONE, OURS, PROMPT_TOKENS
from bench.step import PRETRAIN, make_features, make_stage
from bench.stores import SPEC
from tests.bench.models import TINY_PHI
from train.data.prompts import encode

IMAGES = 5
TEXTS = {OURS: IMAGES, ONE_BY_ONE: 3, NO_CACHE: 2}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    torch.set_num_threads(1)
    spec = dataclasses.replace(SPEC, patches=4, width=8)
    made = make_stage(
        PRETRAIN, make_features(tmp_path_factory.mktemp("features"), IMAGES, spec), TINY_PHI
    )
    for parameter in made.model.parameters():
        if parameter.ndim > 1:
            # Large enough that every position matters to every later token.
            torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    # Two full batches and a rest.
    monkeypatch.setattr(generate, "BATCH", 2)


def test_all_contenders_make_the_same_texts_which_depend_on_the_image(stage):
    texts = {name: generate.make_contender(name, stage, TEXTS[name])() for name in CONTENDERS}
    assert {name: len(made) for name, made in texts.items()} == TEXTS
    assert generate.check_same(texts) == IMAGES
    # In any order: each sets the model up for itself.
    for name in reversed(CONTENDERS):
        assert generate.make_contender(name, stage, TEXTS[name])() == texts[name]


def test_every_text_has_as_many_tokens(stage):
    for name in CONTENDERS:
        made = generate.make_contender(name, stage, TEXTS[name])()
        assert [len(ids) for ids in encode(made, stage.tokenizer)] == [MAX_TOKENS] * len(made)


def test_other_texts_or_shorter_ones_are_not_measured():
    whole = " ".join(f"w{number}" for number in range(MAX_TOKENS))
    with pytest.raises(AssertionError, match="one by one made other texts than ours"):
        generate.check_same({OURS: [whole, whole], ONE_BY_ONE: [whole, whole + "0"]})
    with pytest.raises(AssertionError, match="ours: a text ended"):
        generate.check_same({OURS: ["w1"], ONE_BY_ONE: ["w1"]})


def test_the_prompt_is_as_long_as_is_said(stage):
    (ids,) = encode([generate.prompt()], stage.tokenizer)
    assert len(ids) == PROMPT_TOKENS
    assert stage.tokenizer.eos_token_id not in ids


def test_the_cache_is_used_where_it_is_said_to_be(stage):
    lengths = []

    def note(module, arguments):
        lengths.append(arguments[0].shape[1])

    prefix = 4 + PROMPT_TOKENS
    with stage.model.language_model.model.layers[0].register_forward_pre_hook(note):
        generate.without_cache(stage, 1)
        assert lengths == list(range(prefix, prefix + MAX_TOKENS))
        lengths.clear()
        generate.with_cache(stage, 2, 1, published=True)
        assert lengths == 2 * ([prefix] + [1] * (MAX_TOKENS - 1))
        lengths.clear()
        generate.with_cache(stage, IMAGES, IMAGES, published=False)
        assert lengths == [prefix] + [1] * (MAX_TOKENS - 1)


def test_the_goal_is_about_a_contender():
    assert LEAST.keys() < set(CONTENDERS)
    goals = generate.goals_of({OURS: 12.0, ONE_BY_ONE: 4.0, NO_CACHE: 3.0})
    assert goals == {f"{OURS} / {NO_CACHE}": {"wanted": ">= 5.0", "found": 4.0, "met": False}}
