"""POPE's labels and answers of other systems, in the layouts in which they exist."""

import json
import re

import pytest

from eval.metrics import score_pope
from eval.score import score
from eval.systems.pope_files import read_answers, read_labels
from workspace.errors import StageError

OBJECTS = {
    "random": [("a.jpg", "cat", "yes"), ("a.jpg", "dog", "no"), ("b.jpg", "car", "yes")],
    "popular": [("a.jpg", "cat", "yes"), ("b.jpg", "car", "yes"), ("b.jpg", "bus", "no")],
}
SAID = {
    "random": ["Yes", "Yes, there is a dog.", "No"],
    "popular": ["yes.", "No, there is no car", "Not that I see"],
}


def question(name):
    return f"Is there a {name} in the image?"


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labels_of(subset):
    return [
        {"question_id": number, "image": image, "text": question(name), "label": label}
        for number, (image, name, label) in enumerate(OBJECTS[subset], start=1)
    ]


def answers_of(subset, first=1, **more):
    return [
        {"question_id": number, "text": text, **more}
        for number, text in enumerate(SAID[subset], start=first)
    ]


@pytest.fixture
def folder(tmp_path):
    """POPE's own files: the questions of each subset are numbered from 1."""
    folder = tmp_path / "coco"
    folder.mkdir()
    for subset in OBJECTS:
        lines(folder / f"coco_pope_{subset}.json", labels_of(subset))
    return folder


@pytest.fixture
def answers(tmp_path):
    return lines(tmp_path / "them_random.jsonl", answers_of("random"))


def wanted(subset):
    return score_pope([label for *_, label in OBJECTS[subset]], SAID[subset])


def rows(output):
    """The values of each row of the table, by name; those of a mean have the key mean."""
    found = re.findall(r"^(\S+, (?:mean of )?\S+) +(\d+) +(.*\d)$", output, re.M)
    head = ["words", "accuracy", "precision", "recall", "f1", "yes_rate"]
    return {
        name: dict(zip(["count", *head], map(float, [count, *values.split()]), strict=True))
        for name, count, values in found
    }


def check(found, scores):
    for name, value in scores.items():
        assert found[name] == pytest.approx(100 * value, abs=0.005), name


def test_one_subset_is_scored_as_pope_does(folder, answers, capsys):
    score(folder / "coco_pope_random.json", [f"them={answers}"], official=False)
    found = rows(capsys.readouterr().out)
    assert found.keys() == {"them, random"}
    assert found["them, random"]["count"] == 3
    check(found["them, random"], wanted("random"))


@pytest.mark.parametrize("layout", ["folder", "category", "llava"])
def test_the_mean_of_the_subsets_is_that_of_their_scores(folder, tmp_path, capsys, layout):
    answers = tmp_path / "them"
    if layout == "folder":
        answers.mkdir()
        for subset in SAID:
            lines(answers / f"answers_{subset}.jsonl", answers_of(subset))
    elif layout == "category":
        lines(answers, [row for subset in SAID for row in answers_of(subset, category=subset)])
    else:
        # LLaVA numbers all questions in one list, with a second line, and prints no subset.
        listed = [
            {"question_id": 10 * (subset == "popular") + row["question_id"], "category": subset}
            | {"image": row["image"], "text": row["text"] + "\nAnswer with a single word."}
            for subset in OBJECTS
            for row in labels_of(subset)
        ]
        lines(folder / "llava_pope_test.jsonl", listed)
        prompts = {row["question_id"]: row["text"] for row in listed}
        said = [*answers_of("random"), *answers_of("popular", first=11)]
        lines(answers, [row | {"prompt": prompts[row["question_id"]]} for row in said])
    score(folder, [str(answers)], official=False)
    found = rows(capsys.readouterr().out)
    assert found.keys() == {"them, popular", "them, random", "them, mean of 2"}
    for subset in OBJECTS:
        check(found[f"them, {subset}"], wanted(subset))
    both = [wanted(subset) for subset in OBJECTS]
    check(found["them, mean of 2"], {n: (both[0][n] + both[1][n]) / 2 for n in both[0]})


def test_systems_are_compared_subset_by_subset(folder, answers, tmp_path, capsys):
    all_yes = lines(tmp_path / "yes.jsonl", [r | {"text": "Yes"} for r in answers_of("random")])
    score(folder / "coco_pope_random.json", [str(answers), str(all_yes)], official=False)
    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if "less them_random" in line]
    accuracy = 100 * (2 / 3 - wanted("random")["accuracy"])
    assert float(line.split()[3]) == pytest.approx(accuracy, abs=0.005)


def test_the_answer_may_stand_beside_the_question_and_its_label(folder, answers, tmp_path):
    labels = read_labels(folder / "coco_pope_random.json")
    rows = [
        row | {"answer": answer["text"]}
        for row, answer in zip(labels_of("random"), answers_of("random"), strict=True)
    ]
    beside = lines(tmp_path / "beside.jsonl", rows)
    assert read_answers(beside, labels) == read_answers(answers, labels)


def test_a_model_that_repeats_the_question_is_scored(folder, tmp_path):
    labels = read_labels(folder / "coco_pope_random.json")
    asked = {q.question_id: q.question for q in labels}
    rows = [{"question_id": n, "prompt": text, "text": text} for n, text in asked.items()]
    said = read_answers(lines(tmp_path / "parrot.jsonl", rows), labels)
    assert list(said.values()) == list(asked.values())


def test_questions_without_an_answer_are_counted_and_named(folder, tmp_path, answers, capsys):
    some = lines(tmp_path / "some.jsonl", answers_of("random")[:2])
    score(folder / "coco_pope_random.json", [str(answers), str(some)], official=False)
    output = capsys.readouterr().out
    said = "note: some: scored on 2 of 3 questions of subset random; without a text: 3\n"
    assert said in output
    assert "because them_random has texts for other questions of subset random" in output


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"question_id": 1}], "line 1: wanted an object with the answer as 'text'"),
        ([{"text": "no"}], "line 1: wanted an object with 'question_id'"),
        ([{"question_id": True, "text": "no"}], "line 1: wanted an object with 'question_id'"),
        ([7], "line 1: wanted an object"),
        (labels_of("random"), "line 1: the question without an answer"),
        (
            [labels_of("popular")[1] | {"answer": "no", "question_id": 1}],
            "line 1: has 'text' and 'answer', and 'text' is not question 1",
        ),
        ([{"question_id": 1, "text": "\ud800"}], "line 1: half a character"),
        ([{"question_id": 1, "text": "no"}] * 2, "line 2: question 1 has two answers"),
        ([{"question_id": 8, "text": "no"}], "answers questions that are not asked: 8"),
        (
            [{"question_id": 1, "text": "no", "prompt": "Is there a bus in the image?"}],
            "line 1: was asked 'Is there a bus .*another version of POPE",
        ),
    ],
)
def test_answers_that_fit_no_question_are_refused(folder, tmp_path, rows, reason):
    path = lines(tmp_path / "bad.jsonl", rows)
    with pytest.raises(StageError, match=rf"bad\.jsonl: {reason}"):
        read_answers(path, read_labels(folder / "coco_pope_random.json"))


def test_numbers_of_several_subsets_need_their_subset(folder, answers):
    with pytest.raises(StageError, match="question 1 stands in the subsets popular and random"):
        read_answers(answers, read_labels(folder))


def test_a_file_of_answers_to_no_subset_is_refused(folder, tmp_path):
    (tmp_path / "them").mkdir()
    lines(tmp_path / "them/answers.jsonl", answers_of("random"))
    with pytest.raises(StageError, match=r"its name ends with no subset: popular, random"):
        read_answers(tmp_path / "them", read_labels(folder))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": "maybe"}, "line 1: label is 'maybe', wanted yes or no"),
        ({"image": None}, "line 1: wanted an object with 'image'"),
        ({"question_id": 2}, "question 2 of subset random stands twice"),
    ],
)
def test_labels_in_another_layout_are_refused(folder, change, reason):
    first, *others = labels_of("random")
    path = lines(folder / "coco_pope_random.json", [first | change, *others])
    with pytest.raises(StageError, match=reason):
        read_labels(path)


def test_a_list_of_questions_that_lacks_one_is_refused(folder):
    row = labels_of("random")[0]
    del row["label"]
    lines(folder / "llava_pope_test.jsonl", [row | {"category": "random"}])
    with pytest.raises(StageError, match="the list of questions lacks 5 that have labels"):
        read_labels(folder)


def test_a_folder_without_questions_is_refused(tmp_path):
    with pytest.raises(StageError, match=r"holds no file with the suffix \.json or \.jsonl"):
        read_labels(tmp_path)


def test_a_broken_line_is_named(folder):
    path = folder / "coco_pope_random.json"
    path.write_text(path.read_text() + "{")
    with pytest.raises(StageError, match=r"no usable JSON in UTF-8: line 4: "):
        read_labels(path)
