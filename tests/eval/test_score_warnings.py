"""Scores come with a warning after a change of index or precision, or with a random tower."""

import pytest

from eval.score_warnings import RANDOM_TOWER, changed_inputs_warning, random_tower_warning
from pipeline.settings import RANDOM
from workspace.settings import parse_yaml

REAL = {"encoder": {"pretrained": "openai"}}


def test_one_of_several_settings_is_enough():
    settings = parse_yaml("encoder: {model: ViT-B-32, pretrained: random}", "here")
    assert settings["encoder"]["pretrained"] == RANDOM
    for all_settings in ([settings], [settings, REAL], [REAL, {}, settings]):
        assert random_tower_warning(*all_settings) == RANDOM_TOWER


@pytest.mark.parametrize(
    "encoder", [None, 5, "random", ["random"], {}, {"model": "random"}, {"pretrained": "Random"}]
)
def test_nothing_else_is_a_tower_of_random_weights(encoder):
    assert random_tower_warning({"encoder": encoder}, REAL, {}) == ""


NF4, PLAIN = ({"llm": {"quantize": name, "dtype": "bf16"}} for name in ("nf4", "none"))
TABLES = {"captions.parquet": "a", "conversations.parquet": "b"}


@pytest.fixture(autouse=True)
def _tables(monkeypatch):
    monkeypatch.setattr("train.provenance.index_hashes", lambda: TABLES)


def warning(here=NF4, there=NF4, tables=TABLES):
    return changed_inputs_warning(
        here, {"pretrain": NF4, "finetune": there}, {"finetune": {"index_sha256": tables}}
    )


def test_where_nothing_changed_nothing_is_said():
    assert warning() == ""
    assert changed_inputs_warning(NF4, {"finetune": NF4}, {"finetune": {}}) == ""


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_changed_is_named(name):
    said = warning(tables=TABLES | {name: "other"})
    assert said.startswith(f"{name} changed after finetune was trained: images that it learned")


def test_another_precision_is_named():
    assert warning(here=PLAIN) == "llm.quantize is none, but finetune was trained with nf4."
