import json

import pytest

from pipeline.indexing.captions import read_captions
from pipeline.indexing.instruct import read_instruct
from pipeline.indexing.pope import read_question_files
from workspace.errors import StageError


def written(tmp_path, value, name="file.json"):
    path = tmp_path / name
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return path


GOOD = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]


def read_conversations(path):
    return read_instruct([path], [], read_question_files([]), 0)


def reasons(file):
    return [rejection.reason for rejection in file.rejected]


def captions_of(tmp_path, *annotations):
    value = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": list(annotations)}
    return read_captions(written(tmp_path, value), key="k")


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


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "bad file name: file name is empty"),
        ("../a.jpg", "bad file name: file name '../a.jpg' leaves the image root"),
        ("/etc/passwd", "bad file name: file name '/etc/passwd' leaves the image root"),
        ("a/../../b.jpg", "bad file name: file name 'a/../../b.jpg' leaves the image root"),
        ("c:\\a", "bad file name: file name 'c:\\\\a' holds a backslash"),
        ("a\0b", "bad file name: file name 'a\\x00b' holds a backslash or a zero byte"),
    ],
)
def test_a_bad_file_name_is_rejected_with_its_reason(tmp_path, name, reason):
    value = {"images": [{"id": 1, "file_name": name}], "annotations": []}
    file = read_captions(written(tmp_path, value), key="k")
    assert reasons(file)[0].startswith(reason)
    for image in (name, [name]):
        entry = {"image": image, "conversations": GOOD}
        assert reasons(read_conversations(written(tmp_path, [entry]))) == reasons(file)


def test_a_colon_is_a_character_of_a_name_like_any_other(tmp_path):
    name = "2024-01-02 10:11:12.jpg"
    value = {"images": [{"id": 1, "file_name": name}], "annotations": []}
    assert read_captions(written(tmp_path, value), key="k").images[0].file_name == name
    found = read_conversations(written(tmp_path, [{"image": name, "conversations": GOOD}]))
    assert found.conversations[0].image_name == name


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
def test_a_file_that_is_not_json_gives_one_clear_line(tmp_path, content, reason):
    for key, read in (
        ("data.train.captions", lambda path: read_captions(path, key="data.train.captions")),
        ("data.instruct", read_conversations),
    ):
        path = written(tmp_path, content)
        with pytest.raises(StageError) as error:
            read(path)
        text = str(error.value)
        assert text.startswith(f"{key}: {path}: ")
        assert reason in text
        assert "\n" not in text


@pytest.mark.parametrize(
    "value",
    [{}, {"images": []}, {"images": {}, "annotations": []}, {"annotations": []}],
)
def test_captions_of_another_layout_are_refused(tmp_path, value):
    with pytest.raises(StageError, match="not an object with the lists 'images' and 'annotations'"):
        read_captions(written(tmp_path, value), key="k")


def test_captions_without_images_are_refused(tmp_path):
    with pytest.raises(StageError, match="its list 'images' is empty"):
        read_captions(written(tmp_path, {"images": [], "annotations": []}), key="k")


def test_a_missing_file_is_named_with_its_key(tmp_path):
    path = tmp_path / "none.json"
    with pytest.raises(StageError, match=r"data\.instruct: .*none\.json does not exist"):
        read_conversations(path)
    with pytest.raises(StageError, match=r"data\.instruct: .* a folder, wanted a file"):
        read_conversations(tmp_path)


def test_a_byte_order_mark_is_no_obstacle(tmp_path):
    path = written(tmp_path, b"\xef\xbb\xbf[]")
    assert read_conversations(path).num_conversations == 0


def test_no_error_advises_to_fetch_again(tmp_path):
    paths = [tmp_path / "none.json", written(tmp_path, b"{"), tmp_path]
    for path in paths:
        with pytest.raises(StageError) as error:
            read_conversations(path)
        assert "again" not in str(error.value)


def test_a_table_lists_each_image_once_and_numbers_captions_by_rows(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        "image,caption\na/1.jpg, A  dog. \n./a/1.jpg,B\n\n2.jpg,\n../3.jpg,C\n2.jpg,D\n"
    )
    file = read_captions(path, key="k")
    assert [(i.image_id, i.file_name, i.record) for i in file.images] == [
        (None, "a/1.jpg", "t.csv: line 2"),
        (None, "2.jpg", "t.csv: line 5"),
    ]
    assert [(c.caption_id, c.image, c.caption) for c in file.captions] == [
        (0, "a/1.jpg", "A dog."),
        (1, "a/1.jpg", "B"),
        (4, "2.jpg", "D"),
    ]
    assert [bad.record for bad in file.rejected] == ["t.csv: line 5", "t.csv: line 6"]
    assert {bad.kind for bad in file.rejected} == {"captions"}
    assert (file.num_images, file.num_captions) == (2, 5)
