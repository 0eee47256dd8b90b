"""Two file systems over one bucket in memory, `one://` and `two://`, whose writers can be watched,
stopped in the middle, and let fail."""

import contextlib
import threading
import time
from pathlib import Path

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem


class Bucket:
    """What both file systems share."""

    def __init__(self):
        self.store, self.pseudo_dirs = {}, [""]

    def names(self, folder="features"):
        return {path.rsplit("/", 1)[1] for path in self.store if f"/{folder}/" in path}


class _WatchedFileSystem(MemoryFileSystem):
    """An object store: a put replaces an object in one step; a folder if `in_halves`."""

    cachable = False
    bucket = Bucket()
    after = None
    """Called with the name and the path of each operation that has changed something."""
    before = None
    latency = None
    in_halves = False
    """Whether half a file can be seen while it is put."""

    def __init__(self, **options):
        super().__init__(**options)
        self.store, self.pseudo_dirs = type(self).bucket.store, type(self).bucket.pseudo_dirs

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.partition("://")[2].strip("/") if "://" in path else path

    @classmethod
    @contextlib.contextmanager
    def operation(cls, kind, path):
        if cls.latency:
            time.sleep(cls.latency())
        if cls.before:
            cls.before(kind, path)
        yield
        if cls.after:
            cls.after(kind, path)

    def cat_file(self, path, start=None, end=None, **options):
        with self.operation("read", path):
            path = self._strip_protocol(path)
            if path not in self.store:
                raise FileNotFoundError(path)
            return self.store[path].getvalue()[start:end]

    def _open(self, path, mode="rb", **options):
        if mode == "rb":
            return MemoryFile(None, path, self.cat_file(path))
        return super()._open(path, mode, **options)

    def ls(self, path, detail=True, **options):
        with self.operation("list", path):
            return super().ls(path, detail, **options)

    def pipe_file(self, path, value, mode="overwrite", **options):
        with self.operation("put", path):
            path = self._strip_protocol(path)
            if self.in_halves:
                self.store[path] = MemoryFile(self, path, bytes(value[: len(value) // 2]))
                if self.after:
                    type(self).after("half", path)
            self.store[path] = MemoryFile(self, path, bytes(value))

    def put_file(self, lpath, rpath, **options):
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def rm_file(self, path):
        with self.operation("delete", path):
            super().rm_file(path)

    def mv(self, path1, path2, **options):
        with self.operation("rename", path2):
            self.store[self._strip_protocol(path2)] = self.store.pop(self._strip_protocol(path1))


class One(_WatchedFileSystem):
    protocol = "one"


class Two(_WatchedFileSystem):
    protocol = "two"


def new_bucket(*, in_halves=False):
    """Empty the bucket, and forget all that was planned."""
    _WatchedFileSystem.bucket = Bucket()
    _WatchedFileSystem.in_halves = in_halves
    for files in (One, Two):
        files.after = files.before = files.latency = None
        fsspec.register_implementation(files.protocol, files, clobber=True)
    return _WatchedFileSystem.bucket


class Stopped:
    """Stops the writers of a file system after the n-th change, while something else happens."""

    def __init__(self, files, number, happening):
        self._left, self._happening = number, happening
        self._runs, self._lock = threading.Event(), threading.Lock()
        self._runs.set()
        self.has_happened = False
        files.after, files.before = self._after, self._before

    def _before(self, kind, path):
        assert self._runs.wait(30)

    def _after(self, kind, path):
        if kind in ("read", "list"):
            assert self._runs.wait(30)
            return
        with self._lock:
            self._left -= 1
            is_here = self._left == 0
        if is_here:
            self._runs.clear()
            try:
                self._happening()
                self.has_happened = True
            finally:
                self._runs.set()
