"""`lora-jax serve`: what is told before the first request, and how a signal ends it."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from lora_jax.core.errors import ConfigError
from lora_jax.serving.rows import Rows
from tests.cli import files

PROGRAM = "import sys; from lora_jax.cli import main; sys.exit(main(sys.argv[1:]))"
JSON = {"Content-Type": "application/json"}
PATIENCE = 60  # seconds, for the first request compiles


def test_names(fails, tmp_path):
    for name in ("law", "other"):
        files.peft(tmp_path / name)
    words = ["serve", "-m", "tiny", "--adapter", tmp_path / "law", "--adapter"]
    error = fails(*words, f"law={tmp_path / 'other'}")
    assert f"the name law is already used for {tmp_path / 'law'}; give it another" in error
    assert "the name tiny is already used for the base" in fails(*words, f"tiny={tmp_path / 'law'}")
    assert "give a name and a path, NAME=PATH" in fails(*words, "law=")
    assert "missing: no such file" in fails(*words, "french=missing")


def test_limits(fails, tmp_path):
    assert "--context 5000: the model has only 1024 positions" in fails(
        "serve", "-m", "tiny", "--context", 5000, "--port", 0
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = fails("serve", "-m", "tiny", "--port", port)
        assert (
            f"cannot listen on 127.0.0.1:{port}: " in error and "another --host or --port" in error
        )
    error = fails("serve", "-m", "tiny", "--spare", 1, "--port", 0)
    assert "--spare: give at least one --adapter too" in error
    for words, said in (
        (["--api-key", ""], "--api-key': must not be empty"),
        (["--api-key", "kéy"], "--api-key': must be printable ASCII"),
        (["--allow-origin", "example.org/"], "example.org/ is not an origin"),
    ):
        assert said in fails("serve", "-m", "tiny", *words, status=2)
    assert "'--port'" in fails("serve", "-m", "tiny", "--port", 70000, status=2)


def test_a_model_that_mixes_rows(fails, tmp_path, monkeypatch):
    def check(rows):
        raise ConfigError("adapters_of: `sort` mixes the rows of the batch")

    monkeypatch.setattr(Rows, "check", check)
    files.model(tmp_path / "my-model")
    files.peft(tmp_path / "law")
    words = ["-m", tmp_path / "my-model", "--adapter", tmp_path / "law", "--port", 0]
    error = fails("serve", *words, "--compile-cache", "none")
    assert "cannot have different adapters on this model: adapters_of: `sort` mixes" in error
    assert "to serve one adapter, merge it by 'lora-jax merge'" in error


def test_a_file_of_options_without_the_key(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_JAX_API_KEY", "s3cret")
    words = ["-m", "tiny", "--adapter", "a=b", "--adapter", "c", "--context", 99, "--no-warm-up"]
    printed = run("serve", *words, "--dump-config")
    assert printed.status == 0 and "context: 99" in printed.out and "s3cret" not in printed.out
    path = tmp_path / "serve.yaml"
    path.write_text(f"{printed.out}\napi-key: other\n")
    assert run("serve", "--config", path, "--dump-config").out == printed.out


@pytest.fixture
def serving(tmp_path):
    """Start the command in a process, and return it and where it listens."""
    files.model(tmp_path / "my-model", max_position_embeddings=2048)
    files.peft(tmp_path / "my-adapter")
    words = ["-m", tmp_path / "my-model", "--adapter", f"law={tmp_path / 'my-adapter'}"]
    words += ["--port", "0", "--rows", "2", "--spare", "1", "--rank", "8"]
    words += ["--no-warm-up", "--compile-cache", "none", "--stop-after", str(PATIENCE)]
    command = [sys.executable, "-c", PROGRAM, "serve", *map(str, words)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as made:
        try:
            found = re.fullmatch(r"serving my-model, law at (\S+)\n", made.stdout.readline())
            yield made, found[1]
        finally:
            made.kill()


def until(process, url, line):
    """Wait until a line is among the metrics."""
    end = time.monotonic() + PATIENCE
    while line not in urllib.request.urlopen(f"{url}/metrics").read().decode():
        assert process.poll() is None and time.monotonic() < end


def ask(url, most, model="law"):
    body = {"model": model, "prompt": "Hello", "max_tokens": most, "seed": 0}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), JSON)
    return json.load(urllib.request.urlopen(request, timeout=PATIENCE))


def ask_in_vain(url):
    with pytest.raises((OSError, http.client.HTTPException)):
        ask(url, 2000)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish(serving, number):
    process, url = serving
    answers = []
    asked = [
        threading.Thread(target=lambda n=n: answers.append(ask(url, n))) for n in (30, 40, 500, 600)
    ]
    for thread in asked:
        thread.start()
    until(process, url, "lora_jax_running 2\n")
    until(process, url, "lora_jax_waiting 2\n")
    os.kill(process.pid, number)
    assert "finishing the requests under way" in process.stderr.readline()
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(url, 1)
    assert refused.value.code == 503 and "server is stopping" in refused.value.read().decode()
    refused.value.close()
    for thread in asked:
        thread.join()
    assert process.wait(PATIENCE) == 0
    assert len(answers) == 4 and all(x["choices"][0]["finish_reason"] for x in answers)
    assert process.stderr.read() == ""


@pytest.mark.slow
def test_an_adapter_is_loaded_while_it_runs(serving, tmp_path):
    _, url = serving
    files.mlx(tmp_path / "mlx", seed=3)
    body = json.dumps({"lora_name": "new", "lora_path": str(tmp_path / "mlx")}).encode()
    request = urllib.request.Request(f"{url}/v1/load_lora_adapter", body, JSON)
    assert json.load(urllib.request.urlopen(request, timeout=PATIENCE))["loaded"]
    law, new = (ask(url, 20, model)["choices"][0]["text"] for model in ("law", "new"))
    assert law != new


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(serving):
    process, url = serving
    thread = threading.Thread(target=ask_in_vain, args=(url,))
    thread.start()
    until(process, url, "lora_jax_running 1\n")
    process.terminate()
    process.stderr.readline()
    process.terminate()
    assert process.wait(PATIENCE) == 130
    assert process.stderr.read() == "error: interrupted at once\n"
    thread.join()
