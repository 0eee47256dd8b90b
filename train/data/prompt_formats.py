"""Chooses the prompt format of a language model: Phi-2's, the tokenizer's chat template, or plain."""

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from cache.errors import SettingsError
from train.data.chat_format import chat_format
from train.data.prompts import PromptFormat, Slot, Wording, encode
from train.model.model_files import generation_end_ids
from train.settings import LlmSettings


def prompt_format(
    settings: LlmSettings, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> PromptFormat:
    """Return the prompt format that the settings ask for.

    Args:
        settings: Name the language model and the format.
        tokenizer: Of the model.
        config: Of the model.

    Raises:
        SettingsError: No chat template, or one that cannot be used; or the checkpoint's end tokens
            are damaged.
    """
    name = settings.prompt
    if name == "auto" and tokenizer.chat_template:
        name = "chat"
    elif name == "auto":
        name = "phi" if config.model_type == "phi" else "plain"
    end_ids = generation_end_ids(settings.model) & set(tokenizer.get_vocab().values())
    if name == "phi":
        return phi_format(tokenizer, end_ids)
    if name == "plain":
        return plain_format(tokenizer, end_ids)
    if not tokenizer.chat_template:
        raise SettingsError(
            f"llm.prompt is chat, but the tokenizer of {settings.model} has no chat template. Set "
            f"llm.prompt: plain, or leave it out."
        )

    def refuse(detail: str) -> SettingsError:
        return SettingsError(
            f"llm.prompt: the chat template of {settings.model} cannot be used: {detail}. Set "
            f"llm.prompt: plain."
        )

    return chat_format(tokenizer, end_ids | {tokenizer.eos_token_id}, refuse)


def phi_format(
    tokenizer: PreTrainedTokenizerBase, end_ids: set[int] | frozenset[int] = frozenset()
) -> PromptFormat:
    """Return Phi-2's question-answer format; a caption stands straight behind the patches.

    Args:
        tokenizer: Of the language model.
        end_ids: Tokens at which generation stops, beside EOS.

    Source: the model card of microsoft/phi-2, "QA Format".
    """
    return PromptFormat(
        name="phi",
        tokenizer=tokenizer,
        encoder=tokenizer,
        lead=(),
        first_question=Slot("Instruct: ", "\nOutput:"),
        later_question=Slot("Instruct: ", "\nOutput:"),
        answer=Slot(" "),
        caption=(Slot(), Slot()),
        ask=(),
        closing=(tokenizer.eos_token_id,),
        turn=(),
        end_ids=tuple(sorted({tokenizer.eos_token_id, *end_ids})),
        strips=False,
        wording=Wording("", "Instruct: ", "Instruct: ", "\nOutput:", " ", tokenizer.eos_token),
    )


def plain_format(
    tokenizer: PreTrainedTokenizerBase, end_ids: set[int] | frozenset[int] = frozenset()
) -> PromptFormat:
    """Return the format for a language model that has none of its own.

    The lead is the BOS that the tokenizer puts before a text, if it does.

    Args:
        tokenizer: Of the language model.
        end_ids: Tokens at which generation stops, beside EOS.
    """
    asked = "\nAnswer:"
    (head,) = encode([asked], tokenizer)
    lead = _tokens_before_text(tokenizer)
    # Behind an image token, SentencePiece marks the start of a word at a space alone.
    plain, spaced = encode(["Question: ", " Question: "], tokenizer)
    question = " Question: " if plain == spaced else "Question: "
    return PromptFormat(
        name="plain",
        tokenizer=tokenizer,
        encoder=tokenizer,
        lead=lead,
        first_question=Slot("Question: ", asked),
        later_question=Slot("Question: ", asked),
        # The space belongs to the answer: it is part of the first word's token.
        answer=Slot(f"{asked} ", head=tuple(head)),
        caption=(Slot(), Slot()),
        ask=(),
        closing=(tokenizer.eos_token_id,),
        turn=(),
        end_ids=tuple(sorted({tokenizer.eos_token_id, *end_ids})),
        strips=True,
        wording=Wording(
            "".join(tokenizer.convert_ids_to_tokens(list(lead))),
            question, question, asked, " ", tokenizer.eos_token,
        ),  # fmt: skip
    )


def _tokens_before_text(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that the tokenizer puts before every text: BOS, or nothing."""
    alone, (text,) = tokenizer("a")["input_ids"], encode(["a"], tokenizer)
    for start in range(len(alone) - len(text) + 1):
        if alone[start : start + len(text)] == text:
            return tuple(alone[:start])
    return ()
