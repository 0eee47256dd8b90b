"""How fast pictures become features: decoding by one process, and ViT-B/32 on this machine.

    python -m bench.encode

Pictures of COCO's usual size, 640 x 480, as JPEG; random weights, which take as long as others.
"""

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from bench.measure import compare
from pipeline.decode import decode_rgb
from pipeline.encoder import load_encoder
from pipeline.settings import EncoderSettings

SIDE = 224
BATCH = 64


def jpeg() -> bytes:
    """Return a noisy 640 x 480 JPEG of about COCO's mean size."""
    small = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def decoding() -> Callable[[], int]:
    """Return a contender that decodes a batch in this process."""
    data = jpeg()

    def work() -> int:
        for _ in range(BATCH):
            decode_rgb(data, SIDE, "shortest")
        return BATCH

    return work


def encoding(precision: str, batches: int) -> Callable[[], int]:
    """Return a contender that encodes some decoded batches."""
    encoder = load_encoder(
        EncoderSettings(
            model="ViT-B-32-quickgelu",
            pretrained="random",
            layer=-2,
            precision=precision,  # type: ignore[arg-type]
            batch_size=BATCH,
            device="auto",
        )
    )
    pixels = torch.randint(0, 255, (BATCH, SIDE, SIDE, 3), dtype=torch.uint8)

    def work() -> int:
        for _ in range(batches):
            encoder.encode(pixels)
        return batches * BATCH

    return work


def main() -> None:
    """Measure and write the result file, named after the kind of machine."""
    on_gpu = torch.cuda.is_available()
    batches = 40 if on_gpu else 1
    compare(
        f"encode_{'gpu' if on_gpu else 'cpu'}",
        {
            "ViT-B/32 bf16": encoding("bf16", batches),
            "ViT-B/32 fp32": encoding("fp32", batches),
            "decode 640x480 JPEG, one process": decoding(),
        },
        unit="images",
        repeats=5,
        libraries=("torch", "open_clip_torch", "pillow"),
        setting={"batch": BATCH, "jpeg_bytes": len(jpeg())},
    )


if __name__ == "__main__":
    main()
