"""Sizes of `bench.gpu`: those of the real models, and tiny ones that try all parts on a CPU."""

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import LlamaConfig, PhiConfig, PreTrainedConfig

from bench.gpu_parts.small_cards import Card
from bench.gpu_parts.training import Steps
from bench.make_phi2 import PHI2
from bench.step import FINETUNE, PRETRAIN
from bench.stores import SPEC
from cache import Spec
from train.settings import LoraSettings

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    phi: PhiConfig
    lora: LoraSettings
    spec: Spec
    """Of the features."""
    store_images: int
    heads: dict[str, PreTrainedConfig]
    """Language models of two layers whose gradients are compared, by name."""
    compared_images: int
    matmul: int
    """Rows and columns of the matrices of the chip's rate."""
    copied_bytes: int
    compared_pass: int
    """Positions of a forward pass at which loops are compared; two of them are a step."""
    passes: tuple[int, ...]
    """Further ones, of our loop."""
    usual_batches: dict[str, tuple[int, ...]]
    """Texts of a forward pass of the usual loop: LLaVA's, and a larger one."""
    coco_batch: dict[str, int]
    """Captions and conversations of an optimizer step of configs/coco.yaml."""
    steps: Steps
    compiler_backend: str
    """torch.compile's, of the compiled blocks."""
    towers: tuple[str, ...]
    pixel_batches: tuple[int, int]
    """Batches of decoded pictures, and pictures of a batch."""
    files: int
    """JPEGs."""
    generated_batches: tuple[int, ...]
    generated_tokens: int
    cards: tuple[Card, ...]
    card_passes: tuple[int, ...]
    card_steps: Steps


FULL = Sizes(
    phi=PhiConfig(**PHI2),
    lora=LoraSettings(r=128, alpha=256, dropout=0.05),
    spec=SPEC,
    store_images=1024,
    heads={
        "Phi-2's heads": PhiConfig(**PHI2 | {"num_hidden_layers": 2}),
        "SmolLM2's heads": LlamaConfig(
            vocab_size=51_200,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=2,
            num_attention_heads=9,
            num_key_value_heads=3,
        ),
    },
    compared_images=6,
    matmul=8192,
    copied_bytes=4 * 2**30,
    passes=(2048, 16_384, 32_768),
    compared_pass=8192,
    usual_batches={PRETRAIN: (32, 128), FINETUNE: (16, 64)},
    coco_batch={PRETRAIN: 256, FINETUNE: 128},
    steps=Steps(warmup=2, timed=4),
    compiler_backend="inductor",
    towers=("ViT-B-32-quickgelu", "ViT-L-14-336-quickgelu"),
    pixel_batches=(40, 64),
    files=8192,
    generated_batches=(64, 256),
    generated_tokens=64,
    cards=(
        Card(8, checkpointing=True),
        Card(12, checkpointing=False),
        Card(24, checkpointing=False),
        Card(8, checkpointing=False),
        Card(16, checkpointing=False),
        Card(12, checkpointing=True),
        Card(24, checkpointing=True),
        Card(16, checkpointing=True),
    ),
    card_passes=(512, 1024, 2048, 4096, 8192, 16_384),
    card_steps=Steps(warmup=1, timed=2),
)

TINY_PHI = PhiConfig(
    vocab_size=51_200,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=1024,
    partial_rotary_factor=0.5,
)

DRY = Sizes(
    phi=TINY_PHI,
    lora=LoraSettings(r=4, alpha=8, dropout=0.05),
    spec=replace(SPEC, patches=4, width=8),
    store_images=4,
    heads={
        "tiny Phi": TINY_PHI,
        "tiny Llama": LlamaConfig(
            vocab_size=51_200,
            hidden_size=36,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=9,
            num_key_value_heads=3,
        ),
    },
    compared_images=2,
    matmul=128,
    copied_bytes=2**20,
    passes=(64,),
    compared_pass=128,
    usual_batches={PRETRAIN: (8,), FINETUNE: (2,)},
    coco_batch={PRETRAIN: 5, FINETUNE: 2},
    steps=Steps(warmup=1, timed=1),
    compiler_backend="eager",
    towers=(str(ROOT / "demo/checkpoints/clip/ViT-demo-32.json"),),
    pixel_batches=(2, 4),
    files=8,
    generated_batches=(2,),
    generated_tokens=4,
    cards=(Card(8, checkpointing=True),),
    card_passes=(128,),
    card_steps=Steps(warmup=1, timed=1),
)
