"""Refuses language models that cannot be trained right, before any work and without their weights.

LoRA must cover every linear layer of the blocks. And packed rows have the loss of one sequence a
text only if the model's code leaves masks, positions and windows to its caller: a small copy with
random weights, and with all rules of the model's config, is compared with transformers' own forward
pass in float64.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from cache.errors import SettingsError
from cache.files.foreign import reading_foreign_file
from train.data.packing import Pass, collate, image_length
from train.data.prompts import TokenizedText
from train.model.attention import NAME
from train.model.captioner import CaptionModel
from train.model.decoder import Linear, blocks_of, position_limit
from train.model.language_model import add_lora
from train.model.model_files import build_empty, read_config
from train.model.projector import seeded_projector
from train.settings import LlmSettings, LoraSettings
from workspace.checkpoint_files import holding_back_stderr

PATCHES, VISION_WIDTH, VOCABULARY, HEADS = 5, 8, 64, 2
"""Sizes of the copy and its images."""

WINDOW = 6
"""Of sliding or local attention: shorter than the texts, so that it matters."""

TEXT_LENGTHS = ((9, 4), (12,), (3, 7))
"""Tokens of the texts of each image."""

TOLERANCE = 1e-9
"""Largest relative difference of losses and gradients; rounding gives 1e-13."""


def check_supported(settings: LlmSettings) -> int | None:
    """Refuse a language model that LoRA would not cover, or whose packed rows have another loss.

    Returns:
        Most positions of a text, those of its picture included; None without a limit.

    Raises:
        SettingsError: Says what fails, or names the fault in the model's files.
    """
    empty = build_empty(settings.model)
    kind = type(empty).__name__

    def refuse(detail: str) -> SettingsError:
        return SettingsError(
            f"llm.model: {settings.model} is a {kind}, which cannot be trained here: {detail}. "
            f"Use a model of one of the families of docs/models.md."
        )

    with reading_foreign_file(refuse):
        _check_coverage(empty)
    with reading_foreign_file(
        lambda detail: refuse(f"a small copy of it with random weights fails: {detail}")
    ):
        check_packing(read_config(settings.model))
    with reading_foreign_file(refuse):
        return most_positions(empty)


def most_positions(model: PreTrainedModel) -> int | None:
    """Return the positions for which a model has a table, or one way of counting; None: any number.

    Rotary positions of kind "longrope" or "dynamic" change for all texts of a row once one of them
    is longer than the original limit, so packed texts would not be computed as alone.
    """
    config = model.config
    limits = [position_limit(model)]
    rope = getattr(config, "rope_parameters", None) or {}
    # Models with layers of several types have parameters for each.
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in ("longrope", "dynamic"):
            original = part.get("original_max_position_embeddings")
            limits.append(int(original or config.max_position_embeddings))
    return min((limit for limit in limits if limit is not None), default=None)


def _check_coverage(empty: PreTrainedModel) -> None:
    """Refuse matrices outside of the blocks' linear layers, which LoRA would leave out."""
    layers = {module for module in blocks_of(empty).modules() if isinstance(module, Linear)}
    tables = {module for module in empty.modules() if isinstance(module, nn.Embedding)}
    tables.add(empty.get_output_embeddings())
    covered, uncovered = 0, set()
    for module_name, module in empty.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and module not in tables:
                covered += module in layers
                if module not in layers:
                    uncovered.add(f"{module_name.rpartition('.')[2]}.{name}")
    if uncovered:
        raise ValueError(
            f"LoRA would cover {covered} of its weight matrices, but not "
            f"{', '.join(sorted(uncovered))}"
        )


def check_packing(config: PreTrainedConfig) -> None:
    """Compare packed rows with one sequence a text on a small copy of a model.

    Raises:
        ValueError: Says what differs. Other exceptions come from transformers.
    """
    # Ids of special tokens outside of the vocabulary, which transformers warns of.
    with holding_back_stderr(for_good=True), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with Float64():
            small = small_copy(config)
            _compare(small)
        _use(small)


def small_copy(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model of the same kind with small sizes: float64, random, in `eval()`.

    A layer of each type is kept, and all factors, caps and rules; the width of a head too, which a
    config may state in several places.
    """
    small = copy.deepcopy(config)
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % key_heads:
        # The copy has other numbers of heads.
        raise ValueError(f"{heads} heads of attention cannot share {key_heads} heads of keys")
    types = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes: dict[str, Any] = {
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS if key_heads == heads else HEADS // 2,
        "hidden_size": HEADS * head_width,
        "intermediate_size": 2 * HEADS * head_width,
        "num_hidden_layers": max(2, len(types)),
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
    }
    if types:
        sizes["layer_types"] = types * 2 if len(types) == 1 else types
    for name, value in config.to_dict().items():
        if re.search("window|chunk", name) and type(value) is int and value > WINDOW:
            sizes[name] = WINDOW
    for name, value in sizes.items():
        # Some kinds of models lack one of the sizes.
        if getattr(config, name, None) is not None:
            setattr(small, name, value)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        small, attn_implementation="eager", dtype=torch.float64, trust_remote_code=False
    )
    for name, parameter in model.named_parameters():
        # Large enough that every rule changes the loss by far more than rounding does.
        spread = 1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.3
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        nn.init.normal_(parameter, mean=float(is_norm), std=spread)
    return model.requires_grad_(False).eval()


class Float64(TorchFunctionMode):
    """Computes in float64 where the code of a model asks for float32, as in norms and softmax."""

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if function is Tensor.float:
            function = Tensor.double
        options = {name: widened(value) for name, value in (options or {}).items()}
        return function(*map(widened, arguments), **options)


def _compare(model: PreTrainedModel) -> None:
    """Raise ValueError where packed and separate losses, or gradients of the projector, differ."""
    separate = copy.deepcopy(model)
    width = model.get_input_embeddings().weight.shape[1]
    projector = seeded_projector("linear", VISION_WIDTH, width, seed=0).double()
    packed = CaptionModel(projector, model)
    if model.config._attn_implementation != NAME:
        raise ValueError("its attention cannot be replaced by transformers' AttentionInterface")
    patches_NPD = torch.randn(len(TEXT_LENGTHS), PATCHES, VISION_WIDTH, dtype=torch.float64)
    texts = [[_text(length) for length in lengths] for lengths in TEXT_LENGTHS]
    lengths = [image_length(image, PATCHES) for image in texts]
    numbers = list(range(len(texts)))
    batch = collate(Pass([numbers], sum(lengths)), numbers, texts, patches_NPD)
    found_S = packed.token_losses(batch)
    wanted_S = torch.cat(
        [
            _separate_losses(separate, projector(patches_NPD[[number]]), text)
            for number, image in enumerate(texts)
            for text in image
        ]
    )
    _check_close("losses", found_S, wanted_S)
    parameters = list(projector.parameters())
    pairs = zip(
        torch.autograd.grad(found_S.sum(), parameters),
        torch.autograd.grad(wanted_S.sum(), parameters),
        strict=True,
    )
    for found, wanted in pairs:
        _check_close("gradients", found, wanted)


def _use(model: PreTrainedModel) -> None:
    """Do to a model what stages do behind its losses: generate a text, and add LoRA.

    Raises:
        Exception: From transformers or PEFT.
    """
    embeds_1TH = torch.zeros(1, 1, model.config.hidden_size, dtype=torch.float64)
    model.generation_config = GenerationConfig()
    model.generate(
        inputs_embeds=embeds_1TH,
        attention_mask=torch.ones(1, 1, dtype=torch.long),
        generation_config=GenerationConfig(max_new_tokens=2, pad_token_id=0),
    )
    add_lora(model, LoraSettings(r=1, alpha=1, dropout=0.0), seed=0)


def _text(length: int) -> TokenizedText:
    token_ids: list[int] = torch.randint(VOCABULARY, (length,)).tolist()
    return TokenizedText(token_ids, [True] * length)


def _separate_losses(model: PreTrainedModel, patches_1PH: Tensor, text: TokenizedText) -> Tensor:
    """Return the loss of each token of one sequence, with the model's own mask and positions."""
    ids_1T = torch.tensor([text.token_ids])
    embeds_1TH = torch.cat([patches_1PH, model.get_input_embeddings()(ids_1T)], dim=1)
    logits_1TV = model(inputs_embeds=embeds_1TH, use_cache=False).logits
    losses: Tensor = nn.functional.cross_entropy(
        logits_1TV[0, PATCHES - 1 : -1], ids_1T[0], reduction="none"
    )
    return losses


def _check_close(what: str, found: Tensor, wanted: Tensor) -> None:
    difference = float(((found - wanted).norm() / wanted.norm()).detach())
    # Written so that NaN is refused too.
    if not difference < TOLERANCE:
        raise ValueError(
            f"{what} of packed texts differ from those of one sequence a text (relative "
            f"difference {difference:.1e} in float64 on a small copy)"
        )
