"""Read the body of a request."""

import asyncio

from starlette.requests import Request

from lora_jax.serving.errors import RequestError

MOST_BYTES = 4 * 2**20
LONGEST = 60  # seconds that a body may take


async def read_body(request: Request) -> bytes:
    """Return the body of a request, if it is JSON and not too large.

    Raises:
      RequestError: it is something else, or does not arrive.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            "the request needs the header Content-Type: application/json", status=415
        )
    found = bytearray()
    try:
        async with asyncio.timeout(LONGEST):
            async for piece in request.stream():
                found += piece
                if len(found) > MOST_BYTES:
                    raise RequestError(f"the body has more than {MOST_BYTES:,} bytes", status=413)
    except TimeoutError:
        raise RequestError(
            f"the body did not arrive within {LONGEST} seconds; send it faster", status=408
        ) from None
    return bytes(found)
