"""Which hosts and origins the served page answers."""

import pytest
from starlette.datastructures import Headers

from eval.server.request import AllowedSources, Refusal

PAGE = "127.0.0.1:7860"


def allowed(sources, *, opens_page=False, **headers):
    raw = [
        (name.replace("_", "-").encode(), value.encode())
        for name, values in headers.items()
        for value in ([values] if isinstance(values, str) else values)
    ]
    try:
        sources.check(Headers(raw=raw), opens_page=opens_page)
    except Refusal:
        return False
    return True


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LocalHost", "[::1]"])
def test_this_machine_is_reached_under_its_own_names(name):
    sources = AllowedSources(7860)
    assert allowed(sources, host=name)
    assert allowed(sources, host=f"{name}:7860", origin=f"http://{name}:7860")
    assert not allowed(sources, host=f"{name}:7861")
    assert not allowed(sources, host=f"{name}:7860", origin=f"http://{name}:7861")
    assert not allowed(sources, host=f"{name}:7860", origin=f"http://{name}"), "that is port 80"
    assert not allowed(sources, host=f"{name}:7860", origin=f"https://{name}:7860")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:7860", "127.0.0.1.evil.example:7860", "localhost.:7860", "",
        "127.0.0.1:7860@evil.example", "127.0.0.1:7860, evil.example", "0.0.0.0:7860",
        ["127.0.0.1:7860", "evil.example"], ["127.0.0.1:7860", "127.0.0.1:7860"], [],
    ],
)  # fmt: skip
def test_every_other_host_is_refused(host):
    assert not allowed(AllowedSources(7860), host=host)


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example", "http://evil.example:7860", "null", "", "file://", "http://",
        "http://127.0.0.1:7860.evil.example", "http://localhost:3000",
        ["http://127.0.0.1:7860", "http://evil.example"],
    ],
)  # fmt: skip
def test_every_other_origin_is_refused(origin):
    assert not allowed(AllowedSources(7860), host=PAGE, origin=origin)


@pytest.mark.parametrize("site", ["cross-site", "same-site", "whatever"])
def test_other_web_pages_may_link_to_the_page_and_nothing_else(site):
    sources = AllowedSources(7860)
    assert allowed(
        sources, host=PAGE, sec_fetch_site=site, sec_fetch_dest="document", opens_page=True
    )
    assert not allowed(
        sources, host=PAGE, sec_fetch_site=site, sec_fetch_dest="iframe", opens_page=True
    )
    assert not allowed(sources, host=PAGE, sec_fetch_site=site, sec_fetch_dest="document")
    assert not allowed(sources, host=PAGE, sec_fetch_site=site, sec_fetch_dest="image")
    assert allowed(sources, host=PAGE, sec_fetch_site="same-origin")


def test_the_host_of_a_public_link_is_allowed_only_with_the_link():
    link = {"host": "abc.gradio.live", "origin": "https://abc.gradio.live"}
    assert allowed(AllowedSources(7860, "abc.gradio.live"), **link)
    assert allowed(AllowedSources(7860, "abc.gradio.live"), host=PAGE)
    assert not allowed(AllowedSources(7860), **link)
    assert not allowed(AllowedSources(7860, "xyz.gradio.live"), **link)


def test_origins_without_a_port_are_allowed_at_port_80():
    assert allowed(AllowedSources(80), host="localhost", origin="http://localhost")
