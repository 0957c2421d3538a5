"""The HTTP interface, asked by OpenAI's own client and by bare sockets."""

import concurrent.futures
import http.client
import json
import socket
import threading
import time
import urllib.request

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

import openai

from lora_jax.models.text.byte_tokenizer import byte_tokenizer
from lora_jax.serving import body
from lora_jax.serving.access import Access
from tests.serving import live, small

TOKENIZER = byte_tokenizer()
HELLO = TOKENIZER.encode_prompt("Hello")
MESSAGES = [{"role": "user", "content": "Hi"}]
JSON = {"Content-Type": "application/json"}
PATIENCE = 20  # seconds


@pytest.fixture(scope="module")
def server():
    small.rows().warm_up()
    with live.serving() as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def said(ids, slot, steps, **sampling):
    return TOKENIZER.decode(small.alone(ids, slot, steps, **sampling))


def post(server, sent, path="/v1/completions", headers=JSON):
    """Return the status, the headers and the JSON of an answer."""
    address = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=PATIENCE)
    connection.request("POST", path, sent, headers)
    answer = connection.getresponse()
    found = answer.status, answer.headers, json.loads(answer.read())
    connection.close()
    return found


def ask_for(server, method, path, headers):
    """Return the status and the headers of an answer without a body."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE)
    connection.request(method, path, None, headers)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, answer.headers


def metrics(server):
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=PATIENCE) as answer:
        text = answer.read().decode()
    pairs = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("lora_jax_"): int(value) for name, value in pairs}


def until(true):
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_is_served(server, client):
    found = client.models.list().data
    assert [x.id for x in found] == list(live.NAMES)
    assert [x.parent for x in found] == [None, "base", "base"]
    assert client.models.retrieve("law").max_model_len == small.CONTEXT
    with urllib.request.urlopen(f"{server.url}/health", timeout=PATIENCE) as answer:
        assert answer.status == 200


def test_texts(client):
    """Each model name is an adapter, and the text is that of `models.generate`."""
    for slot, name in enumerate(live.NAMES, -1):
        found = client.completions.create(model=name, prompt="Hello", max_tokens=9, temperature=0)
        (choice,) = found.choices
        assert (choice.text, choice.finish_reason) == (said(HELLO, slot, 9), "length")
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (5, 9)
        assert found.usage.total_tokens == 14
    found = client.completions.create(model="law", prompt=["Hello", "a"], max_tokens=4, seed=5)
    wanted = [
        said(TOKENIZER.encode_prompt(x), 0, 4, temperature=1.0, seed=5) for x in ("Hello", "a")
    ]
    assert [x.text for x in found.choices] == wanted
    assert [x.index for x in found.choices] == [0, 1]


def test_a_chat_and_its_stream(client):
    asked = {"model": "french", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    ids = TOKENIZER.encode(TOKENIZER.chat(MESSAGES, add_generation_prompt=True))
    assert whole.choices[0].message.content == said(ids, 1, 12)
    assert whole.choices[0].message.role == "assistant"
    options = {"include_usage": True}
    pieces = [*client.chat.completions.create(**asked, stream=True, stream_options=options)]
    assert pieces[0].choices[0].delta.role == "assistant"
    texts = [x.choices[0].delta.content or "" for x in pieces if x.choices]
    assert "".join(texts) == whole.choices[0].message.content and len(texts) > 2
    assert pieces[-2].choices[0].finish_reason == "length" and not pieces[-1].choices
    assert pieces[-1].usage == whole.usage
    assert all(x.usage is None for x in pieces[:-1])
    stop = whole.choices[0].message.content[3:5]
    ended = client.chat.completions.create(**asked, stop=stop)
    assert ended.choices[0].message.content == whole.choices[0].message.content.partition(stop)[0]
    assert ended.choices[0].finish_reason == "stop"


def test_log_probabilities(client):
    asked = {"prompt": "Hello", "max_tokens": 3, "temperature": 0}
    text = client.completions.create(model="law", **asked, logprobs=2).choices[0].logprobs
    assert [len(x) for x in (text.tokens, text.token_logprobs, text.top_logprobs)] == [3] * 3
    assert text.text_offset == [0, 1, 2]
    for token, own, top in zip(text.tokens, text.token_logprobs, text.top_logprobs, strict=True):
        assert max(top.values()) == pytest.approx(own) and token in top
    more = {"logprobs": True, "top_logprobs": 2, "max_tokens": 2}
    chat = client.chat.completions.create(model="law", messages=MESSAGES, **more).choices[0]
    assert [len(x.top_logprobs) for x in chat.logprobs.content] == [2, 2]
    pieces = client.chat.completions.create(model="law", messages=MESSAGES, **more, stream=True)
    found = [y for x in pieces if (y := x.choices[0].logprobs)]
    assert sum(len(x.content) for x in found) == 2


def test_errors(server, client):
    with pytest.raises(openai.NotFoundError, match="this server has base, law, french"):
        client.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature must be"):
        client.completions.create(model="law", prompt="x", temperature=3)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 64") as error:
        client.chat.completions.create(model="law", messages=MESSAGES, max_tokens=64)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="the model 'x/y' does not exist"):
        client.models.retrieve("x/y")
    assert post(server, "{}", headers={})[0] == 415
    assert post(server, b"{" + b" " * 5_000_000)[0] == 413
    assert post(server, "{}", "/v1/nothing")[0] == 404
    status, headers, body = post(server, "{}", "/v1/models")
    assert status == 405 and "GET" in headers["Allow"]
    assert body["error"]["message"] == "POST /v1/models: Method Not Allowed"


def test_several_choices_and_an_echo(client):
    """Each choice is what its own seed makes; the prompt's tokens are counted once."""
    asked = {"model": "law", "max_tokens": 4, "seed": 5, "n": 2}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    wanted = [said(HELLO, 0, 4, temperature=1.0, seed=seed) for seed in (5, 6)]
    found = client.completions.create(prompt=["Hello", HELLO], echo=True, **asked)
    assert [x.text for x in found.choices] == [f"Hello{x}" for x in wanted] * 2
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (10, 16)
    pieces = [*client.completions.create(prompt="Hello", echo=True, **asked, **stream)]
    texts = ["", ""]
    for piece in pieces[:-1]:
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == [x.text for x in found.choices[:2]]
    assert pieces[-1].usage.total_tokens == 5 + 8
    chat = client.chat.completions.create(messages=MESSAGES, **asked)
    pieces = [*client.chat.completions.create(messages=MESSAGES, **asked, **stream)]
    texts, roles = ["", ""], {}
    for choice in [x.choices[0] for x in pieces[:-1]]:
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] = choice.delta.role or roles[choice.index]
    assert texts == [x.message.content for x in chat.choices] and len({*texts}) == 2
    assert roles == {0: "assistant", 1: "assistant"} and pieces[-1].usage == chat.usage


def test_a_body_that_does_not_arrive(server, monkeypatch):
    monkeypatch.setattr(body, "LONGEST", 0.05)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n{")
        found = connection.recv(9999)
    assert found.startswith(b"HTTP/1.1 408") and b"within 0.05 seconds" in found


def test_many_at_once(server, client):
    """Rows, adapters and samplings are mixed; each text is what it is alone."""
    prompts = ["Hello", "a", "What?", "xy"]
    calls = [(n % 3 - 1, prompts[n % 4], 3 + n % 5, 1.0 * (n % 2), n % 7) for n in range(24)]
    others = (
        {},
        {"frequency_penalty": 1, "logit_bias": {"66": 3}},
        {"top_k": 3, "n": 2},
        {"min_p": 0.2, "repetition_penalty": 1.2, "logprobs": 3},
        {"stop": ["a", "\ufffd\ufffd", "be"]},
    )

    def ask(number):
        slot, prompt, most, temperature, seed = calls[number]
        options = {"max_tokens": most, "temperature": temperature, "seed": seed}
        options |= {"extra_body": others[number // 2 % 5]}
        found = client.completions.create(model=live.NAMES[slot + 1], prompt=prompt, **options)
        return found.choices[0].text

    before = metrics(server)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = [*pool.map(ask, range(24))]
    after = metrics(server)
    for number, (slot, prompt, most, temperature, seed) in enumerate(calls):
        if not number // 2 % 5:  # sampled as `models.generate` can
            ids = TOKENIZER.encode_prompt(prompt)
            wanted = said(ids, slot, most, temperature=temperature, seed=seed)
            assert found[number] == wanted
    assert found == [ask(number) for number in range(24)]  # one after another
    assert after["finished_total"] - before["finished_total"] >= 24
    assert after["failed_total"] == 0 and metrics(server)["compilations"] == before["compilations"]


def test_adapters_come_and_go(server, client):
    """Under a name and in a slot of its own, without a compilation of what continues texts."""

    def change(what, **fields):
        status, _, body = post(server, json.dumps(fields), f"/v1/{what}_lora_adapter")
        return status, body["error"]["message"] if "error" in body else body["id"]

    def ask(name):
        asked = {"prompt": "Hello", "max_tokens": 6, "temperature": 0}
        return client.completions.create(model=name, **asked).choices[0].text

    before = metrics(server)["compilations"]
    assert change("load", lora_name="new", lora_path="runs/french") == (200, "new")
    assert [x.id for x in client.models.list()] == [*live.NAMES, "new"]
    assert ask("new") == said(HELLO, 1, 6)
    assert change("unload", lora_name="new") == (200, "new")
    with pytest.raises(openai.NotFoundError, match="'new' does not exist"):
        ask("new")
    assert change("load", lora_name="other", lora_path="law") == (200, "other")
    assert ask("other") == said(HELLO, 0, 6) and ask("french") == said(HELLO, 1, 6)
    assert metrics(server)["compilations"] == before
    for what, fields, status, message in (
        ("load", {"lora_name": "x"}, 400, "lora_path must be a string"),
        ("load", {"lora_name": "x", "lora_path": "law", "y": 1}, 400, "takes lora_name, lora_path"),
        ("load", {"lora_name": "law", "lora_path": "law"}, 400, "'law' is already used"),
        ("load", {"lora_name": "x", "lora_path": "nowhere"}, 400, "nowhere: no such file"),
        ("load", {"lora_name": "x", "lora_path": "law"}, 503, "all slots for adapters are in use"),
        ("unload", {"lora_name": "x"}, 404, "'x' does not exist"),
        ("unload", {"lora_name": "base"}, 400, "the base cannot be unloaded"),
    ):
        found = change(what, **fields)
        assert found[0] == status and message in found[1], found
    assert change("unload", lora_name="other") == (200, "other")


def test_a_slot_is_not_given_away_while_a_request_uses_it(server, monkeypatch):
    step, may_step = small.rows().step, threading.Event()
    monkeypatch.setattr(small.rows(), "step", lambda: (may_step.wait(PATIENCE), step())[1])
    load = json.dumps({"lora_name": "brief", "lora_path": "french"})
    assert post(server, load, "/v1/load_lora_adapter")[0] == 200
    body = json.dumps({"model": "brief", "prompt": "Hello", "max_tokens": 5, "temperature": 0})
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        asked = pool.submit(post, server, body)
        until(lambda: metrics(server)["running"] == 1)
        unload = json.dumps({"lora_name": "brief"})
        assert post(server, unload, "/v1/unload_lora_adapter")[0] == 200
        other = json.dumps({"lora_name": "other", "lora_path": "law"})
        loading = pool.submit(post, server, other, "/v1/load_lora_adapter")
        until(lambda: server.scheduler._calls)
        may_step.set()
        assert loading.result(PATIENCE)[0] == 503
        assert asked.result(PATIENCE)[2]["choices"][0]["text"] == said(HELLO, 1, 5)
    until(lambda: post(server, other, "/v1/load_lora_adapter")[0] in (200, 400))
    assert post(server, json.dumps({"lora_name": "other"}), "/v1/unload_lora_adapter")[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(server, monkeypatch, stream):
    step = small.rows().step
    monkeypatch.setattr(small.rows(), "step", lambda: (time.sleep(0.05), step())[1])
    before = metrics(server)["cancelled_total"]
    body = json.dumps({"model": "law", "prompt": "x", "max_tokens": 60, "stream": stream}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        until(lambda: metrics(server)["running"] == 1)
        if stream:
            assert b"200 OK" in connection.recv(100)
    until(lambda: metrics(server)["running"] == 0)
    assert metrics(server)["cancelled_total"] == before + 1


def test_a_failure_of_the_model(server, client, monkeypatch, caplog):
    """It fails the requests that it touched, a stream with an event, and not the server."""

    def fail():
        raise RuntimeError("the device is lost")

    with monkeypatch.context() as patch:
        patch.setattr(small.rows(), "step", fail)
        with pytest.raises(openai.InternalServerError, match="the server failed on this request"):
            client.completions.create(model="law", prompt="x")
        with (
            client.completions.create(model="law", prompt="x", stream=True) as stream,
            pytest.raises(openai.APIError, match="the server failed on this request"),
        ):
            list(stream)
    found = client.completions.create(model="law", prompt="Hello", max_tokens=3, temperature=0)
    assert found.choices[0].text == said(HELLO, 0, 3)
    assert "the device is lost" in caplog.text


def test_a_full_queue_and_a_graceful_stop(monkeypatch):
    """What waits is answered, what comes later is refused, and the port is closed in the end."""
    rows, may_step = small.rows(), threading.Event()
    step = rows.step
    # Until it may step it makes no tokens, so that rows join whenever their requests arrive.
    wait = lambda: (time.sleep(0.001), {})[1]
    monkeypatch.setattr(rows, "step", lambda: step() if may_step.is_set() else wait())
    body = json.dumps({"model": "law", "prompt": "Hello", "max_tokens": 4, "temperature": 0})
    with live.serving(waiting=1) as server, concurrent.futures.ThreadPoolExecutor(9) as pool:
        asked = [pool.submit(post, server, body) for _ in range(rows.count + 1)]
        until(lambda: metrics(server)["running"] == 3 and metrics(server)["waiting"] == 1)
        status, headers, answer = post(server, body)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert answer["error"]["code"] == "queue_full"
        stopping = pool.submit(server.stop, PATIENCE)
        until(lambda: post(server, body)[2]["error"]["code"] == "server_stopping")
        time.sleep(0.3)  # it tells so until all are answered
        assert post(server, body)[0] == 503
        may_step.set()
        stopping.result(PATIENCE)
        answers = [x.result(PATIENCE) for x in asked]
        assert [status for status, _, _ in answers] == [200] * 4
        assert {x["choices"][0]["text"] for _, _, x in answers} == {said(HELLO, 0, 4)}
        with pytest.raises(ConnectionRefusedError):
            post(server, body)


def test_a_key_and_web_pages_of_other_origins():
    """Without the key there is an answer of OpenAI's form, and nothing of it but the page."""
    origin = "https://chat.example"
    with live.serving(access=Access("s3cret!", [origin])) as server:
        options = {"base_url": f"{server.url}/v1", "max_retries": 0}
        with openai.OpenAI(api_key="s3cret!", **options) as client:
            assert client.models.retrieve("law").id == "law"
        with (
            openai.OpenAI(api_key="s3cret", **options) as client,
            pytest.raises(openai.AuthenticationError, match="needs its API key") as refused,
        ):
            client.completions.create(model="law", prompt="x")
        assert refused.value.code == "invalid_api_key"
        body = json.dumps({"model": "law", "prompt": "x", "max_tokens": 1})
        for word, status in (
            ("Bearer s3cret!", 200),
            ("bearer  s3cret! ", 200),
            ("Bearer s3cret!!", 401),
            ("Bearer", 401),
            ("Bearer \xe9\xff", 401),
            ("s3cret!", 401),
            ("Basic s3cret!", 401),
        ):
            head = {"Authorization": word.encode("latin-1"), "Origin": origin, **JSON}
            found, headers, _ = post(server, body, headers=head)
            assert (found, headers["Access-Control-Allow-Origin"]) == (status, origin), word
        for path, status in {"/": 200, "/health": 200, "/metrics": 401, "/v1/nothing": 401}.items():
            found, headers = ask_for(server, "GET", path, {})
            assert found == status and (status == 200 or headers["WWW-Authenticate"] == "Bearer")
        asks = {"Access-Control-Request-Method": "POST"}
        asks["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
        for own, allowed in ((origin, 200), ("https://other.example", 400)):
            found, headers = ask_for(server, "OPTIONS", "/v1/completions", {"Origin": own, **asks})
            assert found == allowed and (allowed == 400) == (
                headers["Access-Control-Allow-Origin"] is None
            )


def test_the_page_needs_nothing_else(server):
    with urllib.request.urlopen(server.url, timeout=PATIENCE) as answer:
        page = answer.read().decode()
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "http://" not in page and "https://" not in page and "<main>" in page
    assert post(server, "{}", "/")[0] == 405
