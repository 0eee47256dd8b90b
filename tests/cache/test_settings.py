from dataclasses import dataclass
from typing import Literal

import pytest

from cache.errors import SettingsError
from cache.settings import Params


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
        ("{rate: -1, kind: mlp}", "data: rate is -1.0, wanted 0 or more"),
        ("3", "data is 3 (int), wanted a section of keys."),
        ("", "data is None (NoneType), wanted a section of keys."),
    ],
)
def test_what_does_not_fit_names_key_and_file(tmp_path, text, reason):
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
        ("[" * 5000, "not a YAML file: "),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, text, reason):
    with pytest.raises(SettingsError) as error:
        params(tmp_path, text)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_or_section_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.yaml: no settings file that can be read"):
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
