"""`python -m cache.card`, and what a card beside or in a store changes: nothing."""

import os
import shutil
import subprocess
import sys

import pytest

from cache.audit import audit
from cache.card import write_card
from cache.card_text import CardSettings, card_of
from cache.errors import IncompleteStoreError, SettingsError
from cache.layout import StoreLayout
from cache.publish import publish_copy
from cache.remote.location import Location
from cache.store import FeatureStore
from cache.store_index import StoreIndex

MIT = CardSettings(license="mit")


def open_store(root):
    return StoreLayout.open(root, partial=False)


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "cache.card", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_licence_is_asked_for_with_the_reason_and_the_common_ones(store):
    done = run(store.root)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --license is missing. ")
    assert done.stderr.count("\n") == 1
    for text in ("owners", "cc-by-4.0", "apache-2.0", "other", "https://huggingface.co/docs/hub"):
        assert text in done.stderr
    assert not store.root.with_name("features.card.md").exists()


def test_a_card_is_a_markdown_file(store):
    spec = (store.root / "spec.json").read_bytes()
    with pytest.raises(SettingsError, match=r"wanted the name of a Markdown file"):
        write_card(str(store.root), MIT, store.root / "spec.json")
    assert (store.root / "spec.json").read_bytes() == spec


@pytest.mark.parametrize("kind", ["other text", "a pipe", "a link", "a folder"])
def test_only_a_card_is_replaced(store, tmp_path, kind):
    target = tmp_path / "README.md"
    write_card(str(store.root), MIT, target)
    write_card(str(store.root), CardSettings(license="other", license_name="ours"), target)
    target.rename(tmp_path / "card.md")
    if kind == "other text":
        target.write_text("# A project with patchcache\n")
    elif kind == "a pipe":
        os.mkfifo(target)
    elif kind == "a link":
        target.symlink_to("card.md")
    else:
        target.mkdir()
    before = target.lstat()
    with pytest.raises(SettingsError, match=r"README\.md: exists, and is no card of a store"):
        write_card(str(store.root), MIT, target)
    assert target.lstat().st_ino == before.st_ino


def test_a_store_that_lacks_a_shard_gets_no_card(store):
    (store.root / store.names[0]).unlink()
    with pytest.raises(IncompleteStoreError, match=store.names[0]):
        write_card(str(store.root), MIT, None)
    assert not store.root.with_name("features.card.md").exists()


def test_a_store_behind_a_url_needs_the_name_of_a_file(store, tmp_path):
    with pytest.raises(SettingsError, match="Name the card with --out"):
        write_card(store.root.as_uri(), MIT, None)
    write_card(store.root.as_uri(), MIT, tmp_path / "new/card.md")
    assert (tmp_path / "new/card.md").read_text() == card_of(*open_store(store.root), MIT)


def test_the_same_store_and_arguments_give_the_same_bytes(store, tmp_path):
    other = tmp_path / "elsewhere/of_another_name"
    shutil.copytree(store.root, other)
    texts = ("--license", "mit", "--images", "ours")
    first = run(store.root, *texts)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(f"{store.root}.card.md: upload it as README.md")
    assert run(".", *texts, cwd=other).returncode == 0
    written = store.root.with_name("features.card.md").read_bytes()
    assert other.with_name("of_another_name.card.md").read_bytes() == written


def test_a_card_leaves_its_store_as_it_is(store):
    def state():
        return {
            path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
            for path in store.root.iterdir()
        }

    before = state()
    write_card(str(store.root), MIT, None)
    assert state() == before


def test_a_card_among_the_files_of_a_store_disturbs_nothing(store, tmp_path):
    files = {path.name for path in store.root.iterdir()}
    write_card(str(store.root), MIT, store.root / "README.md")
    assert audit(Location(store.root), deep=True).problems == []
    assert len(FeatureStore(store.root)) == len(store.image_ids)
    location = Location(store.root)
    index = StoreIndex.read(store.root / "index.parquet", location.read_spec())
    publish_copy(tmp_path / "copy", location, index)
    assert {path.name for path in (tmp_path / "copy").iterdir()} == files
    publish_copy(store.root, Location(tmp_path / "copy"), index)
    assert {path.name for path in store.root.iterdir()} == files | {"README.md"}
