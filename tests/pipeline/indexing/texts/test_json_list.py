import json
import random

import pytest

from pipeline.indexing.records import AnnotationFile
from pipeline.indexing.texts import json_list
from pipeline.indexing.texts.json_list import list_entries
from workspace.errors import StageError

VALUES = [
    {"a": "é😀\ud800", "b": [1, {"c": None}]},
    -12,
    1.5e300,
    123456789012345678901234567890,
    "]],[[{",
    'a "quote" \\',
    "",
    True,
    None,
    [],
    {},
    "x" * 300,
]


@pytest.fixture(params=[1, 2, 3, 7, 64, 1 << 20])
def chunk(request, monkeypatch):
    """Characters that are read at once."""
    monkeypatch.setattr(json_list, "CHUNK", request.param)


def read(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(list_entries(AnnotationFile(path, "k"), path))


@pytest.mark.parametrize("layout", [{}, {"indent": 3}, {"separators": (",", ":")}])
@pytest.mark.parametrize("is_ascii", [True, False])
def test_entries_are_those_that_the_whole_file_gives(tmp_path, chunk, layout, is_ascii):
    for seed in range(10):
        values = random.Random(seed).choices(VALUES[1:] if not is_ascii else VALUES, k=seed)
        text = json.dumps(values, ensure_ascii=is_ascii, **layout)
        found = read(tmp_path / "f.json", f" \n{text}\r\n\t ")
        assert found == [(f"f.json: [{n}]", value) for n, value in enumerate(values)]


def test_a_byte_order_mark_is_no_obstacle(tmp_path, chunk):
    assert read(tmp_path / "f.json", b"\xef\xbb\xbf[1]") == [("f.json: [0]", 1)]


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "[1",
        "[1,",
        "[1,]",
        "[,1]",
        "[1 2]",
        "[1],",
        "[1] [2]",
        '["a',
        '[{"a": 1, }]',
        "[NaN]",
        "[1, -Infinity]",
        b'["\xe9"]',
        b'[1, 2, 3, "' + b"a" * 500 + b"\xff",
        "[" * 100_000,
        f"[1, {'1' * 5000}]",
    ],
)
def test_a_damaged_list_gives_the_error_of_the_whole_file(tmp_path, chunk, text):
    path = tmp_path / "f.json"
    with pytest.raises(StageError) as found:
        read(path, text)
    with pytest.raises(StageError) as wanted:
        AnnotationFile(path, "k").read_json()
    assert str(found.value) == str(wanted.value)


def test_no_more_than_a_part_of_the_file_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "CHUNK", 100)
    path = tmp_path / "f.json"
    path.write_text(json.dumps(["x" * 50] * 1000))
    with path.open() as text:
        scanner = json_list._Scanner(text)
        longest = max(len(scanner._part) for _ in json_list._values(scanner))
    assert longest <= 200
