"""Checks before the first optimizer step, for faults that no loss would show."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from cache.errors import SettingsError
from train.data.prompt_formats import prompt_format
from train.data.prompts import PromptFormat
from train.loop.step import StepData
from train.model.captioner import CaptionModel
from train.model.fingerprint import language_model_identity
from train.model.language_model import load_tokenizer
from train.model.model_files import read_config
from train.model.supported import check_supported
from train.settings import LlmSettings
from workspace.errors import StageError


@dataclass(frozen=True)
class CheckedModel:
    """A language model whose files can be trained with; its weights are not loaded."""

    prompt_format: PromptFormat
    identity: dict[str, str]
    """Hashes of its files, and of the prompt format."""
    width: int
    """H, of its embeddings."""
    max_positions: int | None
    """Most positions of a text, those of its picture included; None without a limit."""

    def check_positions(self, image_tokens: int, max_text_tokens: int) -> None:
        """Refuse texts that may be longer than the model permits.

        Raises:
            SettingsError: Names the limit and what exceeds it.
        """
        given = len(self.prompt_format.lead) + image_tokens
        check_positions(self.identity["name"], self.max_positions, given, max_text_tokens)


def check_positions(model: str, limit: int | None, given: int, max_text_tokens: int) -> None:
    """Refuse texts that may be longer than a language model permits.

    Args:
        model: Its name.
        limit: Most positions of a text, those of its picture included; None without a limit.
        given: Positions before the text: the lead's and the picture's.
        max_text_tokens: Longest text.

    Raises:
        SettingsError: Names the limit and what exceeds it.
    """
    longest = given + max_text_tokens
    if limit is not None and longest > limit:
        raise SettingsError(
            f"llm.model: {model} has {limit} positions, and a picture with a text of "
            f"max_text_tokens takes up to {longest}. Lower max_text_tokens."
        )


def check_language_model(llm: LlmSettings) -> CheckedModel:
    """Check a language model's files, and a small copy of it with random weights.

    Raises:
        PatchcacheError: Says what is wrong with its config, weights, tokenizer or chat template.
    """
    max_positions = check_supported(llm)
    tokenizer = load_tokenizer(llm)
    check_vocabulary(tokenizer, llm)
    config = read_config(llm.model)
    prompts = prompt_format(llm, tokenizer, config)
    identity = language_model_identity(llm, tokenizer) | prompts.identity()
    return CheckedModel(prompts, identity, config.hidden_size, max_positions)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, llm: LlmSettings) -> None:
    """Refuse a tokenizer with ids beyond the language model's embeddings.

    Raises:
        StageError: Names the limit and the number found.
    """
    rows = read_config(llm.model).vocab_size
    advice = f"Put model and tokenizer of one checkpoint into {llm.model}"
    entries = len(tokenizer)
    _check(entries <= rows, "entries of the tokenizer", f"at most {rows}", entries, advice)
    # A damaged tokenizer may give any id to an entry.
    highest = max(tokenizer.get_vocab().values())
    _check(highest < rows, "ids of the tokenizer", f"below {rows}", highest, advice)


def check_first_logits(model: CaptionModel, data: StepData) -> None:
    """Refuse a model whose first forward pass has logits that are not finite.

    The model is left in `eval()`.

    Raises:
        StageError: Says how many logits are not finite.
    """
    wrong = 0

    def count(head: nn.Module, inputs: tuple[Tensor], logits_CV: Tensor) -> None:
        nonlocal wrong
        wrong += int((~logits_CV.isfinite()).sum())

    model.eval()
    head = model.language_model.get_output_embeddings()
    with head.register_forward_hook(count), torch.inference_mode():
        for batch in data.batches[:1]:
            model(batch.to(model.device))
    advice = "Check the features with FeatureStore.verify(); if they are right, set llm.dtype: fp32"
    what = "logits of the first forward pass that are not finite"
    _check(wrong == 0, what, 0, wrong, advice)


def _check(holds: bool, what: str, wanted: object, found: object, advice: str) -> None:
    if not holds:
        raise StageError(
            f"before the first step: {what}: wanted {wanted}, found {found}. {advice}."
        )
