import json

import pytest

from pipeline.indexing.captions import read_captions
from pipeline.indexing.instruct import read_instruct
from pipeline.indexing.pope import read_question_files
from pipeline.indexing.rejections import TEXT_ONLY, count_records, faulty_records
from workspace.errors import StageError


def written(tmp_path, value, name="file.json"):
    path = tmp_path / name
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return path


def read_conversations(path):
    return read_instruct([path], [], read_question_files([]), 0)


def reasons(file):
    return [rejection.reason for rejection in file.rejected]


def messages(*turns):
    return [{"from": role, "value": text} for role, text in turns]


def conversation_of(tmp_path, turns, **changes):
    entry = {"id": "a", "image": "1.jpg", "conversations": turns} | changes
    entry = {name: value for name, value in entry.items() if value is not ...}
    return read_conversations(written(tmp_path, [entry]))


GOOD = messages(("human", "Who?"), ("gpt", "Me."))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("<image>\nWho?", "Who?"),
        ("Who?\n<image>", "Who?"),
        (" <image>\r\nWho?", "Who?"),
        ("<image> Who?", "Who?"),
        ("Who? <image>", "Who?"),
        ("<image>\nWhat is an <image>", "What is an <image>"),
        ("<image> is what?\n<image>", "<image> is what?"),
        ("<image>\n<image>", "<image>"),
        ("Who <image> is it?", "Who <image> is it?"),
        ("<im<image>age>Who?", "<im<image>age>Who?"),
        ("  Who? ", "Who?"),
    ],
)
def test_the_one_marker_at_an_end_of_the_first_question_is_taken_out(tmp_path, text, kept):
    rest = messages(
        ("gpt", "<image>\nMe.\n\n1. An <img>"),
        ("human", "<image>\nIs it an <image>?\n<image>"),
        ("gpt", "<image>"),
    )
    file = conversation_of(tmp_path, messages(("human", text)) + rest)
    assert [turn["text"] for turn in file.conversations[0].turns] == [
        kept,
        *(message["value"] for message in rest),
    ]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "not question and answer in turn: 0 messages"),
        (messages(("human", "a")), "not question and answer in turn: 1 messages"),
        (messages(("gpt", "a"), ("human", "b")), "not question and answer in turn: 'gpt' instead"),
        (messages(("human", "a"), ("human", "b")), "not question and answer in turn: 'human'"),
        (messages(("system", "a"), ("gpt", "b")), "not question and answer in turn: 'system'"),
        (messages(("human", " <image>\n"), ("gpt", "b")), "empty message"),
        (messages(("human", "a"), ("gpt", "")), "empty message"),
        ([1, 2], "a message is not an object: int"),
        ([{"from": "human"}, {}], "no key 'value'"),
        ([{"from": 1, "value": "a"}, {}], "key 'from' is not str: int"),
        ("ab", "key 'conversations' is not list: str"),
    ],
)
def test_a_bad_conversation_is_rejected_with_its_reason(tmp_path, turns, reason):
    file = conversation_of(tmp_path, turns)
    assert not file.conversations
    assert file.num_conversations == 1
    assert reasons(file)[0].startswith(reason)
    assert file.rejected[0].record == "file.json: [0]"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": True}, "key 'id' is not str: bool"),
        ({"id": ["a"]}, "key 'id' is not str: list"),
        ({"id": "\ud800"}, "key 'id' holds half a character (a lone surrogate)"),
        ({"image": []}, "not about one image: key 'image' is a list of 0"),
        ({"image": ["1.jpg", "2.jpg"]}, "not about one image: key 'image' is a list of 2"),
        ({"image": [["1.jpg"]]}, "key 'image' is not str: list"),
    ],
)
def test_a_conversation_with_a_strange_id_or_not_about_one_image_is_rejected(
    tmp_path, changes, reason
):
    assert reasons(conversation_of(tmp_path, GOOD, **changes)) == [reason]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"id": 42}, "42"),
        ({"id": -(2**70)}, str(-(2**70))),
        ({"id": 4.5}, "4.5"),
        ({"id": ...}, "0901"),
        ({"id": None}, "0901"),
        ({"id": ..., "image": ["a/0901.jpg"]}, "0901"),
        ({"id": ""}, ""),
    ],
)
def test_an_id_may_be_a_number_and_defaults_to_the_name_of_the_image(tmp_path, changes, name):
    (found,) = conversation_of(tmp_path, GOOD, **({"image": "a/0901.jpg"} | changes)).conversations
    assert (found.conversation_id, found.image_name) == (name, "a/0901.jpg")


@pytest.mark.parametrize("value", [{"a": []}, {"annotations": []}, {"conversations": []}])
def test_conversations_of_another_layout_are_refused(tmp_path, value):
    with pytest.raises(StageError, match="neither a list of conversations nor COCO's instances"):
        read_conversations(written(tmp_path, value))


def lines(*entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


OTHER = messages(("human", "Hi"), ("gpt", "Hello."))


def test_json_lines_are_the_same_as_a_list(tmp_path):
    entries = [{"id": n, "image": f"{n}.jpg", "conversations": GOOD} for n in range(5)]
    whole = read_conversations(written(tmp_path, entries)).conversations
    for name in ("file.jsonl", "lines.json"):
        found = read_conversations(written(tmp_path, lines(*entries), name)).conversations
        assert [(r.conversation_id, r.image_name, r.turns) for r in found] == [
            (r.conversation_id, r.image_name, r.turns) for r in whole
        ]
        assert [r.record for r in found] == [f"{name}: line {n}" for n in range(1, 6)]


def test_a_line_that_is_no_json_is_rejected_and_the_others_are_read(tmp_path):
    good = {"id": "a", "image": "1.jpg", "conversations": GOOD}
    content = lines(good) + b'{"id": \n\n' + lines(good)
    file = read_conversations(written(tmp_path, content, "f.jsonl"))
    assert len(file.conversations) == 2
    assert (file.rejected[0].record, file.num_conversations) == ("f.jsonl: line 2", 3)
    assert file.rejected[0].reason.startswith("not usable JSON")


def test_a_conversation_without_an_image_is_text_only_and_no_fault(tmp_path):
    entries = [
        {"id": 1, "image": "1.jpg", "conversations": GOOD},
        {"id": 2, "conversations": OTHER},
        {"id": 3, "image": None, "model": "", "conversations": OTHER * 2},
    ]
    file = read_conversations(written(tmp_path, entries))
    assert reasons(file) == [TEXT_ONLY, TEXT_ONLY]
    assert not faulty_records(file.rejected)
    counted = count_records("conversations", file.rejected, file.num_conversations)
    assert counted == {"read": 3, "kept": 1, "rejected": 2, "reasons": {TEXT_ONLY: 2}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image": ...}, "no key 'image'"),
        ({"image": None}, "key 'image' is not str: NoneType"),
        ({"image": ..., "conversations": ...}, "no key 'conversations'"),
    ],
)
def test_a_lost_image_is_a_fault(tmp_path, changes, reason):
    marked = messages(("human", "<image>\nWho?"), ("gpt", "Me."))
    lost = {"image": "1.jpg", "conversations": marked} | changes
    lost = {name: value for name, value in lost.items() if value is not ...}
    good = {"image": "1.jpg", "conversations": GOOD}
    file = read_conversations(written(tmp_path, [lost, good]))
    assert reasons(file) == [reason]
    assert faulty_records(file.rejected) == file.rejected


def test_several_files_are_read_in_their_order_and_none_gives_none(tmp_path):
    paths = [
        written(tmp_path, [{"image": f"{n}.jpg", "conversations": GOOD}, 3], f"{n}.json")
        for n in (2, 1)
    ]
    file = read_instruct(paths, [], read_question_files([]), 0)
    assert [record.image_name for record in file.conversations] == ["2.jpg", "1.jpg"]
    assert [bad.record for bad in file.rejected] == ["2.json: [1]", "1.json: [1]"]
    assert file.num_conversations == 4
    assert read_instruct([], [], read_question_files([]), 0).num_conversations == 0


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_row_of_a_table_is_a_conversation_of_one_question(tmp_path, delimiter):
    rows = [["image", "question", "answer"], ["a/1.jpg", "<image>\nWho?", " Me. "]]
    rows += [["2.jpg", "", "b"], ["", "a", "b"]]
    content = "\n".join(delimiter.join(f'"{cell}"' for cell in row) for row in rows)
    file = read_conversations(written(tmp_path, content.encode(), "f.csv"))
    (found,) = file.conversations
    assert (found.image_name, found.conversation_id) == ("a/1.jpg", "1")
    assert [turn["text"] for turn in found.turns] == ["Who?", "Me."]
    assert reasons(file) == ["empty message", "bad file name: file name is empty"]


def test_a_row_of_json_without_an_image_is_text_only(tmp_path):
    row = {"question": "a", "answer": "b"}
    content = lines({"image": "1.jpg"} | row, row, {"image": None} | row)
    file = read_conversations(written(tmp_path, content, "f.jsonl"))
    assert (len(file.conversations), reasons(file)) == (1, [TEXT_ONLY, TEXT_ONLY])


def test_one_question_is_a_request_for_its_caption(tmp_path):
    two = messages(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))
    entries = [
        {"id": "1", "image": "0/1.jpg", "conversations": GOOD},
        {"id": "2", "image": "0/2.jpg", "conversations": two},
        {
            "image": "0/1.jpg",
            "conversations": messages(("human", "<image>"), ("gpt", " A\n dog. ")),
        },
        {"image": "0/1.jpg", "conversations": messages(("human", "a"), ("gpt", " "))},
        {"conversations": OTHER},
    ]
    file = read_captions(written(tmp_path, entries), key="k")
    assert [(c.caption_id, c.image, c.caption) for c in file.captions] == [
        (0, "0/1.jpg", "Me."),
        (2, "0/1.jpg", "A dog."),
    ]
    assert reasons(file) == ["more than one question: 2", "empty caption", TEXT_ONLY]
    assert [(i.record, i.image_id, i.file_name) for i in file.images] == [
        ("file.json: [0]", None, "0/1.jpg"),
        ("file.json: [1]", None, "0/2.jpg"),
    ]
    assert (file.num_images, file.num_captions) == (2, 5)
