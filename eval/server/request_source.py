"""Says whether a request comes from the served page itself, and not from another web page."""

from starlette.datastructures import Headers

from eval.server.refusal import Refusal

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
HTTP_PORT = 80


class Sources:
    """The names under which this server is reached."""

    def __init__(self, port: int, share_host: str | None = None) -> None:
        """Take the names of this machine at a port, and that of a public link."""
        ports = [f":{port}", ""] if port == HTTP_PORT else [f":{port}"]
        self._hosts = {name + end for name in LOOPBACK for end in (f":{port}", "")}
        self._origins = {f"http://{name}{end}" for name in LOOPBACK for end in ports}
        self._share_host = share_host
        if share_host is not None:
            self._hosts.add(share_host)
            self._origins.add(f"https://{share_host}")

    def check(self, headers: Headers, *, opens_page: bool) -> None:
        """Let a request pass.

        Args:
            headers: Of the request.
            opens_page: Whether it asks for the page as such, to which others may link.

        Raises:
            Refusal: It names another host, or another web page sends it.
        """
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            raise Refusal(403, f"This server answers at {', '.join(sorted(self._origins))} only.")
        if len(origins) > 1 or not self._origins.issuperset(map(str.lower, origins)):
            raise Refusal(403, "Other web pages cannot use this server.")
        # Browsers send no Origin with pictures, frames and links.
        follows_link = opens_page and headers.get("sec-fetch-dest") == "document"
        if (
            headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
            and not follows_link
        ):
            raise Refusal(403, "Other web pages cannot use this server.")

    def is_share(self, headers: Headers) -> bool:
        """Return whether a request that passed came through the public link."""
        return headers["host"].lower() == self._share_host
