import json

import pytest

from pipeline.indexing.captions import read_captions
from pipeline.indexing.instruct import CAPTION_REQUEST, read_instruct
from pipeline.indexing.pope import read_question_files
from workspace.errors import StageError

NOUNS = ["person", "dog", "cat", "apple", "bus", "umbrella", "fork"]
SHOWN = {1: [0, 1], 2: [0, 2, 3, 4], 3: [5], 4: []}
"""Numbers of the nouns in each image."""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Captions and instances of four images; tests change them, then read."""
    monkeypatch.chdir(tmp_path)
    return Files(tmp_path)


class Files:
    def __init__(self, root):
        self.root = root
        images = [{"id": i, "file_name": f"{i}.jpg"} for i in SHOWN]
        self.captions = {
            "images": images,
            "annotations": [
                {"id": 10 * i + n, "image_id": i, "caption": f"caption {n} of {i}"}
                for i in SHOWN
                for n in range(2)
            ],
        }
        self.instances = {
            "images": [dict(image) for image in images],
            "annotations": [
                {"image_id": i, "category_id": n} for i, nouns in SHOWN.items() for n in nouns
            ],
            "categories": [{"id": n, "name": noun} for n, noun in enumerate(NOUNS)],
        }

    def read(self, seed=0, name="instances_val.json"):
        captions = self.root / "captions_val.json"
        captions.write_text(json.dumps(self.captions))
        (self.root / name).write_text(json.dumps(self.instances))
        listed = [read_captions(captions, key="k")]
        return read_instruct([self.root / name], listed, read_question_files([captions]), seed)


def asked(file):
    """Yield image name, object and answer of the questions about objects."""
    for record in file.conversations:
        question, answer = (turn["text"] for turn in record.turns)
        if question != CAPTION_REQUEST:
            noun = question.removesuffix(" in the image?").split(" ", 3)[3]
            yield record.image_name, noun, answer


def test_every_image_is_asked_for_its_first_caption(files):
    found = [
        (record.image_name, record.turns[1]["text"])
        for record in files.read().conversations
        if record.turns[0]["text"] == CAPTION_REQUEST
    ]
    assert found == [(f"{i}.jpg", f"caption 0 of {i}") for i in SHOWN]


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_is_true_and_as_many_are_yes_as_no(files, seed):
    found = list(asked(files.read(seed)))
    for image_id, shown in SHOWN.items():
        answers = {noun: answer for name, noun, answer in found if name == f"{image_id}.jpg"}
        assert all((NOUNS.index(noun) in shown) is (answers[noun] == "Yes") for noun in answers)
        assert len(answers) == 2 * min(3, len(shown))
        assert list(answers.values()).count("Yes") == min(3, len(shown))
    assert len(found) == len({(name, noun) for name, noun, _ in found})


def test_absent_objects_are_of_all_three_subsets(files):
    absent = [
        noun for name, noun, answer in asked(files.read()) if (name, answer) == ("2.jpg", "No")
    ]
    # Popular: dog, by its name of equals. Adversarial: dog too, beside person in image 1.
    assert len(set(absent)) == 3
    assert "dog" in absent


def test_every_conversation_is_one_question(files):
    records = files.read().conversations
    assert len(records) == 4 + 4 + 6 + 2
    assert all([turn["role"] for turn in r.turns] == ["user", "assistant"] for r in records)
    assert len({record.conversation_id for record in records}) == len(records)


def test_the_seed_decides_the_objects(files):
    assert list(asked(files.read(1))) == list(asked(files.read(1)))
    assert len({tuple(asked(files.read(seed))) for seed in range(5)}) > 1


def test_an_image_in_which_no_object_is_known_to_be_absent_is_asked_for_its_caption_alone(files):
    files.instances["annotations"].append({"image_id": 2, "category_id": 99})
    assert {name for name, _, _ in asked(files.read())} == {"1.jpg", "3.jpg"}


def test_another_picture_of_the_same_id_is_rejected_and_counted(files):
    files.instances["images"][1]["file_name"] = "other.jpg"
    found = files.read()
    assert {name for name, _, _ in asked(found)} == {"1.jpg", "3.jpg"}
    (rejection,) = found.rejected
    assert rejection.kind == "conversations"
    assert rejection.reason == (
        "image of another name: 2 is 'other.jpg' in the instances, not '2.jpg'"
    )
    assert found.num_conversations == len(found.conversations) + 1


def test_an_instances_file_of_its_own_is_counted_and_the_one_of_the_questions_is_not(files):
    files.instances["annotations"].append({"image_id": 1, "category_id": 99})
    beside, own = files.read(), files.read(name="mine.json")
    assert (beside.num_objects, beside.rejected) == (0, [])
    assert own.num_objects == 7 + 7 + 1
    assert [rejection.reason for rejection in own.rejected] == ["category unknown: 99"]
    assert list(asked(own)) == list(asked(beside))


def test_half_an_instances_file_is_refused(files):
    files.instances.pop("annotations")
    with pytest.raises(StageError, match=r"data\.instruct: .*'categories' and 'annotations'"):
        files.read(name="mine.json")


def test_images_that_a_table_names_are_asked_about_by_their_names(files):
    names = {1: "COCO_val2014_000000000001.jpg", 2: "a/000000000002.png", 3: "3.jpg", 4: "4.jpg"}
    files.instances["images"] = [{"id": i, "file_name": f"{i:012}.jpg"} for i in names]
    table = files.root / "mine.csv"
    rows = [f"{name},a picture of {i}" for i, name in names.items()]
    table.write_text("\n".join(["image,caption", *rows]))
    path = files.root / "objects.json"
    path.write_text(json.dumps(files.instances))
    made = read_instruct([path], [read_captions(table, key="k")], read_question_files([]), 0)
    captions = {
        r.image_name: r.turns[1]["text"]
        for r in made.conversations
        if "caption" in r.conversation_id
    }
    assert captions == {name: f"a picture of {i}" for i, name in names.items()}
    assert {name for name, _, _ in asked(made)} == {names[1], names[2]}


def test_two_pictures_of_a_name_in_the_instances_are_not_asked_about(files):
    files.instances["images"].append({"id": 9, "file_name": "x/1.jpg"})
    files.instances["annotations"].append({"image_id": 9, "category_id": 2})
    table = files.root / "mine.csv"
    table.write_text("image,caption\n1.jpg,a\n2.jpg,b\n")
    path = files.root / "objects.json"
    path.write_text(json.dumps(files.instances))
    made = read_instruct([path], [read_captions(table, key="k")], read_question_files([]), 0)
    assert {name for name, _, _ in asked(made)} == {"2.jpg"}


def test_instances_and_conversations_may_be_named_together(files):
    beside = files.read()
    llava = files.root / "llava.json"
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
    llava.write_text(json.dumps([{"image": "1.jpg", "conversations": turns}]))
    captions = files.root / "captions_val.json"
    paths = ["./instances_val.json", llava]
    both = read_instruct(
        paths, [read_captions(captions, key="k")], read_question_files(["captions_val.json"]), 0
    )
    assert [r.turns for r in both.conversations[:-1]] == [r.turns for r in beside.conversations]
    assert both.conversations[-1].turns[1]["text"] == "Me."
    assert (both.num_conversations, both.num_objects) == (len(both.conversations), 0)
