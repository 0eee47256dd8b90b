"""Checks before the first optimizer step, for faults that no loss would show."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from train.loop.step import StepData
from train.model.captioner import CaptionModel
from train.model.model_files import read_config
from train.settings import LlmSettings
from workspace.errors import StageError


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
