"""Opens pages in the Chromium of the system, and notes what they ask for and complain about."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Visit:
    """A page in the browser."""

    page: object
    requests: list[str] = field(default_factory=list)
    """Addresses that the page asked for, its own among them."""
    complaints: list[str] = field(default_factory=list)
    """Warnings and errors of the console, and errors of scripts."""


@contextmanager
def chromium():
    """Start the browser; without one the test is skipped, and fails where CI is set."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        reason = f"no browser: none of {', '.join(NAMES)} is on PATH"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visited(browser, address, *, width=1280, **settings) -> Iterator[Visit]:
    """Open an address in a window of its own; `settings` are those of Playwright's context."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
    context.set_default_timeout(10_000)
    visit = Visit(context.new_page())
    visit.page.on("request", lambda request: visit.requests.append(request.url))
    visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    visit.page.on(
        "console",
        lambda said: visit.complaints.append(said.text) if said.type != "log" else None,
    )
    visit.page.goto(address)
    yield visit
    context.close()
