"""Finished runs: opened and checked against features and language model, then loaded.

Says what a run directory must hold. Opening needs no language model in memory, so that a run that
does not fit is found before hours or gigabytes are spent on it.
"""

import contextlib
import csv
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cache import FeatureStore
from cache.errors import SettingsError, SpecMismatchError
from cache.files.atomic import check_ordinary, sha256_of
from cache.files.foreign import reading_foreign_file
from cache.spec import Spec
from cache.texts import first_few
from train.data.prompt_formats import prompt_format
from train.data.prompts import PromptFormat
from train.model.captioner import CaptionModel
from train.model.fingerprint import language_model_identity
from train.model.language_model import load_language_model, load_lora, load_tokenizer
from train.model.model_files import read_config
from train.model.projector import Projector, check_pool, read_projector
from train.provenance import (
    LANGUAGE_MODEL,
    START_PROJECTOR,
    changed_settings,
    check_language_model,
    read_provenance,
    trained_prompt,
)
from train.run import CONTROL_OF, FINISHED, NO_IDENTITY, UNTRAINED, pick_device
from train.settings import CONTROL, LlmSettings
from train.stages.untrained import REASONS
from workspace.errors import StageError
from workspace.json_files import read_json
from workspace.paths import RUNS
from workspace.settings import Params

STAGES = ("pretrain", "finetune")
SAME_IN_CONTROL = ("features_fingerprint", LANGUAGE_MODEL, START_PROJECTOR, "index_sha256")
"""Entries of the provenance that a stage and its control share."""

PROJECTOR, ADAPTER, PROVENANCE = "projector.safetensors", "adapter", "provenance.json"
"""Files of a run directory."""


@dataclass(frozen=True)
class FinishedRun:
    """A run directory that fits its language model, which is not loaded yet."""

    folder: Path
    params: Params
    """The settings with which the run was made."""
    llm: LlmSettings
    """How its language model is to be loaded."""
    provenance: dict[str, Any]
    prompt_format: PromptFormat
    projector: Projector
    answers: bool
    """Whether the run was fine-tuned to answer; a run of stage 1 only captions."""
    is_trained: bool
    """Whether the run made any step; a stage without texts makes none."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The language model's tokenizer."""
        return self.prompt_format.tokenizer

    def check_features(self, spec: Spec, where: str) -> None:
        """Refuse features other than those that the run learned from.

        Args:
            spec: Spec of the features.
            where: Their source, for the error text.

        Raises:
            SpecMismatchError: Their fingerprint is another one.
            StageError: The projector takes another width.
            SettingsError: The projector's pool does not divide their grid.
        """
        wanted = self.provenance.get("features_fingerprint")
        if spec.fingerprint != wanted:
            raise SpecMismatchError(
                f"{where}: gives features of fingerprint {spec.fingerprint[:12]}, {self.folder} "
                f"learned from those of {str(wanted)[:12]}. Take the vision tower and the settings "
                f"of section encoder that the run was made with, or train again."
            )
        if self.projector.vision_width != spec.width:
            raise StageError(
                f"{self.folder / PROJECTOR}: maps width {self.projector.vision_width} to "
                f"{self.projector.text_width}, wanted {spec.width} (features). Run the stage again."
            )
        check_pool(self.projector.pool, spec.patches, str(self.folder / PROJECTOR))


@dataclass(frozen=True)
class LoadedRun(FinishedRun):
    """A finished run with its model."""

    model: CaptionModel


def open_run(folder: Path) -> FinishedRun:
    """Open a run directory of either stage and check it against its own language model.

    A run of stage 2 that had no conversations is like the run of stage 1 that it started from.

    Raises:
        SettingsError: The folder is no run, or its language model cannot be loaded.
        StageError: A file is missing or damaged, the projector is untrained, or the run belongs to
            another language model.
    """
    if not (folder / "params.yaml").is_file():
        raise SettingsError(
            f"{folder} is no run: it has no params.yaml. Wanted a folder like runs/finetune."
        )
    llm = Params.read(folder / "params.yaml").section("llm", LlmSettings)
    if llm.prompt == "auto":
        # A run from before there were formats is in Phi-2's, whatever `auto` means today.
        trained_in = trained_prompt(read_provenance(folder / PROVENANCE)).split()[0]
        llm = replace(llm, prompt="phi" if trained_in == "phi" else "auto")
    prompts = _load_prompts(llm)
    run = _open(folder, llm, prompts, _identity(llm, prompts))
    if not run.is_trained and START_PROJECTOR not in run.provenance:
        raise StageError(
            f"{folder}: its projector has random weights, because "
            f"{REASONS['pretrain']}. Name a run that was trained, like {RUNS / 'finetune'}."
        )
    return run


def open_stages(
    llm: LlmSettings, store: FeatureStore, stages: Collection[str] = STAGES
) -> dict[str, FinishedRun]:
    """Open the runs of stages and check them against features, language model and each other.

    Args:
        llm: The language model that they are evaluated with.
        store: The features that they are evaluated with.
        stages: The stages.

    Returns:
        Stage to run, in the order of `STAGES`.

    Raises:
        SettingsError: A run's settings are missing or damaged, or there is no such language model.
        SpecMismatchError: A run learned from other features.
        StageError: A file is missing or damaged, or a run belongs to another language model or to
            another stage 1.
    """
    prompts = _load_prompts(llm)
    identity = _identity(llm, prompts)
    runs = {
        stage: _open(RUNS / stage, llm, prompts, identity) for stage in STAGES if stage in stages
    }
    for run in runs.values():
        run.check_features(store.spec, str(store.root))
    if len(runs) == len(STAGES):
        _check_same_start(runs["pretrain"], runs["finetune"])
    return runs


def open_control(runs: Mapping[str, FinishedRun]) -> FinishedRun | None:
    """Open the control of the last trained stage, and check that it differs in nothing but sight.

    Args:
        runs: Stage to run, as `open_stages` returns them.

    Returns:
        None if no control was trained, or that of a stage which is not evaluated.

    Raises:
        SettingsError: The control's settings are damaged.
        StageError: A file is missing or damaged, or the control learned other texts, with other
            settings, or from another start than the stage.
    """
    folder = RUNS / CONTROL
    if not (folder / "params.yaml").is_file():
        return None
    found = read_provenance(folder / PROVENANCE)
    trained = [stage for stage, run in runs.items() if run.is_trained]
    if not trained or found.get(CONTROL_OF) in [name for name in STAGES if name not in runs]:
        # The stage is not evaluated.
        return None
    stage, twin = trained[-1], runs[trained[-1]]
    wanted = {CONTROL_OF: stage} | {name: twin.provenance.get(name) for name in SAME_IN_CONTROL}
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if found.get(LANGUAGE_MODEL) is None:
        differing.append(LANGUAGE_MODEL)
    changed = changed_settings(CONTROL, twin.params, ("seed", "llm", "projector", stage))
    differing += [text for text in changed if not text.split()[0].endswith(NO_IDENTITY)]
    if (folder / ADAPTER).is_dir() != twin.answers:
        differing.append(ADAPTER)
    if differing:
        raise StageError(
            f"{folder}: is no control of {twin.folder}: they differ in {first_few(differing)}. Run "
            f"the control stage again."
        )
    return _open(folder, twin.llm, twin.prompt_format, found[LANGUAGE_MODEL])


def load_run(run: FinishedRun) -> LoadedRun:
    """Load the model of a run of either stage.

    Raises:
        SettingsError: The language model cannot be loaded.
        StageError: The adapter is missing, damaged, or does not fit the language model.
    """
    device = pick_device()
    language_model = load_language_model(run.llm, device)
    if run.answers:
        load_lora(language_model, run.folder / ADAPTER)
    model = CaptionModel(run.projector.to(device), language_model).eval()
    return LoadedRun(**vars(run), model=model)


def read_history(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run's history.csv, without their empty cells.

    Raises:
        StageError: The file is missing, or no table of numbers.
    """
    path = folder / "history.csv"

    def refuse(detail: str) -> StageError:
        return StageError(f"{path}: no history ({detail}). Run the {folder.name} stage.")

    check_ordinary(path, refuse)
    with (
        reading_foreign_file(refuse, path),
        path.open(newline="", encoding="utf-8") as file,
    ):
        rows = csv.DictReader(file)
        if "step" not in (rows.fieldnames or ()):
            raise ValueError("it has no column step")
        return [{k: float(v) for k, v in row.items() if v} for row in rows]


def read_trained_on(folder: Path) -> dict[str, int]:
    """Return how many images and texts a run learned from; empty if the run does not say it.

    Raises:
        StageError: `metrics.json` is damaged.
    """
    path = folder / "metrics.json"
    if not path.exists():
        return {}

    def refuse(detail: str) -> StageError:
        return StageError(f"{path}: {detail}. Run the {folder.name} stage.")

    metrics = read_json(path, refuse)
    names = ("images", "texts")
    found = {name: n for name in names if type(n := metrics.get(name)) is int and n > 0}
    return found if len(found) == len(names) else {}


def finish_times(runs: Mapping[str, FinishedRun]) -> dict[str, str]:
    """Return when each stage's run was finished, as ISO 8601.

    Args:
        runs: Stage to its run; a run of an earlier version has no time, and is left out.
    """
    times = {}
    for stage, run in runs.items():
        with contextlib.suppress(KeyError, TypeError, ValueError):
            # Refuses anything but a time.
            datetime.fromisoformat(run.provenance[FINISHED])
            times[stage] = run.provenance[FINISHED]
    return times


def _load_prompts(llm: LlmSettings) -> PromptFormat:
    return prompt_format(llm, load_tokenizer(llm), read_config(llm.model))


def _identity(llm: LlmSettings, prompts: PromptFormat) -> dict[str, str]:
    return language_model_identity(llm, prompts.tokenizer) | prompts.identity()


def _open(
    folder: Path, llm: LlmSettings, prompts: PromptFormat, language_model: Mapping[str, str]
) -> FinishedRun:
    params = Params.read(folder / "params.yaml")
    path = folder / PROVENANCE
    provenance = read_provenance(path)
    check_language_model(path, provenance, language_model)
    projector = read_projector(folder / PROJECTOR)
    width = read_config(llm.model).hidden_size
    if projector.text_width != width:
        raise StageError(
            f"{folder}: its projector maps to width {projector.text_width}, {llm.model} has "
            f"{width}: the model is not the one that the run was made with."
        )
    return FinishedRun(
        folder=folder,
        params=params,
        llm=llm,
        provenance=provenance,
        prompt_format=prompts,
        projector=projector,
        answers=(folder / ADAPTER).is_dir(),
        is_trained=not provenance.get(UNTRAINED),
    )


def _check_same_start(pretrain: FinishedRun, finetune: FinishedRun) -> None:
    """Refuse a stage 1 whose scores would be shown as the start of stage 2, but are not."""
    path = pretrain.folder / PROJECTOR
    wanted, found = finetune.provenance.get(START_PROJECTOR), sha256_of(path)
    if wanted not in (None, found):
        raise StageError(
            f"{path}: sha256 {found[:12]}, but {finetune.folder} started from a projector of "
            f"{str(wanted)[:12]}. Run the finetune stage again, or bring the runs/pretrain back "
            f"that it started from."
        )
