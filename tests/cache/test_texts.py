"""How values are spelled: sizes, long lists, long texts."""

import random
import string

import pytest
import yaml
from markdown_it import MarkdownIt

from cache.errors import MissingImageError, PatchcacheError, UnreachableStoreError
from cache.texts import (
    MAX_LINE,
    UNITS,
    first_few,
    human_size,
    markdown_text,
    one_line,
    printable,
    without_passwords,
    yaml_entry,
)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (600_000, "585.9 KiB"),
        (8 * 2**20, "8.0 MiB"),
        (2**30, "1.0 GiB"),
        (5 * 2**41, "10.0 TiB"),
        (2**52, "4096.0 TiB"),
    ],
)
def test_a_size_is_written_in_its_unit(num_bytes, text):
    assert human_size(num_bytes) == text


def test_a_spelled_size_is_near_the_size_and_never_0():
    rng = random.Random(0)
    for _ in range(500):
        num_bytes = rng.randrange(1, 2 ** rng.randrange(1, 50))
        number, unit = human_size(num_bytes).split()
        assert 1 <= float(number) <= 1024
        assert float(number) * 1024 ** UNITS.index(unit) == pytest.approx(num_bytes, rel=0.05)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2, ...")],
)
def test_a_long_list_is_cut_and_says_so(count, text):
    assert first_few(range(count), 3) == text


def test_a_long_text_is_cut():
    assert one_line("x " * MAX_LINE).endswith("...")
    assert len(one_line("x" * 10 * MAX_LINE)) == MAX_LINE + 3


def random_texts(count):
    rng = random.Random(1)
    signs = string.printable + "\x1b\x85\u2028\u202e\ufeff\ud83d\U0001f600\xe9"
    return ["".join(rng.choices(signs, k=rng.randrange(1, 30))) for _ in range(count)]


def test_a_printable_text_is_one_line_that_can_be_stored():
    for text in random_texts(500):
        line = printable(text)
        assert line.isprintable()
        assert printable(line) == line
        line.encode()
    assert printable("a\n b \u202ec\ud83d") == "a b \N{REPLACEMENT CHARACTER}c" + (
        "\N{REPLACEMENT CHARACTER}"
    )


def test_a_text_in_a_cell_of_markdown_is_shown_as_it_is():
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for text in random_texts(500):
        table = f"| head |\n| --- |\n| x{markdown_text(text)} |"
        texts = [token for token in reader.parse(table) if token.type == "inline"]
        assert len(texts) == 2
        assert {child.type for child in texts[1].children} <= {"text"}
        assert "".join(child.content for child in texts[1].children) == f"x{printable(text)}"


def test_an_entry_of_yaml_gives_its_value_back():
    for text in random_texts(500):
        value = {"text": printable(text), "list": [printable(text), 3]}
        assert yaml.safe_load(yaml_entry("key", value)) == {"key": value}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("http://me:secret@host:80/a: no", "http://me:***@host:80/a: no"),
        ("a ftp://:x@h/a and s3://k:s/x@b/c", "a ftp://:***@h/a and s3://k:s/x@b/c"),
        ("hf://datasets/a/b@main", "hf://datasets/a/b@main"),
        ("abfs://box@host/a http://host:80/a@b", "abfs://box@host/a http://host:80/a@b"),
    ],
)
def test_a_password_in_a_url_is_not_shown(text, wanted):
    assert without_passwords(text) == wanted
    assert str(PatchcacheError(text)) == str(MissingImageError(text)) == wanted
    assert str(UnreachableStoreError(text)) == wanted
