"""Every reader of the package, and the subjects that it reads in turn."""

import functools
from collections.abc import Callable, Sequence

from tests.models.recorded import NEWER, OTHERS
from tests.parity.diffusion import models as images
from tests.parity.diffusion import styles
from tests.parity.peft import models
from tests.stress.damaged_files import adapters, command_line, published, runs
from tests.stress.damaged_files.subject import Subject

CASES = list(models.CASES)
Make = Callable[[], Subject]
Turns = list[tuple[str, Make]]


def _adapters(make: Callable[[str], Subject]) -> Turns:
    """Return adapters of each format in turn, and PEFT's cases one after another."""
    return [
        (kind, functools.partial(make, kind))
        for case in CASES
        for kind in ("native", case, "mlx-lm", "kohya")
    ]


GGUFS = ("llama", "gemma3", "phi3")
#: In turn: each reader as often as the others, whatever the number of its files.
READERS: dict[str, Turns] = {
    "native": [
        ("native", functools.partial(adapters.native, False)),
        ("native DoRA", functools.partial(adapters.native, True)),
    ],
    "stack": [
        ("stack file", functools.partial(adapters.of_stack, "all.safetensors")),
        ("stack directory", functools.partial(adapters.of_stack, "stack")),
    ],
    "PEFT": [(f"PEFT {case}", functools.partial(adapters.of_peft, case)) for case in CASES],
    "mlx-lm": [("mlx-lm", adapters.of_mlx)],
    "loralib": [("loralib", adapters.of_loralib)],
    "images": [
        (case, functools.partial(adapters.of_images, case))
        for case in (*images.FILES, *styles.STYLES)
    ],
    "GGUF adapter": [("GGUF adapter", adapters.of_gguf)],
    "Orbax checkpoint": [
        ("Orbax checkpoint", adapters.of_orbax),
        ("Orbax training state", functools.partial(adapters.of_orbax, state=True)),
    ],
    "inspect": _adapters(command_line.inspect),
    "convert": _adapters(command_line.convert),
    "generate, merge": [
        (word, functools.partial(command_line.with_model, word)) for word in ("generate", "merge")
    ],
    "model directory": [
        (name, functools.partial(published.directory, name))
        for name in ("llama", "llama_tied", "mistral", "qwen2", "bert", *NEWER, *OTHERS)
    ],
    "image processor": [("image processor", published.processor)],
    "GGUF model": [
        (f"GGUF model {name}", functools.partial(published.gguf, "model", name)) for name in GGUFS
    ],
    "GGUF tokenizer": [
        (f"GGUF tokenizer {name}", functools.partial(published.gguf, "tokenizer", name))
        for name in GGUFS
    ],
    "tokenizer": [
        (kind, functools.partial(published.tokenizer, kind))
        for kind in ("BPE", "Unigram", "WordPiece")
    ],
    "checkpoints": [("checkpoints", runs.checkpoints)],
    "run": [("run", runs.run)],
    "data": [
        (
            f"{kind} rows in {'pieces of ' * streamed}{suffix}",
            functools.partial(runs.data, kind, suffix, streamed),
        )
        for streamed in (False, True)
        for kind in runs.ROWS
        for suffix in runs.SUFFIXES
        if suffix != ".csv" or kind in ("text", "completion", "label", "Alpaca")
        if not (streamed and suffix in runs.COMPRESSED)
    ],
    "naming": [("naming", runs.naming)],
}


def name(number: int, readers: Sequence[str]) -> tuple[str, str]:
    """Return the reader and the subject of the file with this number."""
    turn, which = divmod(number, len(readers))
    subjects = READERS[readers[which]]
    return readers[which], subjects[turn % len(subjects)][0]


@functools.cache
def subject(reader: str, name: str) -> Subject:
    """Return a subject of a reader."""
    return dict(READERS[reader])[name]()
