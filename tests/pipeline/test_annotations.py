import json

import pytest

from cache.errors import StageError
from pipeline.annotations import read_captions, read_conversations


def written(tmp_path, value, name="file.json"):
    path = tmp_path / name
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return path


def reasons(file):
    return [rejection.reason for rejection in file.rejected]


def captions_of(tmp_path, *annotations):
    value = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": list(annotations)}
    return read_captions(written(tmp_path, value), key="k")


def messages(*turns):
    return [{"from": role, "value": text} for role, text in turns]


def conversation_of(tmp_path, turns, **changes):
    entry = {"id": "a", "image": "1.jpg", "conversations": turns} | changes
    entry = {name: value for name, value in entry.items() if value is not ...}
    return read_conversations(written(tmp_path, [entry]), key="k")


GOOD = messages(("human", "Who?"), ("gpt", "Me."))


def test_white_space_of_captions_is_normalised(tmp_path):
    text = "  A dog\n on\ta\u2028 mat. \r\n"
    file = captions_of(tmp_path, {"id": 5, "image_id": 1, "caption": text})
    assert file.captions[0].caption == "A dog on a mat."
    assert file.captions[0].record == "file.json: annotations[0]"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (None, "not an object: NoneType"),
        ([], "not an object: list"),
        ({}, "no key 'caption'"),
        ({"caption": "a"}, "no key 'id'"),
        ({"caption": "a", "id": True}, "key 'id' is not int: bool"),
        ({"caption": "a", "id": 1.0}, "key 'id' is not int: float"),
        ({"caption": "a", "id": 2**63}, "key 'id' does not fit 64 bits"),
        ({"caption": "a", "id": -(2**63) - 1}, "key 'id' does not fit 64 bits"),
        ({"caption": "a", "id": 1}, "no key 'image_id'"),
        ({"caption": 3, "id": 1, "image_id": 1}, "key 'caption' is not str: int"),
        ({"caption": " \n", "id": 1, "image_id": 1}, "empty caption"),
        ({"caption": "\ud800", "id": 1, "image_id": 1}, "key 'caption' holds half a character"),
    ],
)
def test_a_bad_caption_is_rejected_with_its_reason(tmp_path, entry, reason):
    file = captions_of(tmp_path, entry)
    assert not file.captions
    assert file.num_captions == 1
    assert reasons(file)[0].startswith(reason)
    assert file.rejected[0].record == "file.json: annotations[0]"


@pytest.mark.parametrize("name", ["", "../a.jpg", "/etc/passwd", "a/../../b.jpg", "c:\\a", "a\0b"])
def test_a_file_name_that_leaves_the_root_is_rejected(tmp_path, name):
    value = {"images": [{"id": 1, "file_name": name}], "annotations": []}
    file = read_captions(written(tmp_path, value), key="k")
    assert reasons(file) == [f"bad file name: file name {name!r} leaves the image root"]
    assert reasons(conversation_of(tmp_path, GOOD, image=name)) == reasons(file)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("<image>\nWho?", "Who?"),
        ("Who?\n<image>", "Who?"),
        ("Who <image> is it?", "Who  is it?"),
        ("<im<image>age>Who?", "Who?"),
        ("  Who? ", "Who?"),
    ],
)
def test_the_image_marker_is_taken_out_wherever_it_stands(tmp_path, text, kept):
    file = conversation_of(tmp_path, messages(("human", text), ("gpt", "Me.\n\n1. You")))
    assert file.conversations[0].turns == [
        {"role": "user", "text": kept},
        {"role": "assistant", "text": "Me.\n\n1. You"},
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
        (..., "no key 'conversations'"),
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
        ({"id": ...}, "no key 'id'"),
        ({"id": None}, "key 'id' is not str: NoneType"),
        ({"image": ...}, "no key 'image'"),
        ({"image": ["1.jpg"]}, "key 'image' is not str: list"),
    ],
)
def test_a_conversation_without_id_or_image_is_rejected(tmp_path, changes, reason):
    assert reasons(conversation_of(tmp_path, GOOD, **changes)) == [reason]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not usable JSON in UTF-8: Expecting value"),
        (b'{"images": [', "not usable JSON in UTF-8"),
        (b'{"images": [NaN], "annotations": []}', "NaN is no number in JSON"),
        (b'{"images": [-Infinity], "annotations": []}', "-Infinity is no number in JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"caf\xe9": 1}', "not usable JSON in UTF-8: 'utf-8' codec"),
        (b"1" * 5000, "not usable JSON in UTF-8: Exceeds the limit"),
    ],
)
def test_a_file_that_is_not_json_is_one_clear_line(tmp_path, content, reason):
    for read in (read_captions, read_conversations):
        path = written(tmp_path, content)
        with pytest.raises(StageError) as error:
            read(path, key="data.train.captions")
        text = str(error.value)
        assert text.startswith(f"data.train.captions: {path}: ")
        assert reason in text
        assert "\n" not in text


@pytest.mark.parametrize(
    "value",
    [[], 3, None, {}, {"images": []}, {"images": {}, "annotations": []}, {"annotations": []}],
)
def test_captions_of_another_layout_are_refused(tmp_path, value):
    with pytest.raises(StageError, match="not an object with the lists 'images' and 'annotations'"):
        read_captions(written(tmp_path, value), key="k")


def test_captions_without_images_are_refused(tmp_path):
    with pytest.raises(StageError, match="its list 'images' is empty"):
        read_captions(written(tmp_path, {"images": [], "annotations": []}), key="k")


def test_conversations_of_another_layout_are_refused(tmp_path):
    with pytest.raises(StageError, match="not a list of conversations"):
        read_conversations(written(tmp_path, {"a": []}), key="k")


def test_a_file_that_is_not_there_names_key_and_path(tmp_path):
    path = tmp_path / "none.json"
    with pytest.raises(StageError, match=r"data\.instruct: .*none\.json does not exist"):
        read_conversations(path, key="data.instruct")
    with pytest.raises(StageError, match=r"data\.instruct: .* a folder, wanted a JSON file"):
        read_conversations(tmp_path, key="data.instruct")


def test_a_byte_order_mark_is_no_obstacle(tmp_path):
    path = written(tmp_path, b"\xef\xbb\xbf[]")
    assert read_conversations(path, key="k").num_conversations == 0
