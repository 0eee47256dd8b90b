"""The text of a store's card: metadata for the Hugging Face Hub, then Markdown for people.

The Hub reads licence, name, tags, and which files its viewer and `load_dataset` take. Nothing in a
store says what its images' owners allow, so the licence is asked for. The same store and settings
give the same text.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from .errors import SettingsError
from .layout import StoreLayout
from .spec import SPEC_FILE, Spec
from .store_index import INDEX_FILE, PROBE_FILE, StoreIndex
from .texts import human_size, markdown_text, printable, yaml_entry

LICENSES = "https://huggingface.co/docs/hub/repositories-licenses"
"""The Hub's list of licences."""

COMMON_LICENSES = (
    *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "odc-by"),
    *("apache-2.0", "mit", "unknown", "other"),
)

OTHER = "other"
"""The Hub's identifier of a licence that has none."""

LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

PLACEHOLDER = "<owner>/<name>"
"""In place of a repository that is not named."""

TASKS = ("image-to-text", "visual-question-answering")
"""The Hub's names of what the features are for."""

TAGS = ("patchcache", "hdf5", "image-features")
"""The Hub's words to find a store by; the tower's name follows."""

SIZES = (
    *("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B"),
    *("1B<n<10B", "10B<n<100B", "100B<n<1T", "n>1T"),
)
"""The Hub's categories of sizes, each ten times the one before."""

MAX_TAG = 60
"""Most characters of the tag that is made of the tower's name."""

READING = """\
## Reading

By image id, in any order, with every byte held against the index (`pip install .` in a checkout of
patchcache, and `pip install huggingface_hub`):

```python
from patchcache import FeatureStore

store = FeatureStore("hf://datasets/{repo}")  # a folder works as well
features = store.gather(store.image_ids[:2])  # float16 [2, {patches}, {width}]
```

One shard, with h5py:

```python
import h5py
from huggingface_hub import hf_hub_download

with h5py.File(hf_hub_download("{repo}", "{shard}", repo_type="dataset")) as file:
    image_ids, features = file["image_id"][:], file["features"][:]
```

All shards as rows, with `datasets` and h5py, or by the repository's name alone:
`load_dataset("{repo}")`. The numpy format gives the same values as float32.

```python
from datasets import load_dataset

files = "hf://datasets/{repo}/*.h5"
rows = load_dataset("hdf5", data_files=files, split="train").with_format("numpy")
image_id, features = rows[0]["image_id"], rows[0]["features"]
```

patchcache trains on them beside an index of the same pictures and their texts, with these lines of
its `params.yaml`:

```yaml
encoder:
  model: external
  pretrained: hf://datasets/{repo}
```"""
"""The section about reading, in four lines of code each way."""


@dataclass(frozen=True, kw_only=True)
class CardSettings:
    """What a card says and a store does not know."""

    license: str | None
    """Identifier of the Hub."""
    license_name: str | None = None
    """Name of a licence that has no identifier."""
    license_link: str | None = None
    """URL of its text, or a file of the repository."""
    name: str | None = None
    """Title; by default of the images and the tower."""
    images: str | None = None
    """What the images are."""
    repository: str | None = None
    """Owner and name on the Hub."""

    def __post_init__(self) -> None:
        """Refuse settings that the Hub would not take."""
        if self.license is None:
            raise SettingsError(
                "--license is missing. The features are made of images, and no file of a store "
                "says what the images' owners and the tower's allow; only you can. "
                f"{_wanted_license()}"
            )
        if not LICENSE.fullmatch(self.license):
            raise SettingsError(
                f"--license {self.license!r}: no identifier of a licence. {_wanted_license()}"
            )
        if (self.license == OTHER) != bool(self.license_name):
            raise SettingsError(
                f"--license {self.license} and --license-name: a name belongs to the licence "
                f"{OTHER!r}, which needs one."
            )
        if self.license_link and not self.license_name:
            raise SettingsError("--license-link: belongs to --license-name.")
        if self.repository is not None and not REPOSITORY.fullmatch(self.repository):
            raise SettingsError(f"--repo {self.repository!r}: wanted <owner>/<name>.")


def _wanted_license() -> str:
    return f"Common: {', '.join(COMMON_LICENSES)}. All: {LICENSES}"


def card_of(layout: StoreLayout, index: StoreIndex, settings: CardSettings) -> str:
    """Return the text of a store's card."""
    spec, num_images = layout.spec, len(index.image_ids)
    name = settings.name or f"Patch features of {settings.images or 'images'} ({spec.model})"
    name = printable(name)
    of_images = f" ({markdown_text(settings.images)})" if settings.images else ""
    head = [yaml_entry(k, v) for k, v in _metadata(spec, num_images, settings, name).items()]
    repository = settings.repository or PLACEHOLDER
    shard = layout.shards[0].name if layout.shards else "<key>.h5"
    parts = [
        "\n".join(["---", *head, "---"]),
        f"# {markdown_text(name)}",
        f"Patch embeddings of {num_images:,} images{of_images}, made once by the "
        f"vision tower {markdown_text(spec.model)}. A projector and a language model are trained "
        f"on them without the tower and without the pictures, which are not here.",
        _table(("", ""), _counts(layout, index)),
        _license_line(settings),
        READING.format(repo=repository, shard=shard, patches=spec.patches, width=spec.width),
        f"## What made the features\n\nFeatures of one fingerprint can be mixed, and no others. It "
        f"is the sha256 of these fields, and stands in `{SPEC_FILE}`, the index and each shard.",
        _table(("field", "value"), _spec_rows(spec)),
        "## Files",
        _table(("file", "content"), _files(index)),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(spec: Spec, num_images: int, settings: CardSettings, name: str) -> dict[str, Any]:
    """Return the entries of the head; `configs` keeps the index out of the data."""
    tower = re.sub(r"[^a-z0-9.]+", "-", spec.model.lower())[:MAX_TAG].strip("-.")
    named = {"license_name": settings.license_name, "license_link": settings.license_link}
    return {
        "license": settings.license,
        **{key: printable(value) for key, value in named.items() if value},
        "pretty_name": name,
        "tags": [*TAGS, *[tower] * bool(tower)],
        "task_categories": TASKS,
        "size_categories": [_size_category(num_images)],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "*.h5"}]}],
    }


def _size_category(num_images: int) -> str:
    return SIZES[min(max(0, len(str(num_images)) - len("999")), len(SIZES) - 1)]


def _license_line(settings: CardSettings) -> str:
    name = markdown_text(settings.license_name or settings.license)
    link = f" ({markdown_text(settings.license_link)})" if settings.license_link else ""
    return (
        f"Licence: {name}{link}, as the uploader states it. What the images' owners and the "
        f"tower's licence ask for holds beside it."
    )


def _counts(layout: StoreLayout, index: StoreIndex) -> list[tuple[str, str]]:
    num_bytes = sum(file.num_bytes for file in layout.shards)
    ids = f"{index.image_ids[0]} to {index.image_ids[-1]}" if len(index.image_ids) else "none"
    return [
        ("images", f"{len(index.image_ids):,}"),
        ("image ids", ids),
        ("an image", f"float16 [{layout.spec.patches}, {layout.spec.width}]"),
        ("shards", f"{len(layout.shards):,}"),
        ("bytes of the shards", f"{num_bytes:,} ({human_size(num_bytes)})"),
        ("tower", markdown_text(layout.spec.model)),
        ("fingerprint", f"`{layout.spec.fingerprint}`"),
    ]


def _spec_rows(spec: Spec) -> list[tuple[str, str]]:
    return [
        (f"`{name}`", markdown_text(value if isinstance(value, str) else json.dumps(value)))
        for name, value in spec.fields().items()
    ]


def _files(index: StoreIndex) -> list[tuple[str, str]]:
    probe = (f"`{PROBE_FILE}`", "features of known pictures, to compare an encoder with")
    return [
        (
            "`*.h5`",
            "`features` float16 [rows, patches, width], `image_id` int64, `row_xxh3` uint64",
        ),
        (f"`{INDEX_FILE}`", "of each image its shard, row and hashes; of each shard its sha256"),
        (f"`{SPEC_FILE}`", "what made the features"),
        *[probe] * (index.probe_sha256 is not None),
    ]


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in [head, ("---", "---"), *rows])
