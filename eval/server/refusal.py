"""The exception for a request that the server refuses."""


class Refusal(Exception):
    """Ends a request with an HTTP status and a line of text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
