"""Scores on the Hub: what was measured with these weights, in the formats that the Hub reads."""

import pytest
from huggingface_hub import ModelCard, parse_eval_result_entries
from ruamel.yaml import YAML

from cache.errors import SettingsError
from eval.llava.card import to_yaml
from eval.llava.hub_results import benchmark_files, model_index, published_scores

SCORES = {
    "captions": {"CIDEr": 0.98765, "BLEU-4": 0.3, "count": 4990},
    "answers": {"exact_match": 0.0, "token_f1": 0.5, "count": 9, "short_count": 0},
    "pope_mean": {"f1": 0.8, "accuracy": 0.81, "count": 60, "subsets": ["popular", "random"]},
}
SPLIT = {"name": "karpathy", "captions": "test"}


def published(source="coco"):
    return list(published_scores(SCORES, SPLIT, source))


def test_only_what_was_measured_is_published_times_100():
    assert {score.name: score.value for score in published()} == {
        "captions.CIDEr": 98.77,
        "captions.BLEU-4": 30.0,
        "pope_mean.accuracy": 81.0,
        "pope_mean.f1": 80.0,
    }
    assert list(published_scores({"captions": {"CIDEr": 1.0, "count": 0}}, {}, "coco")) == []
    assert list(published_scores({"captions": None}, {}, "coco")) == []


def test_a_score_names_data_split_number_and_decoding():
    notes = {score.name: score.note for score in published()}
    assert notes["captions.CIDEr"] == (
        "CIDEr x 100: COCO 2017 captions, karpathy, split test, 4990 texts, greedy decoding"
    )
    assert notes["pope_mean.f1"] == (
        "POPE, mean F1 x 100 of popular, random: yes-no questions of POPE's kind of data source "
        "coco, karpathy, 60 texts, greedy decoding"
    )
    assert "captions of data source local" in published("local")[0].note


def test_the_hub_reads_the_index_of_the_card():
    header = {"library_name": "transformers"} | model_index("my model", published(), "coco")
    found = ModelCard(f"---\n{to_yaml(header)}---\n\n# x\n").data.eval_results
    assert {(r.metric_name, r.metric_value) for r in found} == {
        ("CIDEr x 100", 98.77),
        ("BLEU-4 x 100", 30.0),
        ("POPE, mean accuracy x 100", 81.0),
        ("POPE, mean F1 x 100", 80.0),
    }
    cider = next(r for r in found if r.metric_type == "cider")
    assert (cider.dataset_name, cider.dataset_split) == (
        "COCO 2017 captions",
        "karpathy, split test",
    )
    assert cider.metric_args == {"num_texts": 4990, "decoding": "greedy"}
    assert model_index("my model", [], "coco") == {}


def test_the_hub_reads_the_file_of_a_benchmark():
    named = ["captions.CIDEr=me/coco:karpathy", "pope_mean.f1=me/pope:default"]
    files = benchmark_files(named, published(), "2026-03-01T08:00:00Z")
    assert list(files) == ["me_coco_karpathy.yaml", "me_pope_default.yaml"]
    content = YAML(typ="safe").load(to_yaml(files["me_coco_karpathy.yaml"]))
    (entry,) = parse_eval_result_entries(content)
    assert (entry.dataset_id, entry.task_id, entry.value) == ("me/coco", "karpathy", 98.77)
    assert entry.date == "2026-03-01T08:00:00Z"
    assert entry.notes == published()[0].note


@pytest.mark.parametrize(
    ("benchmark", "reason"),
    [
        ("captions.CIDEr", "wanted SCORE=OWNER/DATASET:TASK"),
        ("captions.CIDEr=coco:test", "wanted SCORE=OWNER/DATASET:TASK"),
        ("captions.CIDEr=me/coco", "wanted SCORE=OWNER/DATASET:TASK"),
        ("captions.CIDEr=me/coco:a/b", "wanted SCORE=OWNER/DATASET:TASK"),
        ("captions.METEOR=me/coco:test", "captions.METEOR was not measured with these weights"),
        ("answers.exact_match=me/x:y", "answers.exact_match was not measured"),
    ],
)
def test_a_benchmark_without_a_score_is_refused(benchmark, reason):
    with pytest.raises(SettingsError, match=reason):
        benchmark_files([benchmark], published(), "")
