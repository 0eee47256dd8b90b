"""The language model: loads it, quantises it, freezes it, and adds LoRA.

Its weights never change; stage 2 trains LoRA matrices beside them. It stays in `eval()` in both
stages: Phi-2's config has a dropout of 0.1, which would make a frozen model random.
"""

import ctypes
import functools
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from cache.errors import SettingsError
from cache.files.foreign import reading_foreign_file
from train.model.adapter_files import ADAPTER_WEIGHTS, check_adapter, read_lora_settings
from train.model.adapter_files import refusal as adapter_refusal
from train.model.decoder import linear_names
from train.model.model_files import (
    TOKENIZER,
    build_empty,
    check_tokenizer_files,
    locate,
    refusal,
)
from train.settings import LlmSettings, LoraSettings
from workspace.checkpoint_files import holding_back_stderr
from workspace.errors import StageError

PROBE = "Instruct: What is in\tthe box?\nOutput: 12 Äpfel, ﬁve 犬 and 🙂."
"""Words, digits, punctuation, white space, and characters of one to four bytes."""

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Parameter numbers of mallopt in glibc's malloc.h."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_tokenizer(settings: LlmSettings) -> PreTrainedTokenizerBase:
    """Load the language model's tokenizer.

    Raises:
        SettingsError: No tokenizer, no EOS token, or a tokenizer in Python, which has no serialised
            form to hash.
    """
    folder = check_tokenizer_files(settings.model)
    # The tokenizers library prints a panic to stderr before it raises.
    with reading_foreign_file(refusal(settings.model, TOKENIZER), folder), holding_back_stderr():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        # Some faults show only in use.
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


def load_language_model(settings: LlmSettings, device: torch.device) -> PreTrainedModel:
    """Load the language model: frozen, in `eval()`, quantised if the settings say so.

    On a CPU, a checkpoint gives the same bits with any number of threads. A GPU that only emulates
    bf16 is named on stderr.

    Raises:
        SettingsError: No such model, no causal language model, or incomplete weights.
    """
    if settings.dtype == "bf16" and device.type == "cuda":
        _warn_of_emulated_bf16()
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
                # Every model has it; `CaptionModel` replaces it.
                attn_implementation="eager",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        if loading["missing_keys"]:
            # Transformers would fill them with random numbers.
            raise ValueError(f"its files lack {', '.join(sorted(loading['missing_keys']))}")
    # The name that adapters record: a hub id, not a folder of the hub's cache.
    model.name_or_path = model.config.name_or_path = settings.model
    # The checkpoint's own (sampling, penalties, beams) would mix into greedy decoding.
    model.generation_config = GenerationConfig()
    _keep_trainable_layout(model)
    return model.requires_grad_(False).eval()


def _warn_of_emulated_bf16() -> None:
    """Say that bf16 is slow on an old GPU.

    Not an error: a run that was trained in bf16 can be evaluated there in its own dtype.
    """
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        print(
            f"llm.dtype: {torch.cuda.get_device_name()} has no bf16 and emulates it slowly: train "
            f"with llm.dtype: fp16 here",
            file=sys.stderr,
        )


@contextmanager
def _quantising_on_cpu() -> Iterator[None]:
    """Quantise with one thread, and return every large freed block to the system.

    The last bits of the mean that double quantisation subtracts depend on the number of threads.
    And glibc would keep freed blocks of up to 32 MiB on its fragmented heap: up to twice the size
    of the model.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _set_malloc(MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        # The upper limits of glibc's own adjustment, which the first call turned off.
        _set_malloc(MMAP_THRESHOLD, 2**25)
        _set_malloc(TRIM_THRESHOLD, 2**26)
        torch.set_num_threads(threads)


def _set_malloc(parameter: int, value: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(parameter, value)


def _keep_trainable_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights on the CPU.

    On a CPU with AVX512-BF16, the first pass without gradients would repack an NF4 layer for
    inference permanently, and no gradient would pass through it again.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def add_lora(model: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    """Add fresh, trainable LoRA matrices to every linear layer of the blocks of `model`, in place.

    Returns:
        PEFT's wrapper, which can save the matrices.
    """
    config = _lora_config(settings, model)
    with torch.random.fork_rng(), warnings.catch_warnings():
        # PEFT 0.21 reads a property that transformers 5 has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        peft_model: PeftModel = get_peft_model(model, config)
    if model.device.type == "cuda":
        compute_lora_in_input_dtype(peft_model)
    return peft_model


def _lora_config(settings: LoraSettings, model: PreTrainedModel) -> LoraConfig:
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=sorted(linear_names(model)),
        # GPT-2's linear layers hold their weights transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )


def load_lora(
    model: PreTrainedModel, folder: Path, others: Mapping[str, Path] = MappingProxyType({})
) -> PeftModel:
    """Add trained LoRA matrices from a folder in PEFT's format to `model`, in place.

    Args:
        model: The language model.
        folder: Of the matrices.
        others: Name to the folder of further matrices, which `using_lora` switches to.

    Returns:
        PEFT's wrapper, which can disable or merge the matrices.

    Raises:
        StageError: No adapter, or an adapter of another model.
    """
    # All before the first is loaded, which renames the layers.
    config, *_ = [_checked_config(path, model) for path in (folder, *others.values())]
    refuse = functools.partial(adapter_refusal, folder)
    with reading_foreign_file(refuse, folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        peft_model: PeftModel = PeftModel.from_pretrained(
            model, folder, config=config, is_trainable=False
        )
    for name, path in others.items():
        refuse = functools.partial(adapter_refusal, path)
        with reading_foreign_file(refuse, path), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            peft_model.load_adapter(str(path), name, is_trainable=False)
    if model.device.type == "cuda":
        compute_lora_in_input_dtype(peft_model)
    return peft_model


def _checked_config(folder: Path, model: PreTrainedModel) -> LoraConfig:
    """Return the config of trained matrices that fit a model without any."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        # PEFT would try a pickled file next, or the network.
        raise StageError(f"{folder}: holds no {ADAPTER_WEIGHTS}. Run the finetune stage.")
    config = _lora_config(read_lora_settings(folder), model)
    check_adapter(folder, config, model)
    return config


@contextmanager
def using_lora(peft_model: PeftModel, name: str) -> Iterator[None]:
    """Compute with the matrices of that name, and with the former ones afterwards."""
    active = peft_model.active_adapter
    peft_model.set_adapter(name, inference_mode=True)
    try:
        yield
    finally:
        peft_model.set_adapter(active, inference_mode=True)


class LoraMatrix(nn.Linear):
    """A LoRA matrix that multiplies in the dtype of its input; its weight stays float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out], both in the dtype of x."""
        return nn.functional.linear(x, self.weight.to(x.dtype))


def compute_lora_in_input_dtype(model: nn.Module) -> None:
    """Let LoRA compute in the dtype of the layers that it adapts, in place.

    PEFT computes in float32: on a GPU that has a small share of the speed of bf16, and a float32
    copy of its input in every layer takes several times the memory of all else.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
                matrix.__class__ = LoraMatrix


def lora_dropouts(model: nn.Module) -> list[nn.Module]:
    """Return LoRA's dropout modules, the only ones active in training."""
    return [module for name, module in model.named_modules() if name.endswith("lora_dropout")]
