"""Checks the provenance of a run: whether it fits the current features and language model.

Weights trained on other features, or with another language model, load without complaint where
the widths agree, and are worthless.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cache import FeatureStore
from cache.errors import SpecMismatchError
from train.run import WEIGHTS, deciding_settings, index_hashes, weights_of
from workspace.errors import StageError
from workspace.json_files import read_json
from workspace.paths import RUNS
from workspace.settings import Params

LANGUAGE_MODEL = "language_model"
START_PROJECTOR = "start_projector_sha256"

PARTS = ("weights", "config", "tokenizer")
"""Parts of a language model's identity that must agree; its name need not."""

PROMPT, PHI = "prompt", "phi"
"""The prompt format, beside the parts; a run without an entry was trained in Phi-2's."""


def read_provenance(path: Path, remedy: str = "Run the stage again.") -> dict[str, Any]:
    """Read a run's provenance and check its weights files.

    Args:
        path: The run's provenance.json.
        remedy: Advice for the error text.

    Raises:
        StageError: No such file, no JSON object with a features fingerprint, or weights files that
            are not the run's own.
        OSError: The system could not read the file.
    """

    def refuse(detail: str) -> StageError:
        return StageError(f"{path}: no provenance ({detail}). {remedy}")

    values = read_json(path, refuse)
    if not isinstance(values.get("features_fingerprint"), str):
        raise refuse("it names no features_fingerprint")
    _check_weights(path, values.get(WEIGHTS), remedy)
    return values


def _check_weights(path: Path, hashes: Any, remedy: str) -> None:
    """Refuse a run with exchanged, missing or added weights files.

    Provenance of earlier versions has no hashes.
    """
    if hashes is None:
        return
    if not isinstance(hashes, dict):
        raise StageError(f"{path}: damaged: {WEIGHTS} is no object. {remedy}")
    here = weights_of(path.parent)
    for name in sorted(hashes.keys() | here.keys()):
        wanted, found = str(hashes.get(name, "no such file")), here.get(name, "no such file")
        if found != wanted:
            raise StageError(
                f"{path.parent / name}: sha256 {found[:12]}, but the run ended with {wanted[:12]}. "
                f"Bring the run's own files back. {remedy}"
            )


def provenance_of(
    stage: str, store: FeatureStore, language_model: Mapping[str, str]
) -> dict[str, Any]:
    """Return the provenance of a stage's run if it fits features and language model.

    Args:
        stage: Its name.
        store: The current features.
        language_model: Identity of the current language model.

    Raises:
        StageError: No provenance, or the run was trained with another language model.
        SpecMismatchError: The run was trained on other features.
    """
    path = RUNS / stage / "provenance.json"
    values = read_provenance(path, f"Run the {stage} stage.")
    learned_from = values["features_fingerprint"]
    if learned_from != store.fingerprint:
        raise SpecMismatchError(
            f"{path}: the run learned from features of fingerprint {learned_from[:12]}, "
            f"{store.root} has {store.fingerprint[:12]}. Run the {stage} stage again, or bring "
            f"back the features that it learned from."
        )
    check_language_model(path, values, language_model)
    return values


def changed_tables(values: Mapping[str, Any]) -> list[str]:
    """Return the names of the text tables that changed since a run.

    Args:
        values: The run's provenance; without hashes of tables, the result is empty.
    """
    before, now = values.get("index_sha256"), index_hashes()
    return [name for name in now if isinstance(before, dict) and before.get(name) != now[name]]


def changed_settings(stage: str, params: Params, sections: Sequence[str]) -> list[str]:
    """Return the settings in which a stage's run differs from the current ones, with both values.

    Args:
        stage: Its name; without the run's settings, the result is empty.
        params: The current settings.
        sections: Sections to compare.
    """
    path = RUNS / stage / "params.yaml"
    if not path.is_file():
        return []
    then, now = (deciding_settings(values, sections) for values in (Params.read(path), params))
    names = dict.fromkeys([*then, *now])
    return [f"{n} {then.get(n)} (now {now.get(n)})" for n in names if then.get(n) != now.get(n)]


def trained_prompt(values: Mapping[str, Any]) -> str:
    """Return the prompt format of a run: a name, and for others than Phi-2's a hash.

    Args:
        values: The run's provenance.
    """
    language_model = values.get(LANGUAGE_MODEL)
    found = language_model.get(PROMPT) if isinstance(language_model, dict) else None
    return found if isinstance(found, str) and found else PHI


def check_language_model(path: Path, values: Mapping[str, Any], here: Mapping[str, str]) -> None:
    """Refuse a language model other than the one that a run was trained with.

    Provenance of earlier versions does not name it: a warning, and the run is accepted.

    Args:
        path: Of the run's provenance.
        values: The provenance.
        here: Identity of the current language model.

    Raises:
        StageError: Names both models and the differing parts.
    """
    there = values.get(LANGUAGE_MODEL)
    if (was := trained_prompt(values)) != (now := here.get(PROMPT, PHI)):
        raise StageError(
            f"{path}: the run was trained with the prompt format {was[:18]}, llm.prompt gives "
            f"{now[:18]} here. Set llm.prompt: {was.split()[0]}, with the chat template that the "
            f"run had, or train both stages again."
        )
    if there is None:
        print(
            f"{path}: does not say beside which language model the run learned; cannot check that "
            f"it was {here['name']}",
            file=sys.stderr,
        )
        return
    named = ("name", *PARTS)
    if not isinstance(there, dict) or not all(isinstance(there.get(key), str) for key in named):
        raise StageError(
            f"{path}: damaged: {LANGUAGE_MODEL} wants {', '.join(named)}. Train again."
        )
    differing = [part for part in PARTS if there[part] != here[part]]
    if differing:
        parts = [f"{there[part][:12]} there, {here[part][:12]} here ({part})" for part in differing]
        raise StageError(
            f"{path}: the run learned beside the language model {there['name']}, llm.model is "
            f"{here['name']}, and they differ: {'; '.join(parts)}. Name the model that the run "
            f"learned beside, or train both stages again."
        )
