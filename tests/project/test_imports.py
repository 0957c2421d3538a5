"""The package's modules import one way, and `import lora_jax` stays light."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

from tests.stress.engine_mutants import MUTANTS

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "lora_jax"

# A module imports only from modules above it.
CORE = [
    "errors",
    "_paths",
    "_jaxpr",
    "_contract",
    "remat",
    "config",
    "weights",
    "algebra",
    "lazy",
    "probes",
    "forms",
    "branches",
    "context",
    "rules",
    "views",
    "concatenation",
    "gathers",
    "contractions",
    "convolutions",
    "ragged",
    "containers",
    "conditionals",
    "loops",
    "derivatives",
    "custom_vjp",
    "sharded",
    "custom_rules",
    "sharing",
    "interpreter",
    "linalg",
    "rounding",
    "matrices",
    "starts.signature",
    "starts.by_matrix",
    "starts.sampled",
    "starts.spectral",
    "starts.quantized",
    "starts",
    "transform",
    "layouts",
    "selection",
    "adapt",
    "overlay",
    "conversion",
    "extract",
    "batches",
    "fresh",
    "moments",
    "eva",
    "lora_ga",
    "merging",
    "optim",
    "norms",
    "memory",
    "summary",
    "fingerprint",
    "atomic",
    "tensorfile",
    "records",
    "gguf_file",
    "checkpoint",
    "naming.patterns",
    "naming.entry",
    "naming.place",
    "naming.table",
    "naming.translation",
    "naming",
    "assets",
]
# Besides a sub-package's own modules; "" is the package itself, that is, its public names.
SUBPACKAGES = {
    "models": {"errors", "gguf_file", "naming", "tensorfile"},
    "peft": {
        *("algebra", "config", "errors", "naming", "overlay", "_paths", "tensorfile", "weights"),
    },
    "mlx": {"config", "errors", "naming", "overlay", "_paths", "tensorfile", "weights", "peft"},
    "loralib": {"config", "errors", "naming", "overlay", "_paths", "tensorfile", "weights", "peft"},
    "text": {"errors", "gguf_file"},
    "training": {"", "atomic", "errors", "fingerprint", "text"},
    "demo": {"", "assets", "models", "text"},
    "cli": {
        *("", "assets", "errors", "models", "naming", "overlay", "peft", "mlx", "loralib"),
        *("text", "training", "tensorfile"),
    },
    "layers": {
        *("algebra", "branches", "config", "errors", "forms", "lazy", "overlay"),
        *("transform", "weights"),
    },
}

HEAVY = {
    *("flax", "gguf", "jinja2", "matplotlib", "orbax", "rich", "tokenizers", "torch"),
    *("transformers", "typer"),
}
PRIVATE = "jax._" + "src"  # written so that this file does not hold it either


def module_name(path: pathlib.Path) -> str:
    """`lora_jax/models/bert.py` is "models.bert", and `lora_jax/__init__.py` is ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def public_names() -> set[str]:
    """`lora_jax.__all__`, read without importing the package."""
    for node in TREES[""].body if "" in TREES else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def imports(name: str) -> set[str]:
    """What a module imports, in functions too: "jax", "lora_jax.weights.LoraWeight"."""
    here = ["lora_jax", *filter(None, name.split("."))]
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = node.level - (MODULES[name].name == "__init__.py")
            start = here[: len(here) - up] if node.level else []
            source = ".".join([*start, *filter(None, [node.module])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def imported_modules(name: str) -> set[str]:
    """The modules of lora_jax that a module imports; "" for the package and its public names."""
    found = set()
    for full in imports(name):
        top, _, rest = full.partition(".")
        if top == "lora_jax":
            # `from lora_jax import summary` is the function, though a module has that name too
            is_module = rest in MODULES and rest not in public_names()
            found.add(rest if is_module else rest.rpartition(".")[0])
    return found


def allowed(name: str) -> set[str]:
    top = name.split(".")[0]
    if name == "":
        return {"", *CORE}
    if top in SUBPACKAGES:
        own = {top, *SUBPACKAGES[top]}
        return {module for module in MODULES if module in own or module.split(".")[0] in own - {""}}
    return set(CORE[: CORE.index(name)])


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "__init__")
def test_imports_point_one_way(name):
    assert name == "" or name in CORE or name.split(".")[0] in SUBPACKAGES, (
        f"{name} is not in this file's CORE or SUBPACKAGES: put it below all that it imports"
    )
    wrong = sorted(module or "lora_jax" for module in imported_modules(name) - allowed(name))
    assert not wrong, f"{name or '__init__'} must not import {wrong}: see the order in CORE"


def test_every_module_in_the_order_exists():
    assert [name for name in [*CORE, *SUBPACKAGES] if name not in MODULES] == []


def test_private_jax_appears_nowhere():
    files = [*PACKAGE.rglob("*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("notebooks/*.ipynb")]
    split = re.compile(r"from\s+jax\s+import\s.*\b_" + "src")
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    assert [p for p, text in texts.items() if PRIVATE in text or split.search(text)] == []


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"_jaxpr"}), ids=lambda n: n or "__init__")
def test_only_one_file_depends_on_jax_versions(name):
    nodes = ast.walk(TREES[name])
    names = imports(name) | {ast.unparse(n) for n in nodes if isinstance(n, ast.Attribute)}
    version = re.compile(r"jax\.(extend|version|__version)|jaxlib\b")
    assert sorted(filter(version.match, names)) == [], "this belongs in _jaxpr.py"


def test_every_public_name_is_documented():
    package = importlib.import_module("lora_jax")
    public = {n: getattr(package, n) for n in package.__all__ if not n.startswith("__")}
    # dataclasses and named tuples make a docstring of their signature: that says nothing
    made = {n: re.compile(rf"{re.escape(getattr(v, '__name__', n))}\(") for n, v in public.items()}
    docs = {n: inspect.cleandoc(value.__doc__ or "") for n, value in public.items()}
    assert [n for n, doc in docs.items() if not doc or made[n].match(doc)] == []
    assert inspect.getdoc(package)


def test_import_is_light():
    code = "import sys, lora_jax; print(*{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert HEAVY & set(run.stdout.split()) == set()


def test_every_mutant_still_finds_its_text():
    """A change of the engine must take the mutants along, or they would break nothing."""
    for mutant in MUTANTS:
        source = (PACKAGE / mutant.file).read_text(encoding="utf-8")
        assert source.count(mutant.old) == 1, mutant.name
