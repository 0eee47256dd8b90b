"""Decides which image files are indexed, and under which id.

Two different files never share an id, and a file never has two; files with the same bytes count
as one wherever two of them claim an id or a name. Decodes nothing.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tqdm import tqdm

from pipeline.images.names import ImageArchive
from pipeline.indexing.annotations import ConversationRecord, ImageRecord
from pipeline.indexing.image_lookup import Content, ImageFile, ImageLookup, Split
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
        """What equal files have in common."""
        return self.num_bytes, self.source_xxh3


@dataclass(slots=True)
class Claim:
    """An entry of a captions file, which gives a file an id."""

    record: ImageRecord
    split: Split
    file: ImageFile | None
    content: Content | None
    size: tuple[int, int]
    problem: str
    """Why the entry is left out, or empty."""

    def __repr__(self) -> str:
        return repr(self.file or self.record.file_name)

    def precedence(self) -> tuple[bool, int, str]:
        """Return what decides between claims to one file, whatever their order: smallest first."""
        return self.split != "train", self.record.image_id, self.record.file_name

    def row(self, content: Content) -> ImageRow:
        """Return the row of an image that is kept."""
        return ImageRow(
            self.record.image_id, self.split, self.record.file_name, *self.size, *content
        )


class ImageCollection:
    """The images kept so far, found by id and by the names that texts use."""

    def __init__(self, archives: Mapping[Split, ImageArchive]) -> None:
        self.rows: dict[int, ImageRow] = {}
        self.rejected: list[Rejection] = []
        self.problems: dict[int, str] = {}
        """Ids that no text can rely on, and why."""
        self.num_adopted = 0
        self._files = ImageLookup(archives)
        self._claims: dict[int, list[Claim]] = defaultdict(list)
        # The id of a file by its place, or why it has none.
        self._ids: dict[str, int | str] = {}

    def add_listed(self, records: Mapping[Split, list[ImageRecord]]) -> None:
        """Read the files of all captions files; what cannot be used goes to `rejected`."""
        claims = [
            self._claim(record, split)
            for split, listed in records.items()
            for record in tqdm(listed, desc=f"index {split} images", unit="image", disable=None)
        ]
        for claim in claims:
            self._claims[claim.record.image_id].append(claim)
        for image_id, same_id in self._claims.items():
            self._settle_id(image_id, same_id)
        self._settle(claims)

    def _settle(self, claims: list[Claim]) -> None:
        for claim in sorted(claims, key=Claim.precedence):
            self._settle_file(claim)
        for claim in claims:
            self._remember(claim)
            if claim.problem:
                self.rejected.append(Rejection("images", claim.record.record, claim.problem))

    def _claim(self, record: ImageRecord, split: Split) -> Claim:
        try:
            file = self._files.listed(record.file_name, split)
        except RecordError as error:
            return Claim(record, split, None, None, (0, 0), str(error))
        return self._claim_of(record, file)

    def _claim_of(self, record: ImageRecord, file: ImageFile) -> Claim:
        header = self._files.header(file)
        return Claim(record, file.split, file, header.content, header.size, header.problem)

    def _settle_id(self, image_id: int, claims: list[Claim]) -> None:
        """Leave an id one claim, or none if there are claims for different files."""
        first = next((claim for claim in claims if claim.content), claims[0] if claims else None)
        if first and (other := _another_file(first, claims)):
            problem = f"image id of two files: {image_id} is {first!r} and {other!r}"
            self.problems[image_id] = problem
            for claim in claims:
                claim.problem = claim.problem or problem
        usable = sorted((c for c in claims if not c.problem), key=Claim.precedence)
        for claim in usable[1:]:
            claim.problem = f"image id repeated: {image_id}"

    def _settle_file(self, claim: Claim) -> None:
        """Give a file the first id that is claimed for it."""
        if claim.problem or claim.file is None or claim.content is None:
            return
        image_id = claim.record.image_id
        known = self._ids.setdefault(claim.file.place, image_id)
        if known == image_id:
            self.rows[image_id] = claim.row(claim.content)
        else:
            claim.problem = f"image file of two ids: {claim!r} is {known} and {image_id}"
            self.problems[image_id] = claim.problem

    def _remember(self, claim: Claim) -> None:
        """Let texts find the file of a claim that was left out, or why they cannot use it."""
        if claim.file is not None:
            row = self.rows.get(claim.record.image_id)
            is_copy = row is not None and row.content == claim.content
            found = claim.record.image_id if is_copy else claim.problem
            self._ids.setdefault(claim.file.place, found)

    def adopt(self, conversations: Iterable[ConversationRecord]) -> None:
        """Take in the images of split train that conversations name and no captions file lists.

        The number at the end of its name becomes an image's id.
        """
        new: dict[str, tuple[str, ImageFile]] = {}
        for record in tqdm(conversations, desc="index conversations", unit="record", disable=None):
            # What a name does not lead to is said by `id_of`.
            with contextlib.suppress(RecordError):
                file = self._file_of(record.image_name)
                if file.place not in self._ids:
                    new.setdefault(file.place, (record.record, file))
        adopted: dict[int, list[Claim]] = defaultdict(list)
        for place, (place_of_record, file) in new.items():
            try:
                image = ImageRecord(place_of_record, _id_in_name(file), file.full_name)
            except RecordError as error:
                self._ids[place] = str(error)
            else:
                adopted[image.image_id].append(self._claim_of(image, file))
        for image_id, claims in adopted.items():
            self._adopt(image_id, claims)

    def _adopt(self, image_id: int, claims: list[Claim]) -> None:
        """Give an id to a file that has it in its name, unless it belongs to another file."""
        self.num_adopted += len(claims)
        listed = self._claims.get(image_id, [])
        for claim in claims:
            if other := _another_file(claim, listed):
                taken = (
                    f"image id taken: {image_id}, in the name of {claim!r}, is that of {other!r}"
                )
                claim.problem = claim.problem or taken
            elif image_id in self.rows:
                claim.problem = claim.problem or f"image id repeated: {image_id}"
        self._settle_id(image_id, [claim for claim in claims if not claim.problem])
        self._settle(claims)

    def id_of(self, name: str) -> int:
        """Return the id of the image that a text names; all of them must have been adopted.

        Raises:
            RecordError: There is no such image, it is left out, or the name may mean several.
        """
        image_id = self._ids[self._file_of(name).place]
        if isinstance(image_id, str):
            is_ours = image_id.startswith(("image without an id", "image not listed"))
            raise RecordError(image_id if is_ours else f"image rejected: {name!r}: {image_id}")
        return image_id

    def _file_of(self, name: str) -> ImageFile:
        """Return the file that a text names; of several equal ones, the one with an id."""
        found = self._files.named(name)
        return next((f for f in found if isinstance(self._ids.get(f.place), int)), found[0])


def _another_file(first: Claim, claims: list[Claim]) -> Claim | None:
    """Return a claim that is not about the file of the first.

    Of files that cannot be read, only the names can be compared.
    """
    names = {c.record.file_name for c in claims if c.content and c.content == first.content}
    names.add(first.record.file_name)
    return next(
        (
            claim
            for claim in claims
            if (
                claim.content != first.content
                if claim.content and first.content
                else claim.record.file_name not in names
            )
        ),
        None,
    )


def _id_in_name(file: ImageFile) -> int:
    if file.split == "val":
        raise RecordError(f"image not listed: {file!r} is of val, whose captions do not list it")
    return image_id_in(file.full_name)
