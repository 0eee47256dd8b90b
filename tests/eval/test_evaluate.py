import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import eval.evaluate
from cache.errors import PatchcacheError, SettingsError, SpecMismatchError
from cache.files.atomic import sha256_of
from eval.compare import compare
from eval.evaluate import evaluate
from eval.llava.card import read_score_report
from eval.runs import STAGES, open_run
from eval.score import score
from eval.score_warnings import RANDOM_TOWER
from eval.scoring.answers import exact_match
from eval.scoring.conditions import Noise, other_images
from eval.scoring.predictions import SCHEMA
from eval.scoring.score_names import CONTROLS
from tests.conftest import sign_weights
from tests.eval.conftest import LEARNED_FROM
from tests.eval.picture_world import change_tensor
from tests.eval.report.report_page import Page
from train.data.examples import read_questions
from train.data.prompt_formats import phi_format
from train.finetune import finetune
from train.model.captioner import CaptionModel
from train.model.generate import generate
from train.model.language_model import load_language_model, load_lora, load_tokenizer
from train.model.projector import load_projector, seeded_projector
from train.pretrain import pretrain
from train.run import index_hashes
from train.settings import LlmSettings
from workspace.errors import StageError
from workspace.stage import run_stage

pytestmark = pytest.mark.slow("runs the whole evaluation")

SCORES, TABLE, RESULTS, LIST, PAGE = (
    Path("reports", name)
    for name in (
        "eval.json",
        "predictions.parquet",
        "captions_results.json",
        "contamination.json",
        "index.html",
    )
)
FORM = {"stop_rate", "repeated_4grams", "mean_tokens", "count"}
CAPTION = {"CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "mean_words"} | FORM
ANSWER = {"exact_match", "token_f1", "ROUGE-L", "loss"} | FORM
POPE = {"accuracy", "precision", "recall", "f1", "yes_rate"} | FORM
NOTHING = {"count": 0, **{control: {"count": 0} for control in CONTROLS}, "without_features": 0}
NO_ANSWERS = NOTHING | {"too_long": 0}
QUANTIZE = [("none", "fp32"), ("nf4", "fp32"), ("nf4", "bf16")]
VAL, HOLDOUT = range(112, 116), range(116, 120)
NOW = "2026-03-02T10:00:00Z"
"""When an evaluation is finished, where a test compares pages."""
GONE = "The picture is not on this machine."


def scores():
    return json.loads(SCORES.read_text())


def rows(model=None, kind=None):
    return [
        row
        for row in pq.read_table(TABLE).to_pylist()
        if model in (None, row["model"]) and kind in (None, row["kind"])
    ]


def write_index(world, captions=None, conversations=None):
    """Replace the texts of val and of the holdout; of other images nothing is asked."""
    if captions is None:
        captions = [(i, "a red cat in the box") for i in VAL]
    if conversations is None:
        conversations = [(i, [("how many", "two")]) for i in HOLDOUT]
    world.workspace.write_index(
        [(i, "val", text) for i, text in captions],
        [(i, "holdout", turns) for i, turns in conversations],
    )
    # As if the runs had learned from them.
    for path in Path("runs").glob("*/provenance.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"index_sha256": index_hashes()}))


def printed(capsys):
    """The first word of each line."""
    return [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]


def rewrite_provenance(stage, change):
    path = Path("runs", stage, "provenance.json")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def one_line(caught):
    return "\n" not in str(caught.value)


def write_pope(rows):
    """Write yes-no questions: (image, subset, question, label)."""
    table = [
        {"question_id": str(n), "image_id": i, "subset": s, "question": q, "label": label}
        for n, (i, s, q, label) in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(table), "data/index/pope.parquet")


ASKED = [
    (112, "popular", "Is there a cat", "yes"),
    (112, "popular", "Is there a box", "no"),
    (113, "popular", "Is there a dog", "yes"),
    (112, "random", "Is there a cat", "yes"),
    (112, "random", "Is there a dog", "no"),
]


def test_every_promised_score_is_there_and_every_control_has_it_too(world):
    write_pope(ASKED)
    evaluate(world.params())
    found = scores()
    names = {"pretrain": ["projector"], "finetune": ["adapter/adapter_model", "projector"]}
    assert found["weights_sha256"] == {
        stage: {
            f"{name}.safetensors": sha256_of(Path(f"runs/{stage}/{name}.safetensors"))
            for name in names[stage]
        }
        for stage in names
    }
    sections = {"captions", "answers", "pope", "pretrain_only", "contamination"}
    assert found.keys() == sections | {
        "pope_mean",
        "weights_sha256",
        "split",
        "decoding",
        "trained",
        "trained_on",
    }
    assert found["decoding"] == "greedy"
    assert found["split"] == {"name": "val2017", "captions": "val"}
    assert found["trained"] == {"pretrain": True, "finetune": True}
    assert found["trained_on"] == dict.fromkeys(("pretrain", "finetune"), LEARNED_FROM)
    answers = found["answers"]
    assert found["pope"].keys() == {"popular", "random"}
    assert answers["by_type"].keys() == {"what", "how many"}
    sections = {
        "captions": (found["captions"], CAPTION, 4),
        "answers": (answers, ANSWER, 8),
        "stage 1": (found["pretrain_only"]["captions"], CAPTION, 4),
        "what": (answers["by_type"]["what"], ANSWER - {"loss"}, 4),
        "popular": (found["pope"]["popular"], POPE, 3),
        "random": (found["pope"]["random"], POPE, 2),
        "mean": (found["pope_mean"], POPE, 5),
    }
    for section, keys, count in sections.values():
        others = section.keys() - keys - set(CONTROLS) - {"subsets"}
        beside = {"intervals", "gains", "without_features", "too_long", "short_count", "by_type"}
        assert others <= beside
        for one in (section, *(section[control] for control in CONTROLS)):
            assert keys <= one.keys()
            assert one["count"] == count
            assert all(np.isfinite(one[key]) for key in keys)
            assert one["intervals"].keys() == keys - {"count"}


def test_loss_and_answers_are_about_the_images_that_are_asked_about(world):
    write_index(world, conversations=[(i, [("how many", f"{i}" * (i - 115))]) for i in HOLDOUT])
    evaluate(world.params(seed=2, evaluate={"questions": 2}))
    asked = {row["image_id"] for row in rows(kind="answer")}
    found = scores()["answers"]
    assert abs(found["loss"] - found["blind"]["loss"]) > 1e-4
    write_index(
        world, conversations=[(i, [("how many", f"{i}" * (i - 115))]) for i in sorted(asked)]
    )
    evaluate(world.params(seed=2))
    assert len(asked) == 2
    assert scores()["answers"] == found


def test_every_text_is_one_row_of_the_table(world):
    evaluate(world.params())
    assert pq.read_schema(TABLE).equals(SCHEMA)
    found = [(r["model"], r["kind"], r["image_id"], r["question"], r["targets"]) for r in rows()]
    captions = ["a red cat in the box", "a blue dog in the box"]
    turns = [("What is on the box", "a red cat"), ("how many", "the dog")]
    assert found == (
        [("pretrain", "caption", i, "", captions) for i in VAL]
        + [("finetune", "caption", i, "What is in the box", captions) for i in VAL]
        + [("finetune", "answer", i, q, [a]) for i in HOLDOUT for q, a in turns]
    )
    for model, kind, section in (
        ("pretrain", "caption", scores()["pretrain_only"]["captions"]),
        ("finetune", "caption", scores()["captions"]),
        ("finetune", "answer", scores()["answers"]),
    ):
        made = rows(model, kind)
        assert section["count"] == len(made)
        assert section["stop_rate"] == np.mean([r["stopped"] for r in made])
        assert section["mean_tokens"] == np.mean([r["num_tokens"] for r in made])
        assert {row["split"] for row in made} == {"val" if kind == "caption" else "holdout"}
        main = "CIDEr" if kind == "caption" else "exact_match"
        assert section[main] == pytest.approx(np.mean([r["score"] for r in made]))


@pytest.mark.parametrize(
    ("quantize", "dtype", "pool"), [*((*kind, 1) for kind in QUANTIZE), ("none", "fp32", 2)]
)
def test_stage_1_is_asked_without_lora_and_stage_2_with_it_whatever_is_shown(
    world, quantize, dtype, pool
):
    llm = {"quantize": quantize, "dtype": dtype}
    for stage, seed in (("pretrain", 1), ("finetune", 2)):
        world.write_run(stage, seed, pool, **llm)
    evaluate(world.params(llm=llm, evaluate={"caption_tokens": 12}))
    settings = LlmSettings(model=str(world.workspace.phi_dir), **llm)
    ids, others = list(VAL), other_images(list(VAL), world.store)
    shown = {
        "prediction": (world.store, ids),
        "blind_prediction": (world.store, [others[i] for i in ids]),
        "noise_prediction": (Noise(world.store, 0), ids),
        "untrained_prediction": (world.store, ids),
    }
    said = {}
    for stage, question in (("pretrain", None), ("finetune", "What is in the box")):
        language_model = load_language_model(settings, torch.device("cpu"))
        if stage == "finetune":
            load_lora(language_model, Path("runs/finetune/adapter"))
        for column, (features, image_ids) in shown.items():
            projector = load_projector(Path(f"runs/{stage}/projector.safetensors"), 8, 64)
            if column == "untrained_prediction":
                projector = seeded_projector("mlp", 8, 64, 0, pool)
            made = generate(
                CaptionModel(projector, language_model), phi_format(load_tokenizer(settings)),
                features, image_ids, [question] * 4,
                max_tokens=12, batch_size=3, description="test",
            )  # fmt: skip
            said[stage, column] = [generation.text for generation in made]
            assert [row[column] for row in rows(stage, "caption")] == said[stage, column]
    assert said["pretrain", "prediction"] != said["finetune", "prediction"]
    assert len({tuple(said["finetune", column]) for column in shown}) == 4


def test_two_runs_give_the_same_bytes(world):
    made = []
    for _ in range(2):
        torch.manual_seed(len(made))
        evaluate(world.params(), now=lambda: NOW)
        # Parquet too: the table has no time in it.
        made.append([path.read_bytes() for path in (SCORES, TABLE, RESULTS, LIST, PAGE)])
        shutil.rmtree("reports")
    assert made[0] == made[1]


def test_the_scores_and_texts_hold_no_time_and_the_page_only_when_it_was_made(world):
    made = []
    for now in (NOW, "2027-12-31T23:59:59Z"):
        evaluate(world.params(), now=lambda now=now: now)
        files = {path: path.read_bytes() for path in (SCORES, TABLE, RESULTS, LIST)}
        page = PAGE.read_text(encoding="utf-8")
        assert page.count(now) == 2
        made.append(files | {PAGE: page.replace(now, NOW)})
    assert made[0] == made[1]


def test_the_page_says_when_the_runs_and_the_evaluation_were_finished(world):
    for stage, time in (("pretrain", "2026-03-01T08:00:00Z"), ("finetune", "2026-03-01T09:00:00Z")):
        rewrite_provenance(stage, lambda values, time=time: values | {"finished_utc": time})
    evaluate(world.params(), now=lambda: NOW)
    assert [a["datetime"] for a in Page(PAGE.read_text()).named("time")] == [
        NOW,
        "2026-03-01T08:00:00Z",
        "2026-03-01T09:00:00Z",
    ]


@pytest.mark.parametrize("value", [None, 5, ["2026"], {"a": 1}, "", "yesterday", "9" * 5000])
def test_a_run_that_does_not_say_when_it_was_finished_has_no_time_on_the_page(world, value):
    rewrite_provenance("pretrain", lambda values: values | {"finished_utc": value})
    rewrite_provenance("finetune", lambda values: {k: values[k] for k in values if "utc" not in k})
    evaluate(world.params(), now=lambda: NOW)
    assert [a["datetime"] for a in Page(PAGE.read_text()).named("time")] == [NOW]


def test_the_page_names_every_picture_by_its_file(world):
    evaluate(world.params())
    page = Page(PAGE.read_text(encoding="utf-8"))
    shown = {a["alt"] for a in page.named("img")}
    assert shown == {f"Picture {i} ({i}.jpg)" for i in (*VAL, *HOLDOUT)}
    for i in (*VAL, *HOLDOUT):
        named = [n for n, text in enumerate(page.texts) if text == f"Picture {i}"]
        assert named
        assert all(f"{i}.jpg" in page.texts[n : n + 8] for n in named)


def random_tower(world, where):
    """Settings of this evaluation; they, or those of one run, name a tower of random weights."""
    encoder = {"model": "ViT-B-32", "pretrained": "random"}
    if where in ("pretrain", "finetune"):
        path = Path("runs", where, "params.yaml")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"encoder": encoder}))
    return {"encoder": encoder} if where == "evaluate" else {}


@pytest.mark.parametrize("where", ["evaluate", "pretrain", "finetune"])
@pytest.mark.parametrize("scored", [True, False])
def test_a_tower_of_random_weights_is_said_before_any_score(world, capsys, where, scored):
    if not scored:
        write_index(world, captions=[], conversations=[])
    evaluate(world.params(**random_tower(world, where)))
    assert capsys.readouterr().out.splitlines()[0] == f"warning:  {RANDOM_TOWER}"
    texts = Page(PAGE.read_text()).texts
    assert texts[texts.index("Scores and controls") + 1] == RANDOM_TOWER


@pytest.mark.parametrize("encoder", [None, {"pretrained": "openai"}, {}, [], 5, "random"])
def test_of_any_other_tower_nothing_is_said(world, capsys, encoder):
    evaluate(world.params(encoder=encoder))
    assert "random" not in capsys.readouterr().out
    assert RANDOM_TOWER not in PAGE.read_text()


@pytest.mark.parametrize("content", [None, "a: [", "5"])
def test_a_run_without_settings_is_one_line_and_found_before_a_model_runs(
    world, monkeypatch, content
):
    no_model(monkeypatch)
    path = Path("runs/finetune/params.yaml")
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(SettingsError, match=r"runs/finetune/params\.yaml") as caught:
        evaluate(world.params())
    assert one_line(caught)


def test_the_page_holds_everything_it_shows(world):
    evaluate(world.params())
    page = PAGE.read_text(encoding="utf-8")
    links = re.findall(r"(?:src|href|srcset|data|action)=\"([^\"]*)\"", page)
    assert len(links) > 12
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"https?://|url\(|@import|<script src", page)
    assert page.count("data:image/jpeg;base64,") >= 8
    assert GONE not in page
    assert world.store.fingerprint in page
    assert "Stage 1: projector" in page
    assert "2.500 at step 2" in page


def test_the_summary_names_scores_gains_verdicts_and_the_page(world, capsys):
    write_pope(ASKED)
    evaluate(world.params())
    captions, answers, popular, random, mean, report = capsys.readouterr().out.splitlines()
    number = r"-?\d\.\d{3}"
    gain = rf"gain [+]?{number}, {number} to {number}, p [\d.]+"
    found = rf"\d\.\d{{3}} \(wrong image \d\.\d{{3}}; {gain}\): does not use the picture"
    assert re.fullmatch(rf"captions: CIDEr {found}", captions)
    assert re.fullmatch(rf"answers:  exact match {found}", answers)
    assert re.fullmatch(rf"pope:     popular accuracy {found}", popular)
    assert re.fullmatch(rf"pope:     random accuracy {found}", random)
    assert re.fullmatch(rf"pope:     mean F1 {found}", mean)
    assert report == f"report:   {PAGE.resolve().as_uri()}"


def ignore_the_picture():
    """Let the projectors give the same embeddings for every picture."""
    for path in Path("runs").glob("*/projector.safetensors"):
        change_tensor(path, "layers.2.weight", lambda weight: weight * 0)
        sign_weights(path.parent)


def test_a_model_that_ignores_the_picture_is_called_so_by_every_verdict(world, capsys):
    ignore_the_picture()
    write_index(
        world,
        captions=[(i, f"a red cat in box {i}") for i in range(112, 124)],
        conversations=[(i, [("how many", f"{i}")]) for i in range(124, 140)],
    )
    write_pope([(i, "random", "Is there a cat", ("yes", "no")[i % 2]) for i in range(112, 124)])
    evaluate(world.params())
    found = scores()
    main = {
        "CIDEr": [found["captions"], found["pretrain_only"]["captions"]],
        "exact_match": [found["answers"]],
        "token_f1": [found["answers"]],
        "loss": [found["answers"]],
        "accuracy": [found["pope"]["random"]],
    }
    for key, sections in main.items():
        for section in sections:
            gain = section["gains"]["blind"][key]
            assert (gain["gain"], gain["interval"], gain["p"]) == (0, [0, 0], 1), key
            assert gain["images"] >= 12
    does_not, of = "does not use the picture", "main scores gains over the wrong image"
    summary = capsys.readouterr().out.splitlines()
    assert [line.endswith(does_not) for line in summary] == [True, True, True, False]
    page = Page(PAGE.read_text())
    verdicts = [a["class"].split() for a in page.of_class("verdict")]
    assert verdicts == [["verdict", "headline", "bad"], *[["verdict", "bad"]] * 6]
    assert f"The model {does_not}: none of 6 {of}." in page.texts
    assert len([text for text in page.texts if text.startswith("Does not use the picture")]) == 6
    for run in STAGES:
        report = read_score_report(open_run(Path("runs", run)))
        assert report.verdict.startswith(f"The model {does_not}: none of ")
    compare(".", ".")
    said = [line for line in capsys.readouterr().out.splitlines() if does_not in line]
    assert said == [f". {does_not}: none of 6 {of}"] * 2


def test_without_a_holdout_there_are_no_answers_and_the_page_says_so(world, capsys):
    write_index(world, conversations=[])
    evaluate(world.params())
    assert scores()["answers"] == NO_ANSWERS
    assert scores()["pope"] == {}
    assert scores()["captions"]["count"] == 4
    assert rows(kind="answer") == []
    assert "No answers were scored" in PAGE.read_text()
    assert printed(capsys) == ["note", "note", "captions", "report"]


def test_without_captions_there_are_only_answers_and_the_page_says_so(world, capsys):
    write_index(world, captions=[])
    evaluate(world.params())
    assert scores()["captions"] == scores()["pretrain_only"]["captions"] == NOTHING
    assert scores()["answers"]["count"] == 4
    assert {row["kind"] for row in rows()} == {"answer"}
    assert "No captions were scored: split val has none." in PAGE.read_text()
    assert printed(capsys) == ["note", "note", "answers", "report"]


def test_with_nothing_to_ask_the_page_is_made_all_the_same(world):
    write_index(world, captions=[], conversations=[])
    evaluate(world.params())
    assert rows() == []
    assert pq.read_schema(TABLE).equals(SCHEMA)
    assert "Nothing was scored." in PAGE.read_text()


def test_of_more_texts_than_the_limits_exactly_so_many_are_asked(world):
    write_index(
        world,
        captions=[(i, "a cat") for i in range(112, 140)],
        conversations=[(i, [("how many", f"{i}"), ("is it red", "no")]) for i in range(112, 140)],
    )
    limits = {"caption_images": 5, "questions": 7}

    def chosen(seed):
        evaluate(world.params(seed=seed, evaluate=limits))
        assert scores()["captions"]["count"] == scores()["pretrain_only"]["captions"]["count"] == 5
        assert scores()["answers"]["count"] == 7
        images = [row["image_id"] for row in rows("finetune", "caption")]
        assert images == [row["image_id"] for row in rows("pretrain", "caption")]
        questions = [(row["image_id"], row["question"]) for row in rows("finetune", "answer")]
        assert (len(set(images)), len(set(questions))) == (5, 7)
        return images, questions

    first = chosen(0)
    assert chosen(1) != first
    # Neither other weights nor another question change what is chosen.
    world.write_run("pretrain", 8)
    world.write_run("finetune", 9)
    limits |= {"caption_question": "where", "answer_tokens": 2, "batch_size": 1}
    assert chosen(0) == first


def test_images_without_features_are_not_asked_about_but_counted(world):
    write_index(
        world,
        captions=[(i, "a cat") for i in (112, 113, 9000)],
        conversations=[(i, [("how many", "two")]) for i in (116, 9001, 117)],
    )
    write_pope([*ASKED, (9002, "random", "Is there a cat", "yes")])
    evaluate(world.params())
    assert {row["image_id"] for row in rows()} == {112, 113, 116, 117}
    found = scores()
    assert [found[kind]["without_features"] for kind in ("captions", "answers")] == [1, 1]
    assert found["pretrain_only"]["captions"]["without_features"] == 1
    assert found["pope"]["random"]["without_features"] == 1


@pytest.mark.parametrize("what", ["captions of split val", "conversations of split holdout"])
def test_a_store_of_other_images_is_an_error_and_no_empty_score(world, what):
    if what.startswith("captions"):
        write_index(world, captions=[(9000, "a cat")])
    else:
        write_index(world, conversations=[(9000, [("how many", "two")])])
    with pytest.raises(StageError, match=f"{what}: 1 of 1 images have no features") as caught:
        evaluate(world.params())
    assert one_line(caught)


def test_a_single_image_is_scored_against_another_of_the_store(world):
    write_index(world, captions=[(139, "a cat")], conversations=[(120, [("where", "here")])])
    evaluate(world.params())
    assert scores()["captions"]["CIDEr"] == 0
    assert scores()["answers"]["count"] == 1


HARD = [
    "",
    " ",
    ".",
    "\u00e9t\u00e9 \u4f60\u597d \U0001f370",
    "a\nb\x00c",
    "</script><b>&{{ 7 }}",
    "x " * 40,
]


def test_hard_texts_come_through_whole(world):
    write_index(
        world,
        captions=[(i, text) for i in VAL for text in HARD],
        conversations=[(i, [(text, text)]) for i, text in zip(range(116, 140), HARD, strict=False)],
    )
    evaluate(world.params(evaluate={"max_text_tokens": 200}))
    assert all(row["targets"] == HARD for row in rows(kind="caption"))
    answers = rows(kind="answer")
    assert [row["question"] for row in answers] == [row["targets"][0] for row in answers] == HARD
    for row in answers[:-1]:
        assert row["score"] == exact_match(row["targets"][0], row["prediction"])
    page = PAGE.read_text(encoding="utf-8")
    assert "\u4f60\u597d \U0001f370" in page
    assert "<b>&" not in page


def test_only_texts_without_a_word_are_scored_too(world):
    write_index(world, captions=[(i, ".") for i in VAL], conversations=[(116, [("", "")])])
    evaluate(world.params())
    assert scores()["captions"]["CIDEr"] == 0


@pytest.mark.parametrize("shown", ["none", "no zip", "no row"])
def test_without_pictures_the_page_has_their_places(world, shown):
    if shown == "none":
        shutil.rmtree("data/raw")
    elif shown == "no zip":
        Path("data/raw/val.zip").unlink()
    else:
        world.write_images(dict.fromkeys(range(116, 140), "train"))
    evaluate(world.params())
    page = PAGE.read_text()
    assert page.count(GONE) == (12 if shown == "none" else 4)
    assert page.count("data:image/jpeg;base64,") == (0 if shown == "none" else 8)


def no_model(monkeypatch):
    """Make sure that a mistake is found before a model runs."""

    def loaded(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(eval.evaluate, "load_models", loaded)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_missing_run_is_found_before_a_model_runs(world, monkeypatch, stage):
    no_model(monkeypatch)
    shutil.rmtree(f"runs/{stage}")
    with pytest.raises(StageError, match=rf"runs/{stage}/history.csv: .*Run the {stage}") as caught:
        evaluate(world.params())
    assert one_line(caught)
    assert not Path("reports").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("history.csv", b"step,loss\n1,much\n"),
        ("history.csv", b"step,loss\n1,2,3\n"),
        ("history.csv", b"\xff\xfe\x00\n1\n"),
        ("provenance.json", None),
        ("provenance.json", b""),
        ("provenance.json", b'{"git_commit": "ab'),
        ("provenance.json", b"[]"),
        ("provenance.json", b"null"),
        ("provenance.json", b"\xff\xfe"),
    ],
)
def test_a_damaged_run_is_one_line_and_found_before_a_model_runs(world, monkeypatch, name, content):
    no_model(monkeypatch)
    path = Path("runs/finetune", name)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StageError, match=f"runs/finetune/{name}: .*Run the ") as caught:
        evaluate(world.params())
    assert one_line(caught)


def test_a_history_with_empty_cells_or_no_row_is_drawn_as_far_as_it_goes(world):
    Path("runs/pretrain/history.csv").write_text("step,loss,validation_loss\n1,3.5,\n2,,2.75\n3\n")
    Path("runs/finetune/history.csv").write_text("step,loss,validation_loss\n")
    evaluate(world.params())
    page = PAGE.read_text()
    assert "Train loss: 3.500 at first, 3.500 at step 1" in page
    assert "Validation loss: 2.750 at first, 2.750 at step 2" in page
    assert "No loss was logged." in page


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def widen(path):
    seeded_projector("mlp", 9, 64, 0).save(path)


def fill_nan(path):
    with Path(path).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(size))["__metadata__"]
    save_file({n: t.fill_(float("nan")) for n, t in load_file(path).items()}, path, metadata)


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        ("runs/pretrain/projector.safetensors", Path.unlink, "no projector"),
        ("runs/pretrain/projector.safetensors", cut, "no projector"),
        ("runs/finetune/projector.safetensors", widen, "maps width 9 to 64, wanted 8"),
        (
            "runs/finetune/projector.safetensors",
            fill_nan,
            "loss of the answers .seen. is not finite",
        ),
        ("runs/finetune/adapter", shutil.rmtree, "holds no adapter_model.safetensors"),
        ("runs/finetune/adapter/adapter_model.safetensors", cut, "no adapter for this model"),
        ("runs/finetune/adapter/adapter_config.json", Path.unlink, "no adapter for this model"),
        ("data/index/captions.parquet", Path.unlink, "Run the index stage"),
        ("data/index/conversations.parquet", cut, "Run the index stage"),
        ("data/index/images.parquet", cut, "Run the index stage"),
        ("data/features/index.parquet", Path.unlink, "index.parquet"),
    ],
)
def test_what_is_missing_or_damaged_is_named_in_one_line(world, path, change, words):
    change(Path(path))
    if path.startswith("runs"):
        # As if it had been made so: otherwise nothing else of it would be looked at.
        sign_weights(Path(*Path(path).parts[:2]))
    with pytest.raises(PatchcacheError, match=words) as caught:
        evaluate(world.params())
    assert one_line(caught)
    assert not PAGE.exists()


@pytest.mark.parametrize("change", [Path.unlink, cut, widen, fill_nan])
@pytest.mark.parametrize(
    "path", ["pretrain/projector", "finetune/projector", "finetune/adapter/adapter_model"]
)
def test_weights_that_a_run_did_not_end_with_are_refused(world, path, change):
    weights = Path(f"runs/{path}.safetensors")
    change(weights)
    with pytest.raises(
        StageError, match=rf"{weights}: sha256 .*, but the run ended with"
    ) as caught:
        evaluate(world.params())
    assert one_line(caught)


def test_an_adapter_beside_stage_1_is_refused(world):
    shutil.copytree("runs/finetune/adapter", "runs/pretrain/adapter")
    with pytest.raises(StageError, match="but the run ended with no such file"):
        evaluate(world.params())


def test_a_store_of_one_image_has_no_control(world, make_store):
    shutil.rmtree("data/features")
    shutil.move(make_store([112]).root, "data/features")
    write_index(world, captions=[(112, "a cat")], conversations=[])
    with pytest.raises(StageError, match="holds one image"):
        evaluate(world.params())


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"evaluate": {"questions": 0}}, "evaluate: questions is 0"),
        (
            {"evaluate": {"max_text_tokens": 1}},
            "max_text_tokens: each of 8 questions has more than 1",
        ),
        ({"data": {"source": "web"}}, "data.source is 'web'"),
        ({"llm": {"model": "/nowhere"}}, "llm.model: cannot load '/nowhere'"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(world, sections, words):
    with pytest.raises((SettingsError, StageError), match=re.escape(words)) as caught:
        evaluate(world.params(**sections))
    assert one_line(caught)


def test_the_command_ends_with_1_and_says_one_line(world, monkeypatch, capsys):
    shutil.rmtree("runs/finetune")
    monkeypatch.setattr(sys, "argv", ["evaluate"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        run_stage(evaluate, "x")
    assert caught.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_images_are_never_opened_for_scores(world):
    """A machine that only received features gets the same scores."""
    evaluate(world.params())
    wanted = SCORES.read_bytes()
    shutil.rmtree("data/raw")
    evaluate(world.params())
    assert SCORES.read_bytes() == wanted


def test_questions_are_asked_without_their_earlier_turns(world, monkeypatch):
    seen = []

    def recording(model, prompt_format, store, image_ids, questions, **limits):
        seen.extend(questions)
        return generate(model, prompt_format, store, image_ids, questions, **limits)

    monkeypatch.setattr("eval.scoring.generation.generate", recording)
    evaluate(world.params())
    asked = [q.question for q in read_questions("holdout")]
    assert seen[-4 * len(asked) :] == asked * 4


def test_a_damaged_adapter_is_found_before_anything_is_asked(world, monkeypatch):
    cut(Path("runs/finetune/adapter/adapter_model.safetensors"))
    monkeypatch.setattr(eval.evaluate, "answer_losses", lambda *_: pytest.fail("asked"))
    sign_weights("runs/finetune")
    with pytest.raises(StageError, match="no adapter for this model"):
        evaluate(world.params())


def test_the_coco_results_are_the_captions_of_the_fine_tuned_model(world):
    evaluate(world.params())
    wanted = [
        {"image_id": row["image_id"], "caption": row["prediction"]}
        for row in rows("finetune", "caption")
    ]
    assert json.loads(RESULTS.read_text()) == wanted
    assert len(wanted) == 4


def test_other_systems_and_ours_are_scored_by_one_program(world, capsys):
    write_pope(ASKED)
    evaluate(world.params())
    found = scores()
    capsys.readouterr()
    reports = SCORES.parent
    score(reports / "pope_questions.jsonl", [str(reports / "pope_answers.jsonl")], official=False)
    printed_rows = capsys.readouterr().out
    for name, section in [*found["pope"].items(), ("mean of 2", found["pope_mean"])]:
        (row,) = re.findall(rf"^pope_answers, {name} +(.*)$", printed_rows, re.M)
        count, _, accuracy, *_, f1, yes_rate = map(float, row.split())
        assert count == section["count"]
        for shown, key in ((accuracy, "accuracy"), (f1, "f1"), (yes_rate, "yes_rate")):
            assert shown == pytest.approx(100 * section[key], abs=0.005), (name, key)
    lines = (reports / "pope_questions.jsonl").read_text().splitlines()
    labels = [json.loads(line) for line in lines]
    assert [(q["category"], q["text"], q["label"]) for q in labels] == [
        (subset, question, label) for _, subset, question, label in ASKED
    ]
    assert {q["image"] for q in labels} == {"112.jpg", "113.jpg"}
    captions = [
        {"image_id": row["image_id"], "caption": text}
        for row in rows("finetune", "caption")
        for text in row["targets"]
    ]
    (reports / "captions.json").write_text(json.dumps({"annotations": captions}))
    score(reports / "captions.json", [f"ours={RESULTS}"], official=False)
    (row,) = re.findall(r"^ours +(.*)$", capsys.readouterr().out, re.M)
    count, words, cider, *_ = map(float, row.split())
    assert count == 4
    assert words == pytest.approx(found["captions"]["mean_words"], abs=0.005)
    assert cider == pytest.approx(100 * found["captions"]["CIDEr"], abs=0.005)


def test_the_mean_of_the_subsets_is_that_of_their_scores(world, capsys):
    write_pope(ASKED)
    evaluate(world.params())
    found = scores()
    for condition in (None, *CONTROLS):
        sections = [found["pope"]["popular"], found["pope"]["random"], found["pope_mean"]]
        first, second, mean = (s if condition is None else s[condition] for s in sections)
        for key in POPE - FORM:
            assert mean[key] == pytest.approx((first[key] + second[key]) / 2)
    assert found["pope_mean"]["subsets"] == ["popular", "random"]
    assert "pope:     mean F1 " in capsys.readouterr().out


def contaminate():
    """Give a validation and a held-out image the files of training images."""
    give_file_of(105, 113)
    give_file_of(106, 117)


def give_file_of(image_id, other):
    """Let an image have the file of another one."""
    path = "data/index/images.parquet"
    table = pq.read_table(path)
    found = {row["image_id"]: row for row in table.to_pylist()}
    found[other]["source_xxh3"] = found[image_id]["source_xxh3"]
    pq.write_table(pa.Table.from_pylist(list(found.values()), table.schema), path)


def test_images_that_were_trained_on_are_counted_listed_and_left_out(world):
    contaminate()
    write_pope([*ASKED, (105, "random", "Is there a cat", "yes")])
    evaluate(world.params())
    found = scores()
    assert found["contamination"] == {
        "captions": {"images": 4, "contaminated": 1, "left_out": 1},
        "answers": {"images": 4, "contaminated": 1, "left_out": 1},
        "pope": {"images": 3, "contaminated": 2, "left_out": 2},
    }
    twin = {
        "image_id": 113,
        "file_name": "113.jpg",
        "reason": "same file as training image 105 (105.jpg)",
    }
    assert json.loads(LIST.read_text()) == {
        "captions": [twin],
        "answers": [
            {
                "image_id": 117,
                "file_name": "117.jpg",
                "reason": "same file as training image 106 (106.jpg)",
            }
        ],
        "pope": [{"image_id": 105, "file_name": "105.jpg", "reason": "trained on"}, twin],
    }
    assert {row["image_id"] for row in rows(kind="caption")} == {112, 114, 115}
    assert {row["image_id"] for row in rows(kind="answer")} == {116, 118, 119}
    assert {row["image_id"] for row in rows(kind="pope")} == {112}
    texts = Page(PAGE.read_text()).texts
    assert "same file as training image 105 (105.jpg)" in texts
    assert {"105.jpg", "113.jpg", "117.jpg"} <= set(texts)


def test_images_that_were_trained_on_are_asked_about_where_the_settings_say_so(world):
    contaminate()
    write_pope([*ASKED, (105, "random", "Is there a cat", "yes")])
    evaluate(world.params(evaluate={"exclude_contaminated": False}))
    assert scores()["contamination"]["pope"] == {"images": 3, "contaminated": 2, "left_out": 0}
    assert {row["image_id"] for row in rows(kind="caption")} == set(VAL)
    assert {(row["image_id"], row["split"]) for row in rows(kind="pope")} == {
        (105, "train"),
        (112, "val"),
        (113, "val"),
    }


class Killed(BaseException):
    pass


def test_a_stopped_evaluation_generates_no_finished_text_again(world, monkeypatch):
    write_pope(ASKED)
    calls = []

    def stopping_after(most):
        def counting(model, prompt_format, features, image_ids, questions, **limits):
            calls.append(limits["description"])
            if len(calls) > most:
                raise Killed
            return generate(model, prompt_format, features, image_ids, questions, **limits)

        monkeypatch.setattr("eval.scoring.generation.generate", counting)

    stopping_after(99)
    evaluate(world.params(), now=lambda: NOW)
    wanted, uninterrupted = [path.read_bytes() for path in (SCORES, TABLE, PAGE)], list(calls)
    assert len(uninterrupted) == 4 * 4
    shutil.rmtree("reports")
    for made in range(1, 16):
        calls.clear()
        stopping_after(1)
        with pytest.raises(Killed):
            evaluate(world.params())
        assert calls == uninterrupted[made - 1 : made + 1]
    calls.clear()
    stopping_after(99)
    evaluate(world.params(), now=lambda: NOW)
    assert calls == uninterrupted[-1:]
    assert [path.read_bytes() for path in (SCORES, TABLE, PAGE)] == wanted
    # What is finished is made afresh.
    calls.clear()
    evaluate(world.params())
    assert calls == uninterrupted


@pytest.mark.parametrize("change", ["seed", "projector", "adapter", "limit", "prompt"])
def test_cached_texts_of_other_inputs_are_not_taken(world, monkeypatch, change):
    evaluate(world.params())
    wanted = TABLE.read_bytes()
    monkeypatch.setattr("eval.scoring.generation_cache.clear", lambda: None)
    other = {"seed": {"seed": 5}, "limit": {"evaluate": {"caption_tokens": 3}}}
    other |= {"prompt": {"evaluate": {"caption_question": "where is it"}}}
    if change in ("projector", "adapter"):
        shutil.copytree("runs", "before")
        world.write_run("finetune", 77)
        if change == "adapter":
            shutil.copy("before/finetune/projector.safetensors", "runs/finetune")
            sign_weights("runs/finetune")
    evaluate(world.params(**other.get(change, {})))
    assert TABLE.read_bytes() != wanted
    if change in ("projector", "adapter"):
        shutil.rmtree("runs")
        shutil.move("before", "runs")
    evaluate(world.params())
    assert TABLE.read_bytes() == wanted


def test_a_run_that_learned_from_other_features_is_not_scored(world, monkeypatch):
    no_model(monkeypatch)
    path = Path("runs/pretrain/provenance.json")
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"features_fingerprint": "0" * 64}))
    words = "runs/pretrain learned from those of 000000000000"
    with pytest.raises(SpecMismatchError, match=words) as caught:
        evaluate(world.params())
    assert one_line(caught)


def test_an_index_that_was_made_after_the_training_is_said_before_any_score(world, capsys):
    table = pq.read_table("data/index/conversations.parquet")
    pq.write_table(table.slice(0, len(table) - 1), "data/index/conversations.parquet")
    evaluate(world.params())
    said = "conversations.parquet changed after pretrain was trained"
    assert capsys.readouterr().out.startswith(f"warning:  {said}")
    assert said in PAGE.read_text()


TURNS = [("how many", "two")]


def train_again(world, captions, conversations, **sections):
    """Run both training stages on other texts; return the settings."""
    world.workspace.write_index(captions, conversations)
    params = world.params(**sections)
    pretrain(params)
    finetune(params)
    return params


def captions_only(world, **sections):
    captions = [(i, "train", "a red cat") for i in range(100, 112)]
    return train_again(world, [*captions, *((i, "val", "a dog") for i in VAL)], [], **sections)


def conversations_only(world, *captions):
    conversations = [(i, "train", TURNS) for i in range(100, 112)]
    return train_again(world, captions, [*conversations, *((i, "holdout", TURNS) for i in HOLDOUT)])


def test_with_captions_only_stage_1_is_scored_and_shown(world, capsys):
    params = captions_only(world)
    write_pope(ASKED)
    capsys.readouterr()
    evaluate(params)
    found = scores()
    assert found["trained"] == {"pretrain": True, "finetune": False}
    assert found["captions"] == NOTHING
    assert found["answers"] == NO_ANSWERS
    assert found["pope"] == {}
    assert found["pretrain_only"]["captions"]["count"] == 4
    assert found["pretrain_only"]["captions"].keys() >= CAPTION
    assert {(row["model"], row["kind"]) for row in rows()} == {("pretrain", "caption")}
    captions = [(row["image_id"], row["prediction"]) for row in rows()]
    assert [tuple(r.values()) for r in json.loads(RESULTS.read_text())] == captions
    page = Page(PAGE.read_text())
    said = [text for text in page.texts if "Stage 2 was not trained" in text]
    assert said == [
        "Stage 2 was not trained, because there are no conversations: all scores are of stage 1 "
        "alone."
    ]
    assert "to caption pictures, from cached" in PAGE.read_text()
    assert "Stage 1: projector" in page.texts
    assert "Stage 2: projector and language model" not in page.texts
    assert "No loss was logged." not in page.texts
    assert not any("were scored:" in text for text in page.texts)
    assert {f"Picture {i}" for i in VAL} <= set(page.texts)
    assert printed(capsys) == ["note", "captions", "report"]


def test_captions_of_stage_1_do_not_depend_on_whether_stage_2_was_trained(world):
    captions_only(world)
    evaluate(world.params())
    alone = scores()["pretrain_only"]["captions"]
    shutil.rmtree("runs/finetune")
    world.write_run("finetune", 2)
    evaluate(world.params())
    assert scores()["pretrain_only"]["captions"] == alone
    assert scores()["captions"]["count"] == 4


def test_with_conversations_only_stage_2_is_scored_and_stage_1_named_as_untrained(world, capsys):
    params = conversations_only(world)
    capsys.readouterr()
    evaluate(params)
    found = scores()
    assert found["trained"] == {"pretrain": False, "finetune": True}
    assert found["captions"] == found["pretrain_only"]["captions"] == NOTHING
    assert found["answers"]["count"] == 4
    assert {row["model"] for row in rows()} == {"finetune"}
    page = Page(PAGE.read_text())
    assert (
        "Stage 1 was not trained, because there are no captions of split train: stage 2 started "
        "from random weights of the projector."
    ) in page.texts
    assert "No captions were scored: split val has none." in page.texts
    assert "to answer questions about pictures, from cached" in PAGE.read_text()
    assert "Stage 1: projector" not in page.texts
    assert "Stage 2: projector and language model" in page.texts
    assert printed(capsys) == ["note", "note", "note", "answers", "report"]


def test_captions_of_val_are_scored_of_stage_2_alone_if_stage_1_had_none(world):
    evaluate(conversations_only(world, (112, "val", "a cat"), (113, "val", "a dog")))
    assert scores()["pretrain_only"]["captions"] == NOTHING
    assert scores()["captions"]["count"] == 2


def test_without_split_val_captions_are_not_scored_and_the_page_says_so(world, capsys):
    params = train_again(world, [(i, "train", "a red cat") for i in range(100, 112)], [])
    capsys.readouterr()
    evaluate(params)
    assert scores()["captions"] == scores()["pretrain_only"]["captions"] == NOTHING
    assert rows() == json.loads(RESULTS.read_text()) == []
    page = Page(PAGE.read_text())
    assert "No captions were scored: split val has none." in page.texts
    assert "Nothing was scored." in page.texts
    assert "Stage 1: projector" in page.texts
    assert printed(capsys) == ["note", "note", "report"]


def test_captions_that_are_all_trained_on_are_left_out_and_the_page_says_so(world):
    give_file_of(105, 112)
    world.workspace.write_index([(112, "val", "a cat"), (105, "train", "a cat")], [])
    evaluate(world.params())
    said = "No captions were scored: all of their pictures are in the training data."
    assert said in Page(PAGE.read_text()).texts


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_dvc_shows_metrics_and_plots_of_an_untrained_stage(world, stage):
    params = captions_only(world) if stage == "finetune" else conversations_only(world)
    evaluate(params)
    shutil.copy(Path(__file__).parents[2] / "dvc.yaml", "dvc.yaml")
    for command in (["init", "--no-scm", "-q"], ["metrics", "show"], ["plots", "show", "-q"]):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert Path("dvc_plots/index.html").exists()


def test_captions_are_scored_on_split_test_where_there_is_one(world):
    captions = [(112, "val", "a cat"), (113, "val", "a dog"), (114, "test", "a red cat")]
    world.workspace.write_index([(100, "train", "a cat"), *captions, (115, "test", "x")], [])
    give_file_of(100, 115)
    data = {"split": "karpathy", "val": None}
    evaluate(world.params(data=data))
    found = scores()
    assert found["split"] == {"name": "karpathy", "captions": "test"}
    assert found["contamination"]["captions"] == {"images": 2, "contaminated": 1, "left_out": 1}
    assert {(row["image_id"], row["split"]) for row in rows(kind="caption")} == {(114, "test")}
    texts = Page(PAGE.read_text()).texts
    said = (
        "Stage 1 learned from 5 captions of 3 pictures. Stage 2 learned from 5 conversations about "
        "3 pictures. Pictures are split by karpathy; scored captions are those of split test."
    )
    assert said in texts


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_one_stage_is_evaluated_without_the_run_of_the_other(world, capsys, stage):
    write_pope(ASKED)
    evaluate(world.params())
    both = scores()
    (other,) = {"pretrain", "finetune"} - {stage}
    shutil.rmtree(f"runs/{other}")
    capsys.readouterr()
    evaluate(world.params(evaluate={"stages": [stage]}))
    found = scores()
    own = {"finetune": ["captions", "answers", "pope"], "pretrain": ["pretrain_only"]}
    assert {key: found[key] for key in own[stage]} == {key: both[key] for key in own[stage]}
    assert not any(
        part.get("count")
        for key in own[other]
        for part in (found[key], *found[key].values())
        if isinstance(part, dict)
    )
    assert found["trained"] == {stage: True}
    assert list(found["weights_sha256"]) == [stage]
    assert {row["model"] for row in rows()} == {stage}
    captions = [row for row in rows() if row["kind"] == "caption"]
    assert [tuple(r.values()) for r in json.loads(RESULTS.read_text())] == [
        (row["image_id"], row["prediction"]) for row in captions
    ]
    said = {"pretrain": "Stage 1 alone", "finetune": "Stage 2"}[other]
    texts = Page(PAGE.read_text()).texts
    assert f"{said} was not evaluated (evaluate.stages)." in texts
    assert sum(text.startswith("Stage 1: proj") for text in texts) == (stage == "pretrain")
    lines = printed(capsys)
    assert lines == [
        "note",
        "captions",
        # Two subsets, and their mean.
        *["answers", "pope", "pope", "pope"] * (stage == "finetune"),
        "report",
    ]


def test_an_evaluation_with_a_budget_stops_at_whole_images_and_says_so(world, capsys):
    write_index(
        world,
        captions=[(i, f"a cat {i}") for i in range(112, 140)],
        conversations=[(i, [("how many", f"{i}"), ("is it red", "no")]) for i in range(112, 140)],
    )
    write_pope(
        [(i, "random", f"Is there a {noun}", "no") for i in range(112, 140) for noun in "ab"]
    )
    evaluate(world.params(evaluate={"minutes": 1e-9, "batch_size": 4}))
    found = scores()
    assert found["budget"] == {"minutes": 1e-9}
    sections = [found["captions"], found["answers"], found["pretrain_only"]["captions"]]
    for section, texts in zip([*sections, found["pope"]["random"]], (4, 8, 4, 8), strict=True):
        assert section["budget"] == {"images": 4, "of": 28}
        for part in (section, *(section[control] for control in CONTROLS)):
            assert part["count"] == texts
            assert all(np.isfinite(value) for value in numbers(part))
        for gains in section["gains"].values():
            assert {gain["images"] for gain in gains.values() if gain["images"]} == {4}
    assert len({row["image_id"] for row in rows("pretrain")}) == 4
    assert {r["image_id"] for r in rows("pretrain")} != set(range(112, 116)), "no first images"
    texts = Page(PAGE.read_text()).texts
    for title in ("Captions", "Answers", "Yes or no, random", "Captions of stage 1 alone"):
        assert texts.count(f"{title} (4 of 28 images)") >= 2, "a card and a table"
    assert {"random (4 of 28 images)", "Type (4 of 28 images)"} <= set(texts)
    assert any(text.startswith("The evaluation had 1e-09 minutes") for text in texts)
    said = capsys.readouterr().out
    assert "note:     The evaluation had 1e-09 minutes (evaluate.minutes)" in said
    for name in ("CIDEr", "exact match", "random accuracy"):
        assert f"{name} (4 of 28 images) " in said
    (row, *_) = read_score_report(open_run(Path("runs/finetune"))).rows
    assert row[0] == "captions (4 of 28 images)"


def test_a_budget_that_is_not_used_up_reaches_everything(world):
    evaluate(world.params())
    wanted = TABLE.read_bytes()
    evaluate(world.params(evaluate={"minutes": 999}))
    assert scores()["answers"]["budget"] == {"images": 4, "of": 4}
    assert TABLE.read_bytes() == wanted


def numbers(section):
    return [value for value in section.values() if isinstance(value, int | float)]
