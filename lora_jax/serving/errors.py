"""What is wrong with a request, in the form that OpenAI's clients read."""

from typing import Any


class RequestError(Exception):
    """A request that is refused or has failed.

    Attributes:
      status: the HTTP status.
      message: what is wrong, and what to do.
      kind: OpenAI's `type`.
      param: the field of the request, if it is one.
      code: OpenAI's `code`, a word for programs.
      retry_after: seconds after which to try again, if that may help.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.kind = message, status, kind
        self.param, self.code, self.retry_after = param, code, retry_after

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the answer."""
        fields = {"message": self.message, "type": self.kind, "param": self.param}
        return {"error": {**fields, "code": self.code}}


def overloaded(waiting: int, most: int) -> RequestError:
    """Return the error for a request that finds the queue full."""
    return RequestError(
        f"the queue is full: {waiting} of {most} requests are waiting; try again later",
        status=503,
        kind="overloaded_error",
        code="queue_full",
        retry_after=1,
    )


def stopping() -> RequestError:
    """Return the error for a request that a server which stops will not answer."""
    return RequestError(
        "the server is stopping; send the request to another one, or again after its restart",
        status=503,
        kind="overloaded_error",
        code="server_stopping",
        retry_after=5,
    )


def failed(error: BaseException) -> RequestError:
    """Return the error for a request that an exception has ended."""
    return RequestError(
        f"the server failed on this request ({type(error).__name__}); its log says more",
        status=500,
        kind="server_error",
        code="internal_error",
    )
