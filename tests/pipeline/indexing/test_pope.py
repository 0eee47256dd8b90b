import json

import pytest

from pipeline.indexing.image_collection import ImageRow
from pipeline.indexing.pope import collect_questions, read_official, read_question_files
from workspace.errors import StageError

LINE = {
    "question_id": 1,
    "image": "COCO_val2014_000000310196.jpg",
    "text": "Is there an apple in the imange?",
    "label": "yes",
}
INSTANCES = {
    "images": [],
    "annotations": [{"image_id": 310196, "category_id": 1}, {"image_id": 9, "category_id": 2}],
    "categories": [{"id": 1, "name": "apple"}, {"id": 2, "name": "dog"}],
}


def images(*ids, split="val"):
    return {i: ImageRow(i, split, f"{i:012d}.jpg", 8, 6, 100, 1) for i in ids}


def write(path, *lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def official(tmp_path, *lines):
    rejected = []
    path = write(tmp_path / "coco_pope_random.json", *lines)
    return [question.row for question in read_official(path, rejected)], rejected


@pytest.fixture
def captions(tmp_path):
    """Path of a captions file with both kinds of question files beside it."""
    write(tmp_path / "instances_val2017.json", INSTANCES)
    write(tmp_path / "coco_pope_random.json", LINE, LINE | {"question_id": 2, "label": "no"})
    write(tmp_path / "coco_pope_popular.json", LINE)
    return tmp_path / "captions_val2017.json"


def test_a_published_question_is_copied_word_for_word(tmp_path):
    (row,), rejected = official(tmp_path, LINE)
    assert not rejected
    assert (row.image_id, row.question, row.label) == (310196, LINE["text"], "yes")
    assert (row.subset, row.question_id) == ("official random", "official random/1")


def test_a_published_question_is_the_same_wherever_it_stands(tmp_path):
    lines = [LINE | {"question_id": n, "text": f"Is there\u2028a {n}?"} for n in range(9)]
    rows, _ = official(tmp_path, *lines)
    assert [row.question for row in rows] == [line["text"] for line in lines]
    fewer, _ = official(tmp_path, *lines[:2:-1])
    assert {row.question_id: row for row in fewer}.items() <= {
        row.question_id: row for row in rows
    }.items()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label": "maybe"}, "label is neither yes nor no: 'maybe'"),
        ({"label": ...}, "no key 'label'"),
        ({"text": " "}, "empty question"),
        ({"text": 5}, "key 'text' is not str: int"),
        ({"image": "cat.jpg"}, "image without an id: no number at the end of 'cat.jpg'"),
        ({"image": "../COCO_val2014_000000000001.jpg"}, "bad file name: "),
        ({"question_id": "2"}, "key 'question_id' is not int: str"),
        ({"question_id": 1}, "question id repeated: official random/1"),
    ],
)
def test_a_bad_question_is_rejected_with_its_reason(tmp_path, changes, reason):
    line = LINE | {"question_id": 2} | changes
    bad = {name: value for name, value in line.items() if value is not ...}
    rows, (rejection,) = official(tmp_path, LINE, bad)
    assert len(rows) == 1
    assert rejection.reason.startswith(reason)
    assert (rejection.kind, rejection.record) == ("pope", "coco_pope_random.json: question 2")


def test_a_damaged_line_costs_that_question_alone(tmp_path):
    path = write(tmp_path / "coco_pope_random.json", LINE, LINE | {"question_id": 2})
    path.write_text(path.read_text()[:-20] + "\n\n[" + "[" * 100_000 + "\n7\n")
    rejected = []
    assert len(read_official(path, rejected)) == 1
    assert [rejection.reason.partition(":")[0] for rejection in rejected] == [
        "not usable JSON in UTF-8", "not usable JSON", "not an object",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no line is a question of POPE: the file is empty"),
        (b"[1,\n2]\n", "no line is a question of POPE: not usable JSON in UTF-8"),
        (b'{"questions": []}', "no line is a question of POPE: no key 'image'"),
        (b"\xff", "not usable JSON in UTF-8: 'utf-8' codec"),
    ],
)
def test_a_file_without_a_question_is_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "coco_pope_random.json"
    path.write_bytes(content)
    with pytest.raises(StageError) as error:
        read_official(path, [])
    assert str(error.value).startswith(f"beside data.val.captions: {path}: {reason}")


def test_usable_or_not_every_published_question_counts_as_read(captions):
    lines = (LINE, LINE, LINE | {"question_id": 2, "label": "perhaps"})
    write(captions.with_name("coco_pope_popular.json"), *lines)
    files = read_question_files([captions])
    assert (len(files.official), len(files.rejected), files.num_official) == (3, 2, 5)


def test_a_folder_in_the_place_of_a_file_is_refused_by_name(captions):
    (captions.parent / "coco_pope_x.json").mkdir()
    with pytest.raises(StageError, match=r"coco_pope_x\.json: a folder, wanted a file"):
        read_question_files([captions])


def test_questions_are_those_of_all_files_by_subset(captions):
    found = collect_questions(read_question_files([captions]), images(310196), seed=0)
    assert [row.question_id for row in found.rows] == [
        "adversarial/310196/1", "adversarial/310196/2",
        "official popular/1", "official random/1", "official random/2",
        "popular/310196/1", "popular/310196/2", "random/310196/1", "random/310196/2",
    ]  # fmt: skip
    assert not found.rejected


def test_a_question_about_another_image_is_left_out_with_that_reason(captions):
    files = read_question_files([captions])
    found = collect_questions(files, images(9), seed=0)
    assert {row.image_id for row in found.rows} == {9}
    assert [(r.kind, r.reason) for r in found.rejected] == [
        ("pope", "image not in the index: 310196")
    ] * 3
    assert files.num_official == 3


def test_questions_are_made_about_val_and_published_ones_accepted_about_any_image(captions):
    found = collect_questions(read_question_files([captions]), images(310196, split="train"), 0)
    assert {row.subset for row in found.rows} == {"official popular", "official random"}


def named(*names):
    return {i: ImageRow(i, "val", name, 8, 6, 100, i) for i, name in enumerate(names)}


@pytest.mark.parametrize(
    "name", ["000000310196.jpg", "val2017/000000310196.png", "x/COCO_train2014_000000310196.jpg"]
)
def test_a_published_question_is_about_the_image_of_its_name_under_any_id(captions, name):
    found = collect_questions(read_question_files([captions]), named("a.jpg", name), seed=0)
    assert {row.image_id for row in found.rows if row.subset.startswith("official")} == {1}
    assert not found.rejected


@pytest.mark.parametrize("name", ["310196.jpg", "n310196.jpg", "COCO_val2014_310196.jpg"])
def test_the_number_of_another_picture_is_not_enough(captions, name):
    images = {310196: ImageRow(310196, "val", name, 8, 6, 100, 1)}
    found = collect_questions(read_question_files([captions]), images, seed=0)
    assert not [row for row in found.rows if row.subset.startswith("official")]
    assert [rejection.reason for rejection in found.rejected] == [
        "image not in the index: 310196"
    ] * 3


def test_a_published_question_about_either_of_two_images_is_rejected(captions):
    images = named("a/000000310196.jpg", "b/000000310196.jpg")
    found = collect_questions(read_question_files([captions]), images, seed=0)
    assert {rejection.reason for rejection in found.rejected} == {
        "image name ambiguous: 'COCO_val2014_000000310196.jpg' may be image 0 or 1"
    }


def test_a_published_question_about_an_id_of_two_files_is_rejected_for_it(captions):
    problems = {310196: "image id of two files: 310196 is a and b"}
    found = collect_questions(read_question_files([captions]), images(9), 0, problems)
    assert {rejection.reason for rejection in found.rejected} == set(problems.values())


def test_no_question_is_made_from_the_objects_of_another_picture(captions):
    listed = [
        {"id": 9, "file_name": "other.jpg"},
        {"id": 310196, "file_name": f"{310196:012d}.png"},
    ]
    write(captions.with_name("instances_val2017.json"), INSTANCES | {"images": [*listed, 7, {}]})
    found = collect_questions(read_question_files([captions]), images(9, 310196), seed=0)
    assert {row.image_id for row in found.rows} == {310196}
    assert [(r.kind, r.record, r.reason) for r in found.rejected] == [
        (
            "objects",
            "instances_val2017.json: image 9",
            "image of another name: 9 is 'other.jpg', not '000000000009.jpg'",
        )
    ]
    assert found.num_objects == 5


def test_without_files_there_is_no_question_and_a_reason(tmp_path):
    captions = tmp_path / "captions_val2017.json"
    files = read_question_files([captions])
    found = collect_questions(files, images(1), seed=0)
    assert (found.rows, found.rejected, files.num_official) == ([], [], 0)
    assert found.report(files) == {
        "files": [],
        "subsets": {},
        "why_empty": f"neither instances_val2017.json nor coco_pope_*.json is in {tmp_path}",
    }


def test_files_about_other_images_are_named_with_the_reason(captions):
    files = read_question_files([captions])
    said = collect_questions(files, images(1), seed=0).report(files)
    assert said["files"] == [
        "instances_val2017.json", "coco_pope_popular.json", "coco_pope_random.json",
    ]  # fmt: skip
    assert said["why_empty"] == "no question of these files is about an image of the index"


def test_a_captions_file_of_another_name_has_no_instances_file(tmp_path):
    captions = write(tmp_path / "val.json", INSTANCES)
    files = read_question_files([captions])
    assert (files.names, files.instances.num_entries) == ([], 0)
    assert files.why_empty.startswith("val.json has no 'captions' in its name")


def test_another_picture_of_the_same_id_is_told_in_the_split_that_is_scored(captions):
    named = INSTANCES | {"images": [{"id": 9, "file_name": "other.jpg"}]}
    write(captions.with_name("instances_val2017.json"), named)
    files = read_question_files([captions])
    scored = images(9, split="test") | images(310196, split="val")
    found = collect_questions(files, scored, seed=0)
    assert [bad.reason for bad in found.rejected] == [
        "image of another name: 9 is 'other.jpg', not '000000000009.jpg'"
    ]
    assert not [row for row in found.rows if not row.subset.startswith("official")]


def test_files_beside_several_captions_files_are_read_once_each(captions, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    more = INSTANCES | {
        "annotations": [
            {"image_id": 9, "category_id": 1},
            {"image_id": 5, "category_id": 7},
        ]
    }
    write(other / "instances_more.json", more)
    write(other / "coco_pope_random.json", LINE | {"question_id": 3})
    tables = [captions.with_name("captions_x.csv"), other / "captions_more.csv"]
    files = read_question_files([captions, *tables, captions])
    assert files.instances.shown == {310196: {"apple"}, 9: {"apple", "dog"}}
    assert files.instances_paths == [
        captions.with_name("instances_val2017.json"),
        other / "instances_more.json",
    ]
    assert files.instances.unclear == {5}
    assert [bad.record for bad in files.rejected] == ["instances_more.json: annotations[1]"]
    assert files.instances.num_entries == 4 + 4
    assert files.num_official == 4
    assert len(files.names) == 5


def test_an_id_that_two_instances_files_give_to_two_pictures_is_not_asked_about(captions):
    write(captions, {})
    named = INSTANCES | {"images": [{"id": 9, "file_name": "COCO_val2014_000000000009.jpg"}]}
    write(captions.with_name("instances_val2017.json"), named)
    for name, file_name in (("same", "000000000009.png"), ("other", "10.jpg")):
        images = [{"id": 9, "file_name": file_name}]
        write(captions.with_name(f"instances_{name}.json"), INSTANCES | {"images": images})
    paths = [captions.with_name(f"captions_{name}.json") for name in ("val2017", "same")]
    assert not read_question_files(paths).rejected
    files = read_question_files([*paths, captions.with_name("captions_other.json")])
    (rejection,) = files.rejected
    assert (rejection.kind, rejection.record) == ("objects", "instances_other.json: image 9")
    assert files.instances.unclear == {9}
    assert files.instances.num_entries == 3 * 4 + 1


def test_instances_of_other_categories_are_not_mixed(captions):
    write(captions.with_name("instances_b.json"), INSTANCES | {"categories": []})
    with pytest.raises(StageError, match=r"instances_b\.json: other categories than in .*val2017"):
        read_question_files([captions, captions.with_name("captions_b.json")])


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        ([], "there are no captions"),
        (["memory://texts/captions.json"], "the captions are at a URL"),
        (["a/captions.csv", "b/texts.csv"], "texts.csv has no 'captions' in its name"),
        (["a/captions.csv"], "neither instances.json nor coco_pope_*.json is in a"),
    ],
)
def test_why_there_are_no_questions_is_told(tmp_path, monkeypatch, paths, reason):
    monkeypatch.chdir(tmp_path)
    files = read_question_files(paths)
    assert not files.names
    assert not files.instances.shown
    assert files.why_empty.startswith(reason)
