"""Damaged adapters given to `inspect` and `convert`: what they print must be clean as well."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lora_jax.cli import main
from tests.cli import files as written
from tests.parity.peft import models
from tests.stress.damaged_files.subject import Files, Subject, Verdict, read_files

Said = tuple[int, str, str]  # exit status, stdout, stderr
LONG = 25_000  # characters of one message
#: Of a tokenizer in use, whose file the command line has just been given.
_WITHOUT_A_FILE = tuple(
    f"error: {words}"
    for words in ("this model has no chat template", "the chat template", "the tokenizer cannot")
)


def command(*words: Any) -> Said:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    return status, out.getvalue(), err.getvalue()


def judge(said: Said, folder: Path) -> Verdict:
    """Say what became of a command: success, or one line that says why not."""
    status, out, err = said
    steering = sorted({c for c in out + err if not c.isprintable() and c != "\n"})
    if steering:
        return "unclear error", f"prints {steering[:5]!r}: {(out + err)[:300]!r}"
    if status == 0:
        return "succeeds", err and f"and yet stderr has {err:.300}"
    if status != 1 or err.count("\n") != 1 or not err.startswith("error: "):
        return "unclear error", f"status {status}, {err:.300}"
    if "unexpected" in err and "bug in lora-jax" in err:
        return "other exception", err[:600]
    is_named = str(folder) in err or err.startswith(_WITHOUT_A_FILE)
    if not is_named or len(err) > LONG:
        return "unclear error", f"{len(err)} characters: {err:.300}"
    return "clear error", ""


def files_of(write: Callable[[Path], Any]) -> Files:
    with TemporaryDirectory() as folder:
        write(Path(folder))
        return read_files(Path(folder))


def adapter(kind: str) -> Files:
    """Return the files of an adapter: native, mlx-lm, kohya's, or one of PEFT's cases."""
    if kind == "native":
        return files_of(lambda folder: written.native(folder / "adapter.safetensors"))
    if kind == "mlx-lm":
        return files_of(written.mlx)
    if kind == "kohya":
        return files_of(lambda folder: written.kohya(folder / "adapter.safetensors"))
    return files_of(lambda folder: models.unpack(kind, folder))


def inspect(kind: str) -> Subject:
    """`lora-jax inspect`, as a table and, for every other adapter, as JSON."""
    files = adapter(kind)

    def load(folder: Path) -> Said:
        path = folder / "adapter.safetensors" if kind in ("native", "kohya") else folder
        said = command("inspect", path)
        asked = command("inspect", path, "--json", "--all")
        if asked[0] == 0:
            json.loads(asked[1])
        return max(said, asked, key=lambda x: x[0])

    return Subject(files, load, judge)


def convert(kind: str) -> Subject:
    """`lora-jax convert` of a native file with a naming, or of the others to one another."""
    files = adapter(kind)
    if kind == "native":
        files |= files_of(lambda folder: written.naming(folder / "naming.json"))

    def load(folder: Path) -> Said:
        with TemporaryDirectory() as out:
            target = Path(out) / "made"
            if kind == "native":
                path, to = folder / "adapter.safetensors", "peft"
                more = ["--naming", folder / "naming.json"]
            elif kind == "kohya":
                path, to = folder / "adapter.safetensors", "peft"
                more = ["--full-rank", "2"]
            else:
                path, to, more = folder, "peft" if kind == "mlx-lm" else "mlx", []
            said = command("convert", path, "--to", to, "--out", target, *more)
            target = next(iter(sorted(target.glob("[!a]*/"))), target)  # the first of several
            if said[0] == 0:
                again = command("inspect", target)
                said = said if again[0] == 0 else (again[0], "", f"error: {folder} {again[2]}")
            return said

    return Subject(files, load, judge)


def with_model(word: str) -> Subject:
    """`lora-jax generate` or `merge` of a model and an adapter on it, one of them damaged."""
    files = files_of(
        lambda folder: (written.model(folder / "model"), written.peft(folder / "adapter"))
    )
    ends = {"eos_token_id": [258, 257], "pad_token_id": 256, "max_length": 20}
    files["model/generation_config.json"] = json.dumps(ends).encode()

    def load(folder: Path) -> Said:
        with TemporaryDirectory() as out:
            words: list[Any] = [word, "--model", folder / "model", "--adapter", folder / "adapter"]
            if word == "merge":
                return command(*words, "--out", Path(out) / "made")
            status, _, err = command(*words, "--prompt", "Hi", "--max-tokens", 2, "--chat")
            return status, "", err  # a pipe gets what the model says as it is

    return Subject(files, load, judge)
