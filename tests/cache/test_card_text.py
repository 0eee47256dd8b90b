"""A card says what its store holds, and texts of others are nothing but texts in it."""

import dataclasses
import json
import re
from itertools import pairwise

import pytest
import yaml
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt
from ruamel.yaml import YAML

from cache.card_text import CardSettings, _size_category, card_of
from cache.errors import SettingsError
from cache.layout import StoreLayout
from cache.spec import Spec
from cache.store_index import ARRAY_TYPES
from cache.texts import printable

MIT = CardSettings(license="mit")

HOSTILE = [
    "---\nlicense: mit\n---\n# own heading",
    '", injected: "yes',
    "a: b # c",
    "`code` | cell | <script>alert(1)</script> &lt; &#124; \\| \\",
    "*bold* _it_ ~~gone~~ $x$ ![i](http://a.b/c.png) [l](javascript:x) www.example.org me@a.b",
    "{braces} %tag !tag &anchor *alias @at ' \"",
    "line\u2028and\x85next\r\nline\ttab",
    "\x1b[31mred\x07 \u202egnp.exe \ufeff \ud83d half \U0001f600 whole",
    "",
]


def open_store(root):
    return StoreLayout.open(root, partial=False)


def head_of(card):
    start, head, _ = card.split("---\n", 2)
    assert start == ""
    return head


def body_of(card):
    return card.split("---\n", 2)[2]


def cells_of(card):
    """The texts of headings and cells, as a reader of Markdown finds them; no text has markup."""
    found = []
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body_of(card))
    for before, token in pairwise(tokens):
        if token.type == "inline":
            kinds = {child.type for child in token.children}
            assert kinds <= {"text", "code_inline", "softbreak"}, token.content
            if before.type in ("heading_open", "th_open", "td_open"):
                found.append("".join(child.content for child in token.children))
    return found


# What a card says


def test_the_head_is_what_the_hub_reads(store):
    card = card_of(*open_store(store.root), CardSettings(license="cc-by-4.0", images="COCO 2017"))
    data = DatasetCard(card).data.to_dict()
    assert data == {
        "license": "cc-by-4.0",
        "pretty_name": "Patch features of COCO 2017 (tiny)",
        "tags": ["patchcache", "hdf5", "image-features", "tiny"],
        "task_categories": ["image-to-text", "visual-question-answering"],
        "size_categories": ["n<1K"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "*.h5"}]}],
    }


def test_a_licence_without_an_identifier_has_a_name_and_a_link(store):
    link = "https://example.org/terms"
    settings = CardSettings(license="other", license_name="our-terms", license_link=link)
    card = card_of(*open_store(store.root), settings)
    data = yaml.safe_load(head_of(card))
    assert [data[key] for key in ("license", "license_name", "license_link")] == [
        "other",
        "our-terms",
        link,
    ]


def test_the_tables_hold_every_number_of_the_store(store):
    cells = cells_of(card_of(*open_store(store.root), MIT))
    num_bytes = sum((store.root / name).stat().st_size for name in store.names)
    wanted = {
        "images": f"{len(store.image_ids):,}",
        "image ids": f"{store.image_ids[0]} to {store.image_ids[-1]}",
        "shards": str(len(store.names)),
        "fingerprint": store.spec.fingerprint,
    }
    assert wanted.items() <= dict(pairwise(cells)).items()
    assert [cell for cell in cells if cell.startswith(f"{num_bytes:,} (")]
    assert f"float16 [{store.spec.patches}, {store.spec.width}]" in cells


def test_the_table_of_the_spec_gives_each_field_its_value(store):
    cells = cells_of(card_of(*open_store(store.root), MIT))
    for name, value in store.spec.fields().items():
        text = value if isinstance(value, str) else json.dumps(value)
        assert cells[cells.index(name) + 1] == text


@pytest.mark.parametrize(
    ("images", "told"),
    [(None, "60 images, made once"), ("A|B", r"60 images (A&#124;B), made once")],
)
def test_what_the_images_are_is_said_where_it_is_known(store, images, told):
    card = card_of(*open_store(store.root), CardSettings(license="mit", images=images))
    assert f"Patch embeddings of {told} by the vision tower tiny." in card


def test_a_store_without_images_has_a_card(store):
    layout, index = open_store(store.root)
    empty = {name: getattr(index, name)[:0] for name in ARRAY_TYPES}
    nothing = dataclasses.replace(index, shards=(), **empty)
    cells = cells_of(card_of(dataclasses.replace(layout, shards=()), nothing, MIT))
    told = {"images": "0", "image ids": "none", "shards": "0", "bytes of the shards": "0 (0 bytes)"}
    assert told.items() <= dict(pairwise(cells)).items()


def test_a_probe_is_listed_where_there_is_one(store):
    layout, index = open_store(store.root)
    assert "probe.safetensors" not in card_of(layout, index, MIT)
    with_probe = dataclasses.replace(index, probe_sha256="0" * 64)
    assert "probe.safetensors" in card_of(layout, with_probe, MIT)


@pytest.mark.parametrize(
    ("count", "category"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (9999, "1K<n<10K"),
        (123_287, "100K<n<1M"),
        (10**6, "1M<n<10M"),
        (10**12, "n>1T"),
    ],
)
def test_a_size_has_the_hubs_category(count, category):
    assert _size_category(count) == category


def test_reading_takes_four_lines_each_and_names_the_repository(store):
    settings = CardSettings(license="mit", repository="me/tiny-features")
    card = card_of(*open_store(store.root), settings)
    blocks = re.findall(r"```python\n(.*?)```", card, re.S)
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "card", "exec")
        assert len([line for line in block.splitlines() if line]) <= 4
        assert "me/tiny-features" in block
    assert sorted(store.names)[0] in blocks[1]
    assert "<owner>/<name>" not in card
    assert "hf://datasets/<owner>/<name>" in card_of(*open_store(store.root), MIT)


# Texts of others


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_text_of_the_command_line_is_a_text_to_yaml_and_markdown(store, text):
    name = f"x{text}"
    card = card_of(*open_store(store.root), CardSettings(license="mit", name=name, images=text))
    for read in (yaml.safe_load, YAML(typ="safe", pure=True).load):
        data = read(head_of(card))
        assert (data["license"], data["pretty_name"]) == ("mit", printable(name))
        assert len(data) == 6
    assert cells_of(card)[0] == printable(name)
    card.encode()


@pytest.mark.parametrize("text", HOSTILE[:-1], ids=ascii)
def test_a_text_of_a_foreign_spec_is_a_text_to_yaml_and_markdown(store, text):
    layout, index = open_store(store.root)
    spec = Spec.external(model=text, about=text, patches=4, width=6, crop=text)
    card = card_of(dataclasses.replace(layout, spec=spec), index, MIT)
    cells = cells_of(card)
    for name in ("model", "about", "crop", "tower"):
        assert cells[cells.index(name) + 1] == printable(text)
    data = yaml.safe_load(head_of(card))
    assert len(data) == 6
    assert all(re.fullmatch(r"[a-z0-9.-]+", tag) for tag in data["tags"])
    html = MarkdownIt("commonmark").enable("table").render(body_of(card))
    assert not re.search(r"<(script|img|a|em|strong)\b", html)


def test_a_tower_whose_name_has_no_letter_gets_no_tag(store):
    layout, index = open_store(store.root)
    spec = Spec.external(model="...", about="x", patches=4, width=6)
    card = card_of(dataclasses.replace(layout, spec=spec), index, MIT)
    assert yaml.safe_load(head_of(card))["tags"] == ["patchcache", "hdf5", "image-features"]


# Settings


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"license": "CC BY 4.0"}, "no identifier of a licence. Common: cc-by-4.0"),
        ({"license": ""}, "no identifier"),
        ({"license": "other"}, "needs one"),
        ({"license": "mit", "license_name": "mine"}, "a name belongs to the licence 'other'"),
        ({"license": "mit", "license_link": "LICENSE"}, "belongs to --license-name"),
        ({"license": "mit", "repository": "features"}, "wanted <owner>/<name>"),
        ({"license": "mit", "repository": 'me/x"); import os; ("'}, "wanted <owner>/<name>"),
    ],
)
def test_settings_that_the_hub_would_not_take_are_refused(settings, why):
    with pytest.raises(SettingsError, match=re.escape(why)):
        CardSettings(**settings)
