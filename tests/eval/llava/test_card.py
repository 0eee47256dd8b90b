"""The model card shows the scores of its own run, beside those with the wrong image."""

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from ruamel.yaml import YAML
from transformers import LlamaConfig, PhiConfig

from eval.llava.card import model_card, read_score_report
from eval.llava.text import TextPart
from eval.score_warnings import RANDOM_TOWER
from tests.eval.llava.test_processor import spec
from workspace.errors import StageError
from workspace.settings import Params

SCORES = {
    "captions": {
        "CIDEr": 0.9, "stop_rate": 1.0, "count": 300,
        "intervals": {"CIDEr": [0.8, 1.0]},
        "blind": {"CIDEr": 0.1, "stop_rate": 1.0, "count": 300, "intervals": {"CIDEr": [0.0, 0.2]}},
    },
    "answers": {"exact_match": 0.75, "count": 9, "by_type": {}, "blind": {"exact_match": 0.25}},
    "pope": {"random": {"accuracy": 0.875, "count": 4, "blind": {"accuracy": 0.5}}},
    "pretrain_only": {"captions": {"CIDEr": 0.3, "count": 300, "blind": {"CIDEr": 0.125}}},
}  # fmt: skip
VALUES = {
    "data": {"source": "coco"},
    "encoder": {"model": "ViT-B-32-quickgelu", "pretrained": "openai", "layer": -2},
    "llm": {"model": "microsoft/phi-2", "quantize": "nf4", "dtype": "bf16"},
    "projector": {"kind": "mlp"},
}
PROVENANCE = {
    "finished_utc": "2026-03-01T08:00:00Z",
    "git_commit": "c0ffee",
    "index_sha256": {"captions.parquet": "abc"},
    "versions": {"torch": "9.9"},
    "device": "a GPU",
}
PHI = TextPart(PhiConfig(dtype="bfloat16"), has_bias=True, scale=1.0)
PROMPTS = SimpleNamespace(
    name="phi", tokenizer=SimpleNamespace(eos_token="<end>"), wording=SimpleNamespace(lead="")
)
LLAMA = TextPart(LlamaConfig(dtype="bfloat16"), has_bias=False, scale=1.0)
SETTINGS = SimpleNamespace(caption_question='What is "this"?')


@pytest.fixture
def run(tmp_path):
    """Make a run, and a report about a run whose projector has the bytes `scored`."""

    def make(answers=True, scores=SCORES, scored=b"", **changes):
        folder = tmp_path / "runs" / ("finetune" if answers else "pretrain")
        folder.mkdir(parents=True)
        (folder / "projector.safetensors").write_bytes(b"")
        if scores is not None:
            report = tmp_path / "reports" / "eval.json"
            report.parent.mkdir()
            hashes = {folder.name: {"projector.safetensors": hashlib.sha256(scored).hexdigest()}}
            if isinstance(scores, dict):
                scores = json.dumps(scores | {"weights_sha256": hashes})
            report.write_text(scores)
        values = VALUES | changes
        return SimpleNamespace(
            folder=folder, params=Params(Path("params.yaml"), "", values), answers=answers,
            provenance=PROVENANCE, prompt_format=PROMPTS,
        )  # fmt: skip

    return make


def card(trained, text=PHI, prompts_differ=False, **changes):
    return model_card(trained, spec(**changes), text, SETTINGS, prompts_differ=prompts_differ)


def header(text):
    _, yaml, _ = text.split("---\n", 2)
    return YAML(typ="safe").load(yaml)


def test_scores_stand_beside_the_wrong_image_control_with_intervals(run):
    text = card(run())
    assert "| captions | CIDEr | 0.900 (0.800 to 1.000) | 0.100 (0.000 to 0.200) |" in text
    assert "| answers | exact_match | 0.750 | 0.250 |" in text
    assert "| POPE random | accuracy | 0.875 | 0.500 |" in text
    assert "not evaluated" not in text


def test_a_run_of_stage_1_has_the_scores_of_stage_1_alone(run):
    text = card(run(answers=False))
    assert "| captions | CIDEr | 0.300 | 0.125 |" in text
    assert "exact_match" not in text
    assert "apply_chat_template" not in text


@pytest.mark.parametrize(
    "state", [{"scores": None}, {"scored": b"other"}, {"scores": "{}"}, {"scores": {}}]
)
def test_without_a_report_of_this_run_it_was_not_evaluated(run, state):
    text = card(run(**state))
    assert "It was not evaluated." in text
    assert "CIDEr" not in text


def test_a_kind_with_nothing_to_score_has_no_row(run):
    empty = {"captions": {"count": 0, "blind": {"count": 0}}, "pope": {}, "answers": None}
    assert "not evaluated" in card(run(scores=empty))


def test_a_damaged_report_is_an_error_of_one_line(run):
    with pytest.raises(StageError, match=r"eval\.json: no scores"):
        read_score_report(run(scores="{"))


def test_the_header_has_the_keys_of_the_hub(run):
    found = header(card(run()))
    assert found["base_model"] == "microsoft/phi-2"
    assert found["datasets"] == ["liuhaotian/LLaVA-Instruct-150K"]
    assert found["pipeline_tag"] == "image-text-to-text"
    assert "llava" in found["tags"]


def test_a_local_model_and_own_data_get_no_public_name(run, tmp_path):
    llm = {"model": str(tmp_path), "quantize": "none", "dtype": "fp32"}
    text = card(run(data={"source": "local"}, llm=llm))
    assert {"base_model", "datasets"}.isdisjoint(header(text))
    assert "NF4" not in text


def test_no_folder_of_this_machine_is_published(run, tmp_path):
    for name in ("my-phi", "my-tower.pt"):
        (tmp_path / name).mkdir()
    encoder = VALUES["encoder"] | {"pretrained": str(tmp_path / "my-tower.pt")}
    llm = VALUES["llm"] | {"model": f"{tmp_path}/my-phi/"}
    text = card(run(encoder=encoder, llm=llm))
    assert str(tmp_path) not in text
    assert "# ViT-B-32-quickgelu with my-phi\n" in text
    assert "`my-tower.pt`" in text
    settings = YAML(typ="safe").load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["encoder"] == encoder | {"pretrained": "my-tower.pt"}
    assert settings["llm"] == llm | {"model": "my-phi"}


@pytest.mark.parametrize("name", ["runs/finetune", "finetune", "."])
def test_the_report_is_found_however_the_run_is_named(run, tmp_path, monkeypatch, name):
    trained = run()
    monkeypatch.chdir(
        {"runs/finetune": tmp_path, "finetune": tmp_path / "runs"}.get(name, trained.folder)
    )
    trained.folder = Path(name)
    assert "0.900 (0.800 to 1.000)" in [row[2] for row in read_score_report(trained).rows]


def test_exact_match_over_no_short_target_has_no_row(run):
    answers = {"exact_match": 0.0, "token_f1": 0.5, "count": 9, "short_count": 0}
    text = card(run(scores={"answers": answers}))
    assert "| answers | token_f1 | 0.500 |  |" in text
    assert "exact_match" not in text


@pytest.mark.parametrize("scores", [SCORES, None])
def test_random_weights_of_the_tower_are_warned_of_beneath_the_title(run, scores):
    encoder = VALUES["encoder"] | {"pretrained": "random"}
    text = card(run(encoder=encoder, scores=scores))
    title = "# ViT-B-32-quickgelu with microsoft/phi-2"
    assert f"{title}\n\n**{RANDOM_TOWER}**\n\nA vision-language model" in text


def test_other_towers_get_no_warning(run):
    assert RANDOM_TOWER not in card(run())


def test_settings_without_a_source_of_data_name_none(run):
    assert 'the data source "unknown"' in card(run(data=5))


def test_the_card_shows_the_provenance(run):
    text = card(run())
    assert "- trained: 2026-03-01T08:00:00Z\n" in text
    for known in ("c0ffee", spec().fingerprint, "sha256 abc", "torch 9.9", "quantize: nf4"):
        assert known in text
    assert "LoRA was trained on top of NF4 weights" in text
    assert 'question = "What is \\"this\\"?"' in text


def test_only_a_model_with_code_of_ours_asks_for_trust(run):
    own = card(run())
    assert "trust_remote_code=True" in own
    assert "Phi's attention overflows" in own
    assert 'backend="pil"' not in own
    assert "phi" in header(own)["tags"]


def test_a_plain_model_says_what_transformers_does_otherwise(run):
    text = card(run(), LLAMA)
    for known in ('backend="pil"', "EXIF", "640 x 427", "loads all parts in bfloat16", "<end>"):
        assert known in text
    for foreign in ("trust_remote_code", "llava_phi", "Phi's"):
        assert foreign not in text
    assert "llama" in header(text)["tags"]


def test_squashed_pictures_are_not_cropped_and_float32_is_not_rounded(run):
    exact = dataclasses.replace(LLAMA, config=LlamaConfig(dtype="float32"))
    text = card(run(), exact, resize="squash")
    assert "640 x 427" not in text
    assert "loads all parts" not in text
    assert 'backend="pil"' in text


@pytest.mark.parametrize(
    ("precision", "parts"),
    [("fp32", "Vision tower and projector computed"), ("bf16", "The projector computed")],
)
def test_the_parts_that_bf16_rounds_are_named(run, precision, parts):
    assert parts in card(run(), LLAMA, precision=precision)


@pytest.mark.parametrize(
    ("name", "lead", "snippet"),
    [
        ("phi", "", "text = processor.image_token\n"),
        ("plain", "<s>", 'text = "\\u003cs\\u003e" + processor.image_token\n'),
        ("chat", "<s>", 'content": [{"type": "image"}]}'),
    ],
)
def test_a_caption_is_asked_for_in_the_format_of_training(run, name, lead, snippet):
    trained = run(answers=False)
    trained.prompt_format = SimpleNamespace(
        name=name, tokenizer=PROMPTS.tokenizer, wording=SimpleNamespace(lead=lead)
    )
    text = card(trained, LLAMA)
    assert snippet in text
    compile(text.split("```python\n")[1].split("```")[0], "README.md", "exec")


def test_the_tags_name_the_family_of_the_tower(run):
    text = card(run(), LLAMA, model="hf:siglip-0123abcd")
    assert header(text)["tags"] == ["llava", "llama", "siglip", "patchcache"]


def test_other_tokens_than_in_training_are_told(run):
    trained = run()
    assert "the start of a word" in card(trained, prompts_differ=True)
    assert "the start of a word" not in card(trained)


def data(**changes):
    train = {"images": "train", "captions": "x.json"}
    return {
        "source": "local", "train": train, "instruct_holdout": 0.5, "max_reject_rate": 0.0,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"val": {"images": "val"}}, "val2017"),
        ({"split": "karpathy"}, "karpathy"),
        ({"val": None}, "hash"),
    ],
)
def test_the_card_names_the_split_of_the_run_and_of_its_scores(run, changes, name):
    scores = SCORES | {"split": {"name": name, "captions": "test"}}
    text = card(run(scores=scores, data=data(**changes)))
    assert f"- split of the pictures: {name}\n" in text
    assert "Captions are of the pictures of split test.\n\n| task" in text


@pytest.mark.parametrize("split", [None, {}, {"captions": None}, {"captions": "| x |"}])
def test_a_split_that_is_not_known_is_not_named(run, split):
    scores = SCORES if split is None else SCORES | {"split": split}
    text = card(run(scores=scores))
    assert "split" not in text
    assert "can reach.\n\n| task" in text


@pytest.mark.parametrize("split", [5, [], {"captions": {}}, "x"])
def test_a_damaged_split_is_no_traceback(run, split):
    trained = run(scores=SCORES | {"split": split})
    with contextlib.suppress(StageError):
        assert read_score_report(trained).caption_split == ""
