import csv
import io
import random

import pytest

from pipeline.indexing.records import AnnotationFile, RecordError
from pipeline.indexing.texts import delimited
from pipeline.indexing.texts.columns import CAPTION_COLUMNS
from pipeline.indexing.texts.delimited import DELIMITERS, table_rows
from workspace.errors import StageError

TEXTS = [
    "a dog",
    'a "dog"',
    "a, b; c | d\te",
    "two\nlines",
    "two\r\nlines",
    " é 😀 ",
    '"',
    "x" * 200_000,
]


def read(tmp_path, content):
    path = tmp_path / "f.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(table_rows(AnnotationFile(path, "k"), path, CAPTION_COLUMNS))


def refused(tmp_path, content):
    with pytest.raises(StageError) as error:
        read(tmp_path, content)
    text = str(error.value)
    assert text.startswith(f"k: {tmp_path}/f.csv: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("delimiter", DELIMITERS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_what_a_program_wrote_is_read(tmp_path, delimiter, end, mark):
    rows = [(f"{n}.jpg", text) for n, text in enumerate(random.Random(0).choices(TEXTS, k=30))]
    out = io.StringIO()
    # Python's writer quotes no line end but its own.
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("image", "caption"), *rows])
    found = read(tmp_path, mark + out.getvalue().encode())
    assert [(row["image"], row["caption"]) for _, row in found] == rows


def test_a_record_is_the_line_on_which_it_begins(tmp_path):
    found = read(tmp_path, '\n\nimage,caption\n\na.jpg,"x\ny"\n   \r\nb.jpg,z\n')
    assert [record for record, _ in found] == ["f.csv: line 5", "f.csv: line 8"]


def test_a_row_with_another_number_of_cells_is_rejected(tmp_path):
    found = read(tmp_path, "image,caption\na.jpg,x,y\nb.jpg\nc.jpg,z\n")
    assert [str(row) for _, row in found[:2]] == [
        "not as many cells as the header: 3 instead of 2; quotes keep a text with ',' in one cell",
        "not as many cells as the header: 1 instead of 2",
    ]
    assert found[2] == ("f.csv: line 4", {"image": "c.jpg", "caption": "z"})


def test_a_stray_quote_costs_its_own_row_alone(tmp_path):
    found = read(tmp_path, 'image,caption\na.jpg,"x\nb.jpg,y\nc.jpg,"z"\nd.jpg,"w" w\ne.jpg,v\n')
    assert [record for record, _ in found] == [f"f.csv: line {n}" for n in range(2, 7)]
    assert [isinstance(row, RecordError) for _, row in found] == [True, False, False, True, False]
    assert found[2][1] == {"image": "c.jpg", "caption": "z"}


def test_lines_are_not_read_again_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited, "MAX_AGAIN", 10_000)
    # Each line opens a quote behind the one that it closes; only the last shows that none fits.
    text = refused(tmp_path, "image,caption\na.jpg,x\n" + 'b","\n' * 1000 + 'b"x\n')
    assert "too many stray quotes" in text


def test_a_quote_that_is_never_closed_is_refused_with_its_line(tmp_path):
    text = refused(tmp_path, 'image,caption\na.jpg,x\nb.jpg,"y\nc.jpg,z\n')
    assert "the quote that line 3 opens is never closed" in text


def test_columns_may_have_their_other_names_and_others_may_be_between(tmp_path):
    found = read(tmp_path, " File_Name ; url; Text\na.jpg;u;x\n")
    assert found == [("f.csv: line 2", {"file_name": "a.jpg", "url": "u", "text": "x"})]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "the file is empty"),
        (" \n\n", "the file is empty"),
        ("picture,caption\na,b\n", "no column 'image' or 'file_name'; it has 'picture', 'caption'"),
        ("image;comment\n", "no column 'caption' or 'text'; it has 'image', 'comment'"),
        ("a.jpg,a dog\n", "seems to have no header: put a first line such as image,caption"),
        ("A.JPEG|a dog\n", "seems to have no header"),
        ("image,caption,caption\n", "its header has the column 'caption' twice"),
        ('image,caption,"x\n', "the quote that line 1 opens is never closed"),
        ("image,caption\na.jpg,\0\n", "a zero byte in line 2; save the file as CSV in UTF-8"),
        ("image,caption\n\na.jpg,é\n".encode("latin-1"), "not UTF-8: byte 0xe9 in line 3; save"),
        ("image,caption\n".encode("utf-16-le"), "a zero byte in line 1"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused_with_its_reason(tmp_path, content, reason):
    assert reason in refused(tmp_path, content)
