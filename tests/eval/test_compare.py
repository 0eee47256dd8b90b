"""What `python -m eval.compare` prints for two evaluations."""

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
from eval.compare import EXAMPLES, compare, lie_apart, pair_texts
from eval.evaluation import COLUMNS, read_evaluation
from workspace.errors import StageError

ROOT = Path(__file__).parents[2]

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
    compare(left, right)
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_an_evaluation_and_its_copy_differ_in_nothing(capsys, tmp_path, left):
    shutil.copytree(left, tmp_path / "copy")
    lines = printed(capsys, left, str(tmp_path / "copy"))
    assert lines[1] == "4 scores equal"
    assert lines[-1].startswith("finetune, caption: 0 texts differ, 1 are equal, 0 only in")


def test_a_score_stands_beside_the_other_with_its_interval(capsys, tmp_path, left):
    right = write(tmp_path / "right", changed("captions", "CIDEr", value=0.85))
    lines = printed(capsys, left, right)
    assert lines[0] == f"{left} {right} second - first"
    assert lines[1:3] == ["captions.CIDEr 0.8 [0.7, 0.9] 0.85 [0.7, 0.9] +0.05", "3 scores equal"]


def test_a_mark_says_that_intervals_do_not_overlap(capsys, tmp_path, left):
    random = {"accuracy": 0.8, "intervals": {"accuracy": [0.71, 0.9]}}
    right = write(tmp_path / "right", changed("pope", "random", value=random))
    lines = printed(capsys, left, right)
    assert lines[1] == "pope.random.accuracy 0.6 [0.5, 0.7] 0.8 [0.71, 0.9] +0.2 *"
    assert "* the 95 % intervals do not overlap" in lines


def test_the_same_score_with_another_interval_is_shown(capsys, tmp_path, left):
    right = write(tmp_path / "right", changed("captions", "intervals", "CIDEr", value=[0.75, 0.85]))
    lines = printed(capsys, left, right)
    assert lines[1] == "captions.CIDEr 0.8 [0.7, 0.9] 0.8 [0.75, 0.85] +0"


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
    assert "captions.CIDEr 0.8 [0.7, 0.9] 3 +2.2" in lines
    assert "captions.stop_rate 1 [1, 1] -" in lines
    assert f"{right} has no intervals: what is chance in it is not known" in lines


def test_controls_are_left_to_the_other_command(capsys, tmp_path, left):
    right = write(tmp_path / "right", changed("captions", "blind", "CIDEr", value=0.7))
    assert printed(capsys, left, right)[1] == "4 scores equal"


def test_what_was_scored_is_no_score(capsys, tmp_path):
    of_run = {
        name: SCORES
        | {
            "weights_sha256": {"pretrain": {"projector.safetensors": name}},
            "contamination": {"captions": {"images": number}},
        }
        for number, name in enumerate(("one", "other"))
    }
    one, other = (write(tmp_path / name, scores) for name, scores in of_run.items())
    lines = printed(capsys, one, other)
    assert not [line for line in lines if "projectors" in line or "contamination" in line]
    assert "4 scores equal" in lines


def test_no_number_equals_no_number(capsys, tmp_path):
    nothing = changed("captions", "CIDEr", value=float("nan"))
    names = [write(tmp_path / name, nothing) for name in ("one", "other")]
    assert printed(capsys, *names)[1] == "4 scores equal"


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
    wanted = sorted(range(13), key=lambda number: -gaps[number])[:EXAMPLES]
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


def test_what_steers_a_terminal_is_spelled_out(capsys, tmp_path):
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
    workspace, folder = read_evaluation(str(tmp_path)), read_evaluation(reports)
    assert workspace.predictions == folder.predictions == [text("a dog", 2.5)]
    assert workspace.scores == folder.scores
    assert folder.scores["captions.intervals.CIDEr.1"] == 0.9


def test_predictions_without_subsets_are_read(tmp_path):
    names = [name for name in COLUMNS.names if name != "subset"]
    schema = pa.schema([COLUMNS.field(name) for name in names] + [("stopped", pa.bool_())])
    folder = write(tmp_path, rows=[text("a dog", 2.5, stopped=True)], schema=schema)
    assert read_evaluation(folder).predictions == [text("a dog", 2.5)]


def test_a_folder_without_an_evaluation_is_named(tmp_path, left):
    with pytest.raises(SettingsError, match=rf"{tmp_path} has no evaluation: neither reports/eval"):
        compare(left, str(tmp_path))


def test_missing_predictions_are_named(left):
    (Path(left) / "predictions.parquet").unlink()
    with pytest.raises(StageError, match=r"left/predictions\.parquet is missing: try `dvc pull`"):
        compare(left, left)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00", b"7", b"[" * 100_000])
def test_damaged_scores_are_named(left, content):
    (Path(left) / "eval.json").write_bytes(content)
    with pytest.raises(StageError, match=r"left/eval\.json is damaged"):
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
        assert lines[1] == "captions.CIDEr 0.5 [0.5, 0.5] 0.75 [0.75, 0.75] +0.25 *"
        assert lines[-2:] == [f"{pair[0]} 0.5 text 0", f"{pair[1]} 0.75 text 1"]
    nowhere = run(tmp_path, "eval.compare", "HEAD", "nowhere")
    assert nowhere.returncode == 2
    assert nowhere.stderr.startswith("error: nowhere is neither a folder nor a revision")
    shutil.rmtree(tmp_path / ".dvc/cache")
    lost = run(tmp_path, "eval.compare", "HEAD~1", ".")
    assert lost.returncode == 1
    assert lost.stderr.startswith("error: HEAD~1: reports/predictions.parquet cannot be read")
    assert lost.stderr.count("\n") == 1
