"""Command: publishes a store to an fsspec URL, such as s3://bucket/folder, the index last.

A second run sends only what is missing, also after a run that was stopped. The store that the URL
held before is whole until the new one is.
"""

from .cli.command import command_parser, run_guarded
from .remote.upload import upload


def main() -> None:
    """Read the command line and publish."""
    parser = command_parser(__doc__)
    parser.add_argument("root", help="folder or fsspec URL of a store")
    parser.add_argument("url", help="fsspec URL: s3://, gs://, hf://buckets/, file:///, ...")
    arguments = parser.parse_args()
    run_guarded(lambda: print(upload(arguments.root, arguments.url)))


if __name__ == "__main__":
    main()
