"""Image files that take their time and log who was read; a module that Ray's processes import."""

import os
import time
from pathlib import Path

from pipeline.images.archives import ImageArchive


class SlowImages(ImageArchive):
    """Images of an archive, each logged as it is read, and waited for."""

    def __init__(self, archive: ImageArchive, log: Path, seconds: float) -> None:
        self.__dict__ |= archive.__dict__
        self._log, self._seconds = log, seconds

    def read(self, file_name: str) -> bytes:
        with self._log.open("a") as log:
            log.write(f"{file_name}\n")
        time.sleep(self._seconds)
        return super().read(file_name)


class DeadlyImages(ImageArchive):
    """Images whose reading ends the process."""

    def __init__(self, archive: ImageArchive) -> None:
        self.__dict__ |= archive.__dict__

    def read(self, file_name: str) -> bytes:
        os._exit(1)
