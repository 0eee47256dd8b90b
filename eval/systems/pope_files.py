"""Reads POPE's labelled questions and the answers of a system, both as JSON Lines.

Labels have POPE's layout (question_id, image, text, label), answers LLaVA's (question_id, text, and
maybe prompt). POPE numbers the questions of each subset from 1; LLaVA numbers them in a list of all
(question_id, image, text, category), and prints answers under these numbers. Positions in a file
mean nothing, since POPE's labels were published in two versions.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache.texts import first_few
from eval.systems.files import check_text, read_values, refuse

OFFICIAL = "coco_pope_"
"""Start of the names of POPE's own files; the subset follows."""

SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True, slots=True)
class LabelledQuestion:
    """A yes-no question and its right answer."""

    subset: str
    question_id: str
    image: str
    question: str
    label: str
    """Yes, no, or empty in a list of questions without labels."""

    @property
    def key(self) -> tuple[str, str]:
        """What tells the question from all others."""
        return self.subset, self.question_id


def is_labelled(content: Any) -> bool:
    """Return whether the value of a file is a list of labelled questions."""
    rows = content if isinstance(content, list) else [content]
    return bool(rows) and isinstance(rows[0], dict) and "label" in rows[0]


def read_labels(path: Path) -> list[LabelledQuestion]:
    """Return the labelled questions of a file, or of a folder with a file for each subset.

    A folder may hold LLaVA's list of questions too, whose numbers the answers then have.

    Raises:
        StageError: There is no such file, it has another layout, or a question stands twice.
    """
    found = [
        question for file in files_in(path) for question in _questions(file, read_values(file))
    ]
    labelled = [question for question in found if question.label]
    listed = [question for question in found if not question.label]
    if not labelled:
        refuse(path, "holds no question with a label, yes or no")
    if listed:
        labelled = _renumbered(path, labelled, listed)
    repeated = [key for key, count in Counter(q.key for q in labelled).items() if count > 1]
    if repeated:
        subset, question_id = repeated[0]
        refuse(path, f"question {question_id} of subset {subset} stands twice, wanted once")
    return labelled


def read_answers(path: Path, questions: Sequence[LabelledQuestion]) -> dict[tuple[str, str], str]:
    """Return the answers of a system, by the keys of the questions.

    Args:
        path: A file, or a folder with a file for each subset, whose name ends with the subset's.
        questions: The questions that were asked.

    Raises:
        StageError: A file has another layout, answers a question twice or one that is not asked, or
            a prompt holds another question.
    """
    by_key = {question.key: question for question in questions}
    subsets_of_id = defaultdict(list)
    for subset, question_id in by_key:
        subsets_of_id[question_id].append(subset)
    answers: dict[tuple[str, str], str] = {}
    unknown = []
    for file in files_in(path):
        of_file = _subset_named(file, questions) if path.is_dir() else ""
        for place, row in _rows(file, read_values(file)):
            question_id = _field(file, place, row, "question_id")
            subset = str(row.get("category") or of_file)
            candidates = [subset] if subset else subsets_of_id[question_id] or [""]
            if len(candidates) > 1:
                refuse(
                    file,
                    f"question {question_id} stands in the subsets {' and '.join(candidates)}. "
                    f"Name a folder with a file for each, or write the subset as 'category'",
                )
            key = candidates[0], question_id
            if key not in by_key:
                unknown.append(question_id)
                continue
            if key in answers:
                refuse(file, f"{place}: question {question_id} has two answers, wanted one")
            _check_prompt(file, place, row, by_key[key])
            answers[key] = _answer(file, place, row, by_key[key])
    if unknown:
        refuse(path, f"answers questions that are not asked: {first_few(unknown)}")
    return answers


def files_in(path: Path) -> list[Path]:
    """Return the JSON files of a folder in the order of their names, or the file itself."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    return files or refuse(path, f"holds no file with the suffix {' or '.join(SUFFIXES)}")


def _questions(path: Path, content: Any) -> list[LabelledQuestion]:
    subset_of_file = path.stem.removeprefix(OFFICIAL)
    questions = []
    for place, row in _rows(path, content):
        label = row.get("label", "")
        if label not in ("yes", "no") and ("label" in row or "category" not in row):
            refuse(
                path,
                f"{place}: label is {str(label)[:20]!r}, wanted yes or no; a folder holds labelled "
                f"questions alone",
            )
        questions.append(
            LabelledQuestion(
                subset=str(row.get("category") or subset_of_file),
                question_id=_field(path, place, row, "question_id"),
                image=_field(path, place, row, "image"),
                question=_first_line(_field(path, place, row, "text")),
                label=label,
            )
        )
    return questions


def _renumbered(
    path: Path, labelled: list[LabelledQuestion], listed: list[LabelledQuestion]
) -> list[LabelledQuestion]:
    """Give labelled questions the numbers that a list of the same questions has."""
    numbers = {(q.subset, q.image, q.question): q.question_id for q in listed}
    places = [(q.subset, q.image, q.question) for q in labelled]
    if absent := [question for *_, question in filter(lambda p: p not in numbers, places)]:
        refuse(path, f"the list of questions lacks {len(absent)} that have labels: {absent[0]!r}")
    return [
        replace(question, question_id=numbers[place])
        for question, place in zip(labelled, places, strict=True)
    ]


def _rows(path: Path, content: Any) -> list[tuple[str, dict[str, Any]]]:
    rows = content if isinstance(content, list) else [content]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            refuse(path, f"line {number}: wanted an object with question_id and text")
    return [(f"line {number}", row) for number, row in enumerate(rows, start=1)]


def _field(path: Path, place: str, row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str | int) or isinstance(value, bool):
        refuse(path, f"{place}: wanted an object with {key!r}, a text or a number")
    return check_text(path, place, str(value))


def _answer(path: Path, place: str, row: dict[str, Any], asked: LabelledQuestion) -> str:
    # POPE's own program reads `answer`, LLaVA prints `prompt` and `text`. In a row of the labels
    # themselves `text` is the question, and a system may have added its answer.
    text, answer = row.get("text"), row.get("answer")
    is_question = isinstance(text, str) and _first_line(text) == asked.question
    if "prompt" not in row and answer is not None and text is not None:
        if not is_question:
            refuse(
                path,
                f"{place}: has 'text' and 'answer', and 'text' is not question "
                f"{asked.question_id}, {asked.question[:80]!r}. Name the answer 'text' alone",
            )
        text = answer
    elif "prompt" not in row and "image" in row and is_question:
        refuse(path, f"{place}: the question without an answer, wanted the answer as 'text'")
    elif text is None:
        text = answer
    if not isinstance(text, str):
        refuse(path, f"{place}: wanted an object with the answer as 'text'")
    return check_text(path, place, text)


def _check_prompt(path: Path, place: str, row: dict[str, Any], asked: LabelledQuestion) -> None:
    prompt = row.get("prompt")
    if isinstance(prompt, str) and asked.question not in " ".join(prompt.split()):
        refuse(
            path,
            f"{place}: was asked {_first_line(prompt)[:80]!r}, but question {asked.question_id} is "
            f"{asked.question[:80]!r}: the labels are of another version of POPE",
        )


def _subset_named(path: Path, questions: Sequence[LabelledQuestion]) -> str:
    subsets = sorted({q.subset for q in questions}, key=len, reverse=True)
    found = next((subset for subset in subsets if path.stem.endswith(subset)), "")
    return found or refuse(path, f"its name ends with no subset: {first_few(sorted(subsets))}")


def _first_line(text: str) -> str:
    """Return the question without the request for one word that LLaVA adds in a second line."""
    return " ".join(text.strip().split("\n")[0].split())
