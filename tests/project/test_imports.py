"""The package's modules import one way, and `import lora_jax` stays light."""

import ast
import importlib
import importlib.metadata
import inspect
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.stress.mutants import MUTANTS

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "lora_jax"

# Each room imports from itself and from the rooms before it. `training` and `cli` may also use the
# public names of the package, as any program would.
ROOMS = (
    *("core", "engine", "initializers", "adapters", "frameworks", "files", "layers", "models"),
    *("training", "serving", "cli"),
)
ABOVE_THE_PUBLIC_NAMES = ("training", "cli")
# In no room: the package, the public names that it imports at their first use, `python -m`.
FACE = ("", "public", "__main__")

HEAVY = {
    *("equinox", "flax", "gguf", "jinja2", "matplotlib", "orbax", "rich", "tokenizers", "torch"),
    *("starlette", "transformers", "typer", "uvicorn"),
}
PRIVATE = "jax._" + "src"  # written so that this file does not hold it either


def module_name(path: pathlib.Path) -> str:
    """`lora_jax/models/bert.py` is "models.encoder.bert", and `lora_jax/__init__.py` is ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports(name: str) -> set[str]:
    """What a module imports, in functions too: "jax", "lora_jax.core.weights.LoraWeight"."""
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
            found.add(rest if "." in rest and rest in MODULES else rest.rpartition(".")[0])
    return found


def room(name: str) -> str:
    """The room of a module, "core" of "core.layout"; "" of the package itself."""
    return name.partition(".")[0]


def circle(start: str) -> list[str]:
    """Modules of a circle of imports through `start` within its room; empty where none is."""
    trail, seen = [(start, [start])], set()
    while trail:
        name, path = trail.pop()
        for other in sorted(imported_modules(name)):
            if other == start:
                return [*path, start]
            if other not in seen and room(other) == room(start) and other != room(start):
                seen.add(other)
                trail.append((other, [*path, other]))
    return []


def test_every_module_is_in_a_room():
    assert {room(name) for name in MODULES} == {*FACE, *ROOMS}


@pytest.mark.parametrize("page, mark", [("engine.md", "| `{}/` |"), ("images/rooms.svg", ">{}<")])
def test_the_documentation_shows_every_room(page, mark):
    text = (ROOT / "docs" / page).read_text()
    assert [name for name in ROOMS if mark.format(name) not in text] == []


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {*FACE}))
def test_imports_point_down(name):
    allowed = {*ROOMS[: ROOMS.index(room(name)) + 1]}
    if room(name) in ABOVE_THE_PUBLIC_NAMES:
        allowed.add("")
    wrong = sorted(other for other in imported_modules(name) if room(other) not in allowed)
    assert not wrong, f"{name} must not import {wrong}: see the order of ROOMS"


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {""}))
def test_no_circle_inside_a_room(name):
    assert circle(name) == []


def test_no_folder_is_crowded():
    folders = {path.parent for path in (*MODULES.values(), *ROOT.glob("tests/**/*.py"))}
    counts = {folder: len([*folder.glob("*.py")]) for folder in folders}
    assert {folder.name: count for folder, count in counts.items() if count > 25} == {}


def test_private_jax_appears_nowhere():
    files = [*PACKAGE.rglob("*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("notebooks/*.ipynb")]
    split = re.compile(r"from\s+jax\s+import\s.*\b_" + "src")
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    assert [p for p, text in texts.items() if PRIVATE in text or split.search(text)] == []


@pytest.mark.parametrize(
    "name", sorted(MODULES.keys() - {"engine.jaxprs"}), ids=lambda n: n or "__init__"
)
def test_only_one_file_depends_on_jax_versions(name):
    nodes = ast.walk(TREES[name])
    names = imports(name) | {ast.unparse(n) for n in nodes if isinstance(n, ast.Attribute)}
    version = re.compile(r"jax\.(extend|version|__version)|jaxlib\b")
    assert sorted(filter(version.match, names)) == [], "this belongs in engine/jaxprs.py"


def installed_with(distribution: str, extra: str = "") -> set[str]:
    """The distributions that `pip install "distribution[extra]"` brings, itself included."""
    todo, found = [(distribution, extra)], set()
    while todo:
        name, extra = todo.pop()
        found.add((name, extra))
        for line in importlib.metadata.requires(name) or ():
            required = Requirement(line)
            if required.marker is None or required.marker.evaluate({"extra": extra}):
                new = {(canonicalize_name(required.name), e) for e in ("", *required.extras)}
                todo += sorted(new - found)
    return {name for name, _ in found}


def test_types_are_checked_without_what_lint_does_not_install():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    overrides = project["tool"]["mypy"]["overrides"]
    may_be_missing = {module.removesuffix(".*") for row in overrides for module in row["module"]}
    tops = {full.partition(".")[0] for name in MODULES for full in imports(name)}
    outside = tops - {"lora_jax"} - sys.stdlib_module_names - may_be_missing
    makers = importlib.metadata.packages_distributions()
    there = installed_with("lora-jax", "cli")
    missing = {n for n in outside if not there & {canonicalize_name(m) for m in makers[n]}}
    assert not missing, (
        "a mypy override in pyproject.toml must ignore these: lint has no such package"
    )


def test_every_public_name_is_documented():
    package = importlib.import_module("lora_jax")
    public = {n: getattr(package, n) for n in package.__all__ if not n.startswith("__")}
    # dataclasses and named tuples make a docstring of their signature: that says nothing
    made = {n: re.compile(rf"{re.escape(getattr(v, '__name__', n))}\(") for n, v in public.items()}
    docs = {n: inspect.cleandoc(value.__doc__ or "") for n, value in public.items()}
    assert [n for n, doc in docs.items() if not doc or made[n].match(doc)] == []
    assert inspect.getdoc(package)


def test_public_names_come_from_one_module():
    """What `import lora_jax` imports at first use is all of `__all__`, and types say the same."""
    package = importlib.import_module("lora_jax")
    public = importlib.import_module("lora_jax.public")
    names = {*public.__all__, "diffusion", "gguf", "loralib", "mlx", "naming", "orbax", "peft"}
    assert names == {*package.__all__} and len(names) == len(package.__all__)
    for name in public.__all__:
        assert getattr(package, name) is getattr(public, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize("room", ["core.errors", "files.native"])
def test_rooms_are_attributes_of_the_package(room):
    """As they were when `import lora_jax` imported them at once."""
    code = f"import lora_jax as l; l.{room}; l.adapters.split, l.engine.forms"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_import_is_light():
    code = "import sys, lora_jax as lora; lora.lora; print(*{n.split('.')[0] for n in sys.modules})"
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
