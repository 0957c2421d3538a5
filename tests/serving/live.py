"""A server on a port of this machine, with the small decoder and two adapters."""

import contextlib
import threading

from lora_jax.models.text.byte_tokenizer import byte_tokenizer
from lora_jax.serving.app import make_app
from lora_jax.serving.asked import Reader, finder
from lora_jax.serving.scheduler import Scheduler
from lora_jax.serving.served import Served
from lora_jax.serving.server import Server, listen
from tests.serving import small

NAMES = ("base", "law", "french")  # slots -1, 0, 1


@contextlib.contextmanager
def serving(rows=None, waiting=64):
    """Yield a server and its scheduler."""
    tokenizer = byte_tokenizer()
    served = {x: Served(x, tokenizer, frozenset(), slot) for slot, x in enumerate(NAMES, -1)}
    scheduler = Scheduler(rows or small.rows(), waiting)
    reader = Reader(finder(served), small.CONTEXT, len(tokenizer))
    app = make_app(scheduler, lambda: list(served.values()), reader)
    server = Server(app, scheduler, listen("127.0.0.1", 0))
    server.start()
    stop = threading.Thread(target=server.stop, args=(20,))
    try:
        yield server
    finally:
        stop.start()
        stop.join()
