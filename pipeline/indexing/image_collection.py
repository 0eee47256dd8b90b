"""Decides which image files are indexed, and under which id.

Two different files never share an id, and a file never has two ids. Files with equal bytes count as
one file where several of them claim the same id or name. No image is decoded.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tqdm import tqdm

from pipeline.images.archives import ImageArchive
from pipeline.indexing.annotations import ConversationRecord, ImageRecord
from pipeline.indexing.image_lookup import Content, ImageFile, ImageInfo, ImageLookup, Split
from pipeline.indexing.records import RecordError, Rejection, image_id_in


@dataclass(frozen=True, slots=True)
class ImageRow:
    """A row of `images.parquet`."""

    image_id: int
    split: Split
    file_name: str
    width: int
    height: int
    num_bytes: int
    source_xxh3: int

    @property
    def content(self) -> Content:
        """Number of bytes and hash, equal for equal files."""
        return self.num_bytes, self.source_xxh3


@dataclass(slots=True)
class Claim:
    """An entry that claims an image id for a file."""

    record: ImageRecord
    split: Split
    file: ImageFile | None
    """None if no file has the name."""
    info: ImageInfo
    problem: str
    """Why the entry is rejected, or empty."""

    def __repr__(self) -> str:
        return repr(self.file or self.record.file_name)

    def precedence(self) -> tuple[bool, int, str]:
        """Sort key: of several claims the smallest wins, whatever their order in the files."""
        return self.split != "train", self.record.image_id, self.record.file_name


class ImageCollection:
    """The accepted images, by id and by the names that texts use."""

    def __init__(
        self,
        archives: Mapping[Split, ImageArchive],
        split_of: Callable[[int], Split] | None = None,
    ) -> None:
        """Start without images.

        Args:
            archives: The image files of each split.
            split_of: Decides the split of an image by its id; without it, the split is that of the
                captions file that lists the image.
        """
        self.split_of = split_of
        self.rows: dict[int, ImageRow] = {}
        """Accepted images by id."""
        self.rejected: list[Rejection] = []
        self.problems: dict[int, str] = {}
        """Why texts cannot rely on an image id, by id."""
        self.num_unlisted = 0
        """Images that only conversations name."""
        self._lookup = ImageLookup(archives)
        self._claims: dict[int, list[Claim]] = defaultdict(list)
        self._ids: dict[str, int | str] = {}
        """The id of a file, or why it has none, by the file's real path."""

    def add_listed(self, records: Mapping[Split, list[ImageRecord]]) -> None:
        """Add the images of all captions files; unusable ones go to `rejected`."""
        claims = [
            self._listed_claim(record, split)
            for split, listed in records.items()
            for record in tqdm(listed, desc=f"index {split} images", unit="image", disable=None)
        ]
        for claim in claims:
            self._claims[claim.record.image_id].append(claim)
        for image_id, same_id in self._claims.items():
            self._resolve_id(image_id, same_id)
        self._accept(claims)

    def _listed_claim(self, record: ImageRecord, split: Split) -> Claim:
        try:
            file = self._lookup.find_listed(record.file_name, split)
        except RecordError as error:
            return Claim(record, split, None, ImageInfo(None), str(error))
        return self._claim(record, file)

    def _claim(self, record: ImageRecord, file: ImageFile) -> Claim:
        info = self._lookup.info(file)
        return Claim(record, file.split, file, info, info.problem)

    def _resolve_id(self, image_id: int, claims: list[Claim]) -> None:
        """Leave one claim of an id without a problem, or none if they are for different files."""
        first = next((claim for claim in claims if claim.info.content), claims[0])
        if other := _claim_of_another_file(first, claims):
            problem = f"image id of two files: {image_id} is {first!r} and {other!r}"
            self.problems[image_id] = problem
            for claim in claims:
                claim.problem = claim.problem or problem
        usable = sorted((c for c in claims if not c.problem), key=Claim.precedence)
        for claim in usable[1:]:
            claim.problem = f"image id repeated: {image_id}"

    def _accept(self, claims: list[Claim]) -> None:
        """Add a row for each claim without a problem, and a rejection for every other one."""
        for claim in sorted(claims, key=Claim.precedence):
            self._add_row(claim)
        for claim in claims:
            if claim.file:
                # A text may name the file of a rejected claim: it means the accepted copy, if any.
                row = self.rows.get(claim.record.image_id)
                is_copy = row is not None and row.content == claim.info.content
                found = claim.record.image_id if is_copy else claim.problem
                self._ids.setdefault(claim.file.real_path, found)
            if claim.problem:
                self.rejected.append(Rejection("images", claim.record.record, claim.problem))

    def _add_row(self, claim: Claim) -> None:
        """Give a file the first id that is claimed for it."""
        content = claim.info.content
        if claim.problem or claim.file is None or content is None:
            return
        record = claim.record
        known = self._ids.setdefault(claim.file.real_path, record.image_id)
        if known == record.image_id:
            split = self.split_of(known) if self.split_of else claim.split
            self.rows[known] = ImageRow(known, split, record.file_name, *claim.info.size, *content)
        else:
            claim.problem = f"image file of two ids: {claim!r} is {known} and {record.image_id}"
            self.problems[record.image_id] = claim.problem

    def add_unlisted(self, conversations: Iterable[ConversationRecord]) -> None:
        """Add the images of split train that conversations name and no captions file lists.

        An image's id is the number at the end of its name.
        """
        new: dict[str, tuple[str, ImageFile]] = {}
        for record in tqdm(conversations, desc="index conversations", unit="record", disable=None):
            # `id_of` raises the error of a name without a file.
            with contextlib.suppress(RecordError):
                file = self._file_of(record.image_name)
                if file.real_path not in self._ids:
                    new.setdefault(file.real_path, (record.record, file))
        claims_of: dict[int, list[Claim]] = defaultdict(list)
        for real_path, (record_name, file) in new.items():
            try:
                image = ImageRecord(record_name, _id_in_name(file), file.full_name)
            except RecordError as error:
                self._ids[real_path] = str(error)
            else:
                claims_of[image.image_id].append(self._claim(image, file))
        for image_id, claims in claims_of.items():
            self._add_unlisted(image_id, claims)

    def _add_unlisted(self, image_id: int, claims: list[Claim]) -> None:
        """Give an id to a file that has it in its name, unless the id belongs to another file."""
        self.num_unlisted += len(claims)
        listed = self._claims.get(image_id, [])
        for claim in claims:
            if other := _claim_of_another_file(claim, listed):
                taken = (
                    f"image id taken: {image_id}, in the name of {claim!r}, is that of {other!r}"
                )
                claim.problem = claim.problem or taken
            elif image_id in self.rows:
                claim.problem = claim.problem or f"image id repeated: {image_id}"
        if usable := [claim for claim in claims if not claim.problem]:
            self._resolve_id(image_id, usable)
        self._accept(claims)

    def id_of(self, name: str) -> int:
        """Return the id of the image that a text names, after `add_unlisted` of all texts.

        Raises:
            RecordError: No image has the name, the image is rejected, or different ones have it.
        """
        image_id = self._ids[self._file_of(name).real_path]
        if isinstance(image_id, str):
            says_image = image_id.startswith(("image without an id", "image not listed"))
            raise RecordError(image_id if says_image else f"image rejected: {name!r}: {image_id}")
        return image_id

    def _file_of(self, name: str) -> ImageFile:
        """Return the file that a text names; of several equal files, one with an id."""
        files = self._lookup.find_named(name)
        return next((f for f in files if isinstance(self._ids.get(f.real_path), int)), files[0])


def _claim_of_another_file(first: Claim, claims: list[Claim]) -> Claim | None:
    """Return a claim for another file than the first claim's.

    Files that cannot be read are compared by name.
    """
    content = first.info.content
    names = {c.record.file_name for c in claims if content and c.info.content == content}
    names.add(first.record.file_name)
    for claim in claims:
        if content and claim.info.content:
            is_other = claim.info.content != content
        else:
            is_other = claim.record.file_name not in names
        if is_other:
            return claim
    return None


def _id_in_name(file: ImageFile) -> int:
    if file.split == "val":
        raise RecordError(f"image not listed: {file!r} is of val, whose captions do not list it")
    return image_id_in(file.full_name)
