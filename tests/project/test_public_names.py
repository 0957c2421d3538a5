"""What `lora_jax.` offers at a prompt."""

import subprocess
import sys

import lora_jax


def test_dir_offers_public_names_alone():
    names = [name for name in dir(lora_jax) if not name.startswith("_")]
    assert set(lora_jax.__all__) <= set(names)
    assert set(names) - set(lora_jax.__all__) <= {
        *("layers", "models", "training"),
        *("equinox", "nnx"),  # of frameworks that need not be installed
    }
    assert not {"adapters", "core", "engine", "importlib", "Any", "TYPE_CHECKING"} & set(names)


def test_every_name_is_there_at_its_first_use():
    code = (
        "import lora_jax as l; [getattr(l, name) for name in dir(l)]; print(l.peft.load.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["load"]
