import errno
import io
import multiprocessing
import os
import pickle
import random
import stat
import warnings
import zipfile
from pathlib import Path

import pytest

from pipeline.images import names as module
from pipeline.images.archives import ImageArchive
from pipeline.images.folder import ImageFolder
from pipeline.images.names import ImageNameError, check_file_name
from workspace.data_settings import ImagePath
from workspace.errors import StageError

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


def opened(*paths, key="k", **options):
    return ImageArchive([ImagePath(path=str(path)) for path in paths], key=key, **options)


def only_files(archive):
    """The files of the only place of an archive."""
    return archive._places[0].files


def read_all(archive):
    return {name: archive.read(name) for name in FILES}


def test_a_folder_and_a_zip_read_alike(folder, zipped):
    for path in (folder, zipped):
        assert read_all(opened(path)) == FILES


def test_a_zip_is_found_by_full_and_by_plain_name(zipped):
    archive = opened(zipped)
    name = next(iter(FILES))
    assert archive.read(f"train2017/{name}") == archive.read(name) == FILES[name]


def stored(path, files):
    """Write some (name, bytes) as a folder, or as a zip where the path says so."""
    if path.suffix == ".zip":
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
            warnings.simplefilter("ignore")
            for name, data in files:
                archive.writestr(name, data)
    else:
        for name, data in files:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return opened(path)


@pytest.fixture(params=["images", "images.zip"])
def place(tmp_path, request):
    return tmp_path / request.param


def means(names, asked):
    """The rule in other words: the file of this name, or the only one that ends in its base."""
    if asked in names:
        return asked
    found = [name for name in names if name.split("/")[-1] == asked.split("/")[-1]]
    return found[0] if len(found) == 1 else None


@pytest.mark.parametrize("kind", ["images", "images.zip"])
@pytest.mark.parametrize("seed", range(20))
def test_a_name_means_the_exact_file_or_the_only_file_of_its_base_name(tmp_path, kind, seed):
    dice = random.Random(seed)
    paths = [f"{folder}{base}" for folder in ("", "a/", "b/", "a/c/") for base in ("x", "y", "z:1")]
    names = dice.sample(paths, dice.randrange(1, len(paths)))
    archive = stored(tmp_path / kind, [(name, name.encode()) for name in names])
    for asked in [*paths, "d/x", "a/b/y", "none"]:
        wanted = means(names, asked)
        if wanted is None:
            with pytest.raises(ImageNameError):
                archive.read(asked)
        else:
            assert archive.read(asked) == wanted.encode()
            assert archive.find(asked) == wanted


def test_a_name_that_may_mean_two_files_names_both(place):
    archive = stored(place, [("a/x.jpg", b"in a"), ("b/x.jpg", b"in b"), ("c/x.jpg", b"in a")])
    with pytest.raises(ImageNameError, match=r"'x.jpg' may be 'a/x.jpg' or 'b/x.jpg' in "):
        archive.read("x.jpg")


def test_of_copies_any_will_do(place):
    archive = stored(place, [(f"{folder}/x.jpg", b"the same") for folder in "abc"])
    assert archive.read("x.jpg") == b"the same"


def test_a_name_twice_in_a_zip_must_have_the_same_bytes(tmp_path):
    archive = stored(tmp_path / "i.zip", [("a/x", b"1"), ("a/x", b"2"), ("y", b"1"), ("y", b"1")])
    assert archive.read("y") == b"1"
    for name in ("a/x", "x", "./a//x"):
        with pytest.raises(ImageNameError, match=r"'a/x' stands twice in .*, with other bytes"):
            archive.read(name)


def test_a_zip_is_read_as_unpacking_it_would_place_its_files(tmp_path):
    archive = stored(tmp_path / "i.zip", [("./a/x", b"x"), ("/b//y", b"y"), ("../c/z", b"z")])
    assert [archive.read(name) for name in ("a/x", "b/y", "c/z")] == [b"x", b"y", b"z"]
    assert (archive.find("x"), archive.find("z")) == ("a/x", "c/z")


def test_a_link_in_a_zip_is_no_image(tmp_path):
    link = zipfile.ZipInfo("x.jpg")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ImageNameError, match="links in a zip are not followed"):
        opened(tmp_path / "i.zip").read("x.jpg")


@pytest.fixture
def linked(tmp_path):
    """A folder with links of all kinds, itself reached by a link."""
    outside, images = tmp_path / "outside", tmp_path / "real"
    (outside / "deep").mkdir(parents=True)
    (images / "own").mkdir(parents=True)
    for path in (outside / "o.jpg", outside / "deep" / "p.jpg", images / "own" / "i.jpg"):
        path.write_bytes(path.name.encode())
    for name, target in {
        "file.jpg": outside / "o.jpg",
        "out": outside,
        "own/middle": "../../outside",
        "twice": "out",
        "in": "own",
        "in.jpg": "own/i.jpg",
        "circle": ".",
        "lost.jpg": "lost.jpg",
        "gone.jpg": "nothing",
    }.items():
        (images / name).symlink_to(target)
    (outside / "back").symlink_to(images)
    (tmp_path / "images").symlink_to(images)
    return tmp_path / "images"


OUTSIDE = {
    "file.jpg": b"o.jpg",
    "out/o.jpg": b"o.jpg",
    "own/middle/deep/p.jpg": b"p.jpg",
    "twice/deep/p.jpg": b"p.jpg",
}
INSIDE = ("own/i.jpg", "in/i.jpg", "in.jpg", "circle/circle/own/i.jpg", "i.jpg")


@pytest.mark.parametrize("follow_links", [False, True])
def test_links_may_stay_inside_and_lead_out_only_if_the_settings_say_so(linked, follow_links):
    archive = opened(linked, follow_links=follow_links)
    for name in INSIDE:
        assert archive.read(name) == b"i.jpg"
    for name, wanted in OUTSIDE.items():
        if follow_links:
            assert archive.read(name) == wanted
        else:
            with pytest.raises(ImageNameError, match=r"leaves the image root by a link to .*outs"):
                archive.read(name)
    for name in ("lost.jpg", "gone.jpg", "lost.jpg/x", "out"):
        with pytest.raises(ImageNameError):
            archive.read(name)


def test_base_names_are_looked_for_behind_links_only_if_these_are_followed(linked):
    assert opened(linked, follow_links=True).read("p.jpg") == b"p.jpg"
    with pytest.raises(ImageNameError, match=r"no file 'p\.jpg'"):
        opened(linked).read("p.jpg")


def test_a_pipe_is_refused_and_not_waited_for(folder):
    (folder / "a").mkdir()
    os.mkfifo(folder / "a" / "pipe.jpg")
    for name in ("a/pipe.jpg", "pipe.jpg"):
        with pytest.raises(ImageNameError):
            opened(folder).read(name)


def test_a_failing_disk_is_an_error_of_the_stage_and_no_bad_name(folder, zipped, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    archives = [opened(path) for path in (folder, zipped)]
    monkeypatch.setattr(Path, "read_bytes", fail)
    monkeypatch.setattr(zipfile.ZipFile, "read", fail)
    for archive in archives:
        with pytest.raises(StageError, match="cannot be read: Input/output error"):
            archive.read(next(iter(FILES)))


def test_folders_are_not_walked_while_all_names_are_exact(folder, monkeypatch):
    monkeypatch.delattr(ImageFolder, "_walk")
    assert read_all(opened(folder)) == FILES


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "leaves the image root") for name in ("..", "../a", "a/../b", "/a")),
        *((name, "holds a backslash or a zero byte") for name in ("a\\b", "a\0", "c:\\a")),
        ("", "file name is empty"),
    ],
)
def test_names_that_are_no_place_below_the_root_are_refused(folder, zipped, name, reason):
    with pytest.raises(ImageNameError, match=reason):
        check_file_name(name)
    for path in (folder, zipped):
        with pytest.raises(ImageNameError):
            opened(path).read(name)


@pytest.mark.parametrize("name", ["none.jpg", ".", "train2017", "x" * 5000, "a/" * 3000 + "a"])
def test_names_of_nothing_are_refused(folder, zipped, name):
    for path in (folder, zipped):
        with pytest.raises(ImageNameError):
            opened(path).read(name)


def test_a_huge_file_is_refused_unread(folder, zipped, monkeypatch):
    monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 99)
    for path in (folder, zipped):
        with pytest.raises(ImageNameError, match="has more than 99 bytes"):
            opened(path).read(next(iter(FILES)))


def test_an_error_about_an_archive_names_key_and_path(tmp_path):
    (tmp_path / "page.zip").write_text("<html>")
    (tmp_path / "none").mkdir()
    zipfile.ZipFile(tmp_path / "none.zip", "w").close()
    wanted = {
        "missing.zip": "does not exist. Name a folder, a zip, a tar or a parquet",
        "page.zip": "neither a folder nor a readable zip",
        "none": "is an empty folder",
        "none.zip": "is an empty zip",
    }
    for name, text in wanted.items():
        with pytest.raises(StageError) as error:
            opened(tmp_path / name, key="data.val.images")
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
            opened(tmp_path / "a.zip").read("a.jpg")
        except (ImageNameError, StageError):
            failures += 1
    assert failures > 200


def _send_all(archive, connection):
    connection.send((read_all(archive), only_files(archive)._owner == os.getpid()))
    connection.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_with_a_file_position_of_their_own(zipped, method):
    archive = opened(zipped)
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
    archive = pickle.loads(pickle.dumps(opened(zipped)))
    assert not hasattr(only_files(archive), "_zip")
    assert read_all(archive) == FILES
    assert only_files(archive)._owner == os.getpid()
