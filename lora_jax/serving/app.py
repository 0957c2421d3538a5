"""The HTTP interface: OpenAI's completions, a list of models, a page, health and metrics."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.responses import StreamingResponse as Streaming
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lora_jax.serving.access import Access
from lora_jax.serving.answers import DONE, Answer, event
from lora_jax.serving.asked import Asked, Reader
from lora_jax.serving.body import read_body
from lora_jax.serving.catalogue import Catalogue
from lora_jax.serving.errors import RequestError, failed
from lora_jax.serving.job import Job, Progress
from lora_jax.serving.scheduler import Scheduler
from lora_jax.serving.served import Served

_CLOSED = 499  # what proxies log where the client has left; nobody reads it
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; " + (
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(
    scheduler: Scheduler,
    catalogue: Catalogue,
    reader: Reader,
    routes: Sequence[Route] = (),
    access: Access | None = None,
) -> Starlette:
    """Return the ASGI application.

    Args:
      scheduler: started.
      catalogue: of what is served.
      reader: of requests for completions.
      routes: further ones.
      access: who may ask; everyone who reaches it by default.
    """
    interface = Interface(scheduler, catalogue, reader)
    return Starlette(
        routes=[
            Route("/", interface.page),
            Route("/health", interface.health),
            Route("/metrics", interface.metrics),
            Route("/v1/models", interface.models),
            Route("/v1/models/{name:path}", interface.model),
            Route("/v1/completions", interface.complete, methods=["POST"]),
            Route("/v1/chat/completions", interface.chat, methods=["POST"]),
            *routes,
        ],
        middleware=(access or Access()).middleware(),
        exception_handlers={
            RequestError: _refuse,
            HTTPException: _refuse_http,
            ClientDisconnect: _closed,
            Exception: _fail,
        },
    )


class Interface:
    """The functions behind the routes."""

    def __init__(self, scheduler: Scheduler, catalogue: Catalogue, reader: Reader) -> None:
        self._scheduler, self._catalogue, self._reader = scheduler, catalogue, reader

    async def page(self, request: Request) -> Response:
        """Return the page on which a prompt can be tried."""
        page = resources.files("lora_jax.serving").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    async def health(self, request: Request) -> Response:
        """Return 200, or 503 once the server stops."""
        if self._scheduler.refusing:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Return the counts."""
        running, waiting = self._scheduler.load
        compilations = self._scheduler.rows.compilations
        gauges = {"running": running, "waiting": waiting, "compilations": compilations}
        text = self._scheduler.metrics.text(gauges)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """Return what is served."""
        return JSONResponse({"object": "list", "data": [*map(self._shown, self._catalogue.all())]})

    async def model(self, request: Request) -> Response:
        """Return one of those that are served."""
        return JSONResponse(self._shown(self._catalogue.find(request.path_params["name"])))

    async def complete(self, request: Request) -> Response:
        """Continue texts."""
        return await self._answer(request, chat=False)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, chat=True)

    def _shown(self, one: Served) -> dict[str, Any]:
        base = self._catalogue.all()[0].name
        shown = {"id": one.name, "object": "model", "created": one.created, "owned_by": "lora-jax"}
        more = {"parent": None if one.name == base else base}
        return {**shown, **more, "max_model_len": self._reader.context}

    async def _answer(self, request: Request, chat: bool) -> Response:
        body = await read_body(request)
        asked = await run_in_threadpool(self._reader.read, body, chat)
        if self._catalogue.find(asked.served.name) is not asked.served:
            raise RequestError(
                "the adapter was replaced meanwhile; send the request again", status=409
            )
        course = Course(self._scheduler, asked)
        self._scheduler.submit(course.jobs)
        return EventStream(course) if asked.stream else await course.whole(request)


class Course:
    """The jobs of a request, and their reports in the order in which they are made."""

    def __init__(self, scheduler: Scheduler, asked: Asked) -> None:
        loop, self._scheduler = asyncio.get_running_loop(), scheduler
        self.answer = Answer(asked)
        self._reports: asyncio.Queue[tuple[int, Progress]] = asyncio.Queue()

        def report(index: int, progress: Progress) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self._reports.put_nowait, (index, progress))

        self.jobs: list[Job] = asked.jobs(report)

    def cancel(self) -> None:
        """Free the rows of the jobs that are not done."""
        self._scheduler.cancel(self.jobs)

    async def events(self) -> AsyncIterator[str]:
        """Yield the answer as it is made, as the events of a stream."""
        yield self.answer.opening()
        try:
            async for text in self._pieces():
                if text:
                    yield text
            yield self.answer.closing()
        except RequestError as error:
            yield event(error.body()) + DONE

    async def whole(self, request: Request) -> Response:
        """Return the answer when it is complete, or stop when the client has left."""
        work = asyncio.ensure_future(self._all())
        left = asyncio.ensure_future(_disconnected(request.receive))
        try:
            await asyncio.wait([work, left], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return JSONResponse(work.result())
        finally:
            self.cancel()
            work.cancel()
            left.cancel()

    async def _all(self) -> dict[str, Any]:
        async for _ in self._pieces():
            pass
        return self.answer.whole()

    async def _pieces(self) -> AsyncIterator[str]:
        while not self.answer.done:
            index, progress = await self._reports.get()
            if progress.error:
                raise progress.error
            yield self.answer.add(index, progress)


class EventStream(Streaming):
    """A stream of events, whose jobs are cancelled when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, course: Course) -> None:
        super().__init__(course.events(), headers={"Cache-Control": "no-cache"})
        self._course = course

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._course.cancel()


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    wait = error.retry_after
    headers = None if wait is None else {"Retry-After": str(wait)}
    return JSONResponse(error.body(), error.status, headers)


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    body = RequestError(what, status=error.status_code).body()
    return JSONResponse(body, error.status_code, error.headers)


async def _closed(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLOSED)


async def _fail(request: Request, error: Exception) -> Response:  # uvicorn logs the traceback
    return await _refuse(request, failed(error))
