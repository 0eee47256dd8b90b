import pytest

from train.data.prompts import (
    caption_text,
    conversation_text,
    dialogue_prompt,
    encode,
    question_text,
    tokenize,
)

TURNS = [
    [("What is in the box", "a red cat")],
    [("What is on the dog", "yes"), ("how many", "blue"), ("where", "in the box")],
    [("ü\n?", "  spaced  ")],
]


def learned(branch):
    return [t for t, is_learned in zip(branch.token_ids, branch.learned, strict=True) if is_learned]


def cut_at(token_ids, eos):
    """Split a list of ids behind every EOS."""
    pieces = [[]]
    for token_id in token_ids:
        pieces[-1].append(token_id)
        if token_id == eos:
            pieces.append([])
    return pieces


@pytest.mark.parametrize("caption", ["a red cat", "", "  ", "naïve ☃"])
def test_all_of_a_caption_is_learned_and_one_eos_ends_it(tokenizer, caption):
    (branch,) = tokenize([caption_text(caption)], tokenizer, 99)
    assert all(branch.learned)
    assert branch.num_learned == len(branch.token_ids) == len(branch.learned)
    assert branch.token_ids.count(tokenizer.eos_token_id) == 1
    assert branch.token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(branch.token_ids[:-1]) == caption


@pytest.mark.parametrize("turns", TURNS)
def test_what_is_learned_of_a_conversation_is_its_answers_and_their_eos(tokenizer, turns):
    (branch,) = tokenize([conversation_text(turns)], tokenizer, 999)
    pieces = cut_at(learned(branch), tokenizer.eos_token_id)
    assert pieces.pop() == [], "the last learned token is an EOS"
    assert [tokenizer.decode(piece[:-1]) for piece in pieces] == [f" {a}" for _, a in turns]
    assert branch.token_ids.count(tokenizer.eos_token_id) == len(turns)


@pytest.mark.parametrize("turns", TURNS)
def test_an_answer_follows_the_very_ids_that_generation_starts_from(tokenizer, turns):
    (branch,) = tokenize([conversation_text(turns)], tokenizer, 999)
    for turn, piece in zip(turns, cut_at(branch.token_ids, tokenizer.eos_token_id), strict=False):
        prompt = tokenizer(question_text(turn[0]), add_special_tokens=False)["input_ids"]
        answer = tokenizer(f" {turn[1]}", add_special_tokens=False)["input_ids"]
        assert piece == [*prompt, *answer, tokenizer.eos_token_id]


def test_the_format_is_that_of_phi_2s_model_card(tokenizer):
    (branch,) = tokenize([conversation_text([("where", "in"), ("why", "a")])], tokenizer, 99)
    assert question_text("where") == "Instruct: where\nOutput:"
    end = tokenizer.eos_token
    assert tokenizer.decode(branch.token_ids) == (
        f"Instruct: where\nOutput: in{end}Instruct: why\nOutput: a{end}"
    )


def test_a_limit_leaves_out_whole_turns_from_the_end(tokenizer):
    turns = TURNS[1]
    lengths = [
        len(tokenize([conversation_text(turns[:n])], tokenizer, 999)[0].token_ids)
        for n in (1, 2, 3)
    ]
    for limit in range(lengths[0], lengths[2] + 3):
        (branch,) = tokenize([conversation_text(turns)], tokenizer, limit)
        whole = max(n for n in (1, 2, 3) if lengths[n - 1] <= limit)
        (kept,) = tokenize([conversation_text(turns[:whole])], tokenizer, 999)
        assert (branch.token_ids, branch.learned) == (kept.token_ids, kept.learned)
        assert branch.cut == (whole < 3)


@pytest.mark.parametrize(
    "text", [caption_text("a red cat in the box"), conversation_text(TURNS[0])]
)
def test_a_first_turn_that_is_too_long_is_cut_and_does_not_learn_to_stop(tokenizer, text):
    (whole,) = tokenize([text], tokenizer, 999)
    for limit in range(1, len(whole.token_ids)):
        (branch,) = tokenize([text], tokenizer, limit)
        assert branch.token_ids == whole.token_ids[:limit]
        assert branch.learned == whole.learned[:limit]
        assert tokenizer.eos_token_id not in branch.token_ids
        assert branch.cut
    assert tokenize([text], tokenizer, len(whole.token_ids)) == [whole]


def test_texts_do_not_depend_on_their_neighbours(tokenizer):
    texts = [conversation_text(turns) for turns in TURNS] + [
        caption_text("a cat"),
        caption_text(""),
    ]
    assert tokenize(texts, tokenizer, 20) == [tokenize([t], tokenizer, 20)[0] for t in texts]
    assert tokenize([], tokenizer, 20) == []


def test_an_eos_written_in_a_text_is_text(tokenizer):
    (branch,) = tokenize([caption_text(f"a cat{tokenizer.eos_token} a dog")], tokenizer, 99)
    assert branch.token_ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("turns", TURNS)
def test_a_dialogue_is_what_training_has_up_to_each_answer(tokenizer, turns):
    (branch,) = tokenize([conversation_text(turns)], tokenizer, 999)
    swept = 0
    for number, (question, answer) in enumerate(turns):
        prompt_ids = dialogue_prompt(turns[:number], question, tokenizer)
        swept += len(prompt_ids)
        answer_ids = encode([f" {answer}"], tokenizer)[0]
        end = len(prompt_ids) + len(answer_ids)
        assert branch.token_ids[:end] == prompt_ids + answer_ids
        assert not branch.learned[len(prompt_ids) - 1]
        assert branch.learned[len(prompt_ids)]
    assert swept


def test_a_dialogue_of_one_question_is_the_prompt_of_evaluation(tokenizer):
    wanted = encode([question_text("where")], tokenizer)[0]
    assert dialogue_prompt([], "where", tokenizer) == wanted


def test_a_long_dialogue_is_not_cut(tokenizer):
    turns = [("What is on the dog", "yes")] * 300
    ends = dialogue_prompt(turns, "where", tokenizer).count(tokenizer.eos_token_id)
    assert ends == 300
