"""What others have published of runs that turn images into embeddings or labels.

Nothing of it was run here. A rate is images over seconds, of all GPUs together.
"""

from dataclasses import dataclass

CLIP_RETRIEVAL = (
    "distributed clip inference, clip-retrieval's documentation",
    "https://github.com/rom1504/clip-retrieval/blob/main/docs/distributed_clip_inference.md",
)
DAFT = (
    "AI benchmarks, Daft's repository",
    "https://github.com/Eventual-Inc/Daft/tree/main/benchmarking/ai",
)
RAY = (
    "Ray Data Benchmarks, Ray's documentation",
    "https://docs.ray.io/en/latest/data/benchmark.html",
)
TIMM = (
    "inference results, pytorch-image-models",
    "https://github.com/huggingface/pytorch-image-models/tree/main/results",
)

IMAGENET = 803_580
"""Images of the classification benchmark that Daft and Ray Data share."""


@dataclass(frozen=True)
class Run:
    """A published run."""

    engine: str
    model: str
    hardware: str
    gpus: int
    cores: int | None
    """Virtual CPUs in all; None where the pixels were on the GPU already."""
    images_per_second: float | None
    """None where the number of images was not published."""
    comparable: str
    """What of it can be compared with this project, and what cannot."""
    source: tuple[str, str]
    """Title with site, and address."""


RUNS = (
    Run(
        "clip-retrieval",
        "ViT-L/14, text tower too",
        "1 A100",
        1,
        None,
        312,
        "the same forward pass, and a text's; keeps one vector of 1.5 kB an image",
        CLIP_RETRIEVAL,
    ),
    Run(
        "clip-retrieval",
        "ViT-L/14, text tower too",
        "8 A100, one AWS node, S3 to S3",
        8,
        96,
        2500,
        "as above; four nodes were four times as fast",
        CLIP_RETRIEVAL,
    ),
    Run(
        "clip-retrieval",
        "ViT-B/32, text tower too",
        "8 A100, one AWS node, S3 to S3",
        8,
        96,
        7000,
        'its authors: "resizing bottlenecked"; one A100 alone made 2,500',
        CLIP_RETRIEVAL,
    ),
    Run(
        "Ray Data 2.50",
        "ResNet18, labels",
        "8 L4, g6.8xlarge",
        8,
        256,
        IMAGENET / 111.2,
        "download, decoding and resizing, which are the limit: the network has less than half "
        "the operations of ViT-B/32",
        RAY,
    ),
    Run(
        "Ray Data 2.50",
        "ResNet18, labels",
        "8 L4, g6.xlarge",
        8,
        32,
        IMAGENET / 456.2,
        "the same on fewer cores",
        RAY,
    ),
    Run(
        "Daft 0.6.2, run by Ray",
        "ResNet18, labels",
        "8 L4, g6.xlarge",
        8,
        32,
        IMAGENET / 315.0,
        "the same",
        RAY,
    ),
    Run(
        "Daft, run by Daft",
        "ResNet18, labels",
        "8 L4, g6.xlarge",
        8,
        32,
        IMAGENET / 263,
        "the same; its Ray Data took 23m 30s",
        DAFT,
    ),
    Run(
        "Ray Data 2.50",
        "ViT-B/16, logits",
        "40 L40S, and 64 machines of 32 cores",
        40,
        2208,
        None,
        "4 TiB of images in base64 in 106 s (Daft: 753 s); how many images is not said",
        RAY,
    ),
    Run(
        "timm",
        "ViT-B/16 of CLIP",
        "1 RTX 4090",
        1,
        None,
        2784,
        "the forward pass alone, float16: 0.59 of the data sheet",
        TIMM,
    ),
)
