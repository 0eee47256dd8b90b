"""docs/settings.md says what the dataclasses say."""

import dataclasses

import pytest

from tests.documents.settings_page import PAGE, fields, render
from tests.test_pipeline_definition import SECTIONS


def test_the_page_is_made_from_the_code():
    assert PAGE.read_text() == render()


@pytest.mark.parametrize("name", SECTIONS)
def test_every_setting_has_a_meaning(name):
    assert [key for key, _, text in fields(SECTIONS[name]) if not text] == []


def test_a_changed_default_or_docstring_changes_the_page():
    @dataclasses.dataclass
    class Section:
        value: int
        """What it is."""

    assert list(fields(Section)) == [("value", "whole number", "What it is.")]
