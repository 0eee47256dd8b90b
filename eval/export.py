"""Command: exports a finished run as a folder that transformers loads as LLaVA.

    python -m eval.export --run runs/finetune OUT
    python -m eval.export --run runs/finetune OUT --benchmark captions.CIDEr=OWNER/DATASET:TASK

OUT gets the vision tower, the projector, the language model with LoRA merged, the processor with
its chat template, and a model card with the scores. A run that LLaVA cannot represent is refused
before the language model is loaded, and so is an OUT that is not empty. --benchmark writes a score
into .eval_results/, where the Hub reads it as a result on a data set that it lists as a benchmark.
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers.utils import logging as transformers_logging

from cache.cli.command import command_parser, run_guarded
from cache.errors import SettingsError
from cache.files.atomic import sync, write_text
from cache.files.foreign import writing_foreign_file
from eval.llava.card import model_card, read_score_report, to_yaml
from eval.llava.hub_results import FOLDER, benchmark_files
from eval.llava.llava_phi import (
    LlavaPhiForConditionalGeneration,
    PatchcacheImageProcessor,
    UprightImageProcessor,
)
from eval.llava.model import LlavaParts, build_model, save_model
from eval.llava.processor import (
    IMAGE_TOKEN,
    make_processor,
    prompts_differ,
    with_image_token,
)
from eval.llava.text import text_part
from eval.llava.vision import vision_part
from eval.runs import PROJECTOR, FinishedRun, load_run, open_run
from eval.settings import EvaluateSettings
from pipeline.encoding.encoder import load_encoder
from pipeline.settings import EncoderSettings
from train.data.jinja_template import jinja_template
from train.model.language_model import DTYPES
from train.model.projector import read_projector
from train.run import FINISHED
from workspace.errors import StageError


def export(run: Path, out: Path, benchmarks: Sequence[str] = ()) -> None:
    """Write a run as LLaVA.

    Args:
        run: Folder of a run of either stage.
        out: Folder to create.
        benchmarks: Scores to publish, as `benchmark_files` takes them.

    Raises:
        PatchcacheError: `out` is not empty, the run cannot be loaded, or LLaVA cannot represent it.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SettingsError(f"{out}: exists already. Wanted a new or empty folder.")
    opened = open_run(run)
    parts = load_parts(opened)
    opened.check_features(parts.spec, "the vision tower")
    date = str(opened.provenance.get(FINISHED) or "")
    files = benchmark_files(benchmarks, read_score_report(opened).published, date)
    trained = load_run(opened)
    settings = trained.params.section("evaluate", EvaluateSettings)
    max_tokens = settings.answer_tokens if trained.answers else settings.caption_tokens
    model = build_model(trained.model, parts, DTYPES[trained.llm.dtype], max_tokens)
    # In a chat format a caption is asked for by a message without text; in the others by nothing.
    has_template = trained.answers or trained.prompt_format.name == "chat"
    template = jinja_template(trained.prompt_format, IMAGE_TOKEN) if has_template else None
    processor = make_processor(
        parts.tokenizer, parts.vision, parts.spec, template, own_code=parts.text.has_bias
    )
    differ = prompts_differ(processor, trained.prompt_format)
    card = model_card(trained, parts.spec, parts.text, settings, prompts_differ=differ)
    with atomic_folder(out) as folder, writing_foreign_file(out):
        save_model(model, folder)
        processor.save_pretrained(folder)
        write_text(folder / "README.md", card)
        for name, entries in files.items():
            (folder / FOLDER).mkdir(exist_ok=True)
            write_text(folder / FOLDER / name, to_yaml(entries))
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
    tokenizer = with_image_token(run.tokenizer)
    text = text_part(run.llm, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    encoder = run.params.section("encoder", EncoderSettings)
    tower = load_encoder(dataclasses.replace(encoder, device="cpu"))
    end_ids = run.prompt_format.end_ids
    return LlavaParts(tower.spec, vision_part(tower, encoder), text, tokenizer, end_ids)


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
    parser.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="SCORE=DATASET:TASK",
        help="a score to publish as a result on a benchmark of the Hub; may be repeated",
    )
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    run_guarded(lambda: export(arguments.run, arguments.out, arguments.benchmark))


# Makes `save_pretrained` copy the module of these classes, and name them in the configs.
LlavaPhiForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
UprightImageProcessor.register_for_auto_class("AutoImageProcessor")
PatchcacheImageProcessor.register_for_auto_class("AutoImageProcessor")

if __name__ == "__main__":
    main()
