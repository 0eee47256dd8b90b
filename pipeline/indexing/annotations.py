"""The records of texts that annotation files hold, whatever the layout of a file.

The layouts are in `pipeline.indexing.texts`. Whether records fit together is decided in
`pipeline.indexing.collect`.
"""

from dataclasses import dataclass

from pipeline.indexing.records import Rejection
from workspace.data_settings import Split


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image that a captions file lists."""

    record: str
    """Position of the entry, such as "captions.json: images[7]"."""
    image_id: int | None
    """None where the file numbers no images: the id then follows from the file's full name."""
    file_name: str
    other_names: tuple[str, ...] = ()
    """Names in other releases of the pictures, tried in order where no file has the first."""
    split: Split | None = None
    """The split that the file gives; None: the one that the file itself is of."""


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """A caption, with white space reduced to single spaces."""

    record: str
    caption_id: int
    image: int | str
    """The id of its image in the same file, or the name if the file numbers no images."""
    caption: str


@dataclass(frozen=True, slots=True)
class ConversationRecord:
    """A conversation about one image."""

    record: str
    conversation_id: str
    image_name: str
    turns: list[dict[str, str]]
    """Role and text of each turn, user and assistant alternating."""


@dataclass(frozen=True)
class CaptionsFile:
    """The records of a captions file, its rejected entries, and the numbers of all entries."""

    images: list[ImageRecord]
    captions: list[CaptionRecord]
    rejected: list[Rejection]
    num_images: int
    num_captions: int

    @property
    def numbers_images(self) -> bool:
        """Whether the file gives the ids of its images."""
        return all(image.image_id is not None for image in self.images)

    @property
    def num_images_read(self) -> int:
        """Images that count as read with the file: all of a file that numbers its images, else the
        rejected ones, since the others count where their files are found.
        """
        if self.numbers_images:
            return self.num_images
        return sum(rejection.kind == "images" for rejection in self.rejected)


@dataclass(frozen=True)
class InstructFile:
    """The conversations of all instruct files, rejected entries, and the numbers of entries."""

    conversations: list[ConversationRecord]
    rejected: list[Rejection]
    num_conversations: int
    num_objects: int = 0
    """Entries of the instances file from which the conversations were made, if none else counts
    them."""
