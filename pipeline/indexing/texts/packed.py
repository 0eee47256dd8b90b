"""Captions that lie beside their images in tar shards (webdataset) or parquet tables (the Hub's).

In a shard, the files of one sample share a key: their path up to the first dot of the file's name.
The caption is `<key>.txt` or, in `<key>.json`, the value of `caption` or `text`.
"""

import contextlib
import glob
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from cache.remote.urls import is_url
from pipeline.images.byte_file import ByteFile
from pipeline.images.names import IMAGE_SUFFIXES, OTHER_SUFFIXES, is_visible
from pipeline.images.parquet_file import PackedTable, holds_images
from pipeline.images.places import addresses, file_at, kind_of, stem_of
from pipeline.images.tar_file import TarMember, reading_tar
from pipeline.images.zip_file import REMEDY
from pipeline.indexing.annotations import CaptionRecord, CaptionsFile, ImageRecord
from pipeline.indexing.records import (
    RecordError,
    Rejection,
    caption_text,
    parse_record_json,
    require_object,
    str_field,
)
from pipeline.indexing.texts.columns import CAPTION, IMAGE
from workspace.errors import StageError

MAX_TEXT_BYTES = 1 << 20
"""Limit of a text in a shard, checked before it is read."""

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Names of shards. Compressed ones are refused with the remedy."""


@dataclass(frozen=True, slots=True)
class _Text:
    """A text beside an image."""

    record: str
    captions: list[str]
    problem: str = ""
    """Why the text cannot be used, or empty."""


@dataclass(slots=True)
class _Sample:
    """The members of a shard with one key, by what they are; a member may stand there twice."""

    images: dict[str, None] = field(default_factory=dict)
    others: dict[str, None] = field(default_factory=dict)
    """Members of an unknown suffix, which may be images."""
    dotted: dict[str, None] = field(default_factory=dict)
    """Images and texts with a further dot in their names."""
    plain_texts: list[_Text] = field(default_factory=list)
    json_texts: list[_Text] = field(default_factory=list)


@dataclass
class _Collected:
    """The records of all shards or tables."""

    images: list[ImageRecord] = field(default_factory=list)
    captions: list[CaptionRecord] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    num_images: int = 0
    num_captions: int = 0

    def add_image(self, record: str, name: str) -> None:
        self.images.append(ImageRecord(record, None, name))
        self.num_images += 1

    def reject_image(self, record: str, reason: str) -> None:
        self.rejected.append(Rejection("images", record, reason))
        self.num_images += 1

    def add_captions(self, record: str, image: str, texts: Iterable[str]) -> None:
        """Add the captions of an image, numbered in their order; empty ones are rejected."""
        for text in texts:
            try:
                self.captions.append(
                    CaptionRecord(record, self.num_captions, image, caption_text(text))
                )
                self.num_captions += 1
            except RecordError as error:
                self.reject_caption(record, str(error))

    def reject_caption(self, record: str, reason: str) -> None:
        self.rejected.append(Rejection("captions", record, reason))
        self.num_captions += 1


def is_packed(path: str | Path, key: str) -> bool:
    """Whether a path of texts is that of tar shards, or of parquet tables with image bytes.

    Raises:
        StageError: A local table, or a pattern of these, matches nothing or cannot be read.
    """
    path = str(path)
    name = path.partition("?")[0] if is_url(path) else path
    if name.lower().endswith(TAR_SUFFIXES):
        return True
    if not name.lower().endswith(".parquet"):
        return False
    if not (is_url(path) or glob.has_magic(path) or Path(path).is_file()):
        return False
    # A server may read no parts of files: a table of texts alone is copied as a whole.
    with contextlib.suppress(*([StageError] if is_url(path) else [])):
        file = file_at(addresses(path, key)[0])
        return kind_of(file, key) == "parquet" and holds_images(file, key=key, names=IMAGE)
    return False


def read_packed_captions(path: str | Path, key: str) -> CaptionsFile:
    """Read the captions in shards or tables, whose images have the names of `ImageArchive`.

    An image without a text is listed without captions; a text without an image is rejected.

    Args:
        path: A tar or a parquet table, a pattern of these, or the URL of either.
        key: The settings key that names it, for error texts.

    Raises:
        StageError: A file does not exist or cannot be read, or none holds an image.
    """
    collected = _Collected()
    for address in addresses(str(path), key):
        if isinstance(address, Path) and address.is_dir():
            raise _refusal(key, address, "a folder, wanted a tar or a parquet table")
        file = file_at(address)
        kind = kind_of(file, key)
        if kind == "tar":
            _read_shard(file, key, collected)
        elif kind == "parquet":
            _read_table(file, key, collected)
        else:
            raise _refusal(key, address, "neither a tar nor a parquet table")
    if not collected.num_images:
        raise _refusal(key, path, "holds no image")
    return CaptionsFile(
        collected.images,
        collected.captions,
        collected.rejected,
        collected.num_images,
        collected.num_captions,
    )


def _refusal(key: str, path: object, reason: str) -> StageError:
    return StageError(f"{key}: {path}: {reason}. {REMEDY}")


def _read_shard(file: ByteFile, key: str, collected: _Collected) -> None:
    samples: dict[str, _Sample] = {}
    with reading_tar(file, key) as (stream, members):
        for member in members:
            _add_member(file, stream, member, samples)
    for sample in samples.values():
        _add_sample(file, sample, collected)


def _add_member(
    file: ByteFile, stream: BinaryIO, member: TarMember, samples: dict[str, _Sample]
) -> None:
    folders, slash, base_name = member.name.rpartition("/")
    stem, _, suffixes = base_name.partition(".")
    if not is_visible(member.name):
        return
    suffix = suffixes.rpartition(".")[2].lower()
    sample = samples.setdefault(f"{folders}{slash}{stem}", _Sample())
    if "." in suffixes:
        if suffix in IMAGE_SUFFIXES or suffix in ("txt", "json"):
            sample.dotted[member.name] = None
    elif suffix == "txt":
        sample.plain_texts.append(_read_text(file, stream, member))
    elif suffix == "json":
        sample.json_texts.append(_read_text(file, stream, member))
    elif suffix in IMAGE_SUFFIXES:
        sample.images[member.name] = None
    elif suffix not in OTHER_SUFFIXES:
        sample.others[member.name] = None


def _read_text(file: ByteFile, stream: BinaryIO, member: TarMember) -> _Text:
    record = _record(file, member.name)
    try:
        if not member.is_ordinary:
            raise RecordError("a link: links in a tar are not followed")
        if member.num_bytes > MAX_TEXT_BYTES:
            raise RecordError(
                f"text too long: {member.num_bytes} bytes, wanted at most {MAX_TEXT_BYTES}"
            )
        stream.seek(member.start)
        text = stream.read(member.num_bytes).decode("utf-8-sig")
        is_json = member.name.lower().endswith(".json")
        return _Text(record, _captions_in(text) if is_json else [text])
    except UnicodeDecodeError as error:
        return _Text(record, [], f"not UTF-8: {error}")
    except RecordError as error:
        return _Text(record, [], str(error))


def _captions_in(text: str) -> list[str]:
    """Return the captions in the JSON of a sample.

    Raises:
        RecordError: No JSON object, or none that holds a caption.
    """
    entry = require_object(parse_record_json(text))
    name = next((name for name in CAPTION if name in entry), None)
    if name is None:
        raise RecordError(f"no caption: no key {' or '.join(map(repr, CAPTION))}")
    if not isinstance(entry[name], list):
        return [str_field(entry, name)]
    return [str_field({name: each}, name) for each in entry[name]]


def _add_sample(file: ByteFile, sample: _Sample, collected: _Collected) -> None:
    images = list(sample.images or sample.others)
    if not images:
        for name in sample.dotted:
            _reject_dotted(file, name, collected)
    for name in images:
        collected.add_image(_record(file, name), f"{stem_of(file)}/{name}")
    texts = sample.plain_texts or sample.json_texts
    if not texts:
        return
    first, *others = texts
    if any((other.captions, other.problem) != (first.captions, first.problem) for other in others):
        collected.reject_caption(first.record, "two texts: the name stands twice, with other bytes")
    elif not images:
        collected.reject_caption(first.record, "text without an image: no image has the same key")
    elif len(images) > 1:
        collected.reject_caption(
            first.record, f"image name ambiguous: {images[0]!r} and {images[1]!r} have the same key"
        )
    elif first.problem:
        collected.reject_caption(first.record, first.problem)
    else:
        collected.add_captions(first.record, f"{stem_of(file)}/{images[0]}", first.captions)


def _reject_dotted(file: ByteFile, name: str, collected: _Collected) -> None:
    reason = f"name with two dots: in webdataset, the first dot of {name!r} ends the key"
    if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
        collected.reject_image(_record(file, name), reason)
    else:
        collected.reject_caption(_record(file, name), reason)


def _record(file: ByteFile, member: str) -> str:
    return f"{file.name}: {member}"


def _read_table(file: ByteFile, key: str, collected: _Collected) -> None:
    table = PackedTable(file, key=key)
    column = _caption_column(table, key)
    names = table.names()
    for group in range(table.num_groups):
        first = int(table.first_rows[group])
        for row, value in enumerate(table.read(column, group).to_pylist(), start=first):
            record, image = f"{file.name}[{row}]", f"{stem_of(file)}/{names[row]}"
            collected.add_image(record, image)
            texts = value if isinstance(value, list) else [value]
            if None in texts:
                collected.reject_caption(record, "no caption: null")
            else:
                collected.add_captions(record, image, texts)


def _caption_column(table: PackedTable, key: str) -> str:
    for name in CAPTION:
        with contextlib.suppress(KeyError):
            kind = table.schema.field(name).type
            if _is_text(kind) or (
                (pa.types.is_list(kind) or pa.types.is_large_list(kind))
                and _is_text(kind.value_type)
            ):
                return name
    columns = ", ".join(f"{name!r}" for name in table.schema.names[:10])
    wanted = " or ".join(map(repr, CAPTION))
    raise _refusal(key, table.file.address, f"no column {wanted} of texts; it has {columns}")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
