import dataclasses
import hashlib
import json

import pytest

from cache.errors import (
    IncompleteStoreError,
    InvalidFeaturesError,
    PatchcacheError,
    SpecMismatchError,
)
from cache.spec import Spec, check_same_spec

FIELDS = [field.name for field in dataclasses.fields(Spec)]


def other(value):
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else value * 2


def tampered(spec, **changes):
    return json.dumps(json.loads(spec.to_json()) | changes).encode()


def test_the_design_names_all_fields():
    wanted = (
        "format model weights_sha256 activation layer tokens normalized image_size resize crop "
        "interpolation mean std precision batch_size dtype patches width preprocess_version about"
    )
    assert sorted(FIELDS) == sorted(wanted.split())


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_changes_the_fingerprint(spec, name):
    changed = dataclasses.replace(spec, **{name: other(getattr(spec, name))})
    assert changed.fingerprint != spec.fingerprint


def test_the_fingerprint_is_sha256_of_canonical_json_without_itself(spec):
    values = json.loads(spec.to_json())
    found = values.pop("fingerprint")
    text = json.dumps(values, sort_keys=True, separators=(",", ":")) + "\n"
    assert found == spec.fingerprint == hashlib.sha256(text.encode()).hexdigest()


def test_spec_json_is_canonical(spec):
    values = json.loads(spec.to_json())
    text = json.dumps(values, sort_keys=True, separators=(",", ":")) + "\n"
    assert spec.to_json() == text.encode()


def test_a_spec_survives_its_json(spec):
    again = Spec.from_json(spec.to_json(), "here")
    assert again == spec
    assert again.to_json() == spec.to_json()


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ("format", "about")])
def test_an_edited_field_is_refused(spec, name):
    value = getattr(spec, name)
    changed = [v / 2 for v in value] if isinstance(value, tuple) else other(value)
    with pytest.raises(SpecMismatchError, match=r"somewhere.*fingerprint is"):
        Spec.from_json(tampered(spec, **{name: changed}), "somewhere")


def test_another_format_is_refused_by_its_name(spec):
    newer = dataclasses.replace(spec, format="patchcache/2")
    with pytest.raises(SpecMismatchError, match=r"'patchcache/2', wanted 'patchcache/1'"):
        Spec.from_json(newer.to_json(), "here")


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "about"])
def test_a_missing_field_is_named(spec, name):
    values = json.loads(spec.to_json())
    del values[name]
    with pytest.raises(PatchcacheError, match=name):
        Spec.from_json(json.dumps(values).encode(), "here")


def test_an_unknown_field_is_named(spec):
    with pytest.raises(IncompleteStoreError, match="colour"):
        Spec.from_json(tampered(spec, colour="red"), "here")


def test_without_a_text_about_it_a_spec_is_spelled_as_before_there_was_one(spec):
    assert "about" not in json.loads(spec.to_json())
    # Of the fixture, by the version before.
    assert spec.fingerprint == "dd2dcaf1dbe2db05c7444d172989eafd7d0eecbb3bd1d1b86c3fecac6d38d2dd"


def test_a_text_about_it_is_a_part_of_the_spec(spec):
    external = dataclasses.replace(spec, about="a CNN")
    assert json.loads(external.to_json())["about"] == "a CNN"
    assert Spec.from_json(external.to_json(), "here") == external
    with pytest.raises(SpecMismatchError, match="fingerprint is"):
        Spec.from_json(tampered(external, about="another CNN"), "here")
    with pytest.raises(SpecMismatchError, match="about is 'a CNN', wanted ''"):
        check_same_spec(external, spec, "there")


@pytest.mark.parametrize("name", ["image_size", "batch_size"])
def test_a_size_is_left_out_only_where_a_text_says_it(spec, name):
    unstated = dataclasses.replace(spec, about="any size", **{name: 0})
    assert Spec.from_json(unstated.to_json(), "here") == unstated
    with pytest.raises(IncompleteStoreError, match=f"{name} is 0"):
        Spec.from_json(dataclasses.replace(unstated, about="").to_json(), "here")


EXTERNAL = {"model": "net", "about": "last map", "patches": 49, "width": 1280}


def test_an_external_spec_needs_four_values():
    spec = Spec.external(**EXTERNAL)
    assert Spec.from_json(spec.to_json(), "here") == spec
    assert {name: getattr(spec, name) for name in EXTERNAL} == EXTERNAL


@pytest.mark.parametrize("name", sorted({*FIELDS} - {"format", "dtype"}))
def test_every_field_of_an_external_spec_can_be_given_and_changes_its_fingerprint(name):
    plain = Spec.external(**EXTERNAL)
    value = other(getattr(plain, name)) or (0.5,) * (name in ("mean", "std")) or 7
    changed = Spec.external(**EXTERNAL | {name: value})
    assert getattr(changed, name) == value
    assert changed.fingerprint != plain.fingerprint


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"about": ""}, "about is empty"),
        ({"about": None}, "about is"),
        ({"patches": 0}, "patches is 0"),
        ({"patches": 49.0}, r"patches is 49\.0"),
        ({"width": 2**26}, "width is 67108864"),
        ({"model": 5}, "model is 5"),
        ({"weights_sha256": b"ab"}, "weights_sha256 is b'ab'"),
        ({"mean": 0.5}, r"mean is 0\.5"),
        ({"image_size": -1}, "image_size is -1"),
        ({"colour": "red"}, "no field colour can be given. Wanted some of activation"),
        ({"dtype": "float32"}, "no field dtype can be given"),
    ],
)
def test_an_external_spec_of_wrong_values_is_refused_by_name(changes, text):
    with pytest.raises(InvalidFeaturesError, match=text):
        Spec.external(**EXTERNAL | changes)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"5", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000]
)
def test_json_that_is_not_an_object_is_refused(text):
    with pytest.raises(IncompleteStoreError, match="not the JSON of a spec"):
        Spec.from_json(text, "here")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean", 5),
        ("mean", None),
        ("std", ["a"]),
        ("std", [float("nan")]),
        ("layer", float("nan")),
        ("layer", float("inf")),
        ("layer", -2.0),
        ("patches", "49"),
        ("patches", 0),
        ("width", -1),
        ("normalized", 0),
        ("model", {}),
        ("mean", [10**400, 0, 0]),
        ("patches", 10**30),
        ("width", 2**29),
    ],
)
def test_a_value_no_spec_holds_is_refused_whatever_the_fingerprint(spec, name, value):
    with pytest.raises(IncompleteStoreError, match=f"{name} is"):
        Spec.from_json(tampered(spec, **{name: value}), "here")


def test_a_mismatch_names_every_field_that_differs_and_no_other(spec):
    found = dataclasses.replace(spec, layer=-1, model="other", std=(1.0, 1.0, 1.0))
    with pytest.raises(SpecMismatchError) as caught:
        check_same_spec(found, spec, "there")
    text = str(caught.value)
    assert all(f"{name} is" in text for name in ("layer", "model", "std"))
    assert not any(f"{name} is" in text for name in set(FIELDS) - {"layer", "model", "std"})
    assert "'other', wanted 'tiny'" in text
    check_same_spec(dataclasses.replace(spec), spec, "there")


@pytest.mark.parametrize(
    "text",
    [
        b'{"format": NaN}',
        b'{"format": 1e999}',
        b'{"format": ' + b"[" * 3000 + b"]" * 3000 + b"}",
        b'{"layer": ' + b"9" * 5000 + b"}",
        b'{"format": "' + b"x" * 60_000 + b'"}',
        b"[]",
        b"\xff",
    ],
    ids=lambda text: text[:16],
)
def test_the_error_about_a_forged_spec_is_one_short_line(text):
    with pytest.raises(PatchcacheError) as caught:
        Spec.from_json(text, "spec.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
