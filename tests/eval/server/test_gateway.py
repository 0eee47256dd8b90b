"""The answers of the served page to raw HTTP requests."""

import json
import os
import socket
from urllib.parse import quote

import pytest

from eval.server.pictures import MAX_UPLOAD_BYTES
from tests.eval.picture_world import make_picture_world
from tests.eval.server.served_page import MAX_UPLOADS, Client, served_page
from tests.pipeline.conftest import draw_jpeg

pytestmark = pytest.mark.slow("starts the served page")

EVIL = "http://evil.example"
ANSWERED = {
    ("GET", "/"), ("HEAD", "/"), ("GET", "/config"), ("GET", "/favicon.ico"), ("GET", "/theme.css"),
    ("GET", "/gradio_api/app_id"), ("GET", "/gradio_api/info"), ("GET", "/gradio_api/file=x"),
    ("HEAD", "/gradio_api/file=x"), ("GET", "/gradio_api/heartbeat/word"),
    ("GET", "/gradio_api/upload_progress"), ("POST", "/gradio_api/queue/join"),
    ("POST", "/gradio_api/upload"), ("GET", "/gradio_api/queue/data"), ("GET", "/static/x"),
    ("GET", "/assets/x"),
}  # fmt: skip
"""Gradio's routes that the page needs."""


@pytest.fixture(scope="module")
def served(tmp_path_factory, phi_dir):
    root = make_picture_world(tmp_path_factory.mktemp("picture_world"), phi_dir).workspace.root
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with served_page(root, port, tmp_path_factory.mktemp("serve")) as served:
        yield served


@pytest.fixture
def client(served):
    """A visitor with a browser's cookie."""
    client = Client(served)
    assert client.send("GET", "/").status_code == 200
    return client


@pytest.fixture(autouse=True)
def _quiet(served):
    """No request makes the server write to its terminal."""
    before = served.errors.read_text()
    yield
    assert served.errors.read_text() == before


# Who may ask


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"}, {"Host": "127.0.0.1:1"}, {"Origin": EVIL}, {"Origin": "null"},
        {"Host": "evil.example", "Origin": EVIL}, {"Sec-Fetch-Site": "cross-site"},
    ],
    ids=str,
)  # fmt: skip
def test_every_address_refuses_other_hosts_and_web_pages(served, client, headers):
    asked = {*served.routes, *((m, "/nothing") for m in ("GET", "POST", "OPTIONS", "PUT"))}
    assert len(asked) > 80
    for method, path in sorted(asked):
        answer = client.send(method, path, headers=headers)
        assert answer.status_code == 403, (method, path)
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_preflight_requests_of_other_pages_are_refused(client):
    asks = {"Origin": EVIL, "Access-Control-Request-Method": "POST"}
    answer = client.send("OPTIONS", "/gradio_api/upload", headers=asks)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


def test_forwarding_headers_change_nothing(client):
    headers = {"X-Forwarded-Host": "evil.example", "X-Gradio-Server": EVIL, "Forwarded": EVIL,
               "X-Forwarded-Proto": "https", "X-Forwarded-For": "6.6.6.6"}  # fmt: skip
    assert client.send("GET", "/", headers=headers).text == client.send("GET", "/").text


def test_a_request_without_a_host_is_refused(served):
    port = int(served.address.rstrip("/").rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 403")


# What there is to ask for


def test_routes_that_the_page_does_not_need_are_not_found(served, client):
    absent = set(served.routes) - ANSWERED
    assert ANSWERED - {("HEAD", "/gradio_api/file=x")} <= set(served.routes)
    assert len(absent) > 50
    for method, path in sorted(absent):
        for options in ({}, {"json": {"data": [], "session_hash": "word"}}):
            answer = client.send(method, path, **options)
            assert (answer.status_code, answer.text) == (
                404,
                "" if method == "HEAD" else "not found",
            )


@pytest.mark.parametrize(
    "path",
    [
        "/static/../../etc/passwd", "/static/%2e%2e/%2e%2e/routes.py", "/static/%00", "/static/",
        "/assets/..%2f..%2findex.html", "/static/" + "x" * 5000, "/static//etc/passwd", "//",
        "/%ff", "/gradio_api/file", "/gradio_api/../config", "/?deep_link=x/../y", "/static/img",
        "/config?deep_link=../x", "/gradio_api/queue/data?session_hash=%00", "/theme.css?v=%ff",
        "/gradio_api/heartbeat/", "/gradio_api/heartbeat/a/b",
        "/gradio_api/queue/data?session_hash=" + "x" * 999,
        "/gradio_api/info?page=x&all_endpoints=1",
    ],
)  # fmt: skip
def test_odd_addresses_fail_quietly(client, path):
    for method in ("GET", "POST", "HEAD", "DELETE", "OPTIONS", "PATCH", "TRACE"):
        assert client.send(method, path, data=b"").status_code in (200, 403, 404, 405)


# Pictures


def spellings(served, theirs, folder):
    """Paths of files that the client did not upload, in many spellings, and paths of no file."""
    secret = folder / "secret.jpg"
    secret.write_bytes(draw_jpeg(1))
    link = served.uploads / "link.jpg"
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    return [
        str(secret), os.path.relpath(secret), f"{served.uploads}/../{secret}", f"file://{secret}",
        f"{served.uploads}/{os.path.relpath(secret, served.uploads)}", str(link), str(folder),
        str(folder / "missing.jpg"), "/proc/self/environ", "/etc/passwd", "/", "", ".", "\x00",
        f"http://{served.address}", "https://evil.example/1.jpg", "data:image/png;base64,AAAA",
        theirs, f"{served.example}/", served.example.replace("/gradio/", "/gradio/./"), "x" * 4096,
    ]  # fmt: skip


def test_all_foreign_paths_get_the_same_answer(served, client, tmp_path):
    theirs = Client(served).upload(draw_jpeg(1))
    answers = {}
    for path in spellings(served, theirs, tmp_path):
        for more in ({}, {"meta": {"_type": "gradio.FileData"}}, {"url": path, "orig_name": path}):
            answers[path, *more] = json.dumps(client.begin(path, **more))
    assert len(answers) > 50
    (answer,) = set(answers.values())
    assert "Upload it again" in answer
    assert "Choose a picture first" in client.reply("where"), "nothing was begun"


def test_foreign_paths_are_never_read(served, client, tmp_path):
    theirs = Client(served).upload(draw_jpeg(1))
    answers = set()
    for path in spellings(served, theirs, tmp_path):
        answer = client.send("GET", f"/gradio_api/file={quote(path, safe='')}")
        answers.add((answer.status_code, answer.content))
    assert answers == {(403, b"not allowed")}


def test_own_uploads_and_examples_are_encoded(served, client):
    own = client.upload(draw_jpeg(1))
    for path in (own, served.example):
        client.begin(path)
        assert '"success": true' in client.reply("where")
        assert client.send("GET", f"/gradio_api/file={path}").status_code == 200
    assert client.send("GET", f"/gradio_api/file={own}").content == draw_jpeg(1)


@pytest.mark.parametrize("name", ["x.html", "x.svg", "x.xhtml", "x", "x.jpg.js", "\"'<>\r\n.html"])
def test_an_upload_is_never_a_document(client, name):
    path = client.upload(b"<script>alert(1)</script>", name)
    answer = client.send("GET", f"/gradio_api/file={path}")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == "attachment"
    assert answer.headers["x-content-type-options"] == "nosniff"


# Visitors


def test_a_conversation_belongs_to_one_visitor(served, client):
    client.begin(client.upload(draw_jpeg(1)))
    assert '"success": true' in client.reply("where")
    without_cookie, other_cookie = Client(served), Client(served)
    other_cookie.send("GET", "/")
    for thief in (without_cookie, other_cookie):
        thief.session_hash = client.session_hash
        query = {"session_hash": client.session_hash}
        answer = thief.send("GET", "/gradio_api/queue/data", params=query)
        assert answer.status_code == 404
        assert "Choose a picture first" in thief.reply("what")
    client.call("clear", [None])
    assert '"success": true' in client.reply("where")


# Bodies

PART = b"--x\r\nContent-Disposition: %s\r\n\r\ntext\r\n--x--"


def test_the_number_of_uploads_is_bounded(served, client):
    paths = [client.upload(b"%d" % number) for number in range(MAX_UPLOADS + 5)]
    stored = {str(path) for path in served.uploads.iterdir() if not path.is_symlink()}
    assert stored == set(paths[5:])
    assert client.send("GET", f"/gradio_api/file={paths[0]}").status_code == 403


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_with_any_headers(served, client, chunked):
    before = set(served.uploads.iterdir())
    for path, size in (("upload", MAX_UPLOAD_BYTES + 2**17), ("queue/join", 2**17)):
        body = b"x" * size
        data = (body[start : start + 2**16] for start in range(0, size, 2**16))
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = client.send(
            "POST", f"/gradio_api/{path}", data=data if chunked else body, headers=headers
        )
        assert answer.status_code == 413
    assert set(served.uploads.iterdir()) == before


def test_a_file_a_little_too_large_is_refused(client):
    files = {"files": ("1.jpg", bytes(MAX_UPLOAD_BYTES + 1))}
    assert client.send("POST", "/gradio_api/upload", files=files).status_code == 413


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (None, b""), ("application/json", b"[]"), ("text/plain", b"x"),
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\n--x--"),
        ("multipart/form-data; boundary=x", PART % b"form-data"),
        ("multipart/form-data; boundary=x", PART % b"form-data; name=files"),
        ("multipart/form-data; boundary=x", b"\xff" * 999),
        ("multipart/form-data; boundary=", b"x"),
        ("multipart/form-data; boundary=" + "x" * 999, b"x"),
        ("multipart/form-data; boundary=x; charset=punycode",
         PART % b'form-data; name="files"; filename="\xff"'),
        ("application/x-www-form-urlencoded", b"files=x"),
    ],
)  # fmt: skip
def test_a_form_without_a_file_is_refused(client, content_type, body):
    headers = {} if content_type is None else {"Content-Type": content_type}
    for query in ("", "?upload_id=x"):
        answer = client.send("POST", f"/gradio_api/upload{query}", data=body, headers=headers)
        assert answer.status_code in (200, 400)
        assert answer.status_code == 400 or b"filename" in body


def test_several_files_at_once_are_refused(client):
    files = [("files", (f"{number}.jpg", b"x")) for number in range(2)]
    assert client.send("POST", "/gradio_api/upload", files=files).status_code == 400


# Calls

REPLY = ["where", None, 0, 5]


def test_a_function_that_the_page_does_not_have_is_not_found(served, client):
    example = served.functions["load_example"]
    for index in (-1, 999, 2**70, None, "0", "reply", 1.0, True, [], {}, example):
        assert client.join("reply", REPLY, fn_index=index).status_code == 404
    call = {"data": REPLY, "session_hash": "x", "fn_index": served.functions["reply"]}
    assert client.send("POST", "/gradio_api/run/predict", json=call).status_code == 404


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *(("choose_picture", [value]) for value in ("x", 1, [], {}, {"path": 1}, {"path": None})),
        *(("choose_picture", [{"path": path}]) for path in ("x" * 5000, "\ud800", ["x"])),
        *(("reply", [value, None, 0, 5]) for value in (1, {}, [], "\ud800", "x" * 2001)),
        *(("reply", ["x", None, value, 5]) for value in (-1, 3, "0", None, True, [0], 10**400)),
        *(("reply", ["x", None, 0, value]) for value in (0, -1, 10**9, "5", None, [])),
        ("reply", []), ("reply", ["x"]), ("reply", [*REPLY, 1]), ("reply", {}), ("reply", None),
        ("reply", "four"), ("clear", []),
    ],
)  # fmt: skip
def test_a_call_that_the_page_cannot_make_is_refused(client, name, values):
    assert client.join(name, values).status_code == 400


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
def test_nan_and_infinity_are_refused(served, client, text):
    index = served.functions["reply"]
    body = f'{{"data": ["x", null, {text}, 5], "fn_index": {index}, "session_hash": "x"}}'
    assert client.send("POST", "/gradio_api/queue/join", data=body).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        b"", b"x", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"{", b"[" * 60000, b'{"a":' * 10000,
        b"{}", b'{"data": []}', b'{"fn_index": 1, "data": [null]}',
        *(b'{"fn_index": 1, "data": [null], "session_hash": %s}' % value
          for value in (b"1", b"null", b'""', b'"a-b"', b'"a\\u0000"', b'"../x"', b'["x"]')),
    ],
)  # fmt: skip
def test_malformed_calls_are_refused(client, body):
    for path in ("queue/join", "run/predict"):
        answer = client.send("POST", f"/gradio_api/{path}", data=body)
        assert answer.status_code in (400, 404)


def test_additional_fields_of_a_call_change_nothing(client):
    client.begin(client.upload(draw_jpeg(1)))
    plain = client.call("reply", REPLY)
    client.call("clear", [None])
    odd = client.call(
        "reply", REPLY, trigger_id=999, event_id="x", event_data={"x": 1}, batched=True,
        simple_format=True, oauth_token="x", request={"x": 1}, batch_trigger_ids=[1],
    )  # fmt: skip
    assert odd == plain


def test_a_conversation_sent_by_a_client_is_ignored(client):
    invented = {"patches_PD": [[0.0]], "turns": [["a", "b"]]}
    assert "Choose a picture first" in json.dumps(client.call("reply", ["x", invented, 0, 5]))


def test_a_session_without_calls_has_no_messages(client):
    assert client.send("GET", "/gradio_api/queue/data?session_hash=never").status_code == 404
