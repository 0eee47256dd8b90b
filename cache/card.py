"""Command: writes the card of a store, which is the README.md of its repository on the Hub.

The card is written beside the store, not into it: a store can be an output of DVC, to which any
other file is a change. `hf upload` puts both into one repository. The licence is asked for, because
no file of a store says what the images' owners allow.
"""

import argparse
import json
import os
from pathlib import Path

from .card_text import LICENSES, OTHER, TAGS, CardSettings, card_of
from .cli.command import command_parser, run_guarded
from .errors import SettingsError
from .files.atomic import write_text
from .layout import StoreLayout

CARD = f"\ntags: {json.dumps(TAGS)[:-1]}".encode()
"""What the head of every card holds, by which a card is known."""

MAX_HEAD_BYTES = 1 << 16
"""Bytes in which the head of a card is looked for."""


def write_card(root: str, settings: CardSettings, target: Path | None) -> None:
    """Write the card of a store.

    Args:
        root: Folder or fsspec URL of the store.
        settings: What the card says beside.
        target: The card; by default beside the store's folder, as `<folder>.card.md`.

    Raises:
        SettingsError: The target is no Markdown file, has no default, or is another file of the
            user.
        PatchcacheError: Not a whole store.
    """
    layout, index = StoreLayout.open(root, partial=False)
    if target is None:
        if layout.location.is_remote:
            raise SettingsError(f"{root}: is not on this machine. Name the card with --out.")
        folder = Path(root).resolve()
        target = folder.with_name(f"{folder.name}.card.md")
    if target.suffix != ".md":
        raise SettingsError(f"--out {target}: wanted the name of a Markdown file, such as card.md.")
    _check_replaceable(target)
    write_text(target, card_of(layout, index, settings))
    print(f"{target}: upload it as README.md, beside the files of the store")


def _check_replaceable(target: Path) -> None:
    """Refuse to replace what is no card of a store, such as the README.md of a project.

    Raises:
        SettingsError: There is another file, a link or a folder.
    """
    if not os.path.lexists(target):
        return
    if not target.is_symlink() and target.is_file():
        with target.open("rb") as file:
            if CARD in file.read(MAX_HEAD_BYTES):
                return
    raise SettingsError(
        f"{target}: exists, and is no card of a store. Move it away, or name another file with "
        f"--out."
    )


def main() -> None:
    """Read the command line and write the card."""
    parser = command_parser(__doc__)
    parser.add_argument("root", help="folder or fsspec URL of a store")
    parser.add_argument("--license", help=f"identifier of a licence, of {LICENSES}")
    parser.add_argument("--license-name", help=f"name of the licence, if it is {OTHER!r}")
    parser.add_argument("--license-link", help="where its text is: a URL or LICENSE")
    parser.add_argument("--name", help="title of the card")
    parser.add_argument("--images", help="what the images are, such as 'COCO 2017'")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="the repository on the Hub")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the card (default: beside the store, <store>.card.md)",
    )
    arguments = parser.parse_args()
    run_guarded(lambda: write_card(arguments.root, settings_of(arguments), arguments.out))


def settings_of(arguments: argparse.Namespace) -> CardSettings:
    """Return the settings in a command line."""
    return CardSettings(
        license=arguments.license,
        license_name=arguments.license_name,
        license_link=arguments.license_link,
        name=arguments.name,
        images=arguments.images,
        repository=arguments.repo,
    )


if __name__ == "__main__":
    main()
