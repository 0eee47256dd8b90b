"""Checks a model before its first optimizer step: faults that no loss would show.

Each of them has happened somewhere: a head without its bias, LoRA on the wrong layers, embeddings
resized, half precision that overflows, a frozen model with dropout.

Letters: S supervised tokens, C of them at a time, H width, V vocabulary.
"""

from collections.abc import Iterable

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.loop.step import StepData
from train.model.captioner import CaptionModel
from train.model.language_model import DTYPES, LORA_TARGETS
from train.model.loss import CHUNK
from train.model.model_files import read_config
from train.settings import LlmSettings
from workspace.errors import StageError

VERSIONS = "Install the libraries of requirements.lock"

NAMED = 3
"""How many layers an error names."""


def check_model(
    model: CaptionModel, tokenizer: PreTrainedTokenizerBase, llm: LlmSettings, *, lora: bool
) -> None:
    """Refuse a model that is not what settings and checkpoint say; leaves it in `eval()`.

    Args:
        model: Whole, as it will be trained.
        tokenizer: Of the language model.
        llm: What it was loaded with.
        lora: Whether every linear layer of the blocks must carry LoRA, or none.

    Raises:
        StageError: Names what was checked, wanted and found.
    """
    language_model = model.language_model
    _check_vocabulary(language_model, tokenizer, llm)
    if language_model.config.model_type == "phi":
        _check_head(language_model)
        _check_layers(language_model, llm, lora)
    quantised = [m for m in language_model.modules() if isinstance(m, Linear4bit)]
    dtypes = {language_model.dtype, *(layer.compute_dtype for layer in quantised)}
    _check(dtypes == {DTYPES[llm.dtype]}, "what layers compute in", llm.dtype, dtypes)
    parameters = dict(language_model.named_parameters())
    wanted = {name for name in parameters if lora and "lora_" in name}
    learning = {name for name, parameter in parameters.items() if parameter.requires_grad}
    _check_names("tensors of the language model that learn", wanted, learning)
    model.train()
    named = language_model.named_modules()
    training = {name for name, module in named if module.training and "lora_dropout" not in name}
    model.eval()
    _check_names("frozen layers that are not in eval() while training", set(), training)


def check_first_logits(model: CaptionModel, data: StepData) -> None:
    """Refuse a model whose logits of a step's first pass are not finite; leaves it in `eval()`.

    Raises:
        StageError: How many of them are not.
    """
    model.eval()
    wrong = 0
    with torch.inference_mode():
        for batch in data.batches[:1]:
            hidden_SH = model.hidden(batch.to(model.device))
            for start in range(0, len(hidden_SH), CHUNK):
                logits_CV = model.language_model.lm_head(hidden_SH[start : start + CHUNK])
                wrong += int((~logits_CV.isfinite()).sum())
    advice = "Check the features with FeatureStore.verify(); if they are right, set llm.dtype: fp32"
    what = "logits of the first forward pass that are not finite"
    _check(wrong == 0, what, 0, wrong, advice)


def _check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, llm: LlmSettings
) -> None:
    rows = model.get_input_embeddings().weight.shape[0], model.lm_head.weight.shape[0]
    wanted = read_config(llm.model).vocab_size
    _check(rows == (wanted, wanted), "rows of embeddings and lm_head", wanted, rows)
    advice = f"Put model and tokenizer of one checkpoint into {llm.model}"
    entries = len(tokenizer)
    _check(entries <= wanted, "entries of the tokenizer", f"at most {wanted}", entries, advice)
    # A damaged one may give any id to an entry.
    highest = max(tokenizer.get_vocab().values())
    _check(highest < wanted, "ids of the tokenizer", f"below {wanted}", highest, advice)


def _check_head(model: PreTrainedModel) -> None:
    # Transformers 4.48.0 built the head without a bias, and only said that a tensor was left over.
    _check(model.lm_head.bias is not None, "lm_head.bias", "the checkpoint's", "none")


def _check_layers(model: PreTrainedModel, llm: LlmSettings, lora: bool) -> None:
    modules = dict(model.named_modules())
    linear = {name for name in modules if name.endswith(LORA_TARGETS)}
    wanted = len(LORA_TARGETS) * model.config.num_hidden_layers
    _check(len(linear) == wanted, "linear layers of the blocks", wanted, len(linear))
    carrying = {name for name, module in modules.items() if isinstance(module, LoraLayer)}
    _check_names("layers with LoRA", linear if lora else set(), carrying)
    quantised = {n.removesuffix(".base_layer") for n, m in modules.items() if type(m) is Linear4bit}
    _check_names("layers in NF4", linear if llm.quantize == "nf4" else set(), quantised)


def _check_names(what: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    wanted, found = set(wanted), set(found)
    names = sorted(wanted ^ found)
    differing = ", ".join(names[:NAMED]) + ", ..." * (len(names) > NAMED)
    _check(not names, what, len(wanted), f"{len(found)}, which differ in {differing}")


def _check(holds: bool, what: str, wanted: object, found: object, advice: str = VERSIONS) -> None:
    if not holds:
        raise StageError(
            f"before the first step: {what}: wanted {wanted}, found {found}. {advice}."
        )
