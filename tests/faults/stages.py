"""The stages that the campaign tries, in their order, on a world of a dozen pictures.

Every stage starts in a copy of the folder that the stages before it left, runs as its command
does, and leaves outputs that an undisturbed run leaves again, byte by byte.
"""

import functools
import http.server
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from cache.cli.command import run_guarded
from cache.files.atomic import sha256_of
from workspace.settings import Params

ROOT = Path(__file__).parents[2]

IN_MEASURED_TIME = (
    "seconds", "shares", "_per_second", "data_wait_share", "peak_memory_gib", "shards_encoded",
    "shards_reused",
)  # fmt: skip
"""Endings of keys of reports whose values two runs do not share."""

TRAINING = {
    "epochs": 1, "micro_batch_tokens": 1024, "row_tokens": 128, "log_every_steps": 2,
    "validate_every_steps": 2, "validation_images": 2, "samples": 1,
}  # fmt: skip

SETTINGS = {
    "data": {"source": "coco"},
    "encoder": {"batch_size": 4, "device": "cpu"},
    "extract": {"workers": 0, "shard_rows": 6},
    "llm": {"quantize": "none"},
    "pretrain": TRAINING | {"batch_captions": 15},
    "finetune": TRAINING | {"batch_examples": 4},
    "evaluate": {
        "caption_images": 2, "questions": 2, "pope_images": 1, "caption_tokens": 4,
        "answer_tokens": 4,
    },
    "checkpoints": {"every_steps": 2},
    "tracking": {"wandb": "disabled"},
}  # fmt: skip
"""What differs from the settings of the demo."""


@dataclass(frozen=True)
class Stage:
    """A command, and what it makes."""

    name: str
    run: Callable[[], None]
    """Ends with SystemExit, in the working directory."""
    outputs: tuple[str, ...]
    """Files, or folders of files, that must come out the same."""

    def result(self, folder: Path) -> dict[str, str]:
        """Return the content of each output, as text that can be compared."""
        paths = [folder / name for name in self.outputs]
        files = [f for path in paths for f in (path.rglob("*") if path.is_dir() else [path])]
        return {str(f.relative_to(folder)): _content(f) for f in sorted(files) if f.is_file()}


def _content(path: Path) -> str:
    if path.parent.name == "reports" and path.suffix == ".json":
        return json.dumps(_without_times(json.loads(path.read_text())), sort_keys=True)
    if path.name == "metrics.json":
        return json.dumps(_without_times(json.loads(path.read_text())), sort_keys=True)
    if path.name == "index.html":
        return f"whole: {path.read_text().rstrip().endswith('</html>')}"
    return sha256_of(path)


def _without_times(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: _without_times(inner)
            for key, inner in value.items()
            if not key.endswith(IN_MEASURED_TIME)
        }
    return value


def _of_params(module: str) -> Callable[[], None]:
    """Return what runs a stage that takes nothing but the settings."""

    def run() -> None:
        stage = getattr(sys.modules[module], module.rpartition(".")[2])
        run_guarded(lambda: stage(Params.read(Path("params.yaml"))))

    return run


def _world() -> None:
    from demo.world import main

    sys.argv = ["demo.world", "world", "--train", "9", "--val", "3"]
    main()


def _export() -> None:
    from eval.export import export

    run_guarded(lambda: export(Path("runs/finetune"), Path("exported")))


def _verify() -> None:
    from cache.verify import verify

    run_guarded(lambda: verify("data/features", deep=True, repair=True))


MODULES = (
    "demo.world", "pipeline.fetch", "pipeline.index", "pipeline.extract",
    "pipeline.encoding.engines", "train.pretrain", "train.finetune", "train.control",
    "eval.evaluate", "eval.export", "cache.verify",
)  # fmt: skip

RUN = ("projector.safetensors", "adapter", "params.yaml", "metrics.json")

STAGES = (
    Stage("world", _world, ("world",)),
    Stage("fetch", _of_params("pipeline.fetch"), ("data/raw",)),
    Stage("index", _of_params("pipeline.index"), ("data/index", "reports/index.json")),
    Stage(
        "extract",
        _of_params("pipeline.extract"),
        ("data/features", "reports/extract.json"),
    ),
    Stage("verify", _verify, ("data/features",)),
    Stage(
        "pretrain",
        _of_params("train.pretrain"),
        ("reports/pretrain.json", *(f"runs/pretrain/{name}" for name in RUN)),
    ),
    Stage(
        "finetune",
        _of_params("train.finetune"),
        ("reports/finetune.json", *(f"runs/finetune/{name}" for name in RUN)),
    ),
    Stage("control", _of_params("train.control"), ("reports/control.json", "runs/control")),
    Stage("evaluate", _of_params("eval.evaluate"), ("reports",)),
    Stage("export", _export, ("exported",)),
)


def import_all() -> None:
    """Import what the stages run, once for all tries, which are forked."""
    for name in MODULES:
        importlib.import_module(name)


def write_inputs(folder: Path) -> None:
    """Write what a user has: the checkpoints, and settings without files to fetch yet."""
    shutil.copytree(ROOT / "demo" / "checkpoints", folder / "demo" / "checkpoints")
    values = YAML().load((ROOT / "params.yaml").read_text())
    for section, changes in SETTINGS.items():
        values[section].update(changes)
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(values, file)


def offer_downloads(folder: Path, port: int) -> None:
    """Put what was rendered into the settings as files to fetch, one of them to be unpacked."""
    texts = [path.name for path in sorted((folder / "world/annotations").iterdir())]
    shutil.make_archive(str(folder / "world/texts"), "zip", folder / "world/annotations")
    files = [
        {"path": f"data/raw/{name}", **_offer(folder / "world" / name, port)}
        for name in ("train2017.zip", "val2017.zip", "llava_instruct_150k.json")
    ]
    unpacked = _offer(folder / "world/texts.zip", port) | {"unpack": texts}
    files.append({"path": "data/raw/annotations"} | unpacked)
    values = YAML().load((folder / "params.yaml").read_text())
    values["fetch"] = {"files": files}
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(values, file)


def _offer(path: Path, port: int) -> dict[str, object]:
    address = f"http://127.0.0.1:{port}/{path.name}"
    return {"url": address, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def serve(folder: Path) -> tuple[int, int]:
    """Offer a folder from a process of its own; returns that process's id and the port."""
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    process = os.fork()
    if process == 0:
        server.serve_forever()
    port = server.server_port
    server.server_close()
    return process, port
