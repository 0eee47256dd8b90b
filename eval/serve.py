"""Command: serves a web page for conversations with a finished run, on this machine only.

    python -m eval.serve --run runs/finetune [--port 7860] [--share]

Each conversation is about one picture. A run of stage 1 only writes captions. The page loads
nothing from the network; only --share opens it to others. Ctrl-C and SIGTERM stop the server with
exit code 0.
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
from eval.chat.conversation import ChatHandlers
from eval.chat.encoder import RunEncoder
from eval.chat.examples import validation_pictures
from eval.chat.page import build_page
from eval.runs import load_run, open_run
from eval.server.gateway import Gateway
from eval.server.pictures import MAX_UPLOAD_BYTES, PagePictures
from eval.server.request import AllowedSources
from eval.server.web_server import HOST, WebServer, listen
from workspace.errors import StageError

NUM_EXAMPLES = 5
MAX_CONVERSATIONS = 100
"""Gradio forgets the oldest ones beyond that."""
MAX_WAITING = 20
"""Calls that wait for the model; further ones are refused."""
CSS = "footer {display: none !important}"


def serve(arguments: argparse.Namespace) -> None:
    """Serve the page until it is interrupted."""
    with listen(arguments.port) as listener, ScratchFolder() as folder:
        configure_gradio_offline(folder / "gradio")
        run = open_run(arguments.run)
        encoder = RunEncoder(run)
        # A wrong vision tower is refused now instead of at the first picture.
        encoder.load()
        trained = load_run(run)
        pictures = PagePictures(folder / "uploads")
        handlers = ChatHandlers(trained, encoder, pictures)
        page = build_page(handlers, validation_pictures(trained.params, folder, NUM_EXAMPLES))
        # Gradio has copied the examples into its own folder, and shows the copies.
        pictures.add_examples(path for path in (folder / "gradio").rglob("*") if path.is_file())
        share_host = open_tunnel(arguments.port) if arguments.share else None
        sources = AllowedSources(arguments.port, share_host)
        app = Gateway(make_app(page), page, pictures, sources, arguments.port)
        server = WebServer(app, listener)
        try:
            server.start()
            print(f"serve: {server.address}", flush=True)
            if share_host is not None:
                print(f"serve: https://{share_host}/ is open to others", flush=True)
            server.wait(pictures.remove_old)
        except KeyboardInterrupt:
            # Ctrl-C and SIGTERM both arrive here.
            ignore_interrupts()
        finally:
            handlers.close()
            page.close(verbose=False)
            server.stop()


def configure_gradio_offline(folder: Path) -> None:
    """Disable Gradio's analytics, and set the folder for its copies of files."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder)}
    # Set at Gradio's import to a folder in /tmp that another user may own.
    gradio.routes.DEFAULT_TEMP_DIR = str(folder)


def make_app(page: gr.Blocks) -> FastAPI:
    """Return the page as an ASGI application, with Gradio's unused features disabled."""
    # The parser warns about every malformed form, which any client can send.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    page.queue(api_open=False, max_size=MAX_WAITING)
    page.state_session_capacity = MAX_CONVERSATIONS
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
    # `page.close` ends the open connections of the application in `page.app`.
    (page.app,) = (route.app for route in app.routes if isinstance(route, Mount))
    return app


def open_tunnel(port: int) -> str:
    """Open a public link to a port through Gradio's tunnel service; return the link's host.

    Raises:
        StageError: The service cannot be reached.
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
