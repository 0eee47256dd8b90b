"""From what a run was made, read back: whether it belongs to the features and the model here.

What was learned from other features, or beside other weights, loads without complaint where the
widths agree, and means nothing.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache import FeatureStore
from cache.errors import SpecMismatchError
from train.model.model_files import read_json
from train.run import WEIGHTS, index_hashes, weights_of
from workspace.errors import StageError
from workspace.paths import RUNS

LANGUAGE_MODEL = "language_model"
START_PROJECTOR = "start_projector_sha256"

PARTS = ("weights", "config", "tokenizer")
"""Of a language model's identity; its name is none of them."""


def read_provenance(path: Path, remedy: str = "Run the stage again.") -> dict[str, Any]:
    """Read what a run says of its origin.

    Args:
        path: The run's provenance.json.
        remedy: What to do without, for the error text.

    Raises:
        StageError: No such file, not a JSON object that names features, or the weights beside it
            are missing or others.
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
    """Refuse a run whose weights are not those that it ended with: exchanged, missing or added.

    The run of an earlier version does not name them.
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
    """Return the provenance of a stage's run, which belongs to the features and the model here.

    Args:
        stage: Its name.
        store: Features that are used now.
        language_model: Identity of the language model that is used now.

    Raises:
        StageError: No provenance, or the run learned beside another language model.
        SpecMismatchError: The run learned from other features.
    """
    path = RUNS / stage / "provenance.json"
    values = read_provenance(path, f"Run the {stage} stage.")
    learned_from = values["features_fingerprint"]
    if learned_from != store.fingerprint:
        raise SpecMismatchError(
            f"{path}: the run learned from features of fingerprint {learned_from[:12]}, "
            f"{store.root} has those of {store.fingerprint[:12]}. Run the {stage} stage again, or "
            f"bring the features back that it learned from."
        )
    check_language_model(path, values, language_model)
    return values


def changed_tables(values: Mapping[str, Any]) -> list[str]:
    """Return the names of the tables of texts that are not those that a run learned from.

    Args:
        values: The run's provenance; one without hashes of tables has none that changed.
    """
    there = values.get("index_sha256")
    here = index_hashes()
    return [name for name in here if isinstance(there, dict) and there.get(name) != here[name]]


def check_language_model(path: Path, values: Mapping[str, Any], here: Mapping[str, str]) -> None:
    """Refuse a language model other than the one that a run learned beside.

    The run of an earlier version does not name it: that is said, and believed.

    Args:
        path: Of the run's provenance.
        values: What it holds.
        here: Identity of the language model that is used now.

    Raises:
        StageError: Names both models, and what differs.
    """
    there = values.get(LANGUAGE_MODEL)
    if there is None:
        print(
            f"{path}: does not say beside which language model the run learned; cannot check that "
            f"it was {here['name']}",
            file=sys.stderr,
        )
        return
    if not isinstance(there, dict) or not all(isinstance(there.get(key), str) for key in here):
        raise StageError(f"{path}: damaged: {LANGUAGE_MODEL} wants {', '.join(here)}. Train again.")
    differing = [part for part in PARTS if there[part] != here[part]]
    if differing:
        named = [f"{there[part][:12]} there, {here[part][:12]} here ({part})" for part in differing]
        raise StageError(
            f"{path}: the run learned beside the language model {there['name']}, llm.model is "
            f"{here['name']}, and they differ: {'; '.join(named)}. Name the model that the run "
            f"learned beside, or train both stages again."
        )
