"""The settings of both training stages, read from `params.yaml`."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from workspace.data_settings import check_writable_url

CONTROL = "control"
"""Name of the run that learns from features of other images."""

MAX_EPOCHS = 10_000
"""All steps of a run are planned, in memory, before the first one."""

CPU_TOKENS = 4096
"""What `micro_batch_tokens: auto` is on a CPU; the most that fits would differ between machines."""

MAX_LORA_RANK = 1024
"""Far above any use; the LoRA matrices are allocated at the start."""


@dataclass(frozen=True, kw_only=True)
class LlmSettings:
    """Section `llm`: the language model."""

    model: str
    """A hub id, or a local directory in the same layout."""
    quantize: Literal["nf4", "none"]
    """NF4 with double quantisation through bitsandbytes, or weights as they are."""
    dtype: Literal["bf16", "fp16", "fp32"]
    """Computing dtype of the language model. fp16 is for GPUs that have no bf16, like the T4;
    attention is computed in float32 then, because Phi-2's overflows in fp16."""
    prompt: Literal["auto", "phi", "chat", "plain"] = "auto"
    """What stands around pictures, questions and answers: Phi-2's question-answer format, the
    tokenizer's own chat template, or `Question: ...` and `Answer: ...`. `auto`, the default, is
    `chat` for a tokenizer with a chat template, else `phi` for a Phi model, else `plain`."""


@dataclass(frozen=True, kw_only=True)
class ProjectorSettings:
    """Section `projector`: from patches to the language model's embeddings."""

    kind: Literal["linear", "mlp", "resblock"]
    """One linear layer; two with GELU, as in LLaVA-1.5; one and a pre-norm residual block."""
    pool: Literal[1, 2, 4] = 1
    """2 and 4 average each square of 2 x 2 or 4 x 4 patches, so that an image takes a fourth or a
    sixteenth of the positions. The features stay whole; their grid must divide into squares."""


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """Section `tracking`: logging to wandb."""

    wandb: Literal["online", "offline", "disabled"]
    """Upload at once, write to `.work/wandb/` for a later `wandb sync`, or log nothing."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Section `checkpoints`: how often a run's state is saved, and where; no influence on its
    result.
    """

    every_steps: int
    """Optimizer steps between two checkpoints; one is also saved at the end and at a signal."""
    every_minutes: float
    """Most minutes between two checkpoints."""
    keep: int
    """Number of recent checkpoints that are kept."""
    to: str | None = None
    """An fsspec URL, such as `s3://bucket/folder`, to which checkpoints and the finished run are
    copied, so that another machine can go on. `null`, the default: they stay on this machine."""

    def __post_init__(self) -> None:
        _check_positive(self, "every_steps", "every_minutes", "keep")
        if self.to is not None:
            check_writable_url("to", self.to)


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """The settings of the training loop, in both stages."""

    section: ClassVar[str]
    """Name of the section, for error texts."""

    epochs: float
    """Passes over the texts; 0.5 is half of them."""
    learning_rate: float
    """Peak, after the warm-up: of the projector in stage 1, of LoRA in stage 2."""
    weight_decay: float
    """AdamW's, of all trainable parameters."""
    warmup_share: float
    """Share of the optimizer steps in which the learning rate rises from 0."""
    clip_norm: float
    """Gradients are scaled down so that their norm is at most this."""
    texts_per_image: int
    """Most texts of an image in one step; the others follow later in the epoch."""
    micro_batch_tokens: int | Literal["auto"]
    """Most positions of a forward pass, patches and padding included; limited by memory. An image
    with more positions gets a pass of its own. `auto` tries what fits the GPU; on a CPU it is
    4096."""
    row_tokens: int
    """Most positions of a row of packed images, for SDPA, which computes all pairs of a row. With
    FlexAttention, on a GPU, a forward pass is one row."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the language model's blocks and compute the rest again in the
    backward pass: a fraction of the memory, up to half more time, the same numbers. Off by
    default."""
    compile: bool = False
    """Compile the language model's blocks and the projector with torch.compile, which takes a
    minute or more at the start; needs a C++ compiler. Off by default; no gain is measured yet."""
    max_text_tokens: int
    """Most tokens of a text; a longer text loses whole turns at its end."""
    order: Literal["global", "windowed"]
    """Shuffle over the whole store, or within windows of shards, for disks with slow random reads.
    See `train.data.order`."""
    window_shards: int
    """Shards of a window of the order `windowed`; two windows should fit in memory."""
    log_every_steps: int
    """Optimizer steps between two rows of the history."""
    validate_every_steps: int
    """Optimizer steps between two validations; the last step is always validated."""
    validation_images: int
    """Images of the validation loss."""
    samples: int
    """Validation images for which a text is generated at every validation."""

    def __post_init__(self) -> None:
        positive = ("epochs", "learning_rate", "clip_norm", "texts_per_image", "row_tokens")
        _check_positive(self, *positive, "max_text_tokens", "window_shards")
        if self.micro_batch_tokens != "auto":
            _check_positive(self, "micro_batch_tokens")
        _check_positive(self, "log_every_steps", "validate_every_steps")
        _check_share(self, "warmup_share")
        _check_at_most(self, "epochs", MAX_EPOCHS)
        for name in ("weight_decay", "validation_images", "samples"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 0 or more")


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(LoopSettings):
    """Section `pretrain`: stage 1, image to caption; the projector learns."""

    section = "pretrain"
    batch_captions: int
    """Captions of an optimizer step; the last image's captions may exceed it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "batch_captions")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Section `finetune.lora`: the adapter of stage 2."""

    r: int
    """Rank of the matrices."""
    alpha: int
    """The product of the matrices is scaled by alpha / r."""
    dropout: float
    """Probability with which an input of the matrices is dropped in training."""

    def __post_init__(self) -> None:
        _check_positive(self, "r", "alpha")
        _check_share(self, "dropout")
        _check_at_most(self, "r", MAX_LORA_RANK)


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(LoopSettings):
    """Section `finetune`: stage 2, image and question to answer; projector and LoRA learn."""

    section = "finetune"
    projector_learning_rate: float
    """Peak, after the warm-up, of the projector."""
    batch_examples: int
    """Conversations of an optimizer step; the last image's conversations may exceed it."""
    lora: LoraSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "projector_learning_rate", "batch_examples")


def _check_positive(settings: object, *names: str) -> None:
    for name in names:
        # Written so that NaN is refused too.
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"{name} is {getattr(settings, name)}, wanted more than 0")


def _check_at_most(settings: object, name: str, most: int) -> None:
    if getattr(settings, name) > most:
        raise ValueError(f"{name} is {getattr(settings, name)}, wanted at most {most}")


def _check_share(settings: object, name: str) -> None:
    if not 0 <= getattr(settings, name) < 1:
        raise ValueError(f"{name} is {getattr(settings, name)}, wanted 0 or more, below 1")
