import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval.scoring.yes_no import YesNo, read_pope
from pipeline.indexing.tables import SCHEMAS
from workspace.errors import StageError
from workspace.paths import YES_NO_QUESTIONS

ROWS = [
    {"question_id": f"{subset}/{number}", "image_id": 5 + number, "subset": subset,
     "question": "Is there a dog in the image?", "label": ("yes", "no")[number % 2]}
    for subset in ("official random", "popular") for number in (3, 1, 2)
]  # fmt: skip


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(rows, schema=SCHEMAS["pope"]):
    YES_NO_QUESTIONS.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), YES_NO_QUESTIONS, compression="zstd")


def test_questions_come_by_subset_in_the_order_of_the_table():
    write(ROWS)
    found = read_pope()
    assert list(found) == ["official random", "popular"]
    question = "Is there a dog in the image?"
    assert found["popular"] == [
        YesNo(8, question, "no", "popular/3"),
        YesNo(6, question, "no", "popular/1"),
        YesNo(7, question, "yes", "popular/2"),
    ]


def test_no_table_and_an_empty_table_are_no_questions():
    assert read_pope() == {}
    write([])
    assert read_pope() == {}


def cut():
    YES_NO_QUESTIONS.write_bytes(YES_NO_QUESTIONS.read_bytes()[:-20])


def garble():
    """Damage the pages, and leave the footer as it is."""
    data = YES_NO_QUESTIONS.read_bytes()
    YES_NO_QUESTIONS.write_bytes(data[:4] + bytes(byte ^ 0x55 for byte in data[4:300]) + data[300:])


def garble_the_footer():
    data = YES_NO_QUESTIONS.read_bytes()
    YES_NO_QUESTIONS.write_bytes(data[:-300] + bytes(292) + data[-8:])


def make_a_folder():
    YES_NO_QUESTIONS.unlink()
    YES_NO_QUESTIONS.mkdir()


def write_another_table():
    write([{"image_id": 1}], pa.schema([("image_id", pa.int64())]))


def write_another_label():
    write([ROWS[0] | {"label": "maybe"}])


def write_a_hole():
    write([ROWS[0] | {"question": None}])


@pytest.mark.parametrize(
    "damage",
    [
        cut, garble, garble_the_footer, make_a_folder,
        write_another_table, write_another_label, write_a_hole,
    ],
)  # fmt: skip
def test_a_damaged_table_is_one_line_that_says_what_to_do(damage):
    write(ROWS)
    damage()
    with pytest.raises(StageError) as error:
        read_pope()
    text = str(error.value)
    assert text.startswith(f"{YES_NO_QUESTIONS}: ")
    assert text.endswith("Run the index stage, or `dvc pull`.")
    assert "\n" not in text
