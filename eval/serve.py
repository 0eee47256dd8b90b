"""Command: serves a page on which a finished run is asked about pictures, to this machine alone.

    python -m eval.serve --run runs/finetune [--port 7860] [--share]

A conversation is about one picture, and a new picture begins a new one. A run of stage 1 only
captions. The page fetches nothing from any network; only --share opens it to others. Ctrl-C or
SIGTERM end the server, which then exits with 0.
"""

import argparse
import logging
import os
import secrets
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr
import gradio.routes
from fastapi import FastAPI
from gradio.networking import setup_tunnel
from starlette.routing import Mount

from cache.cli.command import command_parser, run_guarded
from cache.cli.interrupts import ignore_interrupts
from cache.files.foreign import reading_foreign_file
from cache.files.scratch import ScratchFolder
from eval.chat.conversation import Host
from eval.chat.encoder import Vision
from eval.chat.examples import validation_pictures
from eval.chat.page import build_page
from eval.runs import load_run, open_run
from eval.server.gateway import Gateway
from eval.server.page_pictures import MAX_UPLOAD_BYTES, PagePictures
from eval.server.request_source import Sources
from eval.server.web_server import HOST, WebServer, listen
from workspace.errors import StageError

EXAMPLES = 5
VISITORS = 100
"""So many conversations are remembered."""
MAX_WAITING = 20
"""Calls that wait for the model."""
CSS = "footer {display: none !important}"


def serve(arguments: argparse.Namespace) -> None:
    """Serve the page until it is interrupted."""
    with listen(arguments.port) as listener, ScratchFolder() as folder:
        configure_gradio_offline(folder / "gradio")
        run = open_run(arguments.run)
        vision = Vision(run)
        # Another tower than the run's is found now, and not by the first visitor.
        vision.load()
        trained = load_run(arguments.run, run)
        pictures = PagePictures(folder / "uploads")
        host = Host(trained, vision, pictures)
        page = build_page(host, validation_pictures(trained.params, folder, EXAMPLES))
        # Gradio shows copies of its own.
        pictures.add_examples(path for path in (folder / "gradio").rglob("*") if path.is_file())
        share_host = open_tunnel(arguments.port) if arguments.share else None
        sources = Sources(arguments.port, share_host)
        app = Gateway(make_app(page), page, pictures, sources, arguments.port)
        server = WebServer(app, listener)
        try:
            server.start()
            print(f"serve: {server.address}", flush=True)
            if share_host is not None:
                print(f"serve: https://{share_host}/ is open to others", flush=True)
            server.wait(pictures.remove_old)
        except KeyboardInterrupt:
            # The only way in which a server ends.
            ignore_interrupts()
        finally:
            host.close()
            page.close(verbose=False)
            server.stop()


def configure_gradio_offline(folder: Path) -> None:
    """Disable Gradio's analytics, and set the folder for the files that it copies."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder)}
    # Read when it was imported, for a folder that it makes: one that another user may own.
    gradio.routes.DEFAULT_TEMP_DIR = str(folder)


def make_app(page: gr.Blocks) -> FastAPI:
    """Return the page as an application, without what it does not use of Gradio."""
    # It warns of every form that a client gets wrong.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    page.queue(api_open=False, max_size=MAX_WAITING)
    page.state_session_capacity = VISITORS
    app = FastAPI(openapi_url=None)
    gr.mount_gradio_app(
        app,
        page,
        "/",
        root_path="",
        show_error=False,
        max_file_size=MAX_UPLOAD_BYTES,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        css=CSS,
    )
    # The page, when it is closed, ends the open connections of the application that it knows.
    (page.app,) = (route.app for route in app.routes if isinstance(route, Mount))
    return app


def open_tunnel(port: int) -> str:
    """Open a public link to a port, and return the link's host.

    Raises:
        StageError: There is no way to the service that gives such links.
    """

    def refuse(why: str) -> StageError:
        return StageError(f"no public link: {why} Check the network, or leave out --share.")

    with reading_foreign_file(refuse):
        address = setup_tunnel(HOST, port, secrets.token_urlsafe(32), None, None)
    return str(urlsplit(address).netloc)


def _port(text: str) -> int:
    if not 1 <= int(text) <= 65535:
        raise ValueError
    return int(text)


def main() -> None:
    """Read the command line and serve."""
    parser = command_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run: runs/finetune")
    parser.add_argument("--port", type=_port, default=7860, help="default: %(default)s")
    parser.add_argument("--share", action="store_true", help="open it to others, by a public link")
    arguments = parser.parse_args()
    run_guarded(lambda: serve(arguments))


if __name__ == "__main__":
    main()
