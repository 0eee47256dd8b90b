"""The chat template of an export gives the sequences of training."""

import copy

import pytest

from tests.train.data.chat_tokenizers import MAKERS, chat_tokenizer, sentence_piece
from train.data.chat_format import chat_format
from train.data.jinja_template import jinja_template
from train.data.prompt_formats import phi_format, plain_format

IMAGE = "<image>"
DIALOGUES = [
    ([], "What is in the box?"),
    ([("What is it?", "A red cat.")], "how many"),
    ([("Äpfel", "犬 🙂"), ('"a"\n\nb\\', "{{ x }} {% y %}")], "12?"),
]
OLD_WAY = "TinyLlama, the old way of SentencePiece"
"""Its words begin anew behind every special token, the image token included."""

FORMATS = {
    **{
        name: lambda name=name: chat_format(chat_tokenizer(name), {0}, AssertionError)
        for name in MAKERS
        if name != OLD_WAY
    },
    "phi": lambda: phi_format(chat_tokenizer("GLM 4")),
    "plain": lambda: plain_format(chat_tokenizer("OLMo 2")),
    **{
        f"plain, SentencePiece, {scheme}": lambda scheme=scheme: plain_format(
            sentence_piece(None, scheme=scheme)
        )
        for scheme in ("first", "always", "never")
    },
}


def with_image_token(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE]})
    return tokenizer, tokenizer.convert_tokens_to_ids(IMAGE)


def rendering(prompt_format, turns, question, **options):
    """Transformers' own tokens of a conversation about a picture, and the image token."""
    tokenizer, image_id = with_image_token(prompt_format.tokenizer)
    texts = [text for turn in turns for text in turn] + [question]
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(texts)
    ]
    text = [{"type": "text", "text": texts[0]}] if texts[0] else []
    messages[0]["content"] = [{"type": "image"}, *text]
    ids = tokenizer.apply_chat_template(
        messages,
        chat_template=jinja_template(prompt_format, IMAGE),
        return_dict=False,
        **options,
    )
    return ids, image_id


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("turns", "question"), DIALOGUES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_a_conversation_has_the_tokens_of_training(name, turns, question, add_generation_prompt):
    prompt_format = FORMATS[name]()
    found, image_id = rendering(
        prompt_format, turns, question, add_generation_prompt=add_generation_prompt
    )
    prompt = prompt_format.dialogue_prompt(turns, question)
    assert found == [*prompt_format.lead, image_id, *prompt]


@pytest.mark.parametrize("name", [name for name in FORMATS if name in MAKERS])
def test_a_picture_without_a_text_asks_for_a_caption_as_in_training(name):
    prompt_format = FORMATS[name]()
    found, image_id = rendering(prompt_format, [], "")
    assert found == [*prompt_format.lead, image_id, *prompt_format.prompts([None])[0]]


@pytest.mark.parametrize("name", FORMATS)
def test_outer_white_space_is_treated_as_in_training(name):
    prompt_format = FORMATS[name]()
    found, image_id = rendering(prompt_format, [(" a ", "\nb")], " c\n")
    prompt = prompt_format.dialogue_prompt([(" a ", "\nb")], " c\n")
    if name != "phi":
        assert found == [*prompt_format.lead, image_id, *prompt]


def test_where_words_begin_anew_behind_the_image_token_the_tokens_differ():
    """The one limit of the template: an export has to compare, and refuse."""
    prompt_format = chat_format(chat_tokenizer(OLD_WAY), {0}, AssertionError)
    found, image_id = rendering(prompt_format, [], "What is it?")
    assert found[: len(prompt_format.lead) + 1] == [*prompt_format.lead, image_id]
    assert found[len(prompt_format.lead) + 1 :] != prompt_format.dialogue_prompt([], "What is it?")


def test_a_role_that_training_never_had_is_refused():
    tokenizer = chat_tokenizer("Qwen 3")
    template = jinja_template(chat_format(tokenizer, {0}, AssertionError), IMAGE)
    with pytest.raises(Exception, match="role user or assistant, found system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], chat_template=template)
