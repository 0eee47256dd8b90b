import json

import pytest

from eval.systems.files import named_files, read_values
from workspace.errors import StageError


def test_a_file_has_the_name_that_is_given_or_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [file.name for file in named_files(["a/x.json", "b/x.json", "y.json", "ours=b/x.json"])]
    assert names == ["a/x.json", "b/x.json", "y", "ours"]
    (tmp_path / "a=b.json").touch()
    assert named_files(["a=b.json"])[0].name == "a=b"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('{"a": 1}\n{"a": 2}\n\n', [{"a": 1}, {"a": 2}]),
        ('{"a": 1}\n', {"a": 1}),
        ('{\n"a": 1}\n', {"a": 1}),
        ('[{"a": 1},\n{"a": 2}]', [{"a": 1}, {"a": 2}]),
        ('{"a": "x\u2028y"}\r\n{"a": 2}', [{"a": "x\u2028y"}, {"a": 2}]),
    ],
)
def test_lines_are_told_from_one_value(tmp_path, text, values):
    path = tmp_path / "values"
    path.write_text(text, newline="")
    assert read_values(path) == values


def test_a_line_must_be_json(tmp_path):
    path = tmp_path / "values"
    path.write_text(json.dumps({"a": 1}) + "\n{}}\n")
    with pytest.raises(StageError, match="line 2: "):
        read_values(path)
