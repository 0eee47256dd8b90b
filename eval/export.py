"""Command: exports a finished run as a folder that transformers loads as LLaVA.

    python -m eval.export --run runs/finetune OUT

OUT gets the vision tower, the projector, the language model with LoRA merged, the processor with
its chat template, and a model card with the scores. A run that LLaVA cannot represent is refused
before the language model is loaded, and so is an OUT that is not empty.
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, GenerationConfig, LlavaConfig, PhiConfig
from transformers.utils import logging as transformers_logging

from cache.cli.command import command_parser, run_guarded
from cache.errors import SettingsError
from cache.files.atomic import sync, write_text
from cache.files.foreign import writing_foreign_file
from cache.spec import Spec
from eval.llava.card import model_card
from eval.llava.llava_phi import LlavaPhiForConditionalGeneration, PatchcacheImageProcessor
from eval.llava.processor import image_token_id, make_processor
from eval.llava.text import phi_config, plain_weights
from eval.llava.vision import clip_vision_config, clip_vision_weights
from eval.runs import PROJECTOR, FinishedRun, LoadedRun, load_run, open_run
from eval.settings import EvaluateSettings
from pipeline.encoding.encoder import load_encoder
from pipeline.settings import EncoderSettings
from train.model.attention import score_dtype
from train.model.language_model import DTYPES
from train.model.projector import Projector, read_projector
from train.settings import LlmSettings
from workspace.errors import StageError

MAX_SHARD = "2GB"
"""Largest file of weights. Saving needs about as much memory on top of the weights."""


@dataclass(frozen=True)
class LlavaParts:
    """All of an export but the language model's weights and the projector."""

    visual: nn.Module
    """open_clip's vision tower."""
    spec: Spec
    """Of the tower's features."""
    vision: CLIPVisionConfig
    text: PhiConfig
    image_token_id: int


def export(run: Path, out: Path) -> None:
    """Write a run as LLaVA.

    Args:
        run: Folder of a run of either stage.
        out: Folder to create.

    Raises:
        PatchcacheError: `out` is not empty, the run cannot be loaded, or LLaVA cannot represent it.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SettingsError(f"{out}: exists already. Wanted a new or empty folder.")
    opened = open_run(run)
    parts = load_parts(opened)
    opened.check_features(parts.spec, "the vision tower")
    trained = load_run(opened)
    settings = trained.params.section("evaluate", EvaluateSettings)
    model = build_model(trained, parts, settings)
    processor = make_processor(
        trained.tokenizer, parts.spec, parts.vision.patch_size, answers=trained.answers
    )
    with atomic_folder(out) as folder, writing_foreign_file(out):
        model.save_pretrained(folder, max_shard_size=MAX_SHARD)
        processor.save_pretrained(folder)
        write_text(folder / "README.md", model_card(trained, parts.spec, settings))
    print(f"export: {out}: {sum(path.stat().st_size for path in out.iterdir()) / 2**20:.1f} MiB")


def load_parts(run: FinishedRun) -> LlavaParts:
    """Load all parts but the language model.

    Raises:
        PatchcacheError: A part is missing, damaged, or of a kind that LLaVA does not have.
    """
    projector = read_projector(run.folder / PROJECTOR)
    if projector.kind != "mlp":
        raise StageError(
            f"{run.folder}: has a projector of kind {projector.kind!r}; LLaVA has only 'mlp' "
            f"(linear, GELU, linear). Set projector.kind to mlp, train again, and export that run."
        )
    if projector.pool != 1:
        raise StageError(
            f"{run.folder}: its projector averages squares of {projector.pool} x {projector.pool} "
            f"patches, and LLaVA gives the language model every patch. Set projector.pool to 1, "
            f"train again, and export that run."
        )
    text = phi_config(run.params.section("llm", LlmSettings))
    encoder = run.params.section("encoder", EncoderSettings)
    tower = load_encoder(dataclasses.replace(encoder, device="cpu"))
    visual = tower._visual
    vision = clip_vision_config(visual, encoder.model)
    return LlavaParts(visual, tower.spec, vision, text, image_token_id(run.tokenizer, text))


def build_model(
    trained: LoadedRun, parts: LlavaParts, settings: EvaluateSettings
) -> LlavaPhiForConditionalGeneration:
    """Build the LLaVA model of a run, on the CPU."""
    # Transformers' attention computes in the dtype of the weights, and Phi's overflows in float16.
    dtype = score_dtype(DTYPES[trained.params.section("llm", LlmSettings).dtype])
    config = LlavaConfig(
        vision_config=parts.vision,
        text_config=parts.text,
        image_token_index=parts.image_token_id,
        image_seq_length=parts.spec.patches,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=parts.spec.layer,
        vision_in_float32=parts.spec.precision == "fp32",
    )
    with torch.device("meta"):
        model = LlavaPhiForConditionalGeneration(config)
    model.load_state_dict(dict(_weights(trained, parts, dtype)), assign=True)
    eos = trained.tokenizer.eos_token_id
    unused = set(range(len(trained.tokenizer), parts.text.vocab_size))
    model.generation_config = GenerationConfig(
        max_new_tokens=settings.answer_tokens if trained.answers else settings.caption_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=eos,
        suppress_tokens=sorted(unused | {parts.image_token_id}),
    )
    return model


def _weights(
    trained: LoadedRun, parts: LlavaParts, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in clip_vision_weights(parts.visual):
        yield f"model.vision_tower.{name}", tensor
    projector: Projector = trained.model.projector
    for linear, module in (("linear_1", projector.layers[0]), ("linear_2", projector.layers[2])):
        for kind, tensor in module.state_dict().items():
            yield f"model.multi_modal_projector.{linear}.{kind}", tensor.cpu()
    for name, tensor in plain_weights(trained.model.language_model, dtype):
        inner = name.removeprefix("model.")
        yield name if inner == name else f"model.language_model.{inner}", tensor


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder that is renamed to `out` at the end, or removed after an error."""
    target = out.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    # mkdtemp gives mode 700; os.umask can only be read by setting it.
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    try:
        yield folder
        for path in folder.iterdir():
            sync(path)
        os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sync(target.parent)


def main() -> None:
    """Read the command line and export."""
    parser = command_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run: runs/finetune")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    run_guarded(lambda: export(arguments.run, arguments.out))


# Makes `save_pretrained` copy the module of these classes, and name them in the configs.
LlavaPhiForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
PatchcacheImageProcessor.register_for_auto_class("AutoImageProcessor")

if __name__ == "__main__":
    main()
