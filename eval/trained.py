"""A finished run, loaded to be asked or taken away; says what a run directory must hold."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cache.errors import SettingsError, SpecMismatchError, StageError
from cache.files import naming
from cache.settings import Params
from cache.spec import Spec
from train.language_model import load_language_model, load_lora, load_tokenizer
from train.model import CaptionModel
from train.projector import read_projector
from train.run import pick_device
from train.settings import LlmSettings


@dataclass(frozen=True)
class Trained:
    """A run's model, and what it was made from."""

    folder: Path
    params: Params
    """Settings of the run, as they were when it was made."""
    provenance: dict[str, Any]
    model: CaptionModel
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


def load_run(folder: Path) -> Trained:
    """Load the model of a run directory of either stage.

    Raises:
        SettingsError: It is no run directory, or its language model cannot be loaded.
        StageError: A file of it is missing or damaged.
    """
    if not (folder / "params.yaml").is_file():
        raise SettingsError(
            f"{folder} is no run: it has no params.yaml. Wanted a folder like runs/finetune."
        )
    params = Params.read(folder / "params.yaml")
    llm = params.section("llm", LlmSettings)
    provenance = _provenance(folder / "provenance.json")
    projector = read_projector(folder / "projector.safetensors")
    device = pick_device()
    tokenizer = load_tokenizer(llm)
    language_model = load_language_model(llm, device)
    width = language_model.config.hidden_size
    if projector.text_width != width:
        raise StageError(
            f"{folder}: its projector maps to width {projector.text_width}, {llm.model} has "
            f"{width}: the model is not the one that the run was made with."
        )
    answers = (folder / "adapter").is_dir()
    if answers:
        load_lora(language_model, folder / "adapter")
    model = CaptionModel(projector.to(device), language_model).eval()
    return Trained(folder, params, provenance, model, tokenizer, answers)


def _provenance(path: Path) -> dict[str, Any]:
    try:
        with naming(path):
            values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise StageError(f"{path}: no provenance ({error}). Run the stage again.") from None
    if not isinstance(values, dict):
        raise StageError(f"{path}: no provenance: {type(values).__name__}. Run the stage again.")
    return values
