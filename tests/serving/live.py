"""A server on a port of this machine, with the small decoder and two adapters."""

import contextlib
import threading

import lora_jax as lora
from lora_jax.core.errors import AdapterFileError
from lora_jax.models.text.byte_tokenizer import byte_tokenizer
from lora_jax.serving.app import make_app
from lora_jax.serving.asked import Reader
from lora_jax.serving.catalogue import Catalogue
from lora_jax.serving.loading import Loaded, Loading
from lora_jax.serving.scheduler import Scheduler
from lora_jax.serving.served import Served
from lora_jax.serving.server import Server, listen
from tests.serving import small

NAMES = ("base", "law", "french")  # slots -1, 0, 1


def load(path):
    """Read the adapter that is called as one of those in the stack."""
    if path.name not in NAMES[1:]:
        raise AdapterFileError(f"{path}: no such file or directory")
    slot = NAMES.index(path.name) - 1
    return Loaded(lora.unstack(small.stack())[slot], byte_tokenizer(), frozenset())


@contextlib.contextmanager
def serving(rows=None, waiting=64, access=None):
    """Yield a server and its scheduler."""
    tokenizer = byte_tokenizer()
    served = [Served(x, tokenizer, frozenset(), slot) for slot, x in enumerate(NAMES, -1)]
    catalogue = Catalogue(served, spare=[len(served) - 1])
    scheduler = Scheduler(rows or small.rows(), waiting)
    loading = Loading(scheduler, catalogue, load)
    reader = Reader(catalogue.find, small.CONTEXT, len(tokenizer))
    app = make_app(scheduler, catalogue, reader, loading.routes(), access)
    server = Server(app, scheduler, listen("127.0.0.1", 0))
    server.start()
    stop = threading.Thread(target=server.stop, args=(20,))
    try:
        yield server
    finally:
        stop.start()
        stop.join()
