"""What `python -m eval.compare` prints for two evaluations, and for two run directories."""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache.errors import SettingsError
from eval.compare import SHOWN_TEXTS, compare, lie_apart, pair_texts
from eval.scoring.paired_scores import paired_gains
from eval.snapshots import COLUMNS, flatten, read_predictions, read_snapshot
from workspace.errors import StageError

ROOT = Path(__file__).parents[2]

TITLES = ("settings", "metrics", "scores", "controls", "evaluation", "provenance")
SCORES = {
    "captions": {
        "CIDEr": 0.8,
        "stop_rate": 1.0,
        "count": 30,
        "intervals": {"CIDEr": [0.7, 0.9], "stop_rate": [1.0, 1.0]},
        "blind": {"CIDEr": 0.1, "count": 30, "intervals": {"CIDEr": [0.05, 0.2]}},
    },
    "pope": {"random": {"accuracy": 0.6, "intervals": {"accuracy": [0.5, 0.7]}}},
}


def text(prediction, score, *, image_id=1, question="", kind="caption", **more):
    return {
        "model": "finetune",
        "kind": kind,
        "subset": "",
        "image_id": image_id,
        "question": question,
        "targets": ["a dog", "a brown dog"],
        "prediction": prediction,
        "score": score,
    } | more


def write(folder, scores=SCORES, rows=(), schema=COLUMNS):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.json").write_text(json.dumps(scores))
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), folder / "predictions.parquet")
    return str(folder)


@pytest.fixture
def left(tmp_path):
    return write(tmp_path / "left", rows=[text("a dog", 2.5)])


def changed(*path, value):
    """The scores with one of them changed."""
    scores = copy.deepcopy(SCORES)
    section = scores
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    return scores


def printed(capsys, left, right):
    """The lines, with one space between the columns."""
    compare(left, str(right))
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def parts_of(capsys, left, right):
    """The lines of each part of the table."""
    parts, title = {}, ""
    for line in printed(capsys, left, right)[1:]:
        if line in TITLES:
            title = line
        elif title not in parts or not parts[title][-1].endswith("equal"):
            parts.setdefault(title, []).append(line)
    return parts


def test_an_evaluation_and_its_copy_differ_in_nothing(capsys, tmp_path, left):
    shutil.copytree(left, tmp_path / "copy")
    lines = printed(capsys, left, str(tmp_path / "copy"))
    assert lines[1:7] == [
        "scores", "4 scores equal", "controls", "2 scores equal", "evaluation", "0 facts equal",
    ]  # fmt: skip
    assert lines[-1].startswith("finetune, caption: 0 texts differ, 1 are equal, 0 only in")


def test_a_score_stands_beside_the_other_with_its_interval(capsys, tmp_path, left):
    right = write(tmp_path / "right", changed("captions", "CIDEr", value=0.85))
    lines = printed(capsys, left, right)
    assert lines[0] == f"{left} {right} second - first"
    assert lines[2:4] == [
        "captions.CIDEr 0.8 [0.7, 0.9] 0.85 [0.7, 0.9] +0.05 unpaired", "3 scores equal",
    ]  # fmt: skip


def test_the_mark_of_unpaired_scores_says_that_intervals_lie_apart(capsys, tmp_path, left):
    random = {"accuracy": 0.8, "intervals": {"accuracy": [0.71, 0.9]}}
    right = write(tmp_path / "right", changed("pope", "random", value=random))
    lines = printed(capsys, left, right)
    assert lines[2] == "pope.random.accuracy 0.6 [0.5, 0.7] 0.8 [0.71, 0.9] +0.2 unpaired *"
    assert any(line.startswith("* 0 lies outside the 95 % interval") for line in lines)


def test_the_same_score_with_another_interval_is_shown(capsys, tmp_path, left):
    right = write(tmp_path / "right", changed("captions", "intervals", "CIDEr", value=[0.75, 0.85]))
    lines = printed(capsys, left, right)
    assert lines[2] == "captions.CIDEr 0.8 [0.7, 0.9] 0.8 [0.75, 0.85] +0 unpaired"


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ((0.1, 0.2), (0.3, 0.4), True),
        ((0.3, 0.4), (0.1, 0.2), True),
        ((0.1, 0.3), (0.2, 0.4), False),
        ((0.1, 0.4), (0.2, 0.3), False),
        ((0.1, 0.2), (0.2, 0.3), False),
        (None, (0.2, 0.3), False),
        ((0.2, 0.3), None, False),
    ],
)
def test_intervals_lie_apart_if_they_have_no_number_in_common(one, other, apart):
    assert lie_apart(one, other) is apart


def test_an_evaluation_without_intervals_is_compared_without_marks(capsys, tmp_path, left):
    right = write(tmp_path / "right", {"captions": {"CIDEr": 3.0, "count": 30}})
    lines = printed(capsys, left, right)
    assert "captions.CIDEr 0.8 [0.7, 0.9] 3 +2.2 unpaired" in lines
    assert "captions.stop_rate 1 [1, 1] -" in lines
    assert f"{right} has no intervals: its scores may differ by chance" in lines


WORDS = ("red", "blue", "green", "black", "white", "brown", "pink", "gray")


def captions(num_right, **changes):
    """Captions of eight images, of which the first ones are right."""
    return [
        text(f"a {word} dog" if n < num_right else "a box", 0.0, image_id=n)
        | {"targets": [f"a {word} dog runs"]}
        | changes
        for n, word in enumerate(WORDS)
    ]


def cider_row(capsys, tmp_path, ours, theirs):
    """The row of CIDEr, which is better in the second evaluation."""
    names = [
        write(tmp_path / name, changed("captions", "CIDEr", value=value), rows)
        for name, value, rows in (("A", 0.5, ours), ("B", 0.75, theirs))
    ]
    (row,) = [line for line in printed(capsys, *names) if line.startswith("captions.CIDEr")]
    return row


def test_a_difference_is_paired_where_both_were_asked_the_same(capsys, tmp_path):
    ours, theirs = captions(1), captions(8)
    found = paired_gains("finetune", "caption", list(zip(ours, theirs, strict=True)))
    gain = found["captions.CIDEr"]
    row = cider_row(capsys, tmp_path, ours, theirs[::-1])
    low, high = gain.interval
    assert low > 0
    assert row == (f"captions.CIDEr 0.5 [0.7, 0.9] 0.75 [0.7, 0.9] +0.25 [{low:.5g}, {high:.5g}] *")
    row = cider_row(capsys, tmp_path, theirs, ours)
    assert row.endswith(f" [{-high:.5g}, {-low:.5g}] *"), "a loss has the mark, too"
    assert cider_row(capsys, tmp_path, captions(7), theirs)[-1] == "]", "one image shows nothing"


def test_the_mean_of_popes_subsets_is_paired_too():
    labels = ["yes", "no"] * 6
    questions = [
        {"subset": subset, "image_id": n // 2, "targets": [label], "question": f"{subset} {n}"}
        for subset in ("random", "popular")
        for n, label in enumerate(labels)
    ]
    before = [row | {"prediction": "yes"} for row in questions]
    after = [row | {"prediction": row["targets"][0]} for row in questions]
    after[0] |= {"prediction": "no"}
    found = paired_gains("finetune", "pope", list(zip(before, after, strict=True)))
    for name in ("accuracy", "f1"):
        gains = [found[f"{section}.{name}"].gain for section in ("pope.random", "pope.popular")]
        assert gains[0] < gains[1], "one answer of one subset is wrong"
        mean = found[f"pope_mean.{name}"]
        assert mean.gain == pytest.approx(sum(gains) / 2)
        assert (mean.images, mean.is_shown) == (6, True)


@pytest.mark.parametrize(
    "theirs",
    [captions(8)[:7], captions(8, targets=["a cat"]), captions(8, question="What?"),
     captions(8, model="pretrain"), captions(8, targets=[])],
)  # fmt: skip
def test_a_difference_between_other_questions_is_unpaired(capsys, tmp_path, theirs):
    targets = {"targets": []} if not theirs[0]["targets"] else {}
    ours = [row | targets for row in captions(1)]
    assert cider_row(capsys, tmp_path, ours, theirs).endswith("+0.25 unpaired")


@pytest.mark.parametrize(
    ("interval", "p", "words"),
    [([0.0, 0.0], 1.0, "does not use the picture: none of 1 main scores gains over the wrong"),
     ([0.1, 0.4], 0.002, "uses the picture: all 1 main scores gain over the wrong image")],
)  # fmt: skip
def test_each_side_is_said_to_use_the_picture_or_not(capsys, tmp_path, left, interval, p, words):
    fields = {"gain": 0.25, "interval": interval, "p": p, "detectable": 0.1, "images": 30}
    gains = {control: {"CIDEr": fields, "BLEU-1": fields} for control in ("blind", "noise")}
    right = write(tmp_path / "right", changed("captions", "gains", value=gains))
    lines = printed(capsys, left, right)
    said = [line for line in lines if "the picture" in line]
    assert len(said) == 1
    assert said[0].startswith(f"{right} {words}")
    assert lines[1:5] == ["scores", "4 scores equal", "controls", "2 scores equal"]


def test_scores_of_controls_stand_apart(capsys, tmp_path, left):
    right = write(tmp_path / "right", changed("captions", "blind", "CIDEr", value=0.7))
    parts = parts_of(capsys, left, right)
    assert parts["scores"] == ["4 scores equal"]
    assert parts["controls"][0].startswith("captions.blind.CIDEr 0.1 [0.05, 0.2] 0.7")


def test_scored_weights_and_contamination_are_no_scores(capsys, tmp_path):
    names = [
        write(
            tmp_path / name,
            SCORES
            | {
                "weights_sha256": {"pretrain": {"projector.safetensors": name}},
                "contamination": {"captions": {"images": number}},
                "split": {"name": "karpathy", "captions": ("val", "test")[number]},
                "trained": {"pretrain": True, "finetune": not number},
            },
        )
        for number, name in enumerate(("one", "other"))
    ]
    parts = parts_of(capsys, *names)
    assert parts["scores"] == ["4 scores equal"]
    assert parts["evaluation"] == [
        "weights_sha256.pretrain.projector.safetensors one other",
        "contamination.captions.images 0 1",
        "split.captions val test",
        "trained.finetune true false",
        "2 facts equal",
    ]


def test_no_number_equals_no_number(capsys, tmp_path):
    nothing = changed("captions", "CIDEr", value=float("nan"))
    names = [write(tmp_path / name, nothing) for name in ("one", "other")]
    assert parts_of(capsys, *names)["scores"] == ["4 scores equal"]


def examples(capsys, tmp_path, ours, theirs):
    names = [write(tmp_path / name, rows=rows) for name, rows in (("A", ours), ("B", theirs))]
    lines = printed(capsys, *names)
    return [line.replace(f"{tmp_path}/", "") for line in lines[lines.index("") + 1 :]]


def test_texts_that_differ_are_shown_with_targets_and_scores(capsys, tmp_path):
    ours = [text("a cat", 0.25, image_id=7, question="What?", kind="answer")]
    theirs = [text("a dog", 1.0, image_id=7, question="What?", kind="answer")]
    assert examples(capsys, tmp_path, ours, theirs) == [
        "finetune, answer: 1 texts differ, 0 are equal, 0 only in A, 0 only in B",
        "image 7, What?",
        "targets a dog | a brown dog",
        "A 0.25 a cat",
        "B 1 a dog",
    ]


def test_the_largest_difference_of_the_scores_comes_first_and_no_more_than_so_many(
    capsys, tmp_path
):
    gaps = [0.1 * (number * 7 % 13) for number in range(13)]
    ours = [text("a", 1.0, image_id=number) for number in range(13)]
    theirs = [
        text("b", 1.0 + (-1) ** number * gap, image_id=number) for number, gap in enumerate(gaps)
    ]
    theirs[3]["score"] = None
    lines = examples(capsys, tmp_path, ours, theirs)
    assert lines[0].startswith("finetune, caption: 13 texts differ")
    gaps[3] = 0.0
    wanted = sorted(range(13), key=lambda number: -gaps[number])[:SHOWN_TEXTS]
    assert [line for line in lines if "image" in line] == [f"image {n}" for n in wanted]


def test_texts_about_the_same_are_paired_whatever_their_order():
    about = [("caption", "", 1), ("caption", "", 2), ("answer", "Who?", 1), ("answer", "Why?", 1)]
    ours = [text(q, 0.0, kind=kind, question=q, image_id=i) for kind, q, i in about]
    pairings = pair_texts(ours, ours[::-1])
    assert {kind: len(pairing.equal) for (_, kind), pairing in pairings.items()} == {
        "caption": 2,
        "answer": 2,
    }
    assert not any(p.differing or p.only_left or p.only_right for p in pairings.values())


@pytest.mark.parametrize(
    "other",
    [{"model": "pretrain"}, {"kind": "pope"}, {"subset": "random"}, {"image_id": 2},
     {"question": "What?"}],
)  # fmt: skip
def test_texts_about_something_else_are_not_paired(other):
    pairings = pair_texts([text("a", 0.0)], [text("b", 0.0) | other])
    assert sum(len(pairing.differing) for pairing in pairings.values()) == 0
    assert sum(len(pairing.only_left) for pairing in pairings.values()) == 1
    assert sum(len(pairing.only_right) for pairing in pairings.values()) == 1


def test_a_question_that_is_asked_twice_is_paired_twice():
    pairings = pair_texts([text("a", 0.0), text("b", 0.0)], [text("a", 0.0), text("c", 0.0)])
    (pairing,) = pairings.values()
    assert [one["prediction"] for one, _ in pairing.equal] == ["a"]
    assert [(a["prediction"], b["prediction"]) for a, b in pairing.differing] == [("b", "c")]


def test_targets_of_both_are_shown_where_they_differ(capsys, tmp_path):
    theirs = [text("b", 0.0, targets=["a cat"])]
    lines = examples(capsys, tmp_path, [text("a", 0.0)], theirs)
    assert lines[2:4] == ["targets a dog | a brown dog", "targets a cat"]


def test_a_text_that_steers_a_terminal_is_spelled_out(capsys, tmp_path):
    evil = "\x1b[31m\nred"
    ours = [text(evil, 0.0, question=evil, targets=[evil], model=evil, kind=evil, subset=evil)]
    theirs = [ours[0] | {"prediction": ""}]
    names = [write(tmp_path / n, {evil: n}, r) for n, r in (("A", ours), ("B\x1b[31m", theirs))]
    compare(*names)
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert output.count(r"\x1b[31m\nred") == 7
    assert re.search(r"B\\x1b\[31m'\s+0\s+''", output)


def test_a_workspace_and_its_reports_are_the_same_evaluation(tmp_path):
    reports = write(tmp_path / "reports", rows=[text("a dog", 2.5)])
    workspace, folder = read_snapshot(str(tmp_path)), read_snapshot(reports)
    for snapshot in (workspace, folder):
        assert read_predictions(snapshot) == [text("a dog", 2.5)]
    assert workspace.scores == folder.scores
    assert folder.intervals["captions.CIDEr"] == (0.7, 0.9)


def test_predictions_without_subsets_are_read(tmp_path):
    names = [name for name in COLUMNS.names if name != "subset"]
    schema = pa.schema([COLUMNS.field(name) for name in names] + [("stopped", pa.bool_())])
    folder = write(tmp_path, rows=[text("a dog", 2.5, stopped=True)], schema=schema)
    assert read_predictions(read_snapshot(folder)) == [text("a dog", 2.5)]


def test_a_folder_without_an_evaluation_is_named(tmp_path, left):
    with pytest.raises(SettingsError, match=rf"{tmp_path} is no run and no eval"):
        compare(left, str(tmp_path))


def test_missing_predictions_are_named(left):
    (Path(left) / "predictions.parquet").unlink()
    with pytest.raises(StageError, match=r"left/predictions\.parquet cannot be read.*`dvc pull`"):
        compare(left, left)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00", b"7", b"[" * 100_000])
def test_damaged_scores_are_named(left, content):
    (Path(left) / "eval.json").write_bytes(content)
    with pytest.raises(StageError, match=r"left: eval\.json is damaged"):
        compare(left, left)


def test_damaged_predictions_are_named(left):
    path = Path(left) / "predictions.parquet"
    whole = path.read_bytes()
    wrong = {name: pa.array([{"x": 1}]) for name in COLUMNS.names}
    for content in (b"", b"PAR1", whole[:-9], whole[: len(whole) // 2], whole[:4] + whole[-9:]):
        path.write_bytes(content)
        with pytest.raises(StageError, match=r"predictions\.parquet is damaged, or no table"):
            compare(left, left)
    for table in (pa.table({"image_id": [1]}), pa.table(wrong)):
        pq.write_table(table, path)
        with pytest.raises(StageError, match=r"predictions\.parquet is damaged, or no table"):
            compare(left, left)


SETTINGS = {
    "seed": 0,
    "fetch": {"files": []},
    "finetune": {"learning_rate": 2e-3, "lora": {"r": 16, "alpha": 32}},
}
METRICS = {"steps": 836, "loss": 0.2361449, "validation_loss": None}
PROVENANCE = {"git_commit": "a" * 40, "versions": {"torch": "2.15.0"}, "device": "CPU, 1 threads"}


def write_run(folder, settings=SETTINGS, metrics=METRICS, provenance=PROVENANCE):
    folder.mkdir(parents=True)
    files = {"params.yaml": settings, "metrics.json": metrics, "provenance.json": provenance}
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    return str(folder)


@pytest.fixture
def left_run(tmp_path):
    return write_run(tmp_path / "left")


def test_a_run_and_its_copy_differ_in_nothing(capsys, tmp_path, left_run):
    shutil.copytree(left_run, tmp_path / "copy")
    assert parts_of(capsys, left_run, tmp_path / "copy") == {
        "settings": ["5 settings equal"],
        "metrics": ["3 metrics equal"],
        "provenance": ["3 other facts equal"],
    }


def test_the_setting_that_differs_is_named_and_no_other(capsys, tmp_path, left_run):
    lora = SETTINGS["finetune"]["lora"] | {"r": 64}
    settings = SETTINGS | {"finetune": SETTINGS["finetune"] | {"lora": lora}}
    right = write_run(tmp_path / "right", settings=settings)
    assert parts_of(capsys, left_run, right)["settings"] == [
        "finetune.lora.r 16 64",
        "4 settings equal",
    ]


def test_metrics_are_shown_with_their_difference(capsys, tmp_path, left_run):
    right = write_run(tmp_path / "right", metrics=METRICS | {"steps": 800, "loss": 0.25})
    assert parts_of(capsys, left_run, right)["metrics"] == [
        "steps 836 800 -36",
        "loss 0.23614 0.25 +0.013855",
        "1 metrics equal",
    ]


def test_a_value_of_one_run_only_is_a_dash_on_the_other_side(capsys, tmp_path, left_run):
    metrics = {"steps": 836, "loss": 0.2361449, "stop_rate": 1.0}
    right = write_run(tmp_path / "right", metrics=metrics)
    assert parts_of(capsys, left_run, right)["metrics"] == [
        "validation_loss null -",
        "stop_rate - 1",
        "2 metrics equal",
    ]


def test_a_number_and_none_have_no_difference(capsys, tmp_path, left_run):
    right = write_run(tmp_path / "right", metrics=METRICS | {"validation_loss": 0.5})
    assert "validation_loss null 0.5" in parts_of(capsys, left_run, right)["metrics"]


def test_not_a_number_is_the_same_metric(capsys, tmp_path):
    runs = [write_run(tmp_path / name, metrics={"loss": float("nan")}) for name in ("one", "two")]
    assert parts_of(capsys, *runs)["metrics"] == ["1 metrics equal"]


def test_one_and_one_point_zero_are_the_same_setting(capsys, tmp_path, left_run):
    right = write_run(tmp_path / "right", settings=SETTINGS | {"seed": 0.0})
    assert parts_of(capsys, left_run, right)["settings"] == ["5 settings equal"]


def test_another_commit_is_shown_short(capsys, tmp_path, left_run):
    provenance = PROVENANCE | {"git_commit": "b" * 40 + "+changes"}
    right = write_run(tmp_path / "right", provenance=provenance)
    assert parts_of(capsys, left_run, right)["provenance"] == [
        f"git_commit {'a' * 12} {'b' * 12}+changes",
        "2 other facts equal",
    ]


def test_a_fact_that_steers_a_terminal_is_spelled_out(capsys, tmp_path, left_run):
    right = write_run(tmp_path / "right", provenance=PROVENANCE | {"device": "\x1b[31m"})
    assert parts_of(capsys, left_run, right)["provenance"][0].endswith(r" '\x1b[31m'")


def test_columns_are_aligned(capsys, tmp_path, left_run):
    right = write_run(tmp_path / "right", metrics=METRICS | {"steps": 8, "loss": 0.25})
    compare(left_run, right)
    head, *lines = [line for line in capsys.readouterr().out.splitlines() if "equal" not in line]
    metrics = lines[lines.index("metrics") + 1 :][:2]
    for column in (left_run, right, "second - first"):
        assert {line[head.index(column) + len(column) - 1] == " " for line in metrics} == {False}
    assert {len(line) for line in (head, *metrics)} == {len(head)}


def test_flattening_keeps_every_value_and_the_order():
    values = {"a": {"b": 1, "c": {"d": [2, {"e": 3}]}}, "f": [], "g": {}, "h": None}
    assert list(flatten(values, "x.").items()) == [
        ("x.a.b", 1),
        ("x.a.c.d.0", 2),
        ("x.a.c.d.1.e", 3),
        ("x.f", []),
        ("x.g", {}),
        ("x.h", None),
    ]


def test_a_run_without_metrics_is_named(tmp_path, left_run):
    right = write_run(tmp_path / "right")
    (tmp_path / "right/metrics.json").unlink()
    with pytest.raises(StageError, match=r"right has no metrics: wanted metrics\.json"):
        compare(left_run, right)


def test_a_run_without_provenance_is_compared(capsys, tmp_path, left_run):
    right = write_run(tmp_path / "right")
    (tmp_path / "right/provenance.json").unlink()
    assert "device CPU, 1 threads -" in parts_of(capsys, left_run, right)["provenance"]


@pytest.mark.parametrize("name", ["params.yaml", "metrics.json", "provenance.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00", b"7"])
def test_a_damaged_file_of_a_run_is_named(tmp_path, left_run, name, content):
    right = write_run(tmp_path / "right")
    (tmp_path / "right" / name).write_bytes(content)
    with pytest.raises(StageError, match=rf"right: {name} is damaged"):
        compare(left_run, right)


def test_a_run_directory_is_compared_with_another_one_only(left_run):
    with pytest.raises(SettingsError, match=r"left is a run directory, and HEAD is none"):
        compare(left_run, "HEAD")


def test_workspaces_are_compared_in_runs_and_scores(capsys, tmp_path):
    for name, loss in (("one", 0.5), ("other", 0.25)):
        write_run(tmp_path / name / "runs/pretrain", metrics={"loss": loss})
        write(tmp_path / name / "reports", changed("captions", "CIDEr", value=loss))
        (tmp_path / name / "params.yaml").write_text(f"seed: {loss}")
    parts = parts_of(capsys, str(tmp_path / "one"), tmp_path / "other")
    assert tuple(parts) == TITLES
    assert parts["settings"][0] == "seed 0.5 0.25"
    assert parts["metrics"][0] == "pretrain.loss 0.5 0.25 -0.25"
    assert parts["scores"][0] == "captions.CIDEr 0.5 [0.7, 0.9] 0.25 [0.7, 0.9] -0.25 unpaired"
    assert parts["provenance"] == ["3 other facts equal"]


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def git(folder, *arguments):
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@localhost"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_revisions_the_workspace_and_folders_are_compared_with_one_another(tmp_path):
    git(tmp_path, "init")
    # This repository has a folder of the name that DVC gives to the checked-out files.
    (tmp_path / "workspace").mkdir()
    assert run(tmp_path, "dvc", "init", "--quiet").returncode == 0
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    reports = tmp_path / "reports"
    for number, score in enumerate((0.5, 0.75)):
        scores = {"captions": {"CIDEr": score, "intervals": {"CIDEr": [score, score]}}}
        write(reports, scores, [text(f"text {number}", score)])
        added = run(tmp_path, "dvc", "add", "--quiet", "reports/predictions.parquet")
        assert added.returncode == 0, added.stderr
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "--message", f"evaluation {number}")
    for pair in (["HEAD~1", "HEAD"], ["HEAD~1", "workspace"], ["HEAD~1", "."]):
        done = run(tmp_path, "eval.compare", *pair)
        assert done.returncode == 0, done.stderr
        lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
        assert "captions.CIDEr 0.5 [0.5, 0.5] 0.75 [0.75, 0.75] +0.25 [0, 0]" in lines
        assert lines[-2:] == [f"{pair[0]} 0.5 text 0", f"{pair[1]} 0.75 text 1"]
    nowhere = run(tmp_path, "eval.compare", "HEAD", "nowhere")
    assert nowhere.returncode == 2
    assert nowhere.stderr.startswith("error: nowhere is neither a folder nor a revision")
    shutil.rmtree(tmp_path / ".dvc/cache")
    lost = run(tmp_path, "eval.compare", "HEAD~1", ".")
    assert lost.returncode == 1
    assert lost.stderr.startswith("error: HEAD~1/reports/predictions.parquet cannot be read")
    assert "captions.CIDEr" in lost.stdout, "the scores are printed before"
    assert lost.stderr.count("\n") == 1


@pytest.mark.parametrize(("right", "exit_code"), [("nowhere", 2), (".", 2), ("unfinished", 1)])
def test_a_mistake_is_one_line(left_run, right, exit_code, tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/params.yaml").write_text("seed: 0\n")
    done = subprocess.run(
        [sys.executable, "-m", "eval.compare", left_run, right],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (exit_code, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
