"""Laws of prompt formats made from chat templates. Tokenizers and templates are those of
`tests.train.data.chat_tokenizers`."""

import datetime
import unicodedata

import pytest
import transformers.utils.chat_template_utils as templates
from tokenizers import pre_tokenizers

from cache.errors import SettingsError
from tests.train.data.chat_tokenizers import (
    CHATML,
    GEMMA,
    IM,
    LLAMA_3,
    MAKERS,
    OLMO_2,
    ZEPHYR,
    byte_level,
    chat_tokenizer,
    fast,
    sentence_piece,
)
from train.data.chat_format import DATE, chat_format
from train.data.prompts import caption_turns, conversation_turns, encode, tokenize

CONVERSATIONS = [
    [("What is in the box?", "A red cat.")],
    [("How many?", "12 dogs"), ("Where\n\nare they?", "Äpfel, ﬁve 犬 and 🙂")],
    [('"Is it so?"', "(yes)"), ("- one\n- two:", "3.5!"), ("   indented", "I can't\nsay...")],
    [("É", "à la carte *"), ("<b>", "#7"), ("…", "¿no?"), ("x", "'tis")],
]
CAPTIONS = ["A man rides a wave.", "two dogs", "É", "犬", "12 red birds (small)"]

named = pytest.mark.parametrize("name", MAKERS)


def refuse(detail):
    return SettingsError(f"the template: {detail}")


def format_of(tokenizer):
    return chat_format(tokenizer, {tokenizer.eos_token_id}, refuse)


@pytest.fixture
def made(name, monkeypatch):
    """The tokenizer of a kind of chat model and its format, on the day that all runs have."""

    class Today(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return DATE

    monkeypatch.setattr(templates, "datetime", Today)
    templates._compile_jinja_template.cache_clear()
    yield chat_tokenizer(name), format_of(chat_tokenizer(name))
    templates._compile_jinja_template.cache_clear()


def own_rendering(tokenizer, contents):
    """The tokenizer's own tokens of a conversation that goes on with another question."""
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": text.strip()}
        for number, text in enumerate([*contents, "go on"])
    ]
    return tokenizer.apply_chat_template(messages, return_dict=False)


def tokens_of(text, prompt_format):
    return [*prompt_format.lead, *text.token_ids]


def targets_of(text):
    """The supervised tokens, turn by turn."""
    turns, inside = [], False
    for token_id, is_target in zip(text.token_ids, text.is_target, strict=True):
        if is_target:
            if not inside:
                turns.append([])
            turns[-1].append(token_id)
        inside = is_target
    return turns


@named
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_a_conversation_has_the_tokens_of_the_tokenizers_own_rendering(made, turns):
    tokenizer, prompt_format = made
    (text,) = tokenize([conversation_turns(turns)], prompt_format, 9999)
    found = tokens_of(text, prompt_format)
    wanted = own_rendering(tokenizer, [part for turn in turns for part in turn])
    assert wanted[: len(found)] == found
    rest = encode(["go on"], tokenizer)[0]
    assert len(wanted) > len(found)
    assert wanted[len(found) :][: len(prompt_format.turn)] == list(prompt_format.turn), rest


@named
@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_caption_answers_a_user_who_shows_the_picture_alone(made, caption):
    tokenizer, prompt_format = made
    (text,) = tokenize([caption_turns(caption)], prompt_format, 9999)
    found = tokens_of(text, prompt_format)
    assert own_rendering(tokenizer, ["", caption])[: len(found)] == found
    (prompt,) = prompt_format.prompts([None])
    assert text.token_ids[: len(prompt)] == prompt
    assert text.is_target == [False] * len(prompt) + [True] * (len(found) - len(prompt) - len(prompt_format.lead))


@named
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_prompts_are_the_first_tokens_of_the_trained_sequence(made, turns):
    _, prompt_format = made
    (text,) = tokenize([conversation_turns(turns)], prompt_format, 9999)
    for number, (question, _) in enumerate(turns):
        prompt = prompt_format.dialogue_prompt(turns[:number], question)
        assert text.token_ids[: len(prompt)] == prompt
        assert not any(text.is_target[len(prompt) - len(prompt_format.ask) : len(prompt)])
        assert text.is_target[len(prompt)]
    assert prompt_format.prompts([turns[0][0]]) == [prompt_format.dialogue_prompt([], turns[0][0])]


@named
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_answers_and_their_ends_are_learned_and_nothing_else(made, turns):
    tokenizer, prompt_format = made
    (text,) = tokenize([conversation_turns(turns)], prompt_format, 9999)
    targets = targets_of(text)
    assert len(targets) == len(turns)
    assert prompt_format.closing[-1] in prompt_format.end_ids
    for target, (_, answer) in zip(targets, turns, strict=True):
        closing = len(prompt_format.closing)
        assert tuple(target[-closing:]) == prompt_format.closing
        assert not set(target[:-closing]) & set(prompt_format.end_ids)
        shown = prompt_format.decode(target[:-closing])
        assert shown == unicodedata.normalize("NFC", answer)


@named
def test_the_lead_is_shared_by_all_conversations_and_holds_the_templates_bos(made):
    tokenizer, prompt_format = made
    for turns in CONVERSATIONS:
        whole = own_rendering(tokenizer, [part for turn in turns for part in turn])
        assert tuple(whole[: len(prompt_format.lead)]) == prompt_format.lead
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    starts_with_bos = tokenizer.bos_token and rendered.startswith(tokenizer.bos_token)
    assert (tokenizer.bos_token_id in prompt_format.lead) == bool(starts_with_bos)


ENDS = {
    "Qwen 2.5, SmolLM 2": ["<|im_end|>"],
    "ChatML with another EOS": ["<|endoftext|>", "<|im_end|>"],
    "ChatML whose tokens are not special": ["<|endoftext|>", "<|im_end|>"],
    "Llama 3": ["<|endoftext|>", "<|eot_id|>"],
    "Gemma": ["<end_of_turn>", "<eos>"],
    "Zephyr": ["</s>"],
    "Phi 3": ["</s>", "<|end|>"],
    "GLM 4": ["<|endoftext|>", "<|user|>"],
}


@pytest.mark.parametrize("name", ENDS)
def test_generation_ends_at_the_templates_end_of_a_turn_and_at_eos(made, name):
    tokenizer, prompt_format = made
    assert sorted(tokenizer.convert_ids_to_tokens(list(prompt_format.end_ids))) == ENDS[name]


def test_the_think_block_of_a_last_answer_is_not_learned():
    tokenizer = chat_tokenizer("Qwen 3")
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert "<think>" in tokenizer.apply_chat_template(messages, tokenize=False)
    (text,) = tokenize([conversation_turns([("x", "y")])], format_of(tokenizer), 99)
    assert "<think>" not in tokenizer.decode(text.token_ids)


@pytest.mark.parametrize("name", ["ChatML with another EOS", "ChatML whose tokens are not special"])
def test_a_special_token_spelled_out_in_a_text_is_text(made, name):
    tokenizer, prompt_format = made
    said = "<|im_end|>\n<|im_start|>system <|endoftext|>"
    (text,) = tokenize([conversation_turns([(said, said), (said, "y")])], prompt_format, 999)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (*IM, "<|endoftext|>")]
    assert [text.token_ids.count(token_id) for token_id in ends] == [3, 4, 0]
    assert said in tokenizer.decode(text.token_ids)
    (again,) = tokenizer(["<|im_end|>"], add_special_tokens=False)["input_ids"]
    assert len(again) == 1, "the tokenizer itself is as it was"


@named
def test_white_space_around_a_text_is_dropped(made, name):
    _, prompt_format = made
    texts = [conversation_turns([(f"{s}x y{s}", f"{s}z{s}")] * 2) for s in ("", " ", "\n", " \n\t ")]
    assert len({tuple(text.token_ids) for text in tokenize(texts, prompt_format, 999)}) == 1


@named
@pytest.mark.parametrize("odd", ["", "​x", "́x", "\x00", "x\x00", "﷽", "▁x▁", "\x1cx\u2028"])
def test_odd_texts_never_break_the_law_of_the_prompt(made, odd):
    _, prompt_format = made
    (text,) = tokenize([conversation_turns([(odd, odd), ("x", odd)])], prompt_format, 999)
    prompt = prompt_format.dialogue_prompt([(odd, odd)], "x")
    assert text.token_ids[: len(prompt)] == prompt
    assert text.token_ids[-1] == prompt_format.closing[-1]
    assert tuple(text.token_ids[-len(prompt_format.closing) :]) == prompt_format.closing


def test_a_text_that_merges_with_the_constant_tokens_is_tokenised_alone():
    """A byte-order mark and a line break: what Python's strip leaves and a template's regex joins."""
    tokenizer = chat_tokenizer("OLMo 2")
    prompt_format = format_of(tokenizer)
    slot = prompt_format.first_question
    assert slot.cut([1, 2, 3]) is None
    assert slot.cut([*slot.head, 7, *slot.tail]) == [7]
    assert slot.cut([*slot.head, *slot.tail[1:]]) is None
    altered = type(slot)(slot.before, slot.after, (1, 2, 3), slot.tail)
    assert prompt_format.encode_in_slots([(altered, " dogs "), (slot, "dogs")]) == [
        encode(["dogs"], tokenizer)[0],
        encode(["<|user|>\ndogs\n<|assistant|>\n"], tokenizer)[0][len(slot.head) : -len(slot.tail)],
    ]


# Dates and other things that are none of a conversation's


def test_the_date_of_a_template_is_the_same_on_every_day(monkeypatch):
    tokenizer = byte_level(
        LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), bos="<|begin|>"
    )

    class Someday(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2031, 1, 2)

    monkeypatch.setattr(templates, "datetime", Someday)
    templates._compile_jinja_template.cache_clear()
    prompt_format = format_of(tokenizer)
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(prompt_format.lead)
    templates._compile_jinja_template.cache_clear()


@pytest.mark.parametrize("wanted", ["%d %b %Y", "%Y-%m-%d", "%A, %d %B %Y", "%H:%M"])
def test_every_usual_format_of_a_date_is_written(wanted):
    template = "{{ strftime_now('" + wanted + "') }}" + CHATML
    prompt_format = format_of(byte_level(template, IM))
    assert prompt_format.tokenizer.decode(prompt_format.lead).startswith(DATE.strftime(wanted))


def test_a_template_that_begins_with_a_line_break_keeps_it():
    prompt_format = format_of(byte_level("\n" + CHATML, IM))
    assert prompt_format.wording.lead.startswith("\n<|im_start|>system")


# Templates that are refused

ROUNDS = """\
{% for message in messages %}{% if message['role'] == 'user' %}{{ '[Round ' ~ (loop.index0 // 2) ~ \
']\n' }}{% endif %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"""
REFUSED = {
    "it numbers the turns": (ROUNDS, "another way than a single one"),
    "no token ends an answer": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
        "no special token ends an answer",
    ),
    "question and answer are one text": (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>"
        "{% endif %}{% endfor %}",
        "nothing stands between question and answer",
    ),
    "only the last message is written": (
        "{{ '<|im_start|>' + messages[-1]['content'] + '<|im_end|>' }}",
        "another way",
    ),
    "texts are changed": (CHATML.replace("message['content']", "message['content'] | upper"), "changes"),
    "line breaks are changed": (
        CHATML.replace("message['content']", "message['content'].replace('\n', ' ')"), "changes"
    ),
    "a last user's text alone is written": (
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] + '<|im_end|>' }}"
        "{% endfor %}",
        "another way",
    ),
    "an empty text is refused": (
        "{% for m in messages if not m['content'] %}{{ raise_exception('empty content') }}"
        "{% endfor %}" + CHATML,
        "TemplateError: empty content",
    ),
    "it is no template": ("{% for", "TemplateSyntaxError"),
    "it calls what is not there": ("{{ nothing() }}", "nothing"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_template_whose_turns_cannot_be_told_apart_is_refused(what):
    template, reason = REFUSED[what]
    with pytest.raises(SettingsError, match=reason) as error:
        format_of(byte_level(template, IM))
    assert "\n" not in str(error.value)


def test_a_tokenizer_whose_answers_depend_on_the_question_is_refused():
    """It cuts a text after every fifth character, and no special token stands before an answer."""
    backend = byte_level(None, bos="<|endoftext|>").backend_tokenizer
    cut = [pre_tokenizers.FixedLength(5), pre_tokenizers.ByteLevel(False, use_regex=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(cut)
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    assert format_of(fast(backend, CHATML.replace("<|im_", "<|endoftext|><|im_"), **special))
    with pytest.raises(SettingsError, match="depend on the texts|the tokenizer writes|nothing stands"):
        format_of(fast(backend, OLMO_2, **special))


def test_templates_of_the_sweep_differ():
    found = {name: format_of(chat_tokenizer(name)).identity()["prompt"] for name in MAKERS}
    assert len(set(found.values())) == len(MAKERS) - 1, "two ChatML formats differ in EOS alone"
    assert {GEMMA, ZEPHYR} <= {chat_tokenizer(name).chat_template for name in MAKERS}
    assert sentence_piece(None).chat_template is None
