"""dvc.yaml, the settings files and the imports must tell the same story."""

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from cache.data_settings import DataSettings
from cache.settings import Params
from eval.settings import EvaluateSettings
from pipeline.settings import EncoderSettings, ExtractSettings, FetchSettings
from train.settings import (
    CheckpointSettings,
    FinetuneSettings,
    LlmSettings,
    PretrainSettings,
    ProjectorSettings,
    TrackingSettings,
)

ROOT = Path(__file__).parents[1]

ALLOWED = {
    "cache": {"cache"},
    "pipeline": {"pipeline", "cache"},
    "train": {"train", "cache"},
    "eval": {"eval", "train", "pipeline", "cache"},
    "demo": {"demo", "pipeline", "train", "cache"},
    "bench": {"bench", "demo", "eval", "train", "pipeline", "cache"},
}

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

# The source demo runs the world in a process of its own, which no import shows.
STARTED = {"fetch": ["demo.world"]}
READ = {"extract": {"pipeline/probe_images"}, "evaluate": {"eval/page", "eval/report.html.j2"}}


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in ALLOWED}


def files_of(module: str) -> list[Path]:
    """The files that importing a module runs: its packages' and its own."""
    parts = module.split(".")
    paths = [ROOT.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)]
    return [path for path in [*paths, ROOT.joinpath(*parts).with_suffix(".py")] if path.exists()]


def code_behind(modules: list[str]) -> set[str]:
    seen: set[Path] = set()
    waiting = list(modules)
    while waiting:
        for path in files_of(waiting.pop()):
            if path not in seen:
                seen.add(path)
                waiting += imported_modules(path)
    return {str(path.relative_to(ROOT)) for path in seen}


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_stage_depends_on_exactly_the_code_that_it_runs(stage):
    module = STAGES[stage]["cmd"].removeprefix("python -m ")
    code = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    named = code | (READ.get(stage, set()) & set(STAGES[stage]["deps"]))
    assert named == code_behind([module, *STARTED.get(stage, [])]) | READ.get(stage, set())


def test_there_are_the_six_stages():
    wanted = ["fetch", "index", "extract", "pretrain", "finetune", "evaluate"]
    assert list(STAGES) == wanted


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_follow_the_data(package):
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths, f"{package}/ holds no Python file"
    for path in paths:
        for name in imported_modules(path):
            top = name.split(".")[0]
            assert top in ALLOWED[package], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", ["params.yaml", "configs/coco.yaml"])
def test_a_shipped_settings_file_fits_every_section(path):
    params = Params.read(ROOT / path)
    assert params.seed() == 0
    for name, cls in SECTIONS.items():
        assert isinstance(params.section(name, cls), cls)
    assert set(params.values) == {"seed", *SECTIONS}


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_the_settings_of_a_stage_are_in_the_settings_file(stage):
    values = Params.read(ROOT / "params.yaml").values
    for key in STAGES[stage]["params"]:
        found = values
        for part in key.split("."):
            assert part in found, key
            found = found[part]
    assert STAGES[stage]["params"]


def test_a_training_setting_never_touches_the_features():
    for stage in ("fetch", "index", "extract"):
        tops = {key.split(".")[0] for key in STAGES[stage]["params"]}
        assert tops.isdisjoint({"pretrain", "finetune", "llm", "projector", "evaluate"})


def test_what_changes_no_number_makes_no_stage_run_again():
    named = {key.split(".")[0] for stage in STAGES.values() for key in stage["params"]}
    assert named == {"seed", *SECTIONS} - {"checkpoints", "tracking"}
