"""A score is said to be of another index or precision than the run's, and of nothing else."""

import pytest

from eval.changed_inputs import changed_inputs_warning

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
