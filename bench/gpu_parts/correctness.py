"""Whether a GPU computes what a CPU computes: gradients, features, and quantised layers.

Gradients are compared with those in float64 on a CPU, of models with two layers and the head shapes
of real ones. Their weights are numbers that bf16 holds exactly, so that only the computing differs.
"""

import copy
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bench.gpu_parts.models import make_caption_model, make_language_model, with_shared_weights
from bench.gpu_parts.report import Report, Row
from bench.gpu_parts.training import NO_LIMIT, SDPA_ROW_TOKENS
from bench.texts import bare_format
from cache import FeatureStore
from pipeline.encoding.encoder import load_encoder
from pipeline.encoding.probe import TOLERANCES, encode_probe_images, relative_differences
from pipeline.settings import EncoderSettings
from train.data.examples import Example
from train.loop.step import StepData, build_step, optimizer_step
from train.model.captioner import CaptionModel
from train.settings import LoraSettings

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

GRADIENT_LIMITS = {"bf16": 3e-2, "fp32": 1e-4}
"""Largest relative L2 difference of the gradient of the projector, and of LoRA, from float64.

bf16 rounds every activation to 8 bits: on a CPU its gradients are 1e-2 off. In float32 they are
1e-6 off; GPUs sum in other orders, and FlexAttention's exponentials are less exact.
"""

NF4_LIMITS = {"bf16": 2e-2, "fp32": 1e-3}
"""Largest relative L2 difference of the last hidden states of NF4 models. Both devices may round a
block's scale to another of the 256 levels of double quantisation.
"""

FLEX, SDPA = "FlexAttention", "SDPA"

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Texts:
    """What the models are compared on."""

    tokenizer: PreTrainedTokenizerBase
    store: FeatureStore
    examples: list[Example]


def compare_gradients(
    report: Report,
    shape: str,
    config: PreTrainedConfig,
    texts: Texts,
    lora: LoraSettings,
    device: torch.device,
) -> None:
    """Add a row for each dtype and attention.

    Args:
        report: Gets the rows.
        shape: Name of the head shape.
        config: Of a language model of two layers.
        texts: All examples make one step.
        lora: Without dropout.
        device: The GPU.
    """
    base = _rounded(make_language_model(config, quantize=False, dtype=torch.float32, device=device))
    wanted: dict[str, Tensor] = {}

    def reference() -> Row:
        model = _caption_model(base, texts, lora, CPU, torch.float64, SDPA)
        wanted.update(gradients(model.double(), texts))
        return {group: f"{len(values)} numbers" for group, values in wanted.items()}

    report.row(f"{shape}: float64 on the CPU", 15, reference)
    for dtype in DTYPES:
        for attention in (FLEX, SDPA):
            name = f"{shape}, {dtype}, {attention}"
            if not wanted:
                report.skip(name, "there is nothing to compare with")
            elif attention == FLEX and device.type != "cuda":
                report.skip(name, "FlexAttention has gradients on a GPU only")
            else:
                compare = partial(_compare, base, texts, lora, device, dtype, attention, wanted)
                report.row(name, 20 if attention == FLEX else 3, compare)


def _compare(
    base: PreTrainedModel,
    texts: Texts,
    lora: LoraSettings,
    device: torch.device,
    dtype: str,
    attention: str,
    wanted: dict[str, Tensor],
) -> Row:
    forget_compilations()
    model = _caption_model(base, texts, lora, device, DTYPES[dtype], attention)
    if attention == FLEX and not model.packs_one_row:
        raise RuntimeError("FlexAttention does not work with these heads; stderr says why")
    return compared(gradients(model, texts), wanted, GRADIENT_LIMITS[dtype])


def forget_compilations() -> None:
    """Drop torch's compiled functions: it refuses more than eight of one, and every model adds to
    them.
    """
    torch.compiler.reset()


def compared(found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float) -> Row:
    """Return the relative difference of each group, and whether all are within the limit."""
    differences = {group: relative_difference(found[group], wanted[group]) for group in wanted}
    return {
        **{group: float(f"{value:.3g}") for group, value in differences.items()},
        "limit": limit,
        "within": all(value <= limit for value in differences.values()),
    }


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted| / |wanted| in the L2 norm, computed in float64 on the CPU."""
    reference = wanted.double().cpu()
    return float((found.double().cpu() - reference).norm() / reference.norm())


def _rounded(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    return model


def _caption_model(
    base: PreTrainedModel,
    texts: Texts,
    lora: LoraSettings,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
) -> CaptionModel:
    """Return a model on a device, with the weights of `base` and the same projector and LoRA."""
    # LoRA is drawn on the device of `base`, whatever the model's.
    model = make_caption_model(
        with_shared_weights(base), vision_width=texts.store.spec.width, lora=lora
    )
    language_model = copy.deepcopy(model.language_model).to(CPU)
    for parameter in language_model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    projector = copy.deepcopy(model.projector)
    # A CaptionModel takes SDPA if it is made on a CPU.
    language_model = language_model.to(CPU if attention == SDPA else device)
    return CaptionModel(projector, language_model).to(device)


def gradients(model: CaptionModel, texts: Texts) -> dict[str, Tensor]:
    """Make a step and return the gradients of projector and LoRA: float64 [N], on the CPU."""
    parameters = model.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, weight_decay=0.0)
    optimizer_step(
        model,
        optimizer,
        _step_data(model, texts, one_row=model.packs_one_row),
        clip_norm=math.inf,
        seed=(0, 1),
    )
    groups = {"projector": "projector.", "lora": "language_model."}
    return {
        group: torch.cat(
            [
                p.grad.double().cpu().flatten()
                for name, p in parameters.items()
                if name.startswith(prefix) and p.grad is not None
            ]
        )
        for group, prefix in groups.items()
    }


def _step_data(model: CaptionModel, texts: Texts, *, one_row: bool) -> StepData:
    return build_step(
        texts.examples,
        bare_format(texts.tokenizer),
        texts.store,
        pass_tokens=NO_LIMIT,
        row_tokens=None if one_row else SDPA_ROW_TOKENS,
        max_text_tokens=NO_LIMIT,
        device=model.device,
    )


def compare_quantized(
    config: PreTrainedConfig, texts: Texts, dtype: str, device: torch.device
) -> Row:
    """Compare the last hidden states of an NF4 model on the device and on the CPU.

    The same weights are quantised on either device, each by its own kernels.
    """
    forget_compilations()
    hidden = {}
    for name, place in (("wanted", CPU), ("found", device)):
        quantized = make_language_model(
            config, quantize=True, dtype=DTYPES[dtype], device=place, drawn_on=CPU
        )
        model = make_caption_model(quantized, vision_width=texts.store.spec.width, lora=None)
        (batch,) = _step_data(model, texts, one_row=True).batches
        with torch.inference_mode():
            hidden[name] = model.hidden(batch.to(place))
    return compared({"hidden": hidden["found"]}, {"hidden": hidden["wanted"]}, NF4_LIMITS[dtype])


def compare_features(settings: EncoderSettings, device: torch.device) -> Row:
    """Compare the features of the probe's images on the device and on the CPU."""
    found, wanted = (
        encode_probe_images(load_encoder(replace(settings, device=str(place))))
        for place in (device, CPU)
    )
    worst = float(relative_differences(found, wanted).max())
    limit = TOLERANCES[settings.precision]
    return {"worst image": float(f"{worst:.3g}"), "limit": limit, "within": worst <= limit}
