"""dvc.yaml, the settings files and the settings classes must tell the same story."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from eval.settings import EvaluateSettings
from pipeline.code import STAGES as CODE_STAGES
from pipeline.settings import EncoderSettings, ExtractSettings, FetchSettings
from train.settings import (
    CheckpointSettings,
    FinetuneSettings,
    LlmSettings,
    PretrainSettings,
    ProjectorSettings,
    TrackingSettings,
)
from workspace.code_hash import PACKAGES
from workspace.data_settings import DataSettings
from workspace.settings import Params

ROOT = Path(__file__).parents[1]

SECTIONS = {
    "data": DataSettings,
    "fetch": FetchSettings,
    "encoder": EncoderSettings,
    "extract": ExtractSettings,
    "llm": LlmSettings,
    "projector": ProjectorSettings,
    "pretrain": PretrainSettings,
    "finetune": FinetuneSettings,
    "evaluate": EvaluateSettings,
    "checkpoints": CheckpointSettings,
    "tracking": TrackingSettings,
}

STAGES = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("stage", sorted(STAGES.keys() - {"code"}))
def test_a_stage_depends_on_the_hash_of_its_code(stage):
    assert f"data/code/{stage}" in STAGES[stage]["deps"]
    assert STAGES[stage]["cmd"] == f"python -m {CODE_STAGES[stage][0]}"
    assert not any(dep.endswith(".py") for dep in STAGES[stage]["deps"])


def test_the_stage_code_depends_on_every_package():
    assert STAGES["code"]["deps"] == list(PACKAGES)


def test_there_are_the_six_stages_and_their_code():
    assert list(STAGES) == ["code", *CODE_STAGES]


FILES = ["params.yaml", *sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*"))]


def test_there_are_settings_files():
    assert "configs/coco.yaml" in FILES


@pytest.mark.parametrize("path", FILES)
def test_every_setting_that_names_a_dependency_is_in_a_shipped_settings_file(path):
    values = Params.read(ROOT / path).values
    named = re.findall(r"\$\{([\w.]+)\}", (ROOT / "dvc.yaml").read_text())
    assert len(named) > 5
    for key in named:
        found = values
        for part in key.split("."):
            found = found.get(part, {})
        assert isinstance(found, str), key


@pytest.mark.parametrize("path", FILES)
def test_a_shipped_settings_file_fits_every_section(path):
    params = Params.read(ROOT / path)
    assert params.seed() == 0
    for name, cls in SECTIONS.items():
        assert isinstance(params.section(name, cls), cls)
    assert set(params.values) == {"seed", *SECTIONS}


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_the_settings_of_a_stage_are_in_the_settings_file(stage):
    values = Params.read(ROOT / "params.yaml").values
    for key in STAGES[stage].get("params", ()):
        found = values
        for part in key.split("."):
            assert part in found, key
            found = found[part]


def test_all_stages_but_one_have_settings():
    assert [stage for stage in STAGES if "params" not in STAGES[stage]] == ["code"]


def test_a_training_setting_never_touches_the_features():
    for stage in ("fetch", "index", "extract"):
        tops = {key.split(".")[0] for key in STAGES[stage]["params"]}
        assert tops.isdisjoint({"pretrain", "finetune", "llm", "projector", "evaluate"})


def test_what_changes_no_number_makes_no_stage_run_again():
    named = {key.split(".")[0] for stage in STAGES.values() for key in stage.get("params", ())}
    assert named == {"seed", *SECTIONS} - {"checkpoints", "tracking"}
