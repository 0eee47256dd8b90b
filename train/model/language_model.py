"""The language model: loads it, quantises it, freezes it, and adds LoRA.

Its weights never change; stage 2 learns LoRA matrices beside them. It stays in `eval()` in both
stages, because Phi-2's config has a dropout of 0.1 that would make a frozen model random.
"""

import ctypes
import functools
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from cache.errors import SettingsError
from cache.files.foreign import reading_foreign_file
from train.model.adapter_files import ADAPTER_WEIGHTS, check_adapter, read_lora_settings
from train.model.adapter_files import refusal as adapter_refusal
from train.model.model_files import (
    TOKENIZER,
    build_empty,
    check_tokenizer_files,
    holding_back_stderr,
    locate,
    refusal,
)
from train.settings import LlmSettings, LoraSettings
from workspace.errors import StageError

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
"""Every linear layer of a Phi block; not the embeddings, not lm_head."""

PROBE = "Instruct: What is in\tthe box?\nOutput: 12 Äpfel, ﬁve 犬 and 🙂."
"""Words, digits, punctuation, white space, and characters of one to four bytes."""

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Parameters' numbers in glibc's malloc.h."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_tokenizer(settings: LlmSettings) -> PreTrainedTokenizerBase:
    """Load the language model's tokenizer.

    Raises:
        SettingsError: None there, one without an EOS token, or one that is Python code and so has
            no serialised form to be recognised by.
    """
    folder = check_tokenizer_files(settings.model)
    # The tokenizers library announces a panic on stderr before it is an exception.
    with reading_foreign_file(refusal(settings.model, TOKENIZER), folder), holding_back_stderr():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        # What is wrong in its parts may show in their use only.
        tokenizer.decode(tokenizer(PROBE)["input_ids"])
        tokenizer(PROBE, add_special_tokens=False, split_special_tokens=True)
    if tokenizer.eos_token_id is None:
        raise SettingsError(f"llm.model: the tokenizer of {settings.model} has no EOS token.")
    if not tokenizer.is_fast:
        raise SettingsError(
            f"llm.model: {settings.model}: wanted a tokenizer of the tokenizers library, with a "
            f"tokenizer.json, found {type(tokenizer).__name__}."
        )
    return tokenizer


def check_supported(settings: LlmSettings) -> None:
    """Refuse a language model whose blocks LoRA would not cover whole; loads no weights.

    For both stages. PEFT is content when some of the layers match; and stage 1 computes the loss
    as Phi does, which is another one for models that scale their logits, or look back over a
    window only.

    Raises:
        SettingsError: Names the layers, or says what is wrong with the model's files.
    """
    empty = build_empty(settings.model)
    ends = (empty.get_input_embeddings(), empty.get_output_embeddings())
    outside = {id(module.weight) for module in ends if module is not None}
    matrices = [
        name.rpartition(".")[0]
        for name, parameter in empty.named_parameters()
        if parameter.ndim > 1 and id(parameter) not in outside
    ]
    kinds = [name.rpartition(".")[2] for name in matrices]
    uncovered = sorted({kind for kind in kinds if kind not in LORA_TARGETS})
    if uncovered or not kinds:
        covered = sum(kind in LORA_TARGETS for kind in kinds)
        raise SettingsError(
            f"llm.model: {settings.model} is a {type(empty).__name__}: LoRA would stand beside "
            f"{covered} of its {len(kinds)} layers of weights, not beside {', '.join(uncovered)}. "
            f"Take a Phi model, like microsoft/phi-2."
        )


def load_language_model(settings: LlmSettings, device: torch.device) -> PreTrainedModel:
    """Load the language model frozen, in `eval()`, quantised where the settings say so.

    On a CPU the same checkpoint gives the same bits for any number of threads.

    Raises:
        SettingsError: No such model, not in the layout of a causal language model, or not whole.
    """
    quantization = None
    if settings.quantize == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[settings.dtype],
        )
    transformers_logging.disable_progress_bar()
    build_empty(settings.model)
    with reading_foreign_file(refusal(settings.model)):
        model: PreTrainedModel
        with _quantising_on_cpu() if quantization and device.type == "cpu" else nullcontext():
            model, loading = AutoModelForCausalLM.from_pretrained(
                locate(settings.model),
                dtype=DTYPES[settings.dtype],
                quantization_config=quantization,
                device_map={"": device},
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        if loading["missing_keys"]:
            # Transformers would go on with random numbers in their place.
            raise ValueError(f"its files lack {', '.join(sorted(loading['missing_keys']))}")
    # Adapters name the model that they belong to: by a hub id, not by a folder of its cache.
    model.name_or_path = model.config.name_or_path = settings.model
    # What the checkpoint recommends (sampling, penalties, beams) would mix into greedy decoding.
    model.generation_config = GenerationConfig()
    _keep_trainable_layout(model)
    return model.requires_grad_(False).eval()


@contextmanager
def _quantising_on_cpu() -> Iterator[None]:
    """Quantise with one thread, and hand every large block back to the system when it is freed.

    The mean that double quantisation subtracts depends on the number of threads in its last bits.
    And glibc would keep freed blocks of up to 32 MiB on its heap, between those that stay in use:
    up to twice the size of the model, never to be used again.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _set_malloc(MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        # Where glibc's own adjusting ends, which the first call has turned off.
        _set_malloc(MMAP_THRESHOLD, 2**25)
        _set_malloc(TRIM_THRESHOLD, 2**26)
        torch.set_num_threads(threads)


def _set_malloc(parameter: int, value: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(parameter, value)


def _keep_trainable_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights on the CPU.

    Where the CPU has AVX512-BF16, the first pass without gradients would repack an NF4 layer for
    inference, for good; no gradient goes through it from then on.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def add_lora(model: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    """Put fresh LoRA matrices beside every linear layer of the blocks; they alone learn.

    The layers of `model` itself are replaced; what is returned serves to save them.

    Raises:
        StageError: The model has none of the layers, so it is no Phi.
    """
    config = _lora_config(settings)
    with torch.random.fork_rng(), warnings.catch_warnings():
        # PEFT 0.21 reads a property that transformers 5 has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        try:
            peft_model: PeftModel = get_peft_model(model, config)
        except ValueError as error:
            raise StageError(f"llm.model: cannot take LoRA on {LORA_TARGETS}: {error}") from None
    return peft_model


def _lora_config(settings: LoraSettings) -> LoraConfig:
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(LORA_TARGETS),
        task_type="CAUSAL_LM",
    )


def load_lora(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put trained LoRA matrices into the layers of `model`, from a folder in PEFT's format.

    What is returned serves to turn them off for a while, or to merge them.

    Raises:
        StageError: No adapter there, or one of another model.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        # PEFT would go on to a pickled file, or to the network.
        raise StageError(f"{folder}: holds no {ADAPTER_WEIGHTS}. Run the finetune stage.")
    config = _lora_config(read_lora_settings(folder))
    check_adapter(folder, config, model)
    refuse = functools.partial(adapter_refusal, folder)
    with reading_foreign_file(refuse, folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        peft_model: PeftModel = PeftModel.from_pretrained(
            model, folder, config=config, is_trainable=False
        )
    return peft_model


def lora_dropouts(model: nn.Module) -> list[nn.Module]:
    """Return the dropout modules of LoRA: the only ones that run while training."""
    return [module for name, module in model.named_modules() if name.endswith("lora_dropout")]
