"""Packs the same files as a folder, a zip, a tar shard, or a parquet table."""

import io
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path, files, layout=tarfile.PAX_FORMAT):
    """Write a mapping, or pairs, of names and bytes."""
    with tarfile.open(path, "w", format=layout) as archive:
        for name, data in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path, images, more=None, **options):
    """Write pairs of path and bytes as the Hub does, or bytes alone."""
    if images and not isinstance(images[0], tuple):
        column = pa.array(images, pa.binary())
    else:
        rows = [{"bytes": data, "path": path} for path, data in images]
        column = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": column, **(more or {})}), path, **options)
    return path
