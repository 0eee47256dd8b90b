from pathlib import Path

import pytest

from cache.remote.urls import is_url


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("s3://a/b", True),
        ("a:/b.csv", False),
        ("./x", False),
        ("://x", False),
        (Path("a://b"), False),
    ],
)
def test_a_url_has_a_scheme(path, wanted):
    assert is_url(path) == wanted
