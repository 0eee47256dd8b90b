"""The settings of the pipeline: sections `fetch`, `encoder` and `extract`."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from workspace.data_settings import check_share, check_writable_url

RANDOM = "random"
"""The value of `pretrained` that stands for untrained weights."""

EXTERNAL = "external"
"""The value of `encoder.model` that stands for a store of features that others made."""

TRANSFORMERS, TIMM = "hf:", "timm:"
"""How a `model` begins that transformers or timm loads instead of open_clip."""

Engine = Literal["auto", "local", "ray"]
"""How the shards are distributed to processes."""

MAX_BATCH = 4096
"""Limit of `batch_size`, which decides the memory of a forward pass."""

MAX_WORKERS = 1024
"""Limit of `workers`, each of which is a process."""


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file to download, for the source `coco`."""

    url: str
    """The http or https address of the file."""
    path: str
    """Where the file is published; for an unpacked zip, the folder of its members."""
    bytes: int
    """Published size in bytes."""
    sha256: str | None = None
    """Published hash, if any."""
    unpack: tuple[str, ...] = ()
    """Members of a zip to unpack into `path`, without their folders."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or self.url.endswith("/"):
            raise ValueError(f"url is {self.url}, wanted the http or https address of a file")
        _check_at_least_one("bytes", self.bytes)
        _check_distinct("unpack", self.unpack)


@dataclass(frozen=True, kw_only=True)
class FetchSettings:
    """Section `fetch`: what the source `coco` downloads."""

    files: tuple[Download, ...]
    """The files to download; their last names must differ."""

    def __post_init__(self) -> None:
        _check_distinct("files", tuple(item.url for item in self.files))


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """Section `encoder`: the vision tower and how it runs."""

    model: str
    """An open_clip architecture, or the path of an open_clip config JSON; `hf:` and a hub id or
    folder of transformers (CLIP, SigLIP, DINOv2, DINOv3, AIMv2); or `timm:` and a convolutional
    network of timm. "external": no tower, but the features of a store of your own; the other keys
    but `pretrained` then mean nothing."""
    pretrained: str
    """An open_clip tag, a hub id, or the path of a checkpoint. For `hf:`, the revision on the hub:
    a branch, tag or commit; `main` for a folder. For `timm:`, a tag of the network, or the path of
    safetensors. For all, "random": weights drawn from a fixed seed, to try the stages without a
    download. Scores of such a tower say nothing about a trained one; report, summary and model card
    say so. Of `model: external`, the folder or URL of the store."""
    layer: int
    """The block whose output is stored; -1 is the last, -2 (as in LLaVA) the one before. Of a
    convolutional network, -1 only: its last map."""
    precision: Literal["fp32", "bf16"]
    """Number type of the tower's weights and activations."""
    batch_size: int
    """Images per forward pass, at most 4096. Part of the features' identity, because it decides
    their last bits."""
    device: str
    """"auto" is every GPU, or the CPU if there is none; a list with commas uses several devices. On
    a Ray cluster that RAY_ADDRESS names: "auto", "cpu" or "cuda", on all its nodes."""
    stream: bool = False
    """Of `model: external` with a URL of an object store, the Hub or a web server: whether the
    shards stay there, and are read and checked when they are needed, instead of being copied."""

    def __post_init__(self) -> None:
        if self.layer >= 0:
            raise ValueError(f"layer is {self.layer}, wanted one counted from the end: -1, -2, ...")
        _check_at_least_one("batch_size", self.batch_size, most=MAX_BATCH)
        if self.stream:
            self._check_stream()

    def _check_stream(self) -> None:
        # Imports fsspec, which most commands need not load.
        from cache.remote.origin import origin_json
        from cache.remote.urls import is_url

        if self.model != EXTERNAL or not is_url(self.pretrained):
            raise ValueError(
                f"stream is true, wanted model external and a URL in pretrained, not {self.model} "
                f"and {self.pretrained}"
            )
        origin_json(self.pretrained)


@dataclass(frozen=True, kw_only=True)
class ExtractSettings:
    """Section `extract`: how the shards are made."""

    workers: int
    """Number of decoding processes; 0 decodes in the encoding process; with `ray`, 0 is 1. A
    cluster that RAY_ADDRESS names decodes on every CPU instead."""
    engine: Engine
    """How the shards are distributed: "local" is one process on one device. "ray" takes all
    devices, of this machine or of the cluster that RAY_ADDRESS names. "auto" is ray if there are
    several devices or RAY_ADDRESS is set, else local. No engine changes a byte of a store."""
    shard_rows: int
    """Mean number of rows in a shard; the largest holds twice as many."""
    max_failure_rate: float
    """Share of images, from 0 to 1, above which images that do not decode, or that an external
    store lacks, stop the stage."""
    to: str | None = None
    """An fsspec URL such as `s3://bucket/features`, where the finished store is published as well,
    as `python -m cache.push` does. Null: nowhere."""

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= MAX_WORKERS:
            raise ValueError(f"workers is {self.workers}, wanted 0 to {MAX_WORKERS}")
        _check_at_least_one("shard_rows", self.shard_rows)
        check_share("max_failure_rate", self.max_failure_rate)
        if self.to is not None:
            check_writable_url("to", self.to)


def _check_at_least_one(name: str, value: int, most: float = math.inf) -> None:
    if not 1 <= value <= most:
        limit = "1 or more" if most == math.inf else f"1 to {most}"
        raise ValueError(f"{name} is {value}, wanted {limit}")


def _check_distinct(name: str, paths: tuple[str, ...]) -> None:
    last_names = Counter(path.rsplit("/", 1)[-1] for path in paths)
    for last_name, count in last_names.items():
        if last_name in ("", ".", "..") or count > 1:
            raise ValueError(f"{name} ends in {last_name!r}, wanted file names that all differ")
