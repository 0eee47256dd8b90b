import io
import multiprocessing
import os
import pickle
import random
import zipfile

import pytest

from cache import images as module
from cache.errors import StageError
from cache.images import ImageArchive, ImageNameError, check_file_name

FILES = {f"{number:012d}.jpg": bytes([number]) * 100 for number in range(5)}


@pytest.fixture
def zipped(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.mkdir("train2017")
        for name, data in FILES.items():
            archive.writestr(f"train2017/{name}", data)
    return tmp_path / "images.zip"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name, data in FILES.items():
        (tmp_path / "images" / name).write_bytes(data)
    return tmp_path / "images"


def read_all(archive):
    return {name: archive.read(name) for name in FILES}


def test_a_folder_and_a_zip_read_alike(folder, zipped):
    for path in (folder, zipped):
        assert read_all(ImageArchive(path, key="k")) == FILES


def test_a_zip_is_found_by_full_and_by_plain_name(zipped):
    archive = ImageArchive(zipped, key="k")
    name = next(iter(FILES))
    assert archive.read(f"train2017/{name}") == archive.read(name) == FILES[name]


def test_a_full_name_wins_over_a_plain_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as opened:
        opened.writestr("a/x.jpg", b"in a")
        opened.writestr("x.jpg", b"at the root")
    assert ImageArchive(tmp_path / "two.zip", key="k").read("x.jpg") == b"at the root"


@pytest.mark.parametrize("name", ["", "..", "../a", "a/../b", "/a", "a\\b", "a\0", "c:a"])
def test_names_that_leave_the_root_are_refused(folder, zipped, name):
    with pytest.raises(ImageNameError, match="leaves the image root"):
        check_file_name(name)
    for path in (folder, zipped):
        with pytest.raises(ImageNameError):
            ImageArchive(path, key="k").read(name)


@pytest.mark.parametrize("name", ["none.jpg", ".", "train2017", "x" * 5000, "a/" * 3000 + "a"])
def test_names_of_nothing_are_refused(folder, zipped, name):
    for path in (folder, zipped):
        with pytest.raises(ImageNameError):
            ImageArchive(path, key="k").read(name)


def test_a_huge_file_is_refused_unread(folder, zipped, monkeypatch):
    monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 99)
    for path in (folder, zipped):
        with pytest.raises(ImageNameError, match="has more than 99 bytes"):
            ImageArchive(path, key="k").read(next(iter(FILES)))


def test_what_is_no_archive_names_key_and_path(tmp_path):
    (tmp_path / "page.zip").write_text("<html>")
    (tmp_path / "none").mkdir()
    zipfile.ZipFile(tmp_path / "none.zip", "w").close()
    wanted = {
        "missing.zip": "does not exist. Run the fetch stage",
        "page.zip": "neither a folder nor a readable zip",
        "none": "is an empty folder",
        "none.zip": "is an empty zip",
    }
    for name, text in wanted.items():
        with pytest.raises(StageError) as error:
            ImageArchive(tmp_path / name, key="data.val.images")
        assert str(error.value).startswith(f"data.val.images: {tmp_path / name} ")
        assert text in str(error.value)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_damaged_zips_raise_only_named_errors(tmp_path, method):
    dice = random.Random(method)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a.jpg", dice.randbytes(300) + b"a" * 300)
    failures = 0
    for _ in range(300):
        data = bytearray(buffer.getvalue())
        for _ in range(3):
            data[dice.randrange(len(data))] = dice.randrange(256)
        (tmp_path / "a.zip").write_bytes(data)
        try:
            ImageArchive(tmp_path / "a.zip", key="k").read("a.jpg")
        except (ImageNameError, StageError):
            failures += 1
    assert failures > 200


def _send_all(archive, connection):
    connection.send((read_all(archive), archive._owner == os.getpid()))
    connection.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_with_a_file_position_of_their_own(zipped, method):
    archive = ImageArchive(zipped, key="k")
    read_all(archive)
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_all, args=(archive, sender))
    process.start()
    for _ in range(50):
        assert read_all(archive) == FILES
    assert receiver.recv() == (FILES, True)
    process.join()


def test_a_pickled_archive_holds_no_open_file(zipped):
    archive = pickle.loads(pickle.dumps(ImageArchive(zipped, key="k")))
    assert archive._zip is None
    assert read_all(archive) == FILES
    assert archive._owner == os.getpid()
