"""A finished run, loaded to be asked or taken away; says what a run directory must hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cache.errors import SettingsError, SpecMismatchError
from cache.spec import Spec
from train.model.captioner import CaptionModel
from train.model.fingerprint import language_model_identity
from train.model.language_model import load_language_model, load_lora, load_tokenizer
from train.model.model_files import read_config
from train.model.projector import read_projector
from train.provenance import check_language_model, read_provenance
from train.run import pick_device
from train.settings import LlmSettings
from workspace.errors import StageError
from workspace.settings import Params

PROJECTOR, ADAPTER = "projector.safetensors", "adapter"
"""Files of a run directory."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that fits its language model, before that is loaded."""

    folder: Path
    params: Params
    """Settings of the run, as they were when it was made."""
    provenance: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    answers: bool
    """Whether it was fine-tuned to answer; a run of stage 1 alone only captions."""

    def check_features(self, spec: Spec, where: str) -> None:
        """Refuse features other than those that the run learned from.

        Args:
            spec: Of the features.
            where: Who gives them, for the error text.

        Raises:
            SpecMismatchError: They are others.
        """
        wanted = self.provenance.get("features_fingerprint")
        if spec.fingerprint != wanted:
            raise SpecMismatchError(
                f"{where}: gives features of fingerprint {spec.fingerprint[:12]}, {self.folder} "
                f"learned from those of {str(wanted)[:12]}. Take the vision tower and the settings "
                f"of section encoder that the run was made with."
            )


@dataclass(frozen=True)
class LoadedRun(FinishedRun):
    """A run's model, and what it was made from."""

    model: CaptionModel


def open_run(folder: Path) -> FinishedRun:
    """Open a run directory of either stage, and check what needs no language model in memory.

    Raises:
        SettingsError: It is no run directory, or its language model cannot be loaded.
        StageError: A file of it is missing or damaged, or it belongs to another language model.
    """
    if not (folder / "params.yaml").is_file():
        raise SettingsError(
            f"{folder} is no run: it has no params.yaml. Wanted a folder like runs/finetune."
        )
    params = Params.read(folder / "params.yaml")
    llm = params.section("llm", LlmSettings)
    path = folder / "provenance.json"
    provenance = read_provenance(path)
    projector = read_projector(folder / PROJECTOR)
    tokenizer = load_tokenizer(llm)
    check_language_model(path, provenance, language_model_identity(llm, tokenizer))
    width = read_config(llm.model).hidden_size
    if projector.text_width != width:
        raise StageError(
            f"{folder}: its projector maps to width {projector.text_width}, {llm.model} has "
            f"{width}: the model is not the one that the run was made with."
        )
    return FinishedRun(folder, params, provenance, tokenizer, (folder / ADAPTER).is_dir())


def load_run(folder: Path, run: FinishedRun | None = None) -> LoadedRun:
    """Load the model of a run directory of either stage.

    Args:
        folder: The run directory.
        run: The same, where it has been opened already.

    Raises:
        SettingsError: It is no run directory, or its language model cannot be loaded.
        StageError: A file of it is missing or damaged, or it belongs to another language model.
    """
    run = run or open_run(folder)
    device = pick_device()
    language_model = load_language_model(run.params.section("llm", LlmSettings), device)
    projector = read_projector(folder / PROJECTOR)
    if run.answers:
        load_lora(language_model, folder / ADAPTER)
    model = CaptionModel(projector.to(device), language_model).eval()
    return LoadedRun(**vars(run), model=model)
