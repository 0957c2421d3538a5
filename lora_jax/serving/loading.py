"""Load and unload adapters while the server runs, by the requests that vLLM has for it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lora_jax.core.errors import LoraError
from lora_jax.core.foreign import shown, shown_value
from lora_jax.models.text.tokenizer import Tokenizer
from lora_jax.serving.body import read_body
from lora_jax.serving.catalogue import Catalogue
from lora_jax.serving.errors import RequestError
from lora_jax.serving.fields import Fields
from lora_jax.serving.rows import BASE
from lora_jax.serving.scheduler import Scheduler
from lora_jax.serving.served import Served

_NAME, _PATH = "lora_name", "lora_path"


@dataclass(frozen=True)
class Loaded:
    """An adapter that was read from its files.

    Attributes:
      overlay: its factors.
      tokenizer, ends: as in `Served`.
    """

    overlay: Any
    tokenizer: Tokenizer
    ends: frozenset[int]


class Loading:
    """The functions behind the routes.

    Args:
      scheduler: of the jobs.
      catalogue: of what is served.
      load: reads an adapter; raises `LoraError`.
    """

    def __init__(
        self, scheduler: Scheduler, catalogue: Catalogue, load: Callable[[Path], Loaded]
    ) -> None:
        self._scheduler, self._catalogue, self._read = scheduler, catalogue, load
        self._one_at_a_time = asyncio.Lock()

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
        ]

    async def load(self, request: Request) -> Response:
        """Load an adapter from the server's own disk, and serve it under a name."""
        fields = Fields(await read_body(request))
        fields.refuse_others((_NAME, _PATH), ())
        name, path = fields.text(_NAME), Path(fields.text(_PATH))
        async with self._one_at_a_time:
            if name in self._catalogue:
                raise RequestError(
                    f"the name {shown_value(name)} is already used; unload that adapter first, "
                    "or choose another name",
                    param=_NAME,
                )
            try:
                loaded = await run_in_threadpool(self._read, path)
                slot = await asyncio.wrap_future(
                    self._scheduler.call(lambda: self._place(loaded.overlay))
                )
            except LoraError as error:
                said = shown("; ".join(str(error).splitlines()), most=1000)
                raise RequestError(said, param=_PATH, code="adapter_not_loaded") from None
            self._catalogue.add(Served(name, loaded.tokenizer, loaded.ends, slot))
        return JSONResponse({"id": name, "object": "model", "loaded": True})

    async def unload(self, request: Request) -> Response:
        """Serve an adapter no longer; requests that use it finish."""
        fields = Fields(await read_body(request))
        fields.refuse_others((_NAME,), ())
        name = fields.text(_NAME)
        async with self._one_at_a_time:
            if self._catalogue.find(name).slot == BASE:
                raise RequestError("the base cannot be unloaded", param=_NAME)
            self._catalogue.remove(name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    def _place(self, overlay: Any) -> int:
        """Put an adapter into a slot that no request uses, in the scheduler's thread."""
        used = self._scheduler.slots_in_use()
        free = [slot for slot in self._catalogue.spare if slot not in used]
        if not free:
            raise RequestError(
                "all slots for adapters are in use; unload one, and wait for its requests to end",
                status=503,
                kind="overloaded_error",
                code="adapter_slots_full",
                retry_after=1,
            )
        self._scheduler.rows.set_adapter(free[0], overlay)
        return free[0]
