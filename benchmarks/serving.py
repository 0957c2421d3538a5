"""The server under load: `python -m benchmarks.serving --help`.

A server of `lora-jax serve` in this process, on a port of this machine, asked over HTTP by as many
clients as a row of the table says. Prompts, lengths, samplings and adapters are mixed; each request
is a stream, so that the first token is timed too. No answer may be lost.
"""

import argparse
import concurrent.futures
import dataclasses
import http.client
import json
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import lora_jax as lora
from benchmarks.report import versions
from lora_jax.cli import sources
from lora_jax.models.pretrained import Pretrained
from lora_jax.serving.app import make_app
from lora_jax.serving.asked import Reader
from lora_jax.serving.catalogue import Catalogue
from lora_jax.serving.rows import Rows
from lora_jax.serving.scheduler import Scheduler
from lora_jax.serving.served import Served
from lora_jax.serving.server import Server, listen

CONFIG = lora.LoraConfig(rank=16, targets=["query/kernel", "value/kernel"])
ADAPTERS = (1, 8)
CLIENTS = (1, 8, 32)
CONTEXT = 128
WORDS = ("the", "night", "is", "long", "and", "wind", "comes", "from", "sea", "knows", "no", "king")
PATIENCE = 300  # seconds


@dataclasses.dataclass(frozen=True)
class Request:
    """One of the requests of a load."""

    model: str
    prompt: str
    most: int
    temperature: float

    def body(self) -> bytes:
        """Return what is sent."""
        asked = {"model": self.model, "prompt": self.prompt, "max_tokens": self.most}
        more = {"temperature": self.temperature, "seed": 0, "stream": True}
        return json.dumps({**asked, **more, "stream_options": {"include_usage": True}}).encode()


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came back: seconds to the first token and to the last, and the number of tokens.

    The number is None where the answer was lost.
    """

    first: float = 0.0
    last: float = 0.0
    tokens: int | None = None


def requests(count: int, adapters: int, tokens: int) -> list[Request]:
    """Return requests of mixed lengths, a third of them sampled."""
    rng = np.random.default_rng(0)
    return [
        Request(
            f"adapter-{n % adapters}",
            " ".join(rng.choice(WORDS, int(rng.integers(3, 60)))),
            int(rng.integers(tokens // 2, tokens + 1)),
            0.7 * (n % 3 == 0),
        )
        for n in range(count)
    ]


def ask(address: str, request: Request) -> Answer:
    """Send a request, and read its stream to the end."""
    start, first, usage, last = time.perf_counter(), 0.0, None, b""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", request.body(), headers)
        answer = connection.getresponse()
        for line in answer if answer.status == 200 else ():
            if line.startswith(b"data: "):
                first, last = first or time.perf_counter() - start, line
                if b'"usage"' in line:
                    usage = json.loads(line[6:])["usage"]
    except OSError:
        return Answer()
    finally:
        connection.close()
    if usage is None or last.strip() != b"data: [DONE]":
        return Answer()
    return Answer(first, time.perf_counter() - start, usage["completion_tokens"])


def run_load(address: str, load: Sequence[Request], clients: int) -> tuple[list[Answer], float]:
    """Return the answers to a load by so many clients at a time, and the seconds of all."""
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        answers = [*pool.map(lambda request: ask(address, request), load)]
    return answers, time.perf_counter() - start


def make_stack(model: Pretrained, count: int) -> Any:
    """Return adapters that change what the model says."""
    ids = jnp.ones((1, 8), jnp.int32)

    @jax.jit
    def overlay(key: jax.Array) -> Any:
        made = lora.init(key, model.params, CONFIG, model.apply, ids)
        return jax.tree.map(lambda x: x + 0.01 if x.ndim > 1 else x, lora.split(made)[1])

    return lora.stack([overlay(key) for key in jax.random.split(jax.random.key(0), count)])


@contextmanager
def serving(model: Pretrained, tokenizer: Any, adapters: int, rows: int) -> Iterator[Server]:
    """Start a server, warm, of so many adapters and rows."""
    made = Rows(model, make_stack(model, adapters), rows, CONTEXT)
    made.warm_up()
    names = ["base", *(f"adapter-{n}" for n in range(adapters))]
    served = [Served(name, tokenizer, frozenset(), n - 1) for n, name in enumerate(names)]
    catalogue = Catalogue(served)
    scheduler = Scheduler(made, waiting=10_000)
    reader = Reader(catalogue.find, CONTEXT, model.config.vocab_size)
    app = make_app(scheduler, catalogue, reader)
    server = Server(app, scheduler, listen("127.0.0.1", 0))
    server.start()
    stop = threading.Thread(target=server.stop, args=(PATIENCE,))
    try:
        yield server
    finally:
        stop.start()
        stop.join()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--model", default=sources.SMOLLM2, help="as of the lora-jax commands")
    parser.add_argument("--requests", type=int, default=96, help="per row (default 96)")
    parser.add_argument("--tokens", type=int, default=24, help="at most, per answer (default 24)")
    parser.add_argument("--rows", type=int, default=8, help="of the batch (default 8)")
    parser.add_argument("--adapters", type=int, nargs="+", default=ADAPTERS)
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    args = parser.parse_args()
    console = Console(width=max(Console().width, 124))  # rich assumes 80 columns in a pipe
    found = sources.find_model(args.model)
    model, tokenizer = sources.load_model(found, "float32"), sources.tokenizer_of(found)
    table = Table(title=f"{args.model}, rank {CONFIG.rank} on q and v, {args.rows} rows")
    headings = ("adapters", "clients", "requests", "failures", "first token, s", "p95", "answer, s")
    for heading in (*headings, "p95", "tokens/s", "compiled"):
        table.add_column(heading, justify="right")
    for adapters in args.adapters:
        with serving(model, tokenizer, adapters, args.rows) as server:
            for clients in args.clients:
                # One client alone takes as long as it takes: a third of the requests is enough.
                count = args.requests // 3 if clients == 1 else args.requests
                load = requests(count, adapters, args.tokens)
                table.add_row(*measured(server, load, clients, adapters))
    table.caption = f"{versions('starlette', 'uvicorn')}, median and 95th percentile"
    console.print(table)


def measured(server: Server, load: Sequence[Request], clients: int, adapters: int) -> list[str]:
    """Return the cells of a row of the table."""
    before = server.scheduler.rows.compilations
    answers, seconds = run_load(server.url.removeprefix("http://"), load, clients)
    compiled = server.scheduler.rows.compilations - before
    done = [x for x in answers if x.tokens is not None]
    cells = [adapters, clients, len(answers), len(answers) - len(done)]
    for times in ([x.first for x in done], [x.last for x in done]):
        cells += [f"{statistics.median(times):.2f}", f"{statistics.quantiles(times, n=20)[-1]:.2f}"]
    return [*map(str, cells), f"{sum(x.tokens or 0 for x in done) / seconds:.1f}", str(compiled)]


if __name__ == "__main__":
    main()
