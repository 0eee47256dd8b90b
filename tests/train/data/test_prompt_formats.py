import json
from types import SimpleNamespace

import pytest

from cache.errors import SettingsError
from tests.train.data.chat_tokenizers import IM, byte_level, chat_tokenizer, sentence_piece
from train.data.prompt_formats import phi_format, plain_format, prompt_format
from train.data.prompts import caption_turns, conversation_turns, encode, tokenize
from train.settings import LlmSettings

PHI, LLAMA = SimpleNamespace(model_type="phi"), SimpleNamespace(model_type="llama")
TURNS = [("What is it?", "12 dogs"), ("É\n\nand", "(yes)"), ("x", '"z"')]
PLAIN = {
    "byte level": lambda: byte_level(None),
    "byte level with BOS": lambda: byte_level(None, bos="<|begin|>"),
    "SentencePiece": lambda: sentence_piece(None),
    "SentencePiece, the old way": lambda: sentence_piece(None, scheme="always"),
    "no mark at the start": lambda: sentence_piece(None, scheme="never"),
}


@pytest.fixture
def settings(tmp_path):
    """Name a folder with a generation_config.json of some end tokens."""

    def make(prompt="auto", **generation_config):
        if generation_config:
            text = json.dumps(generation_config)
            (tmp_path / "generation_config.json").write_text(text)
        return LlmSettings(model=str(tmp_path), quantize="none", dtype="fp32", prompt=prompt)

    return make


@pytest.mark.parametrize("config", [PHI, LLAMA])
def test_auto_is_the_chat_template_if_there_is_one(settings, config):
    tokenizer = chat_tokenizer("Qwen 3")
    assert prompt_format(settings(), tokenizer, config).name == "chat"
    assert prompt_format(settings("chat"), tokenizer, config).name == "chat"
    assert prompt_format(settings("phi"), tokenizer, config) == phi_format(tokenizer)
    assert prompt_format(settings("plain"), tokenizer, config) == plain_format(tokenizer)


def test_auto_without_a_template_is_phis_for_phi_and_plain_for_others(settings):
    tokenizer = byte_level(None)
    assert prompt_format(settings(), tokenizer, PHI) == phi_format(tokenizer)
    assert prompt_format(settings(), tokenizer, LLAMA) == plain_format(tokenizer)


def test_a_chat_format_without_a_template_is_refused(settings):
    with pytest.raises(SettingsError, match=r"llm\.prompt is chat, .* no chat template"):
        prompt_format(settings("chat"), byte_level(None), LLAMA)


def test_a_template_that_cannot_be_used_is_refused_with_what_to_do(settings):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for prompt in ("auto", "chat"):
        with pytest.raises(
            SettingsError, match=r"^llm\.prompt: the chat template of .* Set llm\.prompt: plain\.$"
        ):
            prompt_format(settings(prompt), byte_level(template, IM), LLAMA)
    assert prompt_format(settings("plain"), byte_level(template, IM), LLAMA).name == "plain"


@pytest.mark.parametrize("prompt", ["phi", "plain", "chat"])
def test_generation_ends_at_all_ends_of_the_checkpoint(settings, prompt):
    tokenizer = chat_tokenizer("ChatML with another EOS")
    own = {tokenizer.eos_token_id}
    if prompt == "chat":
        own.add(tokenizer.convert_tokens_to_ids("<|im_end|>"))

    def ends(eos):
        made = prompt_format(settings(prompt, eos_token_id=eos), tokenizer, LLAMA)
        return made.end_ids

    assert ends(None) == ends([]) == ends(tokenizer.eos_token_id) == tuple(sorted(own))
    assert ends(5) == tuple(sorted(own | {5}))
    assert ends([7, 5, 7]) == tuple(sorted(own | {5, 7}))
    assert ends(10**6) == tuple(sorted(own)), "an id without a token is never generated"


@pytest.mark.parametrize("eos", ["</s>", [1, "x"], 1.5, True, {"a": 1}])
def test_end_tokens_that_are_no_ids_are_refused(settings, eos):
    with pytest.raises(SettingsError, match=r"generation_config\.json: eos_token_id is .*wanted"):
        prompt_format(settings("plain", eos_token_id=eos), byte_level(None), LLAMA)


# Phi-2's


def test_phis_format_has_no_lead_and_no_entry_in_a_runs_identity():
    made = phi_format(byte_level(None, bos="<|begin|>"))
    assert (made.lead, made.ask, made.turn, made.identity()) == ((), (), (), {})


def test_every_other_format_has_an_entry_that_depends_on_its_constants(settings):
    def identity(tokenizer, prompt="auto"):
        return prompt_format(settings(prompt), tokenizer, LLAMA).identity()["prompt"]

    found = [
        identity(byte_level(None)),
        identity(byte_level(None, bos="<|begin|>")),
        identity(chat_tokenizer("Qwen 3")),
        identity(chat_tokenizer("Qwen 2.5, SmolLM 2")),
        identity(chat_tokenizer("GLM 4")),
    ]
    assert len(set(found)) == len(found)
    assert [entry.split()[0] for entry in found] == ["plain"] * 2 + ["chat"] * 3
    assert identity(byte_level(None)) == found[0]
    assert identity(chat_tokenizer("GLM 4"), "plain") == found[0]


# Plain


@pytest.fixture(params=PLAIN)
def tokenizer(request):
    return PLAIN[request.param]()


def test_the_plain_format_is_question_and_answer_as_one_text(tokenizer):
    """As if each turn were one text: an answer's first word has the space in its token."""
    (text,) = tokenize([conversation_turns(TURNS)], plain_format(tokenizer), 999)
    wanted = []
    for question, answer in TURNS:
        (ids,) = encode([f"Question: {question}\nAnswer: {answer}"], tokenizer)
        wanted += [*ids, tokenizer.eos_token_id]
    assert text.token_ids == wanted


def test_plain_prompts_are_the_first_tokens_of_the_trained_sequence(tokenizer):
    made = plain_format(tokenizer)
    (text,) = tokenize([conversation_turns(TURNS)], made, 999)
    for number, (question, _) in enumerate(TURNS):
        prompt = made.dialogue_prompt(TURNS[:number], question)
        assert text.token_ids[: len(prompt)] == prompt
        assert not text.is_target[len(prompt) - 1]
        assert text.is_target[len(prompt)]


def test_a_plain_caption_stands_straight_behind_the_patches(tokenizer):
    made = plain_format(tokenizer)
    (text,) = tokenize([caption_turns("A red cat.")], made, 999)
    assert text.token_ids == [*encode(["A red cat."], tokenizer)[0], tokenizer.eos_token_id]
    assert all(text.is_target)
    assert made.prompts([None]) == [[]]


def test_bos_is_the_lead_if_the_tokenizer_puts_it_before_a_text(tokenizer):
    whole, bare = tokenizer("a")["input_ids"], encode(["a"], tokenizer)[0]
    lead = plain_format(tokenizer).lead
    assert [*lead, *bare] == whole
    assert lead in ((), (tokenizer.bos_token_id,))


def test_tokens_around_a_text_that_change_it_are_no_lead():
    class Odd:
        """A tokenizer whose special tokens change the text's own."""

        def __call__(self, text, add_special_tokens=True, split_special_tokens=False):
            return {"input_ids": [1, 2] if isinstance(text, str) else [[3] for _ in text]}

        eos_token_id, eos_token = 0, ""

        def convert_ids_to_tokens(self, ids):
            return [str(token_id) for token_id in ids]

    assert plain_format(Odd()).lead == ()
