"""Every setting of every section is held by a law, or stands here with the reason why not."""

import dataclasses
import inspect

import pytest

import eval.settings
import pipeline.settings
import train.settings
import workspace.data_settings
from tests.eval import test_settings_law as of_evaluation
from tests.pipeline import test_settings_law as of_features
from tests.settings_law import has_a_choice, leaves
from tests.test_pipeline_definition import SECTIONS as CLASSES
from tests.train import test_settings_law as of_training
from workspace.settings import SECTIONS

FETCHED = "only the source coco reads it: tests/pipeline/test_fetch.py and test_download.py hold it"
INDEXED = (
    "a path: the index has the records of no other file, which tests/pipeline/test_index.py holds"
)
NO_LAW = {
    "data.source": "who makes the files, not what is in them: tests/pipeline/test_fetch.py",
    **{
        f"data.{split}.{name}": INDEXED
        for split in ("train", "val")
        for name in ("images", "images.path", "images.prefix", "captions")
    },
    "data.instruct": INDEXED,
    "data.instruct_holdout": "a share of random images: tests/pipeline/test_index.py",
    "data.follow_links": "what a folder with links holds: tests/pipeline/images/test_names.py",
    "data.split": "which split an image has: tests/pipeline/test_index.py",
    "data.val_share": "how many images are of split val: tests/pipeline/test_index.py",
    "data.max_reject_rate": "when the stage fails, not what it makes: tests/pipeline/test_index.py",
    "fetch.files.url": FETCHED,
    "fetch.files.path": FETCHED,
    "fetch.files.bytes": FETCHED,
    "fetch.files.sha256": FETCHED,
    "fetch.files.unpack": FETCHED,
    "llm.prompt": "which tokens stand around texts: tests/train/data/test_prompt_formats.py",
    "controls.trained_blind": "whether a stage trains anything: tests/train/test_control.py",
    "encoder.stream": "where the shards lie: tests/pipeline/test_stream.py",
    "extract.to": "where else the store goes: tests/pipeline/test_extract_to.py",
    "encoder.device": "where the work is done: tests/pipeline/encoding/test_engines.py",
}
"""Settings that no law changes."""

LAWS = (
    of_training.CHANGES
    | of_evaluation.CHANGES
    | of_evaluation.ONLY_ROUNDING
    | of_features.CHANGES
    | of_features.CHANGES_NOTHING
)
ALL = {leaf: wanted for name, cls in CLASSES.items() for leaf, wanted in leaves(cls, name).items()}


def test_every_section_and_class_of_settings_is_looked_at():
    assert {"seed", *CLASSES} == set(SECTIONS)
    modules = (workspace.data_settings, eval.settings, pipeline.settings, train.settings)
    declared = {
        field.name
        for module in modules
        for _, cls in inspect.getmembers(module, dataclasses.is_dataclass)
        for field in dataclasses.fields(cls)
    }
    named = {part for leaf in ALL for part in leaf.split(".")}
    assert declared <= named


@pytest.mark.parametrize("leaf", ALL)
def test_a_setting_is_held_by_a_law_or_has_a_reason(leaf):
    held = leaf in LAWS or not has_a_choice(ALL[leaf])
    assert held != (leaf in NO_LAW), f"{leaf}: change it in a law, or say in NO_LAW why not"


def test_no_law_is_about_a_setting_that_is_not_there():
    assert set(LAWS) | set(NO_LAW) <= {"seed", *ALL}
