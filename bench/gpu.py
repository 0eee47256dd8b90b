"""What a GPU computes and how fast, beside what others do with the same weights, in eight minutes.

    python -m bench.gpu [--minutes 8] [--out FOLDER]
    python -m bench.gpu --dry-run

Random weights of the real shapes are made on the GPU: nothing is downloaded. The result file,
gpu_<name of the GPU>.json, is written after every row, so a run that is cut off leaves what it had.
With --dry-run every part runs on the CPU, at sizes whose figures mean nothing, in one to three
minutes.

The parts, the most valuable first, with what they take on an H200. A row that does not fit in the
time left is skipped; a row that fails is recorded with its error, and the next row runs.

    chip          bf16 matrix products and copies                                         5 s
    right         gradients, features, and NF4 layers against the CPU                    80 s
    training      both stages, NF4 and bf16, beside the usual loop and packing loops    150 s
    extraction    ViT-B/32 and ViT-L/14-336: decoded pictures, and JPEGs to shards       50 s
    generation    batches of 64 and 256                                                  20 s
    compiled      training with the setting `compile`                               50 s a row
    sizes         training at other sizes of a forward pass, and other peers             60 s
    small cards   Phi-2 in NF4 with 8 to 24 GiB, a fresh process each                 25 s each

Start and compilation take another 60 s. The times of training are estimated from its operations
(`bench.gpu_parts.arithmetic`): a pass of 8,192 positions has 88 TFLOP, which take an H200 0.2 to
0.4 s. The rows so far give the hours of configs/coco.yaml on this GPU, and the goals.
"""

import argparse
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from bench.gpu_parts import correctness, packed_loop
from bench.gpu_parts.chip import measure_copies, measure_products
from bench.gpu_parts.extraction import encode_files, encode_pixels, tower_settings
from bench.gpu_parts.generation import measure_generation
from bench.gpu_parts.goals import (
    BF16,
    CHIP,
    COCO_STEP,
    COMPARED,
    COMPILED,
    EXTRACTION,
    GENERATION,
    JPEGS,
    NF4,
    OURS,
    PACKING,
    RIGHT,
    SIZES,
    SMALL_CARDS,
    TRAINING,
    USUAL,
    conclude,
    row_name,
)
from bench.gpu_parts.models import make_language_model
from bench.gpu_parts.report import Report, Row
from bench.gpu_parts.sizes import DRY, FULL, Sizes
from bench.gpu_parts.small_cards import Training, measure_card
from bench.gpu_parts.training import (
    Chip,
    Loop,
    difference,
    estimate_seconds,
    images_of_passes,
    make_stage,
    measure_loop,
    our_loop,
    packed_loop_of,
    usual_loop_of,
)
from bench.measure import RESULTS, machine, print_goals, versions
from bench.step import FINETUNE, PRETRAIN, Stage, make_features, shape_of
from bench.texts import CAPTIONS_AN_IMAGE, draw_conversations, make_tokenizer
from cache import FeatureStore
from cache.cli.command import command_parser, run_guarded
from cache.errors import SettingsError
from train.model.blocks import compile_blocks
from workspace.errors import StageError

COMPILE_SECONDS = 30.0
"""Of the first row that trains with FlexAttention, and of each with compiled blocks."""

CARD_SECONDS = 25.0
"""Of a card: start of the process, model, compilation, and passes."""

LIBRARIES = (
    "torch", "triton", "transformers", "peft", "bitsandbytes", "open_clip_torch",
    "liger-kernel", "cut-cross-entropy",
)  # fmt: skip


class Bench:
    """What the parts share: sizes, device, data, and each model once."""

    def __init__(self, sizes: Sizes, device: torch.device, folder: Path) -> None:
        self.sizes, self.device = sizes, device
        self.chip = Chip(measured=1e12, data_sheet=None)
        """Replaced when it has been measured."""
        self.tokenizer = make_tokenizer()
        self.store = FeatureStore(make_features(folder, sizes.store_images, sizes.spec))
        self._bases: dict[str, PreTrainedModel] = {}
        self._stages: dict[tuple[str, str], Stage] = {}

    def stage(self, weights: str, name: str) -> Stage:
        """Return a stage with NF4 or BF16 weights; it is made once."""
        if (weights, name) not in self._stages:
            self._stages[weights, name] = self.make_stage(weights, name)
        return self._stages[weights, name]

    def make_stage(self, weights: str, name: str) -> Stage:
        """Make a stage with NF4 or BF16 weights; all stages of one kind share them."""
        sizes = self.sizes
        if weights not in self._bases:
            self._bases[weights] = make_language_model(
                sizes.phi, quantize=weights == NF4, dtype=torch.bfloat16, device=self.device
            )
        return make_stage(
            name, self._bases[weights], self.tokenizer, self.store, sizes.lora, sizes.store_images
        )

    def texts(self) -> correctness.Texts:
        """Return conversations of a few images, on which devices are compared."""
        examples = draw_conversations(np.random.default_rng(0), self.sizes.compared_images)
        return correctness.Texts(self.tokenizer, self.store, examples)

    def forget_models(self) -> None:
        """Free the memory of the models."""
        self._bases.clear()
        self._stages.clear()


def measure_chip(report: Report, bench: Bench) -> None:
    """Measure the rate of matrix products, which later rows take shares of, and of copies."""
    sizes, device = bench.sizes, bench.device

    def products() -> Row:
        bench.chip, row = measure_products(sizes.matmul, device)
        return row

    report.row("bf16 products", 4, products)
    report.row("copies", 2, partial(measure_copies, sizes.copied_bytes, device))


def measure_right(report: Report, bench: Bench) -> None:
    """Compare the GPU with the CPU."""
    sizes, device = bench.sizes, bench.device
    texts = bench.texts()
    without_dropout = replace(sizes.lora, dropout=0.0)
    for shape, config in sizes.heads.items():
        correctness.compare_gradients(report, shape, config, texts, without_dropout, device)
    config = next(iter(sizes.heads.values()))
    for dtype in correctness.DTYPES:
        compare = partial(correctness.compare_quantized, config, texts, dtype, device)
        report.row(f"NF4 layers, {dtype}", 8, compare)
    for precision in correctness.DTYPES:
        settings = tower_settings(sizes.towers[0], precision, device)
        compare = partial(correctness.compare_features, settings, device)
        report.row(f"features, {precision}", 10, compare)


def measure_training(report: Report, bench: Bench) -> None:
    """Compare loops in both stages, with both kinds of weights."""
    for name in (PRETRAIN, FINETUNE):
        for weights in (NF4, BF16):
            stage = bench.stage(weights, name)
            add = partial(_training_row, report, bench, weights, stage)
            images = images_of_passes(stage, 2, bench.sizes.compared_pass)
            ours = our_loop(stage, bench.sizes.compared_pass)
            usual = usual_loop_of(stage, bench.sizes.usual_batches[name][0])
            packing = packed_loop_of(stage, bench.sizes.compared_pass, "supervised logits")
            add(COCO_STEP, ours, images_of_coco_step(stage, bench.sizes.coco_batch[name]))
            add(OURS + COMPARED, ours, images)
            add(f"{USUAL}, batches of {bench.sizes.usual_batches[name][0]}", usual, images)
            add(f"{PACKING}, supervised logits", packing, images)
            for other, loop in ((USUAL, usual), (PACKING, packing)):
                report.row(
                    row_name(weights, name, f"gradients of {OURS} and the {other}"),
                    6,
                    lambda stage=stage, ours=ours, loop=loop: {  # type: ignore[misc]
                        "difference": difference(stage, ours, loop)
                    },
                )


def images_of_coco_step(stage: Stage, texts: int) -> int:
    """Return how many images have about so many texts."""
    if stage.name == PRETRAIN:
        return max(1, round(texts / CAPTIONS_AN_IMAGE))
    per_image = sum(len(example.texts) for example in stage.examples) / len(stage.examples)
    return max(1, round(texts / per_image))


def measure_sizes(report: Report, bench: Bench) -> None:
    """Train with other sizes of a pass, other batches and other heads."""
    sizes = bench.sizes
    for name in (PRETRAIN, FINETUNE):
        for weights in (NF4, BF16):
            stage = bench.stage(weights, name)
            add = partial(_training_row, report, bench, weights, stage)
            for pass_tokens in sizes.passes:
                images = images_of_passes(stage, 2, pass_tokens)
                add(f"{OURS}, {pass_tokens} a pass", our_loop(stage, pass_tokens), images)
            images = images_of_passes(stage, 2, sizes.compared_pass)
            for batch in sizes.usual_batches[name][1:]:
                add(f"{USUAL}, batches of {batch}", usual_loop_of(stage, batch), images)
            for head in packed_loop.HEADS:
                if head == "supervised logits":
                    continue
                what = f"{PACKING}, {head}"
                if packed_loop.is_installed(head):
                    add(what, packed_loop_of(stage, sizes.compared_pass, head), images)
                else:
                    report.skip(row_name(weights, name, what), "not installed")


def measure_compiled(report: Report, bench: Bench) -> None:
    """Train with compiled blocks, which the setting `compile` asks for."""
    for weights, name in ((BF16, PRETRAIN), (NF4, FINETUNE)):
        stage = bench.make_stage(weights, name)
        model = stage.model
        compile_blocks(model.language_model, model.projector, backend=bench.sizes.compiler_backend)
        images = images_of_passes(stage, 2, bench.sizes.compared_pass)
        loop = our_loop(stage, bench.sizes.compared_pass)
        _training_row(
            report, bench, weights, stage, f"{OURS}, compiled", loop, images, COMPILE_SECONDS
        )


def _training_row(
    report: Report,
    bench: Bench,
    weights: str,
    stage: Stage,
    what: str,
    loop: Loop,
    images: int,
    compiling: float = 0.0,
) -> None:
    rank = bench.sizes.lora.r if stage.name == FINETUNE else 0
    estimate = estimate_seconds(stage, loop, images, bench.sizes.steps, rank, bench.chip)
    if not report.rows[TRAINING]:
        compiling = COMPILE_SECONDS
    report.row(
        row_name(weights, stage.name, what),
        estimate + compiling,
        partial(measure_loop, stage, loop, images, bench.sizes.steps, rank, bench.chip),
    )


def measure_extraction(report: Report, bench: Bench) -> None:
    """Encode decoded pictures, and JPEGs with all cores."""
    sizes = bench.sizes
    for tower in sizes.towers:
        settings = tower_settings(tower, "bf16", bench.device)
        name = Path(tower).stem
        report.row(f"{name}, decoded", 12, partial(encode_pixels, settings, *sizes.pixel_batches))
        report.row(f"{name}, {JPEGS}", 25, partial(encode_files, settings, sizes.files))


def measure_texts(report: Report, bench: Bench) -> None:
    """Generate with both kinds of weights."""
    for weights in (NF4, BF16):
        stage = bench.stage(weights, PRETRAIN)
        for batch in bench.sizes.generated_batches:
            make = partial(measure_generation, stage, batch, bench.sizes.generated_tokens)
            report.row(f"{weights}, {batch} texts", 8, make)


def measure_cards(report: Report, bench: Bench) -> None:
    """Train within the memory of smaller cards; nothing of this process is on the GPU any more."""
    bench.forget_models()
    sizes = bench.sizes
    training = Training(
        phi=sizes.phi,
        lora=sizes.lora,
        dtype=torch.bfloat16,
        passes=sizes.card_passes,
        device=bench.device.type,
        images=sizes.store_images,
        steps=sizes.card_steps,
    )
    for card in sizes.cards:
        report.row(card.name, CARD_SECONDS, partial(measure_card, card, training))


PARTS: dict[str, Callable[[Report, Bench], None]] = {
    CHIP: measure_chip,
    RIGHT: measure_right,
    TRAINING: measure_training,
    EXTRACTION: measure_extraction,
    GENERATION: measure_texts,
    COMPILED: measure_compiled,
    SIZES: measure_sizes,
    SMALL_CARDS: measure_cards,
}
"""In order of worth."""


def measure(path: Path, sizes: Sizes, device: torch.device, minutes: float) -> Report:
    """Measure all parts, as far as the time suffices.

    Args:
        path: The result file.
        sizes: How much is measured.
        device: The GPU, or the CPU to try the parts.
        minutes: Time budget.
    """
    about = {
        "setting": {
            "device": device.type,
            "minutes": minutes,
            "language_model": shape_of(sizes.phi),
            "lora": vars(sizes.lora),
            "patches": sizes.spec.patches,
            "width": sizes.spec.width,
            "steps": vars(sizes.steps),
        },
        "machine": machine(),
        "versions": versions(LIBRARIES),
    }
    report = Report(path, seconds=60 * minutes, about=about, conclude=conclude)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(sizes, device, Path(folder))
        for name, part in PARTS.items():
            with report.part(name):
                part(report, bench)
    return report


def run(arguments: argparse.Namespace) -> None:
    """Measure on the GPU, or try all parts on the CPU.

    Raises:
        SettingsError: There is no GPU.
    """
    if not 0 < arguments.minutes < math.inf:
        raise SettingsError(f"--minutes is {arguments.minutes:g}, wanted more than 0.")
    if arguments.out is not None and not arguments.out.is_dir():
        raise SettingsError(f"--out: {arguments.out} is no folder.")
    if arguments.dry_run:
        dry_run(arguments)
        return
    if not torch.cuda.is_available():
        raise SettingsError(
            "bench.gpu: torch finds no GPU here. Take --dry-run to try every part on the CPU."
        )
    path = (arguments.out or RESULTS) / f"gpu_{short_name(torch.cuda.get_device_name())}.json"
    print(f"gpu: takes about {arguments.minutes:g} min; {path} is written meanwhile", flush=True)
    report = measure(path, FULL, torch.device("cuda"), arguments.minutes)
    print_goals(conclude(report.rows)["goals"])
    print(f"gpu: written to {path}")


def dry_run(arguments: argparse.Namespace) -> None:
    """Try all parts on the CPU; the result file stays only where the user names a folder."""
    torch.set_num_threads(1)
    print("gpu: tries every part on the CPU, in one to three minutes; its figures mean nothing")
    with tempfile.TemporaryDirectory() as temporary:
        path = (arguments.out or Path(temporary)) / "gpu_dry_run.json"
        report = measure(path, DRY, torch.device("cpu"), arguments.minutes)
    failed = [
        f"{part}: {name}"
        for part, rows in report.rows.items()
        for name, row in rows.items()
        if "error" in row
    ]
    if failed:
        raise StageError(f"gpu: {len(failed)} rows failed: {'; '.join(failed)}.")
    print(f"gpu: every part ran{f'; {path}' if arguments.out else ''}")


def short_name(gpu: str) -> str:
    """Return a GPU's name as part of a file name: "NVIDIA H200" is "h200"."""
    return re.sub("[^a-z0-9]+", "_", gpu.lower().removeprefix("nvidia ")).strip("_")


def main() -> None:
    """Read the command line and measure."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "--dry-run", action="store_true", help="every part on the CPU, at tiny sizes"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="time budget (default: %(default)g)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="existing folder of the result file (default: bench/results; none with --dry-run)",
    )
    arguments = parser.parse_args()
    run_guarded(lambda: run(arguments))


if __name__ == "__main__":
    main()
