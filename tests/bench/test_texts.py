import numpy as np
import pytest

from bench.texts import (
    CAPTION_LENGTHS,
    EOS_ID,
    KINDS,
    SEVERAL_QUESTIONS,
    TOKENS,
    bare_format,
    draw_captions,
    draw_conversations,
    make_tokenizer,
)
from train.data.prompts import tokenize


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def lengths_of(texts, tokenizer):
    parts = [[part for turn in text for part in turn if part] for text in texts]
    return [[len(piece) for piece in tokenizer(part)["input_ids"]] for part in parts]


def test_a_word_is_one_token_and_the_vocabulary_is_phi_2s(tokenizer):
    assert len(tokenizer) == TOKENS
    assert tokenizer.eos_token_id == EOS_ID
    assert tokenizer(["w7 w50294 w0"])["input_ids"] == [[7, 50_294, 0]]


def test_captions_have_the_lengths_of_the_table(tokenizer):
    examples = draw_captions(np.random.default_rng(1), 400)
    assert [example.image_id for example in examples] == list(range(400))
    assert {len(example.texts) for example in examples} == {5}
    texts = [text for example in examples for text in example.texts]
    lengths = np.array(lengths_of(texts, tokenizer))
    assert set(lengths.flatten()) <= set(CAPTION_LENGTHS)
    table = np.repeat(list(CAPTION_LENGTHS), list(CAPTION_LENGTHS.values()))
    assert table.mean() == pytest.approx(11.75, abs=0.01)
    assert lengths.mean() == pytest.approx(table.mean(), abs=0.2)


def test_every_caption_is_learned_as_a_whole_and_ends_once(tokenizer):
    texts = [text for e in draw_captions(np.random.default_rng(1), 20) for text in e.texts]
    for text in tokenize(texts, bare_format(tokenizer), 99):
        assert all(text.is_target)
        assert text.token_ids.index(EOS_ID) == len(text.token_ids) - 1


def test_conversations_are_those_of_the_tables(tokenizer):
    examples = draw_conversations(np.random.default_rng(1), 400)
    assert [example.image_id for example in examples] == list(range(400))
    known = {lengths for _, conversations in KINDS for lengths in conversations}
    texts = [text for example in examples for text in example.texts]
    for text, flat in zip(texts, lengths_of(texts, tokenizer), strict=True):
        assert tuple(zip(flat[::2], flat[1::2], strict=True)) in known
        assert len(text) == len(flat) // 2
    assert len(texts) / len(examples) == pytest.approx(1.96, abs=0.1)
    several = np.mean([len(text) > 1 for text in texts])
    assert several == pytest.approx(58 / 158, abs=0.05)


def test_the_means_are_those_that_are_stated():
    def mean_tokens(conversations):
        return np.mean([sum(q + a + 1 for q, a in turns) for turns in conversations])

    assert mean_tokens(SEVERAL_QUESTIONS) == pytest.approx(294, abs=1)
    assert mean_tokens(KINDS[1][1]) == pytest.approx(149, abs=1)
    assert mean_tokens(KINDS[2][1]) == pytest.approx(150, abs=1)


def test_texts_depend_on_the_seed_alone():
    for draw in (draw_captions, draw_conversations):
        first, again, other = (draw(np.random.default_rng(seed), 5) for seed in (1, 1, 2))
        assert first == again != other
