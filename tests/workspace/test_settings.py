import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from ruamel.yaml import YAML

from cache.errors import SettingsError
from workspace.settings import Params


@dataclass(frozen=True, kw_only=True)
class Inner:
    rank: int
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Outer:
    rate: float
    kind: Literal["mlp", "linear"]
    names: tuple[str, ...] = ()
    inners: tuple[Inner, ...] = ()
    note: str | None = None
    size: int | Literal["auto"] = 1
    cut: float | Literal["auto", "off"] | None = None

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate is {self.rate}, wanted 0 or more")


def params(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Params.read(path)


def data(tmp_path, text):
    return params(tmp_path, f"data: {text}\n").section("data", Outer)


def test_values_arrive_with_their_types(tmp_path):
    found = data(tmp_path, "{rate: 5e-4, kind: mlp, names: [a, b], inners: [{rank: 2}], note: x}")
    assert found == Outer(
        rate=5e-4, kind="mlp", names=("a", "b"), inners=(Inner(rank=2),), note="x"
    )


@pytest.mark.parametrize(
    ("size", "cut"), [(2048, 0.5), ("auto", "off"), (1, None), (3, 2.0), ("auto", "auto")]
)
def test_a_number_or_a_word_arrives_as_it_is(tmp_path, size, cut):
    text = f"{{rate: 1, kind: mlp, size: {size}, cut: {'null' if cut is None else cut}}}"
    found = data(tmp_path, text)
    assert (found.size, found.cut) == (size, cut)
    assert type(found.size) is type(size)


def test_a_whole_number_is_good_for_a_float_but_not_the_reverse(tmp_path):
    assert isinstance(data(tmp_path, "{rate: 1, kind: mlp}").rate, float)
    with pytest.raises(SettingsError, match=r"data\.inners\[0\]\.rank is 2\.0 \(float\)"):
        data(tmp_path, "{rate: 1, kind: mlp, inners: [{rank: 2.0}]}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{rate: 1}", "data: missing key kind. Wanted: rate, kind."),
        ("{rate: 1, kind: mlp, tpyo: 3}", "data: unknown key tpyo. Allowed: rate, kind, names"),
        ("{rate: yes, kind: mlp}", "data.rate is 'yes' (str), wanted float."),
        ("{rate: true, kind: mlp}", "data.rate is True (bool), wanted float."),
        ("{rate: 1, kind: resnet}", "data.kind is 'resnet' (str), wanted one of mlp, linear."),
        ("{rate: 1, kind: mlp, names: a}", "data.names is 'a' (str), wanted a list."),
        ("{rate: 1, kind: mlp, names: [a, 1]}", "data.names[1] is 1 (int), wanted str."),
        ("{rate: 1, kind: mlp, inners: [3]}", "data.inners[0] is 3 (int), wanted a section"),
        (
            "{rate: 1, kind: mlp, size: automatic}",
            "data.size is 'automatic' (str), wanted int or auto",
        ),
        ("{rate: 1, kind: mlp, size: 1.5}", "data.size is 1.5 (float), wanted int or auto."),
        ("{rate: 1, kind: mlp, size: [auto]}", "data.size is ['auto'] (list), wanted int or auto."),
        ("{rate: 1, kind: mlp, size: }", "data.size is None (NoneType), wanted int or auto."),
        ("{rate: 1, kind: mlp, cut: x}", "data.cut is 'x' (str), wanted float or auto, off."),
        ("{rate: -1, kind: mlp}", "data: rate is -1.0, wanted 0 or more"),
        ("3", "data is 3 (int), wanted a section of keys."),
        ("", "data is None (NoneType), wanted a section of keys."),
    ],
)
def test_a_wrong_value_is_an_error_that_names_key_and_file(tmp_path, text, reason):
    with pytest.raises(SettingsError) as error:
        data(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'params.yaml'}: ")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sed: 3", "unknown key sed. Allowed: seed, data, fetch"),
        ("[1, 2]", "wanted sections, found list."),
        ("", "wanted sections, found NoneType."),
        ("a: [", "not a YAML file: "),
        ("seed: 1\nseed: 2", "not a YAML file: "),
        (b"seed: \xff", "not a YAML file: "),
        ("seed: 2024-13-45", "not a YAML file: "),
        ("seed: !!bool foo", "not a YAML file: "),
        ("seed: !!int ''", "not a YAML file: "),
        ("seed: !!int 0x", "not a YAML file: "),
        ("seed: " + "9" * 5000, "not a YAML file: "),
        ("seed: !!timestamp x", "not a YAML file: "),
        ("seed: !!python/object/apply:os.getcwd []", "not a YAML file: "),
        ("--- 1\n--- 2", "not a YAML file: "),
        ("seed: *none", "not a YAML file: "),
        ("? [a]\n: 1", "unknown key ('a',)"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, text, reason):
    with pytest.raises(SettingsError) as error:
        params(tmp_path, text)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


BOMB = "a0: &a0 [" + "b, " * 9 + "]\n"
BOMB += "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 12))
MERGES = "a0: &a0 {b: 1}\n"
MERGES += "".join(f"a{n}: &a{n} {{<<: [{f'*a{n - 1}, ' * 9}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        MERGES,
        "seed: &a [*a]",
        "&a seed: &b {c: {*a : *b}}",
        "[" * 60_000,
        "{" * 60_000,
        "- " * 30_000,
        "? " * 30_000,
        "seed: [" + "a," * 30_000 + "]",
        "\n".join(f"a{number}: 1" for number in range(6000)),
        "\n".join(f"a{number}: 1" for number in range(10**6)),
        "seed: " + "x" * 10**7,
    ],
    ids=lambda text: text[:12],
)
def test_yaml_that_grows_without_bound_is_refused_before_it_is_built(tmp_path, text, monkeypatch):
    monkeypatch.setattr(YAML, "load", lambda *_: pytest.fail("it was built"))
    started = time.process_time()
    with pytest.raises(SettingsError, match="this is no settings file") as error:
        params(tmp_path, text)
    assert time.process_time() - started < 5
    assert len(str(error.value)) < 500


def test_aliases_and_merges_of_a_usual_size_are_read(tmp_path):
    text = "data: {rate: 1, kind: &k mlp, names: [*k, *k], inners: [&i {rank: 2}, {<<: *i}]}"
    found = params(tmp_path, text).section("data", Outer)
    assert (found.names, found.inners) == (("mlp", "mlp"), (Inner(rank=2), Inner(rank=2)))


@pytest.mark.parametrize(
    "value",
    [
        ".nan",
        ".inf",
        "-.inf",
        "1e400",
        "0x" + "f" * 5000,
        "9" * 4000,
        str(2**53 + 1),
        "!!binary aGk=",
        "2001-01-01",
        "!!set {a}",
        "!!omap [a: 1]",
        "'" + "x" * 60_000 + "'",
        "[" + "[a, a, a, a], " * 1000 + "]",
        "{" + ", ".join(f"a{number}: [[a]]" for number in range(1000)) + "}",
    ],
    ids=lambda value: value[:12],
)
def test_an_impossible_number_is_shown_in_short(tmp_path, value):
    with pytest.raises(SettingsError) as error:
        data(tmp_path, f"{{rate: {value}, kind: mlp}}")
    assert "data.rate is " in str(error.value)
    assert len(str(error.value)) - len(str(tmp_path)) < 500


@pytest.mark.parametrize("value", ['"\\0"', '"\\ud800"', '"' + "x" * 5000 + '"'])
def test_a_text_that_no_path_can_be_is_refused(tmp_path, value):
    with pytest.raises(SettingsError, match=r"data\.note is .*wanted a text of at most"):
        data(tmp_path, f"{{rate: 1, kind: mlp, note: {value}}}")


def test_a_long_unknown_key_is_cut(tmp_path):
    with pytest.raises(SettingsError, match="unknown key xxx") as error:
        params(tmp_path, f"? {'x' * 60_000}\n: 3")
    assert len(str(error.value)) - len(str(tmp_path)) < 500


def test_a_failure_of_the_system_is_reported_in_its_own_words(tmp_path, monkeypatch):
    def failing(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "params.yaml")

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(OSError, match="Input/output error"):
        Params.read(Path("params.yaml"))


def test_a_folder_is_no_settings_file(tmp_path):
    with pytest.raises(SettingsError, match="a folder, wanted a settings file"):
        Params.read(tmp_path)


def test_a_file_or_section_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.yaml: no such settings file"):
        Params.read(tmp_path / "none.yaml")
    with pytest.raises(SettingsError, match=r"section 'data' is missing\. Found: seed\."):
        params(tmp_path, "seed: 3").section("data", Outer)


def test_the_seed_is_a_whole_number(tmp_path):
    assert params(tmp_path, "seed: 3").seed() == 3
    for text in ("seed: 3.0", "seed: true", "seed: x"):
        with pytest.raises(SettingsError, match=r"seed is .* wanted int"):
            params(tmp_path, text).seed()


@pytest.mark.parametrize("text", ["seed: 3", "# why\nseed:  3   # ü\n\n", "{seed: 3}\n"])
def test_the_text_is_kept_as_it_was_read_whatever_becomes_of_the_file(tmp_path, text):
    found = params(tmp_path, text)
    found.path.write_text("seed: 4")
    assert found.text == text
    assert found.seed() == 3
