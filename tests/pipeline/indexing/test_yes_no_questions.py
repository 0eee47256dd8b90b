import json
import math
import random
from collections import Counter

import pytest

from pipeline.indexing.yes_no_questions import (
    MAX_IMAGES,
    MAX_OBJECTS,
    Instances,
    make_questions,
    read_instances,
)
from workspace.errors import StageError

NOUNS = {1: "dog", 2: "cat", 3: "apple", 7: "bus", 9: "fire hydrant", 90: "umbrella"}
CATEGORIES = [{"id": number, "name": noun} for number, noun in NOUNS.items()]
SUBSETS = ["random", "popular", "adversarial"]


def outline(image_id, category_id, **changes):
    return {"id": 1, "image_id": image_id, "category_id": category_id, "iscrowd": 0} | changes


def written(tmp_path, value):
    path = tmp_path / "instances_val2017.json"
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return path


def read(tmp_path, annotations, categories=CATEGORIES):
    return read_instances(
        written(tmp_path, {"images": [], "annotations": annotations, "categories": categories})
    )


def reasons(found):
    return [rejection.reason for rejection in found.rejected]


def world(num_images=60, num_nouns=12, seed=0):
    """Instances of images that show one to six of the nouns, some of them much more often."""
    dice = random.Random(seed)
    nouns = {number: f"thing {number}" for number in range(num_nouns)}
    weights = [1 / (1 + number) for number in nouns]
    shown = {
        image_id: set(dice.choices(list(nouns.values()), weights, k=dice.randint(1, 6)))
        for image_id in dice.sample(range(10**6), num_images)
    }
    return Instances(nouns=nouns, shown=shown)


def asked(rows, label=None):
    """Subset to (image id, noun) of the questions, in order."""
    found = {subset: [] for subset in SUBSETS}
    for row in rows:
        if label in (None, row.label):
            noun = row.question.split(" ", 3)[3].removesuffix(" in the image?")
            found[row.subset].append((row.image_id, noun))
    return found


def test_shown_objects_are_read_by_name(tmp_path):
    found = read(tmp_path, [outline(5, 1), outline(5, 90), outline(5, 1), outline(6, 9)])
    assert found.shown == {5: {"dog", "umbrella"}, 6: {"fire hydrant"}}
    assert set(found.nouns.values()) == set(NOUNS.values())
    assert (found.num_entries, found.rejected, found.unclear) == (4 + len(NOUNS), [], set())


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (None, "not an object: NoneType"),
        ({"category_id": 1}, "no key 'image_id'"),
        (outline(True, 1), "key 'image_id' is not int: bool"),
        (outline(2**63, 1), "key 'image_id' does not fit 64 bits"),
        (outline(5, 4), "category unknown: 4"),
        (outline(5, [1]), "key 'category_id' is not int: list"),
        ({"image_id": 5}, "no key 'category_id'"),
    ],
)
def test_a_bad_outline_is_rejected_with_its_reason(tmp_path, entry, reason):
    found = read(tmp_path, [outline(5, 1), entry])
    assert reasons(found) == [reason]
    assert found.rejected[0].kind == "objects"
    assert found.rejected[0].record == "instances_val2017.json: annotations[1]"
    assert found.num_entries == 2 + len(NOUNS)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (7, "not an object: int"),
        ({"name": "dog"}, "no key 'id'"),
        ({"id": 1, "name": "horse"}, "category id repeated: 1"),
        ({"id": 11}, "no key 'name'"),
        ({"id": 11, "name": " \n"}, "category without a name"),
        ({"id": 11, "name": "\ud800"}, "key 'name' holds half a character (a lone surrogate)"),
    ],
)
def test_a_bad_category_is_rejected_with_its_reason(tmp_path, entry, reason):
    found = read(tmp_path, [], [*CATEGORIES, entry])
    assert reasons(found) == [reason]
    assert found.nouns == NOUNS


def test_nothing_is_called_absent_where_an_outline_shows_something_unknown(tmp_path):
    annotations = [outline(image_id, 1) for image_id in (5, 6)]
    found = read(tmp_path, [*annotations, outline(6, 44)])
    assert {row.image_id for row in make_questions(found, [5, 6], 0)} == {5}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not usable JSON in UTF-8: Expecting value"),
        (b'{"annotations": [', "not usable JSON in UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"caf\xe9": 1}', "not usable JSON in UTF-8: 'utf-8' codec"),
        (b"[]", "not an object with the lists 'categories' and 'annotations'"),
        (b'{"images": [], "annotations": []}', "the lists 'categories' and 'annotations'"),
        (b'{"categories": {}, "annotations": []}', "the lists 'categories' and 'annotations'"),
    ],
)
def test_a_file_that_is_no_instances_file_gives_one_clear_line(tmp_path, content, reason):
    path = written(tmp_path, content)
    with pytest.raises(StageError) as error:
        read_instances(path)
    text = str(error.value)
    assert text.startswith(f"beside data.val.captions: {path}: ")
    assert reason in text
    assert text.endswith("Replace it, or take it away.")
    assert "\n" not in text


def test_every_answer_agrees_with_the_instances():
    instances = world()
    rows = make_questions(instances, instances.shown, 0)
    assert {row.label for row in rows} == {"yes", "no"}
    for label in ("yes", "no"):
        for questions in asked(rows, label).values():
            assert questions
            for image_id, noun in questions:
                assert noun in instances.nouns.values()
                assert (noun in instances.shown[image_id]) == (label == "yes")


def test_an_image_is_asked_for_up_to_three_objects_and_as_many_that_it_lacks():
    instances = world()
    rows = make_questions(instances, instances.shown, 0)
    yes, no = asked(rows, "yes"), asked(rows, "no")
    for subset in SUBSETS:
        for image_id, shown in instances.shown.items():
            wanted = min(len(shown), MAX_OBJECTS)
            for questions in (yes[subset], no[subset]):
                nouns = [noun for asked_id, noun in questions if asked_id == image_id]
                assert len(nouns) == len(set(nouns)) == wanted
    assert yes["random"] == yes["popular"] == yes["adversarial"]
    assert [row.label for row in rows] == ["yes", "no"] * (len(rows) // 2)


def test_an_image_with_few_absent_objects_has_fewer_questions():
    nouns = dict(enumerate("abcd"))
    instances = Instances(nouns=nouns, shown={1: set("abc"), 2: set("abcd"), 3: {"a"}})
    rows = make_questions(instances, [1, 2, 3], 0)
    assert Counter((row.subset, row.image_id) for row in rows) == {
        (subset, image_id): 2 for subset in SUBSETS for image_id in (1, 3)
    }


def test_popular_asks_for_the_objects_of_most_images():
    instances = world()
    counts = Counter(noun for shown in instances.shown.values() for noun in shown)
    assert len(set(counts.values())) > 5
    rows = make_questions(instances, instances.shown, 0)
    check_that_none_is_passed_over(instances, asked(rows, "no")["popular"], lambda _, n: counts[n])


def test_adversarial_asks_for_objects_that_often_occur_with_the_present_ones():
    instances = world()

    def times_together(image_id, noun):
        here = instances.shown[image_id]
        return sum(len(here & shown) for shown in instances.shown.values() if noun in shown)

    rows = make_questions(instances, instances.shown, 0)
    chosen = asked(rows, "no")["adversarial"]
    assert chosen != asked(rows, "no")["popular"]
    check_that_none_is_passed_over(instances, chosen, times_together)


def check_that_none_is_passed_over(instances, chosen, value):
    """What is chosen has at least the value of everything absent that is not chosen."""
    for image_id, shown in instances.shown.items():
        taken = [noun for asked_id, noun in chosen if asked_id == image_id]
        values = [value(image_id, noun) for noun in taken]
        assert values == sorted(values, reverse=True)
        for noun in set(instances.nouns.values()) - shown - set(taken):
            assert value(image_id, noun) <= values[-1]


def test_random_asks_for_any_absent_object():
    instances = world(num_images=400)
    chosen = asked(make_questions(instances, instances.shown, 0), "no")["random"]
    absent = Counter(
        noun for s in instances.shown.values() for noun in set(instances.nouns.values()) - s
    )
    share = len(chosen) / absent.total()
    for noun, count in Counter(noun for _, noun in chosen).items():
        # An image that shows much lacks little, so the share is not the same for all.
        assert math.isclose(count / absent[noun], share, rel_tol=0.35), noun


def test_only_the_given_images_are_asked_about_but_all_count():
    instances = world()
    some = sorted(instances.shown)[::3]
    rows = make_questions(instances, [*some, 5, 6], 0)
    everything = make_questions(instances, instances.shown, 0)
    assert rows == [row for row in everything if row.image_id in some]


def test_at_most_five_hundred_images_are_asked_about_and_the_seed_decides_which():
    instances = world(num_images=MAX_IMAGES + 100)
    image_ids = list(instances.shown)

    def chosen(ids, seed):
        return {row.image_id for row in make_questions(instances, ids, seed)}

    assert len(chosen(image_ids, 0)) == MAX_IMAGES == 500
    assert chosen(image_ids, 0) == chosen(image_ids[::-1], 0) != chosen(image_ids, 1)
    # One image less makes room for one other.
    gone = min(chosen(image_ids, 0))
    rest = [image_id for image_id in image_ids if image_id != gone]
    assert len(chosen(rest, 0) - chosen(image_ids, 0)) == 1


def test_the_questions_do_not_depend_on_the_order_of_the_file(tmp_path):
    dice = random.Random(1)
    annotations = [outline(dice.randrange(30), dice.choice(list(NOUNS))) for _ in range(90)]
    first = make_questions(read(tmp_path, annotations), range(30), 4)
    dice.shuffle(annotations)
    again = make_questions(read(tmp_path, annotations, CATEGORIES[::-1]), range(30), 4)
    assert again == first
    assert make_questions(read(tmp_path, annotations), range(30), 5) != first


def test_the_question_is_worded_as_in_pope_and_has_a_name_of_its_own(tmp_path):
    found = read(tmp_path, [outline(5, 90)], [CATEGORIES[5], CATEGORIES[4]])
    rows = make_questions(found, [5], 0)
    assert [(row.question_id, row.question) for row in rows[:2]] == [
        ("random/5/1", "Is there an umbrella in the image?"),
        ("random/5/2", "Is there a fire hydrant in the image?"),
    ]
    many = make_questions(world(), world().shown, 0)
    assert len({row.question_id for row in many}) == len(many)
