"""Decides which image files are indexed, and under which id.

Two different files never share an id, and a file never has two ids. Files with equal bytes count as
one file where several of them claim the same id or name. No image is decoded.

Captions files in COCO's layout number their images. Every other image has the number at the end of
its name, as COCO's own files do, or a hash of its full name where there is no such number, or where
another image has it.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import xxhash
from tqdm import tqdm

from pipeline.images.archives import ImageArchive
from pipeline.images.names import is_named_as_image, suffix_of
from pipeline.indexing.annotations import ConversationRecord, ImageRecord
from pipeline.indexing.image_lookup import Content, ImageFile, ImageInfo, ImageLookup
from pipeline.indexing.records import RecordError, Rejection, image_id_in
from workspace.data_settings import Split


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
    image_id: int
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
        return self.split != "train", self.image_id, self.record.file_name


class ImageCollection:
    """The accepted images, by id and by the names that texts use."""

    def __init__(
        self,
        archives: Mapping[Split, ImageArchive],
        *,
        split_of: Callable[[int], Split] | None = None,
        listing: Collection[Split] = (),
    ) -> None:
        """Start without images.

        Args:
            archives: The image files of each split.
            split_of: Decides the split of an image by its id; without it, the split is that of the
                captions file that lists the image, or of the archive that holds it.
            listing: The splits whose captions files list all their images, so that a conversation
                cannot add one.
        """
        self.split_of = split_of
        self.rows: dict[int, ImageRow] = {}
        """Accepted images by id."""
        self.listed: dict[Split, set[int]] = defaultdict(set)
        """Ids of the accepted images by the split whose inputs gave them."""
        self.rejected: list[Rejection] = []
        self.problems: dict[int, str] = {}
        """Why texts cannot rely on an image id, by id."""
        self.num_without_number = 0
        """Images, accepted or not, whose id no captions file gives."""
        self._lookup = ImageLookup(archives)
        self._archives = archives
        self._listing = listing
        self._claims: dict[int, list[Claim]] = defaultdict(list)
        self._ids: dict[str, int | str] = {}
        """The id of a file, or why it has none, by the file's real path."""
        self._other_names: dict[str, ImageFile | None] = {}
        """Files by the names, in full and without folders, that their images have elsewhere; None
        for a name of two files."""

    def add_listed(self, records: Mapping[Split, list[ImageRecord]]) -> None:
        """Add the images of all captions files; unusable ones go to `rejected`."""
        claims: list[Claim] = []
        unnumbered: list[tuple[ImageRecord, ImageFile, Split]] = []
        for split, listed in records.items():
            for record in tqdm(listed, desc=f"index {split} images", unit="image", disable=None):
                if record.image_id is not None:
                    claims.append(self._listed_claim(record, record.image_id, split))
                    continue
                try:
                    file = self._lookup.find_listed(record.file_name, split)
                    unnumbered.append((record, file, split))
                except RecordError as error:
                    self.num_without_number += 1
                    self.rejected.append(Rejection("images", record.record, str(error)))
        for claim in claims:
            self._claims[claim.image_id].append(claim)
        for image_id, same_id in self._claims.items():
            self._resolve_id(image_id, same_id)
        self._accept(claims)
        self._add_unnumbered(unnumbered)

    def add_files(self, split: Split) -> Counter[str]:
        """Add all files of a split that are named as images; return the numbers of others.

        Returns:
            Suffix to the number of files.
        """
        others: Counter[str] = Counter()
        found = []
        for name in self._archives[split].all_names():
            if not is_named_as_image(name):
                others[suffix_of(name)] += 1
                continue
            record = ImageRecord(f"{split} images: {name}", None, name)
            try:
                found.append((record, self._lookup.find_listed(name, split), split))
            except RecordError as error:
                self.num_without_number += 1
                self.rejected.append(Rejection("images", record.record, str(error)))
        self._add_unnumbered(found, with_copies=True)
        return others

    def move_to_val(self, image_ids: Iterable[int]) -> None:
        """Keep images out of training that are of split train."""
        for image_id in image_ids:
            if self.rows[image_id].split == "train":
                self.rows[image_id] = replace(self.rows[image_id], split="val")

    def add_conversations(self, conversations: Iterable[ConversationRecord]) -> None:
        """Add the images that conversations name and no captions file lists."""
        found = []
        for record in tqdm(conversations, desc="index conversations", unit="record", disable=None):
            # `id_of` raises the error of a name without a file.
            with contextlib.suppress(RecordError):
                file = self._file_of(record.image_name)
                if file.real_path in self._ids:
                    continue
                image = ImageRecord(record.record, None, record.image_name)
                if file.split in self._listing:
                    self._ids[file.real_path] = (
                        f"image not listed: {file!r} is of {file.split}, whose captions do not "
                        f"list it"
                    )
                else:
                    found.append((image, file, file.split))
        self._add_unnumbered(found)

    def _listed_claim(self, record: ImageRecord, image_id: int, split: Split) -> Claim:
        try:
            name, file = self._find_listed(record, split)
        except RecordError as error:
            return Claim(record, image_id, split, None, ImageInfo(None), str(error))
        if name != record.file_name:
            record = replace(record, file_name=name)
        return self._claim(record, image_id, file, split)

    def _find_listed(self, record: ImageRecord, split: Split) -> tuple[str, ImageFile]:
        """Return the first name of an image that is a file's, and the file."""
        names = (record.file_name, *record.other_names) if record.other_names else ()
        for name in names:
            with contextlib.suppress(RecordError):
                file = self._lookup.find_listed(name, split)
                for other in {*names, *(other.rpartition("/")[2] for other in names)}:
                    known = self._other_names.setdefault(other, file)
                    if known and known.real_path != file.real_path:
                        self._other_names[other] = None
                return name, file
        return record.file_name, self._lookup.find_listed(record.file_name, split)

    def _claim(self, record: ImageRecord, image_id: int, file: ImageFile, split: Split) -> Claim:
        info = self._lookup.info(file)
        return Claim(record, image_id, split, file, info, info.problem)

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
                row = self.rows.get(claim.image_id)
                is_copy = row is not None and row.content == claim.info.content
                found = claim.image_id if is_copy else claim.problem
                self._ids.setdefault(claim.file.real_path, found)
            if claim.problem:
                self.rejected.append(Rejection("images", claim.record.record, claim.problem))

    def _add_row(self, claim: Claim) -> None:
        """Give a file the first id that is claimed for it."""
        content = claim.info.content
        if claim.problem or claim.file is None or content is None:
            return
        record = claim.record
        known = self._ids.setdefault(claim.file.real_path, claim.image_id)
        if known == claim.image_id:
            split = record.split or claim.split
            if self.split_of:
                split = self.split_of(known)
            self.listed[claim.split].add(known)
            self.rows[known] = ImageRow(known, split, record.file_name, *claim.info.size, *content)
        else:
            claim.problem = f"image file of two ids: {claim!r} is {known} and {claim.image_id}"
            self.problems[claim.image_id] = claim.problem

    def _add_unnumbered(
        self, found: Iterable[tuple[ImageRecord, ImageFile, Split]], *, with_copies: bool = False
    ) -> None:
        """Add each file once, under an id that follows from its name.

        Args:
            found: Records, the files that they name, and the splits that these were named for.
            with_copies: Whether a file with the number and the bytes of another is an image of its
                own. Otherwise the texts of both are about one image.
        """
        by_number: dict[int, list[Claim]] = defaultdict(list)
        by_hash: dict[int, list[Claim]] = defaultdict(list)
        for claim in self._claims_by_name(found):
            by_number[claim.image_id].append(claim)
        new: list[Claim] = []
        copies: list[Claim] = []
        for image_id, same in by_number.items():
            same.sort(key=Claim.precedence)
            if _claim_of_another_file(same[0], [*same, *self._claims[image_id]]):
                # No file has the number rather than another, so none of the new ones keeps it.
                numbered, hashed = [], same
            else:
                # All have the same bytes; those of no image are rejected one by one.
                num_numbered = len(same) if same[0].problem else int(image_id not in self.rows)
                numbered, hashed = same[:num_numbered], same[num_numbered:]
                if not with_copies:
                    copies += hashed
                    hashed = []
            if numbered:
                self._resolve_unnumbered(image_id, numbered)
            for claim in hashed:
                claim.image_id = hashed_id(claim.record.file_name)
                by_hash[claim.image_id].append(claim)
            new += numbered + hashed
        for image_id, same in by_hash.items():
            self._resolve_unnumbered(image_id, same)
        self.num_without_number += len(new)
        self._accept(new)
        for copy in copies:
            if copy.file:
                self._ids[copy.file.real_path] = copy.image_id

    def _claims_by_name(
        self, found: Iterable[tuple[ImageRecord, ImageFile, Split]]
    ) -> Iterator[Claim]:
        """Yield a claim for each new file; a file whose name is not UTF-8 is rejected."""
        # Of several names of a file, the same gives its id whichever text comes first.
        chosen: dict[str, tuple[ImageRecord, ImageFile, Split]] = {}
        for each in found:
            _, file, split = each
            _, known, known_split = chosen.setdefault(file.real_path, each)
            if (split != "train", file.full_name) < (known_split != "train", known.full_name):
                chosen[file.real_path] = each
        for record, file, split in chosen.values():
            if file.real_path in self._ids:
                continue
            try:
                image_id = _id_by_name(file.full_name)
            except UnicodeEncodeError:
                problem = f"file name not UTF-8: {file.full_name!r}"
                self._ids[file.real_path] = problem
                self.rejected.append(Rejection("images", record.record, problem))
                self.num_without_number += 1
            else:
                yield self._claim(replace(record, file_name=file.full_name), image_id, file, split)

    def _resolve_unnumbered(self, image_id: int, claims: list[Claim]) -> None:
        """Leave one new claim of an id without a problem, unless another image has the id."""
        known = self._claims[image_id]
        known += claims
        if image_id not in self.rows:
            self._resolve_id(image_id, known)
            return
        for claim in claims:
            taken = f"image id of two files: {image_id} is that of {known[0]!r}"
            claim.problem = claim.problem or taken

    def id_of(self, name: str, split: Split | None = None) -> int:
        """Return the id of the image that a text names, after all images were added.

        Args:
            name: As the text spells it.
            split: The split whose captions the text is of; None for a conversation.

        Raises:
            RecordError: No image has the name, the image is rejected, or different ones have it.
        """
        file = self._lookup.find_listed(name, split) if split else self._file_of(name)
        image_id = self._ids[file.real_path]
        if isinstance(image_id, str):
            if image_id.startswith("image not listed"):
                raise RecordError(image_id)
            raise RecordError(f"image rejected: {name!r}: {image_id}")
        return image_id

    def _file_of(self, name: str) -> ImageFile:
        """Return the file that a text names; of several equal files, one with an id."""
        try:
            files = self._lookup.find_named(name)
        except RecordError:
            base_name = name.rpartition("/")[2]
            other = self._other_names.get(name) or self._other_names.get(base_name)
            if other is None:
                raise
            return other
        return next((f for f in files if isinstance(self._ids.get(f.real_path), int)), files[0])


def hashed_id(full_name: str) -> int:
    """Return 63 bits of a hash of an image's full name, for an image without a number."""
    return xxhash.xxh3_64_intdigest(full_name.encode()) >> 1


def _id_by_name(full_name: str) -> int:
    """Return the number at the end of a file's name, or a hash of the full name."""
    hashed = hashed_id(full_name)
    try:
        return image_id_in(full_name)
    except RecordError:
        return hashed


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
