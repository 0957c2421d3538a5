"""What the clients of a storm do, and how the server may answer."""

import json
import random
import time
from collections.abc import Callable
from typing import Any

from tests.stress.storm.client import Said, connect, head, read, send

Address = tuple[str, int]
#: A deed: it does something, and returns what the server said and the statuses that are right.
Deed = Callable[[Address, random.Random], tuple[Said, set[int]]]
BUSY = 503  # right wherever a request waits for a row
TEXT = {"model": "law", "prompt": "Hello", "max_tokens": 6}


def body(**fields: Any) -> bytes:
    return json.dumps({**TEXT, **fields}).encode()


def any_body(rng: random.Random) -> bytes:
    """Return a request with random options."""
    fields: dict[str, Any] = {"model": rng.choice(["base", "law", "french"])}
    fields |= {"max_tokens": rng.randint(1, 40), "stream": rng.random() < 0.5}
    more = {
        "n": rng.randint(1, 3),
        "temperature": rng.choice([0, 0.7, 2]),
        "top_k": rng.randint(-1, 300),
        "top_p": rng.random(),
        "min_p": rng.random(),
        "frequency_penalty": rng.uniform(-2, 2),
        "presence_penalty": rng.uniform(-2, 2),
        "repetition_penalty": rng.uniform(0.1, 3),
        "logit_bias": {str(rng.randrange(260)): rng.uniform(-100, 100)},
        "logprobs": rng.randint(0, 20),
        "stop": [chr(rng.randrange(32, 500)) for _ in range(3)],
        "prompt": "".join(chr(rng.randrange(1, 900)) for _ in range(rng.randint(1, 8))),
    }
    chosen = rng.sample(sorted(more), rng.randint(0, 5))
    return body(**fields, **{name: more[name] for name in chosen}, seed=rng.randrange(99))


def ask(address: Address, rng: random.Random) -> tuple[Said, set[int]]:
    """Ask twice, again and again while the server is busy: both answers have the same texts."""
    sent, found = any_body(rng), []
    for _ in range(2):
        said = send(address, sent)
        while said.status == BUSY and said.code == "queue_full":
            time.sleep(0.02 + rng.random() / 10)
            said = send(address, sent)
        if said.status != 200:
            return said, {200}
        found.append(said)
    assert found[0].texts == found[1].texts, sent
    return found[1], {200}


def leave(address: Address, rng: random.Random) -> tuple[Said, set[int]]:
    """Leave before, while or after the answer comes."""
    sent = any_body(rng)
    with connect(address) as connection:
        connection.sendall(head(len(sent)) + sent)
        if rng.random() < 0.7:
            connection.recv(rng.choice([1, 100, 1000]))
        time.sleep(rng.random() / 50)
    return Said(), {0}


def leave_unfinished(address: Address, rng: random.Random) -> tuple[Said, set[int]]:
    """Leave in the middle of the request."""
    sent = head(1000) + any_body(rng)
    with connect(address) as connection:
        connection.sendall(sent[: rng.randrange(len(sent))])
    return Said(), {0}


def send_slowly(address: Address, rng: random.Random) -> tuple[Said, set[int]]:
    sent = any_body(rng)
    with connect(address) as connection:
        connection.sendall(head(len(sent)))
        for start in range(0, len(sent), 40):
            connection.sendall(sent[start : start + 40])
            time.sleep(0.02)
        return read(connection), {200, BUSY}


def send_damaged(address: Address, rng: random.Random) -> tuple[Said, set[int]]:
    """Change bytes of a request; what is still one may be answered."""
    sent = bytearray(any_body(rng))
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(sent))
        sent[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
    return send(address, bytes(sent)), {200, 400, 404, BUSY}


def send_nonsense(address: Address, rng: random.Random) -> tuple[Said, set[int]]:
    sent = rng.choice(
        [
            b"",
            b"{",
            b"null",
            b"[" * 200_000,
            b'{"a":' * 50_000,
            b'{"prompt": "\xff\xfe"}',
            b"\x00" * 100,
            b'{"temperature": NaN}',
            b'{"temperature": Infinity}',
            b"9" * 100_000,
            body(temperature=1e400).replace(b"Infinity", b"1e999"),
            body(prompt="\ud800"),
            body(prompt=[-1]),
            body(prompt=["a"] * 65),
            body(n=128, best_of=127),
            body(n=128),
            body(max_tokens=10**30),
            body(logit_bias={"x": 1}),
            body(tools=[{}]),
            body(stop=[""]),
        ]
    )
    return send(address, sent), {400}


def send_much(address: Address, rng: random.Random) -> tuple[Said, set[int]]:
    """Send more than is read; the connection may close before all of it is sent."""
    return send(address, b'{"prompt": "' + b"x" * 5_000_000), {413, 0}


def send_messages(address: Address, rng: random.Random) -> tuple[Said, set[int]]:
    messages = [{"role": "user", "content": "x"}] * rng.choice([0, 300, 5000])
    sent = json.dumps({"model": "law", "messages": messages}).encode()
    return send(address, sent, path="/v1/chat/completions"), {400}


def send_another_type(address: Address, rng: random.Random) -> tuple[Said, set[int]]:
    kind = rng.choice(["", "Content-Type: text/plain\r\n", "Content-Type: multipart/form-data\r\n"])
    return send(address, body(), more=kind), {415}


def ask_unknown(address: Address, rng: random.Random) -> tuple[Said, set[int]]:
    name = rng.choice(["gpt-4", "../law", "law ", "\u202e", "x" * 9999, "LAW"])
    return send(address, body(model=name)), {404}


def ask_elsewhere(address: Address, rng: random.Random) -> tuple[Said, set[int]]:
    path = rng.choice(["/v2", "/v1/completions/", "/..%2f..", "/v1/models/nothing"])
    return send(address, b"", path=path, method="GET"), {404, 307}


def use_another_method(address: Address, rng: random.Random) -> tuple[Said, set[int]]:
    return send(address, b"", method=rng.choice(["GET", "PUT", "DELETE"])), {405}


def send_no_http(address: Address, rng: random.Random) -> tuple[Said, set[int]]:
    with connect(address) as connection:
        connection.sendall(rng.randbytes(rng.randint(1, 2000)) + b"\r\n\r\n")
        connection.shutdown(1)
        return read(connection), {400, 0}


def look(address: Address, rng: random.Random) -> tuple[Said, set[int]]:
    path = rng.choice(["/", "/health", "/metrics", "/v1/models", "/v1/models/law"])
    return send(address, b"", path=path, method="GET"), {200}


def change_adapters(address: Address, rng: random.Random) -> tuple[Said, set[int]]:
    """Load an adapter, ask it, and unload it; others do the same with the only slot."""
    name = f"other{rng.randrange(3)}"
    load = json.dumps({"lora_name": name, "lora_path": "french"}).encode()
    found = send(address, load, path="/v1/load_lora_adapter")
    if found.status == 200:
        found = send(address, body(model=name))
        if found.status not in (200, 404, 409, BUSY):
            return found, {200}
        unload = json.dumps({"lora_name": name}).encode()
        found = send(address, unload, path="/v1/unload_lora_adapter")
    return found, {200, 400, 404, BUSY}


DEEDS: dict[Deed, int] = {  # and how often they are done
    ask: 8,
    leave: 6,
    leave_unfinished: 2,
    send_slowly: 1,
    send_damaged: 4,
    send_nonsense: 4,
    send_much: 1,
    send_messages: 1,
    send_another_type: 1,
    ask_unknown: 1,
    ask_elsewhere: 1,
    use_another_method: 1,
    send_no_http: 1,
    look: 2,
    change_adapters: 2,
}
