import pytest

from train.data.prompts import caption_turns, conversation_turns, encode, tokenize

TURNS = [
    [("What is in the box", "a red cat")],
    [("What is on the dog", "yes"), ("how many", "blue"), ("where", "in the box")],
    [("ü\n?", "  spaced  ")],
]


def question_text(question):
    """The "QA Format" of the model card of microsoft/phi-2."""
    return f"Instruct: {question}\nOutput:"


def learned(text):
    return [t for t, is_learned in zip(text.token_ids, text.is_target, strict=True) if is_learned]


def cut_at(token_ids, eos):
    """Split a list of ids behind every EOS."""
    pieces = [[]]
    for token_id in token_ids:
        pieces[-1].append(token_id)
        if token_id == eos:
            pieces.append([])
    return pieces


@pytest.mark.parametrize("caption", ["a red cat", "", "  ", "naïve ☃"])
def test_all_of_a_caption_is_learned_and_one_eos_ends_it(tokenizer, prompt_format, caption):
    (text,) = tokenize([caption_turns(caption)], prompt_format, 99)
    assert all(text.is_target)
    assert text.num_target_tokens == len(text.token_ids) == len(text.is_target)
    assert text.token_ids.count(tokenizer.eos_token_id) == 1
    assert text.token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(text.token_ids[:-1]) == caption


@pytest.mark.parametrize("turns", TURNS)
def test_what_is_learned_of_a_conversation_is_its_answers_and_their_eos(tokenizer, prompt_format, turns):
    (text,) = tokenize([conversation_turns(turns)], prompt_format, 999)
    pieces = cut_at(learned(text), tokenizer.eos_token_id)
    assert pieces.pop() == [], "the last learned token is an EOS"
    assert [tokenizer.decode(piece[:-1]) for piece in pieces] == [f" {a}" for _, a in turns]
    assert text.token_ids.count(tokenizer.eos_token_id) == len(turns)


@pytest.mark.parametrize("turns", TURNS)
def test_an_answer_follows_the_very_ids_that_generation_starts_from(tokenizer, prompt_format, turns):
    (text,) = tokenize([conversation_turns(turns)], prompt_format, 999)
    for turn, piece in zip(turns, cut_at(text.token_ids, tokenizer.eos_token_id), strict=False):
        prompt = tokenizer(question_text(turn[0]), add_special_tokens=False)["input_ids"]
        answer = tokenizer(f" {turn[1]}", add_special_tokens=False)["input_ids"]
        assert piece == [*prompt, *answer, tokenizer.eos_token_id]


def test_the_format_is_that_of_phi_2s_model_card(tokenizer, prompt_format):
    (text,) = tokenize([conversation_turns([("where", "in"), ("why", "a")])], prompt_format, 99)
    end = tokenizer.eos_token
    assert tokenizer.decode(text.token_ids) == (
        f"Instruct: where\nOutput: in{end}Instruct: why\nOutput: a{end}"
    )


def test_a_limit_leaves_out_whole_turns_from_the_end(tokenizer, prompt_format):
    turns = TURNS[1]
    lengths = [
        len(tokenize([conversation_turns(turns[:n])], prompt_format, 999)[0].token_ids)
        for n in (1, 2, 3)
    ]
    for limit in range(lengths[0], lengths[2] + 3):
        (text,) = tokenize([conversation_turns(turns)], prompt_format, limit)
        whole = max(n for n in (1, 2, 3) if lengths[n - 1] <= limit)
        (kept,) = tokenize([conversation_turns(turns[:whole])], prompt_format, 999)
        assert (text.token_ids, text.is_target) == (kept.token_ids, kept.is_target)
        assert text.was_cut == (whole < 3)


@pytest.mark.parametrize(
    "turns", [caption_turns("a red cat in the box"), conversation_turns(TURNS[0])]
)
def test_a_first_turn_that_is_too_long_is_cut_and_does_not_learn_to_stop(tokenizer, prompt_format, turns):
    (whole,) = tokenize([turns], prompt_format, 999)
    for limit in range(1, len(whole.token_ids)):
        (text,) = tokenize([turns], prompt_format, limit)
        assert text.token_ids == whole.token_ids[:limit]
        assert text.is_target == whole.is_target[:limit]
        assert tokenizer.eos_token_id not in text.token_ids
        assert text.was_cut
    assert tokenize([turns], prompt_format, len(whole.token_ids)) == [whole]


def test_texts_do_not_depend_on_their_neighbours(tokenizer, prompt_format):
    texts = [conversation_turns(turns) for turns in TURNS] + [
        caption_turns("a cat"),
        caption_turns(""),
    ]
    assert tokenize(texts, prompt_format, 20) == [tokenize([t], prompt_format, 20)[0] for t in texts]
    assert tokenize([], prompt_format, 20) == []


def test_an_eos_written_in_a_text_is_text(tokenizer, prompt_format):
    (text,) = tokenize([caption_turns(f"a cat{tokenizer.eos_token} a dog")], prompt_format, 99)
    assert text.token_ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("turns", TURNS)
def test_a_dialogue_is_what_training_has_up_to_each_answer(tokenizer, prompt_format, turns):
    (text,) = tokenize([conversation_turns(turns)], prompt_format, 999)
    swept = 0
    for number, (question, answer) in enumerate(turns):
        prompt_ids = prompt_format.dialogue_prompt(turns[:number], question)
        swept += len(prompt_ids)
        answer_ids = encode([f" {answer}"], tokenizer)[0]
        end = len(prompt_ids) + len(answer_ids)
        assert text.token_ids[:end] == prompt_ids + answer_ids
        assert not text.is_target[len(prompt_ids) - 1]
        assert text.is_target[len(prompt_ids)]
    assert swept


def test_a_dialogue_of_one_question_is_the_prompt_of_evaluation(tokenizer, prompt_format):
    wanted = encode([question_text("where")], tokenizer)[0]
    assert prompt_format.dialogue_prompt([], "where") == wanted


def test_a_long_dialogue_is_not_cut(tokenizer, prompt_format):
    turns = [("What is on the dog", "yes")] * 300
    ends = prompt_format.dialogue_prompt(turns, "where").count(tokenizer.eos_token_id)
    assert ends == 300
