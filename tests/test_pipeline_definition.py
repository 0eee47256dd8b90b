"""dvc.yaml, the settings files and the settings classes must tell the same story."""

import re
from pathlib import Path, PurePosixPath

import open_clip
import pytest
from ruamel.yaml import YAML

from eval.settings import EvaluateSettings
from pipeline.code import STAGES as CODE_STAGES
from pipeline.input_paths import named_paths
from pipeline.settings import EncoderSettings, ExtractSettings, FetchSettings
from train.model.projector import check_pool
from train.settings import (
    CheckpointSettings,
    FinetuneSettings,
    LlmSettings,
    PretrainSettings,
    ProjectorSettings,
    TrackingSettings,
)
from workspace.code_hash import PACKAGES
from workspace.control_settings import ControlsSettings
from workspace.data_settings import DataSettings
from workspace.settings import Params

ROOT = Path(__file__).parents[1]

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

SECTIONS = {
    "data": DataSettings,
    "fetch": FetchSettings,
    "encoder": EncoderSettings,
    "extract": ExtractSettings,
    "llm": LlmSettings,
    "projector": ProjectorSettings,
    "pretrain": PretrainSettings,
    "finetune": FinetuneSettings,
    "controls": ControlsSettings,
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
    assert STAGES["code"]["deps"] == [*PACKAGES, "params.yaml"]


def test_there_are_the_stages_and_their_code():
    assert list(STAGES) == ["code", *CODE_STAGES]


FILES = [ROOT / "params.yaml", *CONFIGS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_shipped_settings_file_fits_every_section(path):
    params = Params.read(path)
    assert params.seed() == 0
    for name, cls in SECTIONS.items():
        assert isinstance(params.section(name, cls), cls)
    assert set(params.values) == {"seed", *SECTIONS}


def test_there_is_a_ladder_of_whole_runs():
    assert [path.stem for path in CONFIGS] == ["coco", "coco_strong", "laptop"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_real_run_downloads_what_it_names_and_no_more(path):
    params = Params.read(path)
    data = params.section("data", DataSettings)
    assert data.source == "coco"
    files = params.section("fetch", FetchSettings).files
    assert all(item.sha256 for item in files)
    fetched = {
        f"{item.path}/{PurePosixPath(member).name}" if member else item.path
        for item in files
        for member in item.unpack or [""]
    }
    named = {path for _, path in named_paths(data)}
    # The yes-no questions are made of the objects in the images of split val.
    named.add(data.val.captions.replace("captions_", "instances_"))
    assert fetched == named


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_tower_of_a_real_run_is_known_to_open_clip_and_its_grid_can_be_pooled(path):
    params = Params.read(path)
    encoder = params.section("encoder", EncoderSettings)
    assert (encoder.model, encoder.pretrained) in open_clip.list_pretrained()
    vision = open_clip.get_model_config(encoder.model)["vision_cfg"]
    name = vision.get("timm_model_name", "")
    patch = vision.get("patch_size") or int(re.search("patch([0-9]+)", name)[1])
    num_patches = (vision["image_size"] // patch) ** 2
    pool = params.section("projector", ProjectorSettings).pool
    check_pool(pool, num_patches, str(path))
    text = path.read_text()
    assert f"images x {num_patches} patches x {vision.get('width', 768)} values" in text


def test_the_smallest_run_cuts_one_set_of_images():
    data = Params.read(ROOT / "configs/laptop.yaml").section("data", DataSettings)
    assert (data.split, data.train) == ("hash", data.val)
    assert "LLaVA" not in data.instruct


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


def test_dvc_runs_a_settings_file_without_the_section_that_may_be_absent():
    """DVC refuses a file that lacks a section of `params`."""
    assert not any("controls" in stage.get("params", ()) for stage in STAGES.values())


def test_a_training_setting_never_touches_the_features():
    for stage in ("fetch", "index", "extract"):
        tops = {key.split(".")[0] for key in STAGES[stage]["params"]}
        assert tops.isdisjoint({"pretrain", "finetune", "llm", "projector", "controls", "evaluate"})


def test_what_changes_no_number_makes_no_stage_run_again_but_code():
    named = {key.split(".")[0] for stage in STAGES.values() for key in stage.get("params", ())}
    assert named == {"seed", *SECTIONS} - {"checkpoints", "tracking", "controls"}
    assert [s for s in STAGES if "params.yaml" in STAGES[s]["deps"]] == ["code"]
