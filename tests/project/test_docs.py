"""What is published is executed: README, docs, notebooks, and the commands that they show.

A ```python block runs, all blocks of a page in the same namespace. A block under the line "prints"
is output that the page must have printed; one under "raises" is the error of the block before it,
where "..." stands for any text.
"""

import importlib.util
import itertools
import os
import pathlib
import re
import shlex
import sys
import types
import warnings
from dataclasses import dataclass

import jax
import pytest

import lora_jax
from lora_jax.models import assets
from tests.programs import CASES

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TIMEOUT = 300  # seconds for one cell
SERVING = "With the server running:"  # above blocks that tests/serving/test_docs.py runs
# Pages of the default suite; `make test-docs` runs all pages and notebooks.
QUICK = ("README", "files", "faq", "checkpoints")
# What a notebook fetches where the cache does not have it; tests fetch nothing.
NEEDS = {"02_language_model": (assets.SMOLLM2, assets.SHAKESPEARE)}
# What a recipe or a notebook with another package's model imports, where that is not in the extra
# `test`: without it the page is skipped, and `make recipes` fails.
RECIPES = {
    "equimo": "equimo",
    "gemma": "gemma",
    "jax_image_models": "jimm",
    "keras": "keras",
    "tunix": "tunix",
    "07_nnx_gemma": "tunix",
}
# Published models under the names that the pages use, and the small ones that stand for them.
MODELS = {
    **{"Llama-3.2-1B": "llama", "Qwen2-0.5B": "qwen2", "bert-base-uncased": "bert"},
    **{"ModernBERT-base": "modernbert", "vit-base": "vit", "whisper-tiny": "whisper"},
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    line: int  # of the first line of code, from 1
    code: str
    before: str  # the line of text above it


def blocks(path: pathlib.Path) -> list[Block]:
    """The fenced blocks of a page, also those indented in a list or a tab."""
    found, start, language, indent, before = [], None, "", "", ""
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        fence = re.match(r"( *)```\s*(\w*)", line)
        if start is not None and fence and fence[1] == indent:
            code = "\n".join(text.removeprefix(indent) for text in lines[start : number - 1])
            found.append(Block(language, start + 1, code, before))
            start, before = None, ""
        elif start is None and fence:
            start, indent, language = number, fence[1], fence[2]
        elif start is None and line.strip():
            before = line.strip()
    assert start is None, f"{path.name}: the block that begins at line {start} does not end"
    return found


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def page_directory(tmp_path, monkeypatch):
    """A directory with the models that the pages load."""
    for name, fixture in MODELS.items():
        (tmp_path / name).symlink_to(ROOT / "tests" / "models" / "fixtures" / fixture)
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"):  # JAX as its users have it
        yield


def same_text(pattern: str, text: str) -> bool:
    """Whether `text` is `pattern`, where "..." is any text and white space does not count."""
    parts = [re.escape(" ".join(part.split())) for part in pattern.split("...")]
    return re.fullmatch(r"\s*.*\s*".join(parts), " ".join(text.split())) is not None


def run(page: pathlib.Path, block: Block, namespace: dict, raises: str | None) -> None:
    # empty lines in front make tracebacks show the page's own lines
    code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
    if raises is None:
        exec(code, namespace)
        return
    with pytest.raises(Exception) as raised:
        exec(code, namespace)
    message = f"{raised.type.__name__}: {raised.value}"
    assert same_text(raises, message), f"{page.name}:{block.line} raises\n{message}"


def is_recipe(page: pathlib.Path) -> bool:
    return page.parent.name == "recipes" and page.stem in RECIPES


def skip_without_its_package(page: pathlib.Path) -> None:
    package = RECIPES.get(page.stem)
    missing = package is not None and importlib.util.find_spec(package) is None
    if missing and not os.environ.get("LORA_JAX_RECIPES"):
        pytest.skip(f"{package} is not installed: make recipes")


def prepare_recipe(page: pathlib.Path, monkeypatch) -> None:
    """Let other packages warn, and lora_jax not."""
    skip_without_its_package(page)
    warnings.simplefilter("ignore")
    for category in (lora_jax.DenseWarning, lora_jax.LeftOutWarning, lora_jax.BaseKindWarning):
        warnings.simplefilter("error", category)
    if page.stem == "gemma" and importlib.util.find_spec("tensorflow") is None:
        # kauldron needs its class of arrays for annotations, and einops asks for both.
        stand_in = types.ModuleType("tensorflow")
        stand_in.Tensor = stand_in.Variable = type("Tensor", (), {})
        monkeypatch.setitem(sys.modules, "tensorflow", stand_in)


@pytest.mark.usefixtures("page_directory", "quick_compile")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=() if p.stem in QUICK or "recipes" in p.parts else pytest.mark.slow)
        for p in PAGES
        if "```python" in p.read_text()
    ],
    ids=name_of,
)
def test_python_blocks_run_and_print_what_they_say(page, monkeypatch, capsys):
    module = types.ModuleType(f"page_{page.stem}")  # not the name of the package of a recipe
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = blocks(page)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if is_recipe(page):
            prepare_recipe(page, monkeypatch)
        for block, after in itertools.zip_longest(found, found[1:]):
            if block.language == "python" and block.before != SERVING:
                raises = after.code if after and after.before == "raises" else None
                run(page, block, vars(module), raises)
    printed = capsys.readouterr().out
    shown = [block for block in found if block.before == "prints"]
    assert page != README or shown, "README.md shows no output"
    for block in shown:
        assert block.code in printed, f"{page.name}:{block.line}: what was printed:\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_a_page_names_its_language(page):
    known = {"python", "text", "console", "toml", "json", "yaml"}
    assert [(b.line, b.language) for b in blocks(page) if b.language not in known] == []


def commands(page: pathlib.Path) -> list[str]:
    """The lines of a page's console blocks, continued lines joined."""
    code = "\n".join(b.code for b in blocks(page) if b.language == "console")
    return re.sub(r"\\\n\s*", "", code).splitlines()


RECIPE_PAGES = sorted((ROOT / "docs" / "recipes").glob("*.md"))


@pytest.mark.parametrize("page", RECIPE_PAGES, ids=name_of)
def test_recipes_fit_on_a_screen(page):
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 40


def test_make_targets_exist():
    mentioned = {
        match[1]
        for page in PAGES
        for command in [*commands(page), *re.findall(r"`(make [^`]+)`", page.read_text())]
        if (match := re.match(r"make\s+([a-z][\w-]*)", command))
    }
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test", "docs", "bench", "published"} <= mentioned
    assert mentioned - set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE)) == set()


SHOWN = [(page, line) for page in PAGES for line in commands(page) if line.startswith("lora-jax ")]


@pytest.mark.parametrize("page, line", SHOWN, ids=[line for _, line in SHOWN])
def test_commands_parse(page, line, tmp_path, monkeypatch):
    """`tests/cli` runs commands; here the options and their values are checked.

    A YAML block is the file that the line above it names, and --config reads it.
    """
    typer = pytest.importorskip("typer")
    from lora_jax.cli.app import app

    monkeypatch.chdir(tmp_path)
    if "--config" in line:
        for block in blocks(page):
            if block.language == "yaml":
                pathlib.Path(re.search(r"`(\S+\.yaml)`", block.before)[1]).write_text(block.code)
        line = line.partition(" > ")[0]
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    if words[0].startswith("-"):
        assert words == ["--version"]
        return
    command.commands[words[0]].make_context(words[0], words[1:])


def test_modules_that_pages_run_exist():
    mentioned = {
        match[1] for page in PAGES for match in re.finditer(r"python -m ([\w.]+)", page.read_text())
    }
    ours = [name for name in mentioned if name.split(".")[0] in {"tests", "examples", "benchmarks"}]
    assert ours
    for name in ours:
        path = ROOT.joinpath(*name.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors that headings of a page get, as GitHub and Python-Markdown make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_public_names_in_the_text_exist(page):
    names = set(re.findall(r"`lora\.(\w+)", page.read_text(encoding="utf-8")))
    assert {name for name in names if not hasattr(lora_jax, name)} == set()


def test_the_api_reference_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: lora_jax\.(\w+)$", text, re.MULTILINE)
    assert sorted(set(listed)) == sorted(listed)
    assert {*lora_jax.__all__, "equinox", "layers", "models", "nnx"} == set(listed)


def test_faq_triggers_ten_errors():
    """The test that runs the page's blocks raises each and compares the text."""
    found = [b for b in blocks(ROOT / "docs" / "faq.md") if b.before == "raises"]
    assert len(found) >= 10


def test_readme_says_how_many_programs_there_are():
    """Those whose jaxprs are looked at: of the others a weight's shape says nothing."""
    asserted = [case for case in CASES if not case.shapes_collide and not case.small]
    assert f"the jaxprs of {len(asserted)} programs" in README.read_text(encoding="utf-8")


def test_there_are_notebooks():
    assert NOTEBOOKS, "notebooks/ is empty"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_its_outputs(path):
    nbformat = pytest.importorskip("nbformat")
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in cells)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "not run from top to bottom"
    outputs = "".join(str(cell.outputs) for cell in cells)
    assert not re.search(r"/(home|root|tmp|work|Users)/", outputs), "a path of one machine"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    cache = assets.cache_directory()
    missing = [str(a) for a in NEEDS.get(path.stem, ()) if not a.is_cached(cache)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not in {cache}: run the notebook once to fetch them")
    skip_without_its_package(path)
    import nbclient
    import nbformat

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of the running interpreter
    monkeypatch.delenv("JUPYTER_PATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources=resources
    ).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    print(*(out["text"] for out in outputs if out.get("name") == "stderr"))
