"""How fast pictures become features: decoding by one process, and ViT-B/32 on this machine.

    python -m bench.encode

Pictures of COCO's usual size, 640 x 480, as JPEG; random weights, which take as long as others.
"""

import argparse
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.command import benchmark_parser, run_benchmark
from bench.measure import compare
from pipeline.encoding.encoder import load_encoder
from pipeline.images.decode import decode_rgb
from pipeline.settings import EncoderSettings

SIDE = 224
BATCH, QUICK_BATCH = 64, 8
ROUNDS = 5


def jpeg() -> bytes:
    """Return a noisy 640 x 480 JPEG of about COCO's mean size."""
    small = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def decoding(batch: int) -> Callable[[], int]:
    """Return a contender that decodes a batch in this process."""
    data = jpeg()

    def work() -> int:
        for _ in range(batch):
            decode_rgb(data, SIDE, "shortest")
        return batch

    return work


def encoding(precision: str, batch: int, batches: int) -> Callable[[], int]:
    """Return a contender that encodes some decoded batches."""
    encoder = load_encoder(
        EncoderSettings(
            model="ViT-B-32-quickgelu",
            pretrained="random",
            layer=-2,
            precision=precision,  # type: ignore[arg-type]
            batch_size=batch,
            device="auto",
        )
    )
    pixels = torch.randint(0, 255, (batch, SIDE, SIDE, 3), dtype=torch.uint8)

    def work() -> int:
        for _ in range(batches):
            encoder.encode(pixels)
        return batches * batch

    return work


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return what the result file says."""
    batch = QUICK_BATCH if arguments.quick else BATCH
    batches = 40 if torch.cuda.is_available() and not arguments.quick else 1
    return compare(
        "encode",
        {
            "ViT-B/32 bf16": encoding("bf16", batch, batches),
            "ViT-B/32 fp32": encoding("fp32", batch, batches),
            "decode 640x480 JPEG, one process": decoding(batch),
        },
        unit="images",
        repeats=1 if arguments.quick else ROUNDS,
        setting={"batch": batch, "jpeg_bytes": len(jpeg())},
    )


def main() -> None:
    """Measure and write the result file, named after the kind of machine."""
    run_benchmark(
        f"encode_{'gpu' if torch.cuda.is_available() else 'cpu'}",
        measure,
        benchmark_parser(__doc__),
        minutes=1,
        quick_seconds=30,
        libraries=("torch", "open_clip_torch", "pillow"),
    )


if __name__ == "__main__":
    main()
