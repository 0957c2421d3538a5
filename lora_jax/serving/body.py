"""Read the body of a request."""

from starlette.requests import Request

from lora_jax.serving.errors import RequestError

MOST_BYTES = 4 * 2**20


async def read_body(request: Request) -> bytes:
    """Return the body of a request, if it is JSON and not too large.

    Raises:
      RequestError: it is something else.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            "the request needs the header Content-Type: application/json", status=415
        )
    found = bytearray()
    async for piece in request.stream():
        found += piece
        if len(found) > MOST_BYTES:
            raise RequestError(f"the body has more than {MOST_BYTES:,} bytes", status=413)
    return bytes(found)
