from pathlib import Path

import pytest

from cache import FeatureStore
from cache.errors import CorruptShardError, SettingsError, UnreachableStoreError
from cache.remote.urls import filesystem_of, is_url
from cache.verify import verify


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


@pytest.mark.parametrize(
    "url",
    [
        *("s3://", "s3:///", "s3:///folder", "http://", "http:///x", "https://:80/x"),
        *("http://host:99999/x", "http://host:eighty/x", "http://[::1/x"),
        *("reference://", "jupyter://x", "nothing://x", "dir:///x"),
        *("file://", "file:///", "local://"),
    ],
)
def test_a_url_that_leads_nowhere_is_refused_in_one_line(url):
    with pytest.raises(SettingsError) as caught:
        filesystem_of(url)
    assert str(caught.value).startswith(url)
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError):
        FeatureStore(url)


def test_a_server_that_is_contacted_at_once_is_named():
    with pytest.raises(UnreachableStoreError, match=r"^ftp://127\.0\.0\.1:1/x: the host refuses"):
        filesystem_of("ftp://127.0.0.1:1/x")


def test_what_holds_no_store_has_nothing_to_repair(tmp_path):
    with pytest.raises(CorruptShardError, match=r"deleted: 0\. Push the store there again\.$"):
        verify((tmp_path / "nothing").as_uri(), deep=True, repair=False)
