import dataclasses
import random
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash

from cache.errors import CorruptShardError, PatchcacheError, SpecMismatchError, UnsafeShardError
from cache.shard import USUAL_OFFSET, hash_rows, open_shard, shard_bytes, write_shard

TYPES = {"features": "<f2", "image_id": "<i8", "row_xxh3": "<u8"}


def mapped(shard):
    """The features, at the offset and of the shape that a shard states."""
    return np.memmap(shard.path, "<f2", "r", shard.offset, shard.shape)


IDS = np.array([3, 5, 8, 13, 21])


@pytest.fixture
def rows(make_rows):
    return make_rows(len(IDS))


@pytest.fixture
def shard(tmp_path, spec, rows):
    write_shard(tmp_path / "a.h5", spec, IDS, rows)
    return tmp_path / "a.h5"


@pytest.fixture
def craft(tmp_path, spec, rows):
    """Writes a shard with plain h5py as the design has it, but for what `change` does to it."""

    def crafted(change, skip=()):
        path = tmp_path / "crafted.h5"
        with h5py.File(
            path, "w", libver=("v110", "v110"), alignment_threshold=1, alignment_interval=4096
        ) as file:
            contents = {"features": rows, "image_id": IDS, "row_xxh3": hash_rows(rows)}
            for name, values in contents.items():
                if name not in skip:
                    file.create_dataset(name, data=values, track_times=False)
            for name, text in texts(spec).items():
                if name not in skip:
                    file.attrs[name] = np.bytes_(text)
            change(file, rows)
        return path

    return crafted


def texts(spec):
    return {
        "format": spec.format.encode(),
        "fingerprint": spec.fingerprint.encode(),
        "spec": spec.to_json(),
    }


def nothing(file, rows):
    pass


# Round trip and layout


def test_a_round_trip_keeps_every_bit(tmp_path, spec, make_rows):
    rows = make_rows(4)
    # Every finite float16 would not fit; these are the corners and random bit patterns.
    corners = np.array([65504, -65504, 6e-8, -6e-8, 6.1e-5, 0.0, -0.0, 1.0], np.float16)
    rows[0].ravel()[: len(corners)] = corners
    rows[1] = (
        np.arange(1, rows[1].size + 1, dtype=np.uint16).view(np.float16).reshape(rows[1].shape)
    )
    image_ids = np.array([-(2**63), -1, 0, 2**63 - 1])
    write_shard(tmp_path / "a.h5", spec, image_ids, rows)
    found = open_shard(tmp_path / "a.h5", spec)
    assert mapped(found).tobytes() == rows.tobytes()
    assert np.array_equal(found.image_ids, image_ids)
    assert found.row_xxh3.tolist() == [xxhash.xxh3_64_intdigest(r.tobytes()) for r in rows]


def test_two_writes_are_equal_byte_by_byte(tmp_path, spec, rows):
    write_shard(tmp_path / "a.h5", spec, IDS, rows)
    # Longer than the resolution of any time stamp in HDF5.
    time.sleep(1.1)
    write_shard(tmp_path / "b.h5", spec, IDS.copy(), rows.copy())
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


@pytest.mark.parametrize(("num_rows", "patches", "width"), [(1, 1, 1), (2, 4, 6), (700, 49, 64)])
def test_features_start_on_a_page(tmp_path, spec, num_rows, patches, width):
    spec = dataclasses.replace(spec, patches=patches, width=width)
    rows = np.ones((num_rows, patches, width), np.float16)
    write_shard(tmp_path / "a.h5", spec, np.arange(num_rows), rows)
    found = open_shard(tmp_path / "a.h5", spec)
    assert found.offset == USUAL_OFFSET
    assert found.offset % 4096 == 0
    data = (tmp_path / "a.h5").read_bytes()
    assert data[found.offset : found.offset + rows.nbytes] == rows.tobytes()
    assert np.array_equal(mapped(found), rows)


def test_plain_h5py_finds_the_layout_of_the_design(shard, spec, rows):
    with h5py.File(shard, "r") as file:
        assert file.userblock_size == 0
        assert {name: file[name].dtype.str for name in file} == {
            "features": "<f2",
            "image_id": "<i8",
            "row_xxh3": "<u8",
        }
        for name in file:
            assert file[name].chunks is None
            assert file[name].id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
        assert np.array_equal(file["features"][:], rows)
        assert np.array_equal(file["image_id"][:], IDS)
        assert dict(file.attrs) == texts(spec)
        for name in file.attrs:
            kind = file.attrs.get_id(name).get_type()
            assert not kind.is_variable_str()
            assert kind.get_cset() == h5py.h5t.CSET_UTF8


def write_as_hdf5_does(path, spec, image_ids, rows):
    """The same shard, written to the disk by HDF5 itself."""
    with h5py.File(
        path, "w", libver=("v110", "v110"), alignment_threshold=1, alignment_interval=4096
    ) as file:
        contents = {"features": rows, "image_id": image_ids, "row_xxh3": hash_rows(rows)}
        for name, values in contents.items():
            file.create_dataset(name, data=values, track_times=False)
        for name, text in texts(spec).items():
            utf8 = h5py.string_dtype("utf-8", len(text))
            file.attrs.create(name, np.array(text, dtype=utf8), dtype=utf8)


@pytest.mark.parametrize(
    "shape",
    [
        (0, 4, 6), (1, 1, 1), (1, 4, 6), (1, 576, 1024), (3, 576, 1024), (20, 4, 8), (7, 49, 768),
        (5, 4096, 1), (2048, 4, 8), (5000, 2, 3), (20000, 1, 1),
    ],
)  # fmt: skip
def test_the_bytes_are_those_that_hdf5_writes(tmp_path, spec, shape):
    """Of all sizes beside those of HDF5's buffers, which decide in what order it writes."""
    rows = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    spec = dataclasses.replace(spec, patches=shape[1], width=shape[2])
    image_ids = 3 * np.arange(shape[0]) - 5
    write_as_hdf5_does(tmp_path / "wanted.h5", spec, image_ids, rows)
    assert b"".join(shard_bytes(spec, image_ids, rows)) == (tmp_path / "wanted.h5").read_bytes()


def test_the_features_are_not_copied(spec, rows):
    head, features, tail = shard_bytes(spec, IDS, rows)
    assert np.shares_memory(np.frombuffer(features, np.uint8), rows)
    assert len(head) + len(tail) < 2**16


def test_the_map_is_read_only(shard, spec):
    with pytest.raises(ValueError, match="read-only"):
        mapped(open_shard(shard, spec))[0] = 0


def test_a_failed_write_leaves_nothing(tmp_path, spec):
    with pytest.raises(TypeError):
        write_shard(tmp_path / "a.h5", spec, np.array([object()]), np.ones((1, 4, 6), np.float16))
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_plain_h5py_in_this_layout_is_accepted(craft, spec, rows):
    # So each refusal below is for its own change.
    assert np.array_equal(mapped(open_shard(craft(nothing), spec)), rows)


# Refused: structure


def soft_link(file, rows):
    file["elsewhere"] = rows
    file["features"] = h5py.SoftLink("/elsewhere")
    del file["elsewhere"]


def external_link(file, rows):
    with h5py.File(file.filename + ".other", "w") as other:
        other["features"] = rows
    file["features"] = h5py.ExternalLink(file.filename + ".other", "/features")


def external_storage(file, rows):
    Path(file.filename + ".raw").write_bytes(rows.tobytes())
    where = [(file.filename + ".raw", 0, rows.nbytes)]
    file.create_dataset("features", rows.shape, "<f2", external=where)


def virtual(file, rows):
    layout = h5py.VirtualLayout(rows.shape, "<f2")
    layout[:] = h5py.VirtualSource(file.filename + ".other", "features", rows.shape)
    file.create_virtual_dataset("features", layout)


def chunked(file, rows):
    file.create_dataset("features", data=rows, chunks=(1, *rows.shape[1:]))


def gzipped(file, rows):
    file.create_dataset("features", data=rows, compression="gzip")


def compact(file, rows):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple(rows.shape)
    kind = h5py.h5t.py_create(np.dtype("<f2"))
    dataset = h5py.h5d.create(file.id, b"features", kind, space, dcpl=properties)
    dataset.write(space, space, rows)


def group(file, rows):
    file.create_group("features")["image_id"] = rows


def named_type(file, rows):
    file["features"] = np.dtype("<f2")


def unlimited(file, rows):
    file.create_dataset("features", data=rows, maxshape=(None, *rows.shape[1:]))


def missing(file, rows):
    pass


def unaligned(file, rows):
    # A second file without alignment, since the property is the file's.
    path = file.filename
    contents = {name: file[name][:] for name in file} | {"features": rows}
    attributes = dict(file.attrs)
    file.close()
    with h5py.File(path, "w", libver=("v110", "v110")) as again:
        for name, values in contents.items():
            again[name] = values
        for name, text in attributes.items():
            again.attrs[name] = np.bytes_(text)


UNSAFE_FEATURES = [
    soft_link,
    external_link,
    external_storage,
    virtual,
    chunked,
    gzipped,
    compact,
    group,
    named_type,
    unlimited,
    missing,
    unaligned,
]


@pytest.mark.parametrize("change", UNSAFE_FEATURES, ids=lambda change: change.__name__)
def test_features_of_another_structure_are_unsafe(craft, spec, change):
    path = craft(change, skip={"features"})
    with pytest.raises(UnsafeShardError, match=r"crafted.h5: .*No writer of this format"):
        open_shard(path, spec)


@pytest.mark.parametrize("name", ["image_id", "row_xxh3"])
def test_ids_and_hashes_are_not_read_through_a_link(craft, spec, name):
    def link(file, rows):
        file[name] = h5py.ExternalLink("/etc/passwd", "/x")

    with pytest.raises(UnsafeShardError, match=f"{name} is a link"):
        open_shard(craft(link, skip={name}), spec)


def test_a_link_is_refused_before_its_target_is_opened(craft, spec, monkeypatch):
    path = craft(external_link, skip={"features"})
    opened = []
    real = h5py.Group.__getitem__
    monkeypatch.setattr(
        h5py.Group, "__getitem__", lambda self, name: opened.append(name) or real(self, name)
    )
    with pytest.raises(UnsafeShardError, match="features is a link"):
        open_shard(path, spec)
    assert "features" not in opened


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("features", ">f2"),
        ("features", "<f4"),
        ("features", "<u2"),
        ("image_id", ">i8"),
        ("image_id", "<i4"),
        ("image_id", "<u8"),
        ("row_xxh3", ">u8"),
        ("row_xxh3", "<i8"),
        ("row_xxh3", "<f8"),
    ],
)
def test_another_type_is_unsafe(craft, spec, name, dtype):
    def retype(file, rows):
        values = rows if name == "features" else IDS
        file.create_dataset(name, data=values.astype(dtype))

    with pytest.raises(UnsafeShardError, match=f"{name} is {dtype}"):
        open_shard(craft(retype, skip={name}), spec)


@pytest.mark.parametrize(
    ("name", "shape", "error"),
    [
        ("features", (5, 24), UnsafeShardError),
        ("features", (120,), UnsafeShardError),
        ("features", (), UnsafeShardError),
        ("features", (4, 4, 6), CorruptShardError),
        ("features", (5, 6, 4), CorruptShardError),
        ("features", (5, 4, 7), CorruptShardError),
        ("features", (0, 4, 6), PatchcacheError),
        ("image_id", (5, 1), UnsafeShardError),
        ("image_id", (4,), CorruptShardError),
        ("image_id", (0,), CorruptShardError),
        ("row_xxh3", (6,), CorruptShardError),
    ],
)
def test_another_shape_is_refused(craft, spec, name, shape, error):
    def reshape(file, rows):
        file.create_dataset(name, data=np.ones(shape, TYPES[name]))

    with pytest.raises(error, match=r"crafted.h5: "):
        open_shard(craft(reshape, skip={name}), spec)


def test_space_that_was_never_written_is_refused(craft, spec):
    def empty(file, rows):
        file.create_dataset("features", (2**40, 4, 6), "<f2")

    with pytest.raises(CorruptShardError, match="beyond the end"):
        open_shard(craft(empty, skip={"features"}), spec)


def test_anything_more_in_the_root_is_unsafe(craft, spec):
    with pytest.raises(UnsafeShardError, match="extra"):
        open_shard(craft(lambda file, rows: file.create_dataset("extra", data=rows)), spec)
    with pytest.raises(UnsafeShardError, match="elsewhere"):
        open_shard(craft(lambda file, rows: file.create_group("elsewhere")), spec)


def test_a_user_block_is_unsafe(tmp_path, spec, shard):
    path = tmp_path / "block.h5"
    with h5py.File(shard) as old, h5py.File(path, "w", userblock_size=4096) as new:
        for name in old:
            new[name] = old[name][:]
        for name, text in old.attrs.items():
            new.attrs[name] = text
    with pytest.raises(UnsafeShardError):
        open_shard(path, spec)


# Refused: attributes

ODD_ATTRIBUTES = {
    "variable length": "a text",
    "a number": 5,
    "an array of texts": np.array([b"a", b"b"]),
    "one text in an array": np.array([b"a"]),
    "no value": h5py.Empty("S4"),
    "a list of numbers": np.arange(3),
    "a compound": np.zeros((), [("a", "<i8")]),
}


@pytest.mark.parametrize("name", ["format", "fingerprint", "spec"])
@pytest.mark.parametrize("kind", ODD_ATTRIBUTES)
def test_an_attribute_that_is_no_plain_text_is_unsafe(craft, spec, name, kind):
    def change(file, rows):
        file.attrs[name] = ODD_ATTRIBUTES[kind]

    with pytest.raises(UnsafeShardError, match=f"attribute {name}"):
        open_shard(craft(change, skip={name}), spec)


@pytest.mark.parametrize("name", ["format", "fingerprint", "spec"])
def test_an_attribute_too_few_or_too_many_is_unsafe(craft, spec, name):
    with pytest.raises(UnsafeShardError, match="attributes"):
        open_shard(craft(nothing, skip={name}), spec)

    def more(file, rows):
        file.attrs["more"] = np.bytes_(b"x")

    with pytest.raises(UnsafeShardError, match="not exactly the attributes"):
        open_shard(craft(more), spec)


@pytest.mark.parametrize("name", ["format", "fingerprint", "spec"])
def test_an_attribute_of_another_text_is_a_mismatch(craft, spec, name):
    def change(file, rows):
        file.attrs[name] = np.bytes_(b"another")

    with pytest.raises(SpecMismatchError, match=name):
        open_shard(craft(change, skip={name}), spec)


def test_a_shard_of_another_encoder_names_the_fields_that_differ(shard, spec):
    other = dataclasses.replace(spec, layer=-1, model="large")
    with pytest.raises(SpecMismatchError, match=r"layer is -2, wanted -1") as caught:
        open_shard(shard, other)
    assert "model is 'tiny', wanted 'large'" in str(caught.value)


# Refused: damage


@pytest.mark.parametrize("part", range(41))
def test_a_file_cut_short_is_corrupt(tmp_path, spec, shard, part):
    data = shard.read_bytes()
    # Evenly over the file, and its very last byte.
    length = min(len(data) * part // 40, len(data) - 1)
    (tmp_path / "short.h5").write_bytes(data[:length])
    with pytest.raises(CorruptShardError, match=r"short.h5: .*dvc pull"):
        open_shard(tmp_path / "short.h5", spec)


def test_a_file_cut_short_among_its_first_bytes_is_corrupt(tmp_path, spec, shard):
    data = shard.read_bytes()
    for length in range(0, 700, 7):
        (tmp_path / "short.h5").write_bytes(data[:length])
        with pytest.raises(CorruptShardError):
            open_shard(tmp_path / "short.h5", spec)


def test_a_file_that_is_not_hdf5_is_corrupt(tmp_path, spec):
    for content in (b"", b"\0" * 5000, b"PAR1" * 3000):
        (tmp_path / "a.h5").write_bytes(content)
        with pytest.raises(CorruptShardError, match="HDF5 cannot read it"):
            open_shard(tmp_path / "a.h5", spec)
    with pytest.raises(CorruptShardError):
        open_shard(tmp_path / "not there.h5", spec)
    with pytest.raises(CorruptShardError):
        open_shard(tmp_path, spec)


def test_flipped_bytes_outside_the_features_raise_nothing_but_our_errors(tmp_path, spec, shard):
    data = shard.read_bytes()
    found = open_shard(shard, spec)
    features = range(found.offset, found.offset + mapped(found).nbytes)
    # Bytes that are not zero: most others are padding between the parts.
    places = [n for n, byte in enumerate(data) if byte and n not in features]
    rng = random.Random(0)
    path = tmp_path / "flipped.h5"
    refused = 0
    for _ in range(400):
        flipped = bytearray(data)
        for place in rng.sample(places, rng.choice([1, 1, 1, 2, 8])):
            flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            open_shard(path, spec)
        except PatchcacheError as error:
            assert "flipped.h5" in str(error)  # noqa: PT017
            refused += 1
    # What is not refused here are flipped ids and hashes, which the index and `verify` catch.
    assert refused > 200


def metadata_blocks(data):
    """Where the parts that end in a checksum begin and end: superblock and object headers."""
    yield 0, 48
    start = data.find(b"OHDR")
    while start >= 0:
        # Version 2: signature, version, flags, then times and counts that these flags leave out.
        flags = data[start + 5]
        head = start + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        size = int.from_bytes(data[head : head + width], "little")
        yield start, head + width + size + 4
        start = data.find(b"OHDR", start + 4)


def lookup3(data):
    """Bob Jenkins' hash, the checksum of HDF5 metadata."""
    mask = 0xFFFFFFFF

    def rot(value, count):
        return ((value << count) | (value >> (32 - count))) & mask

    a = b = c = (0xDEADBEEF + len(data)) & mask
    blocks = max(0, (len(data) - 1) // 12)
    for number in range(blocks):
        words = np.frombuffer(data, "<u4", 3, 12 * number).tolist()
        a, b, c = (a + words[0]) & mask, (b + words[1]) & mask, (c + words[2]) & mask
        for x, y in ((4, "a"), (6, "b"), (8, "c"), (16, "a"), (19, "b"), (4, "c")):
            if y == "a":
                a = ((a - c) & mask) ^ rot(c, x)
                c = (c + b) & mask
            elif y == "b":
                b = ((b - a) & mask) ^ rot(a, x)
                a = (a + c) & mask
            else:
                c = ((c - b) & mask) ^ rot(b, x)
                b = (b + a) & mask
    tail = data[12 * blocks :]
    if not tail:
        return c
    words = np.frombuffer(tail.ljust(12, b"\0"), "<u4").tolist()
    a, b, c = (a + words[0]) & mask, (b + words[1]) & mask, (c + words[2]) & mask
    for target, x in (("c", 14), ("a", 11), ("b", 25), ("c", 16), ("a", 4), ("b", 14), ("c", 24)):
        if target == "c":
            c = ((c ^ b) - rot(b, x)) & mask
        elif target == "a":
            a = ((a ^ c) - rot(c, x)) & mask
        else:
            b = ((b ^ a) - rot(a, x)) & mask
    return c


def test_forged_metadata_with_fitting_checksums_raise_nothing_but_our_errors(tmp_path, spec, shard):
    data = shard.read_bytes()
    blocks = list(metadata_blocks(data))
    assert len(blocks) == 5
    for start, end in blocks:
        wanted = int.from_bytes(data[end - 4 : end], "little")
        assert lookup3(data[start : end - 4]) == wanted
    rng = random.Random(1)
    path = tmp_path / "forged.h5"
    refused = 0
    for _ in range(300):
        forged = bytearray(data)
        start, end = rng.choice(blocks)
        # Not the signatures: without them nothing behind is looked at.
        forged[rng.randrange(start + 4, end - 4)] = rng.choice([0, 1, 2, 127, 128, 255])
        forged[end - 4 : end] = lookup3(bytes(forged[start : end - 4])).to_bytes(4, "little")
        path.write_bytes(forged)
        try:
            found = open_shard(path, spec)
        except PatchcacheError:
            refused += 1
        else:
            # Whatever was accepted can be mapped and read to its last byte.
            assert mapped(found).tobytes()
    assert refused > 100


def forge(data, old, new):
    """Replace a number in the one header that holds it, and mend that header's checksum."""
    forged = bytearray(data)
    for start, end in list(metadata_blocks(data))[1:]:
        place = data.find(old.to_bytes(8, "little"), start, end - 4)
        if place >= 0:
            forged[place : place + 8] = new.to_bytes(8, "little")
            forged[end - 4 : end] = lookup3(bytes(forged[start : end - 4])).to_bytes(4, "little")
    assert forged != data
    return bytes(forged)


@pytest.mark.parametrize("pages", [0, 1, 2**40])
def test_features_forged_to_lie_beyond_the_end_are_corrupt(tmp_path, spec, shard, pages):
    data = shard.read_bytes()
    offset = open_shard(shard, spec).offset
    beyond = (len(data) // 4096 + pages) * 4096
    (tmp_path / "forged.h5").write_bytes(forge(data, offset, beyond))
    with pytest.raises(CorruptShardError, match=r"forged.h5: "):
        open_shard(tmp_path / "forged.h5", spec)


@pytest.mark.parametrize("count", [0, 6, 2**40, 2**61 + 5, 2**63, 2**64 - 2])
def test_forged_numbers_of_rows_are_refused(tmp_path, spec, shard, count):
    (tmp_path / "forged.h5").write_bytes(forge(shard.read_bytes(), len(IDS), count))
    with pytest.raises(PatchcacheError, match=r"forged.h5: "):
        open_shard(tmp_path / "forged.h5", spec)
