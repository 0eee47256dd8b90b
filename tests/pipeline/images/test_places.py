"""Every kind of place gives the same bytes under the same names, here and behind a URL."""

import gzip
import multiprocessing
import os
import pickle
import random
from pathlib import Path

import fsspec
import pytest

from cache.errors import SettingsError
from cache.remote import network
from pipeline.images import names as names_module
from pipeline.images.archives import ImageArchive
from pipeline.images.byte_file import LocalFile, OffsetReader
from pipeline.images.folder import ImageFolder
from pipeline.images.names import ImageNameError, is_named_as_image
from tests.pipeline.images.packing import write_folder, write_parquet, write_tar, write_zip
from tests.pipeline.images.range_server import RangeServer
from workspace.data_settings import ImagePath
from workspace.errors import StageError

FILES = {f"{n % 2}/{n}.jpg": bytes([n]) * (n * 100) for n in range(6)}
KEY = "data.train.images"


def write_table(path, files):
    return write_parquet(path, list(files.items()), row_group_size=2)


WRITERS = {"": write_folder, ".zip": write_zip, ".tar": write_tar, ".parquet": write_table}
SHARDS = (".tar", ".parquet")


def opened(*paths, **options):
    places = [p if isinstance(p, ImagePath) else ImagePath(path=str(p)) for p in paths]
    return ImageArchive(places, key=KEY, **options)


def read_all(archive):
    return {name: archive.read(name) for name in archive.all_names()}


def full_names(files, suffix, stem="a"):
    """Files under the names that they have in a place of this suffix."""
    return {f"{stem}/{name}" if suffix in SHARDS else name: data for name, data in files.items()}


def refusal(*paths):
    with pytest.raises(StageError, match=f"^{KEY}: ") as error:
        opened(*paths)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(params=WRITERS)
def suffix(request):
    return request.param


@pytest.fixture
def server(tmp_path):
    running = RangeServer(tmp_path)
    yield running
    running.stop()


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(network, "BACK_OFF", (0.0, 0.0))


def test_all_kinds_of_places_read_alike(tmp_path, suffix):
    archive = opened(WRITERS[suffix](tmp_path / f"a{suffix}", FILES))
    wanted = full_names(FILES, suffix)
    assert read_all(archive) == wanted
    for name, data in wanted.items():
        assert archive.has(name)
        assert archive.find(name.rpartition("/")[2]) == name
        assert archive.read(name.rpartition("/")[2]) == data
    for name in ("a", "a/", "0/9.jpg", "9.jpg", "a/a/0/0.jpg"):
        assert not archive.has(name)


def test_what_a_file_is_follows_from_its_bytes(tmp_path):
    for suffix, write in list(WRITERS.items())[1:]:
        path = write(tmp_path / f"{suffix[1:]}-blob", FILES)
        assert read_all(opened(path)) == full_names(FILES, suffix, path.name)


def test_a_tar_without_signature_is_known_by_its_name(tmp_path):
    data = bytearray(write_tar(tmp_path / "a.tar", {"x.jpg": b"x"}).read_bytes())
    data[257:265] = bytes(8)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    assert read_all(opened(tmp_path / "a.tar")) == {"a/x.jpg": b"x"}


@pytest.mark.parametrize("suffix", SHARDS)
def test_shards_of_a_pattern_number_their_files_apart(tmp_path, suffix):
    wanted = {}
    for stem in ("00001", "00000"):
        files = {name: stem.encode() + data for name, data in FILES.items()}
        WRITERS[suffix](tmp_path / f"{stem}{suffix}", files)
        wanted |= full_names(files, suffix, stem)
    archive = opened(f"{tmp_path}/*{suffix}")
    assert read_all(archive) == wanted
    assert archive.all_names()[0] == "00000/0/0.jpg"
    with pytest.raises(ImageNameError, match=r"'0\.jpg' may be '00000/0/0\.jpg' or '00001/0/0"):
        archive.read("0.jpg")


def test_a_pattern_of_zips_and_folders_is_all_of_them(tmp_path):
    names = list(FILES)
    for number, suffix in enumerate(("", ".zip", "")):
        some = {name: FILES[name] for name in names[number::3]}
        WRITERS[suffix](tmp_path / f"part{number}{suffix}", some)
    assert read_all(opened(f"{tmp_path}/part*")) == FILES


def test_a_path_with_signs_of_a_pattern_means_itself_if_it_exists(tmp_path):
    write_folder(tmp_path / "a[1]", {"x.jpg": b"x"})
    write_folder(tmp_path / "a1", {"y.jpg": b"y"})
    assert read_all(opened(tmp_path / "a[1]")) == {"x.jpg": b"x"}


def test_a_pattern_without_a_match_names_the_key(tmp_path, memory):
    for pattern in (f"{tmp_path}/*.tar", f"{tmp_path}/x[0-9]", "memory://none/*.tar"):
        assert f"no file matches the pattern {pattern}" in refusal(pattern)


def test_two_shards_of_one_name_hold_equal_files_or_are_told_apart_by_a_prefix(tmp_path):
    for folder, data in (("a", b"a"), ("b", b"b")):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", {"x.jpg": data, "y.jpg": b"same"})
    archive = opened(f"{tmp_path}/*/0.tar")
    assert archive.all_names() == ["0/x.jpg", "0/y.jpg"]
    assert archive.read("0/y.jpg") == b"same"
    with pytest.raises(ImageNameError, match=r"'0/x\.jpg' is one file in .* and another in .*; a "):
        archive.read("0/x.jpg")
    places = [ImagePath(path=f"{tmp_path}/{name}/0.tar", prefix=f"in/{name}") for name in "ab"]
    archive = opened(*places)
    assert archive.read("in/a/0/x.jpg") == b"a"
    assert archive.read("in/b/0/x.jpg") == b"b"


@pytest.mark.parametrize("seed", range(20))
def test_with_prefixes_a_name_means_what_it_meant_among_all_full_names(tmp_path, seed):
    dice = random.Random(seed)
    whole, places = {}, []
    for number in range(4):
        suffix = dice.choice(list(WRITERS))
        prefix = dice.choice(["", "p", "p/q", f"p{number}"])
        files = {f"{dice.choice(['', 'p/', 'q/'])}{number}{x}.jpg": os.urandom(3) for x in "ab"}
        path = WRITERS[suffix](tmp_path / f"{number}{suffix}", files)
        places.append(ImagePath(path=str(path), prefix=prefix))
        for name, data in full_names(files, suffix, str(number)).items():
            whole[f"{prefix}/{name}".lstrip("/")] = data
    archive = opened(*places)
    assert read_all(archive) == whole
    for name in whole:
        assert archive.has(name)
        assert archive.find(name) == name
        assert not archive.has(f"x/{name}")


def test_a_folder_asks_the_disk_once_for_a_name(tmp_path, monkeypatch):
    archive = opened(write_folder(tmp_path / "a", FILES))
    asked = []
    real = type(tmp_path).stat
    monkeypatch.setattr(type(tmp_path), "stat", lambda *a, **k: asked.append(a) or real(*a, **k))
    monkeypatch.delattr(ImageFolder, "_walk")
    assert archive.has("0/0.jpg")
    assert len(asked) == 1


@pytest.mark.parametrize("suffix", ["", ".zip", ".tar"])
def test_files_of_the_system_and_texts_are_not_among_all_names(tmp_path, suffix):
    files = dict.fromkeys(
        [
            ".DS_Store",
            "._x.jpg",
            ".git/x.jpg",
            "__MACOSX/x.jpg",
            "Thumbs.db",
            "desktop.ini",
            "x.txt",
            "captions.csv",
            "x.JSON",
            "b/.hidden/x.jpg",
            "x.jpg",
            "b/y",
            "z.mp4",
        ],
        b"x",
    )
    archive = opened(WRITERS[suffix](tmp_path / f"a{suffix}", files))
    found = [name.removeprefix("a/") if suffix == ".tar" else name for name in archive.all_names()]
    # A shard's texts are not even listed.
    texts = [] if suffix == ".tar" else ["captions.csv", "x.JSON", "x.txt"]
    assert found == sorted([*texts, "b/y", "x.jpg", "z.mp4"])
    assert [name for name in found if is_named_as_image(name)] == ["b/y", "x.jpg"]


def test_suffixes_of_images_are_those_of_images_in_either_case():
    for suffix in names_module.IMAGE_SUFFIXES:
        assert is_named_as_image(f"v1.2/a.{suffix}")
        assert is_named_as_image(f"a.{suffix.upper()}")


def test_a_folder_that_cannot_be_listed_is_no_silent_gap(tmp_path, monkeypatch):
    archive = opened(write_folder(tmp_path / "a", FILES | {"lost+found/x": b""}))
    real = os.scandir

    def scandir(path):
        if path.name in unreadable:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    unreadable = {"lost+found"}
    assert read_all(archive) == FILES
    unreadable = {"1"}
    archive = pickle.loads(pickle.dumps(archive))
    with pytest.raises(StageError, match=r"'1' in .* cannot be listed: Permission denied"):
        archive.all_names()


def test_compressed_tars_are_refused_with_the_remedy(tmp_path):
    data = write_tar(tmp_path / "a.tar", FILES).read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(data))
    assert "compressed as a whole" in refusal(tmp_path / "a.tar.gz")
    for start, command in (
        (b"BZh9", "bunzip2"),
        (b"\xfd7zXZ\0", "unxz"),
        (b"\x28\xb5\x2f\xfd", "unz"),
    ):
        (tmp_path / "a.tar").write_bytes(start)
        assert command in refusal(tmp_path / "a.tar")


def test_pipes_and_files_that_are_nothing_known_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    assert "a pipe, a socket or a device" in refusal(tmp_path / "pipe.tar")
    for name, text in (
        ("page.tar", "no readable tar"),
        ("page.parquet", "no readable parquet file of images"),
        ("page.zip", "neither a folder nor a readable zip"),
        ("none", "does not exist"),
    ):
        if name != "none":
            (tmp_path / name).write_text("<html>")
        assert text in refusal(tmp_path / name)


# --- Behind a URL ---


def put(memory, folder, path):
    """Put a file or folder into the memory of fsspec; returns its URL."""
    memory.put(str(path), f"/{folder}/{path.name}", recursive=True)
    return f"memory://{folder}/{path.name}"


def test_all_kinds_of_places_read_alike_behind_a_url(tmp_path, suffix, memory):
    url = put(memory, "bucket", WRITERS[suffix](tmp_path / f"a{suffix}", FILES))
    wanted = full_names(FILES, suffix)
    archive = opened(url)
    assert read_all(archive) == wanted
    assert read_all(pickle.loads(pickle.dumps(archive))) == wanted
    assert archive.path == url
    name = next(iter(wanted))
    assert archive.find(name.rpartition("/")[2]) == name
    assert archive.real_path(name).startswith(url)


def test_a_pattern_behind_a_url_is_all_of_its_matches(tmp_path, memory):
    for stem in ("00001", "00000"):
        put(memory, "bucket", write_tar(tmp_path / f"{stem}.tar", FILES))
    archive = opened("memory://bucket/*.tar")
    assert archive.all_names()[:1] == ["00000/0/0.jpg"]
    assert len(archive.all_names()) == 2 * len(FILES)
    assert archive.read("00001/1/5.jpg") == FILES["1/5.jpg"]


def test_a_file_url_means_the_local_path(tmp_path, suffix):
    path = WRITERS[suffix](tmp_path / f"a{suffix}", FILES)
    assert read_all(opened(f"file://{path}")) == full_names(FILES, suffix)
    spaced = path.rename(tmp_path / f"a b{suffix}")
    assert read_all(opened(f"file://{str(spaced).replace(' ', '%20')}")) == full_names(
        FILES, suffix, "a b"
    )


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".parquet"])
def test_files_on_a_web_server_are_read_by_their_parts(tmp_path, suffix, server):
    dice = random.Random(1)
    files = {f"{n:03d}.jpg": dice.randbytes(100_000) for n in range(30)}
    path = WRITERS[suffix](tmp_path / f"a b{suffix}", files)
    archive = opened(f"{server.url}/a%20b{suffix}")
    wanted = full_names(files, suffix, "a b")
    server.num_bytes = 0
    name = list(wanted)[20]
    assert archive.read(name) == wanted[name]
    assert server.num_bytes < path.stat().st_size / 4
    assert read_all(archive) == wanted


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".parquet"])
def test_a_server_that_fails_for_a_while_is_asked_again(tmp_path, suffix, server):
    WRITERS[suffix](tmp_path / f"a{suffix}", FILES)
    server.faults = [503]
    archive = opened(f"{server.url}/a{suffix}")
    name = archive.all_names()[-1]
    server.faults = [500, 503]
    assert archive.read(name) == FILES["1/5.jpg"]


@pytest.mark.parametrize("suffix", [".tar", ".parquet", ".zip"])
def test_a_server_that_fails_is_an_error_of_the_stage_and_no_bad_name(tmp_path, suffix, server):
    WRITERS[suffix](tmp_path / f"a{suffix}", {f"{n}.jpg": os.urandom(300_000) for n in range(4)})
    archive = opened(f"{server.url}/a{suffix}")
    name = archive.all_names()[1]
    server.faults = [503] * 99
    with pytest.raises(StageError, match=r"http://.*503 Service Unavailable \(3 attempts\)"):
        archive.read(name)
    server.faults = []
    assert len(archive.read(name)) == 300_000


def test_a_web_server_that_reads_no_parts_is_refused_with_the_remedy(tmp_path, server):
    server.ignores_ranges = True
    for suffix in (".zip", ".tar", ".parquet"):
        files = {f"{n}.jpg": os.urandom(100_000) for n in range(30)}
        WRITERS[suffix](tmp_path / f"a{suffix}", files)
        with pytest.raises(StageError, match=r"HTTP range requests\)\. Copy the file to this"):
            opened(f"{server.url}/a{suffix}")


def test_web_folders_and_patterns_cannot_be_listed_and_say_so(tmp_path, server):
    write_folder(tmp_path / "images", FILES)
    for url in (f"{server.url}/images/", f"{server.url}/images"):
        assert "is a folder on a web server, which does not list its files" in refusal(url)
    assert "a pattern cannot be matched there" in refusal(f"{server.url}/*.tar")
    assert "No such file" in refusal(f"{server.url}/none.tar")


def test_urls_of_nothing_are_refused(memory):
    assert "No such file" in refusal("memory://none/a.tar")
    memory.mkdir("/empty")
    assert "is an empty folder" in refusal("memory://empty")
    with pytest.raises(SettingsError, match="cannot be read here"):
        opened("nosuch://bucket/a.tar")


def test_a_huge_remote_file_is_refused_and_a_vanished_one_named(tmp_path, memory, monkeypatch):
    url = put(memory, "bucket", write_folder(tmp_path / "a", FILES))
    archive = opened(url)
    memory.rm("/bucket/a/1/5.jpg")
    with pytest.raises(ImageNameError, match=r"1/5\.jpg: .*No such file"):
        archive.read("1/5.jpg")
    monkeypatch.setattr(names_module, "MAX_IMAGE_BYTES", 99)
    with pytest.raises(ImageNameError, match="has more than 99 bytes"):
        archive.read("0/4.jpg")


def _send_all(archive, connection):
    connection.send(read_all(archive))
    connection.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("suffix", [".zip", ".tar", ".parquet"])
@pytest.mark.parametrize("is_remote", [False, True])
def test_other_processes_read_too(tmp_path, suffix, method, is_remote, server):
    path = WRITERS[suffix](tmp_path / f"a{suffix}", FILES)
    archive = opened(f"{server.url}/a{suffix}" if is_remote else path)
    wanted = read_all(archive)
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_all, args=(archive, sender))
    process.start()
    for _ in range(5):
        assert read_all(archive) == wanted
    assert receiver.poll(60)
    assert receiver.recv() == wanted
    process.join()


def test_a_stream_over_offsets_reads_as_a_file_does(tmp_path):
    data = os.urandom(1000)
    (tmp_path / "f").write_bytes(data)
    file = LocalFile(tmp_path / "f")
    stream = OffsetReader(file, 1000)
    stream.hold(300, 200)
    dice = random.Random(1)
    with (tmp_path / "f").open("rb") as real:
        for _ in range(300):
            whence = dice.randrange(3)
            offset = dice.randrange(1200) - (1000 if whence == 2 else 0)
            if whence == 1:
                offset = dice.randrange(-min(100, real.tell()), 100) if real.tell() else 0
            if offset < 0 and whence == 0:
                continue
            try:
                place = real.seek(offset, whence)
            except OSError:
                with pytest.raises(OSError, match="Invalid argument"):
                    stream.seek(offset, whence)
                continue
            assert stream.seek(offset, whence) == place
            assert stream.read(50) == real.read(50)
            assert stream.tell() == real.tell()


def test_local_shards_hold_no_file_open(tmp_path):
    for number in range(20):
        write_tar(tmp_path / f"{number}.tar", FILES)
        write_table(tmp_path / f"{number}.parquet", FILES)
    before = len(list(Path("/proc/self/fd").iterdir()))
    archive = opened(f"{tmp_path}/*")
    assert len(read_all(archive)) == 40 * len(FILES) // 2
    assert len(list(Path("/proc/self/fd").iterdir())) == before
