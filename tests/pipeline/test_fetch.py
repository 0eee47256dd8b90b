import functools
import os
import signal
import subprocess
import sys
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from cache.cli.interrupts import INTERRUPTS
from cache.errors import SettingsError
from cache.files.atomic import sha256_of
from pipeline.fetch import fetch, unpack
from workspace.errors import StageError
from workspace.settings import Params

ROOT = Path(__file__).parents[2]

DATA = {
    "train": {"images": "data/raw/train.zip", "captions": "data/raw/annotations/train.json"},
    "val": {"images": "data/raw/val.zip", "captions": "data/raw/annotations/val.json"},
    "instruct": "data/raw/instruct.json",
    "instruct_holdout": 0.1,
    "max_reject_rate": 0.1,
}
NAMED = [
    *[DATA[split][name] for split in ("train", "val") for name in ("images", "captions")],
    DATA["instruct"],
]

FAKE_WORLD = """
import pathlib, sys
root = pathlib.Path(sys.argv[1])
for name in {names}:
    path = root / pathlib.Path(name).relative_to("data/raw")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)
sys.exit({code})
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_params(source, **sections):
    with Path("params.yaml").open("w") as file:
        YAML().dump({"data": {"source": source, **DATA}, **sections}, file)


def run(source, **sections):
    write_params(source, **sections)
    fetch(Params.read(Path("params.yaml")))


def touch(names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)


def write_world(code=0):
    Path("demo").mkdir(exist_ok=True)
    Path("demo/__init__.py").touch()
    Path("demo/world.py").write_text(FAKE_WORLD.format(names=NAMED, code=code))


def test_local_takes_existing_files_and_makes_the_folder():
    touch(NAMED)
    before = {name: Path(name).stat().st_ino for name in NAMED}
    run("local")
    assert {name: Path(name).stat().st_ino for name in NAMED} == before
    assert Path("data/raw").is_dir()


KEYS = ["train.images", "train.captions", "val.images", "val.captions", "instruct"]


@pytest.mark.parametrize(("missing", "key"), list(zip(NAMED, KEYS, strict=True)))
def test_a_missing_path_is_named_by_its_key(missing, key):
    touch(name for name in NAMED if name != missing)
    with pytest.raises(StageError, match=rf"^data\.{key}: {missing} does not exist"):
        run("local")


def test_the_demo_is_rendered_by_another_process_and_published():
    write_world()
    run("demo")
    assert [Path(name).read_text() for name in NAMED] == NAMED
    assert not list(Path(".work/fetch").iterdir())


def test_a_demo_that_fails_publishes_nothing():
    write_world(code=7)
    with pytest.raises(StageError, match=r"demo\.world \.work/fetch/demo ended with exit code 7"):
        run("demo")
    assert not list(Path("data/raw").iterdir())


@pytest.mark.parametrize("code", [1, 2])
def test_an_error_of_the_demo_is_not_repeated(code, capfd):
    write_world(code=code)
    with pytest.raises(SystemExit) as ended:
        run("demo")
    assert ended.value.code == code
    assert capfd.readouterr().err == ""
    assert not list(Path("data/raw").iterdir())


@pytest.fixture
def remote(tmp_path_factory):
    """A folder and the address it is served at; `asked` lists the requests."""
    folder = tmp_path_factory.mktemp("remote")
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *args):
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    with zipfile.ZipFile(folder / "annotations.zip", "w") as archive:
        for name in ("train.json", "val.json", "instances.json"):
            archive.writestr(f"annotations/{name}", f"{name} " * 500)
    for name in ("train.zip", "val.zip", "instruct.json"):
        (folder / name).write_bytes(name.encode() * 999)
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def listed(folder, address, name, path, **more):
    size, sha256 = (folder / name).stat().st_size, sha256_of(folder / name)
    return {"url": f"{address}/{name}", "path": path, "bytes": size, "sha256": sha256, **more}


def all_files(folder, address):
    members = ["annotations/train.json", "annotations/val.json"]
    files = [
        listed(folder, address, name, f"data/raw/{name}")
        for name in ("train.zip", "val.zip", "instruct.json")
    ]
    zipped = listed(folder, address, "annotations.zip", "data/raw/annotations", unpack=members)
    return {"files": [*files, zipped]}


def test_coco_downloads_unpacks_and_publishes(remote):
    folder, address, asked = remote
    run("coco", fetch=all_files(folder, address))
    for name in ("train.zip", "val.zip", "instruct.json"):
        assert Path("data/raw", name).read_bytes() == (folder / name).read_bytes()
    found = {path.name: path.read_text() for path in Path("data/raw/annotations").iterdir()}
    assert found == {name: f"{name} " * 500 for name in ("train.json", "val.json")}
    assert len(asked) == 4


def test_deleted_outputs_come_back_without_a_request(remote):
    folder, address, asked = remote
    files = all_files(folder, address)
    run("coco", fetch=files)
    asked.clear()
    run("coco", fetch=files)
    for name in NAMED:
        Path(name).unlink()
    run("coco", fetch=files)
    assert not asked


def test_files_copied_by_hand_are_not_downloaded(remote):
    folder, address, asked = remote
    Path("data/raw").mkdir(parents=True)
    Path("data/raw/train.zip").write_bytes((folder / "train.zip").read_bytes())
    Path("data/raw/val.zip").write_bytes(b"of another size")
    run("coco", fetch=all_files(folder, address))
    assert sorted(asked) == ["/annotations.zip", "/instruct.json", "/val.zip"]


def test_unpacking_takes_last_names_only(tmp_path):
    with zipfile.ZipFile("evil.zip", "w") as archive:
        archive.writestr("../../evil.txt", "x")
    unpack(Path("evil.zip"), ("../../evil.txt",), Path("inside/deep"))
    assert [path.name for path in Path("inside").rglob("*.txt")] == ["evil.txt"]
    assert not list(tmp_path.parent.glob("evil.txt"))


def test_a_missing_member_is_named():
    with zipfile.ZipFile("some.zip", "w") as archive:
        archive.writestr("a.json", "x")
    with pytest.raises(StageError, match=r"no item named 'b\.json'.*unpack in fetch\.files"):
        unpack(Path("some.zip"), ("b.json",), Path("inside"))


def test_a_damaged_member_is_no_half_file():
    with zipfile.ZipFile("some.zip", "w") as archive:
        archive.writestr("a.json", "x" * 5000)
    data = Path("some.zip").read_bytes()
    Path("some.zip").write_bytes(data.replace(b"xxxx", b"xxyx", 1))
    with pytest.raises(StageError, match=r"Bad CRC-32.*Delete it and run again"):
        unpack(Path("some.zip"), ("a.json",), Path("inside"))
    assert not list(Path("inside").iterdir())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"url": "file:///etc/passwd"}, "wanted the http or https address"),
        ({"url": "http://host/"}, "wanted the http or https address"),
        ({"bytes": 0}, "bytes is 0, wanted 1 or more"),
        ({"unpack": ["a/x.json", "b/x.json"]}, "unpack ends in 'x.json'"),
        ({"unpack": [".."]}, "unpack ends in '..'"),
    ],
)
def test_entries_that_make_no_sense_are_settings_errors(changes, reason):
    entry = {"url": "http://host/a.zip", "path": "a.zip", "bytes": 1} | changes
    with pytest.raises(SettingsError) as error:
        run("coco", fetch={"files": [entry]})
    assert reason in str(error.value)
    assert "fetch.files[0]" in str(error.value)


def test_two_downloads_of_one_name_are_a_settings_error():
    entries = [
        {"url": f"http://host/{folder}/a.zip", "path": folder, "bytes": 1} for folder in "xy"
    ]
    with pytest.raises(SettingsError, match=r"files ends in 'a\.zip'"):
        run("coco", fetch={"files": entries})


def test_an_interrupt_while_the_renderer_starts_leaves_none(monkeypatch):
    write_world()
    Path("demo/world.py").write_text("import time\ntime.sleep(99)")
    started = []

    def start(*args, real=subprocess.Popen, **options):
        started.append(real(*args, **options))
        os.kill(os.getpid(), signal.SIGINT)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        run("demo")
    assert started[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", INTERRUPTS)
def test_a_signal_to_the_group_while_rendering_gives_one_line(number):
    write_params("demo")
    write_world()
    # It says that it is at it, and never ends by itself.
    Path("demo/world.py").write_text(
        "import os, time\nos.write(1, b'%d ' % os.getpid())\ntime.sleep(99)"
    )
    started = subprocess.Popen(
        [sys.executable, "-m", "pipeline.fetch"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    renderer = int(os.read(started.stdout.fileno(), 20))
    os.killpg(started.pid, number)
    _, error = started.communicate(timeout=60)
    assert (started.returncode, error) == (130, b"error: interrupted; run the same command again\n")
    with pytest.raises(ProcessLookupError):
        os.kill(renderer, 0)
