"""The prose of the project: plain words in docstrings, messages, help and pages."""

import ast
import io
import json
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parents[2]
MODULES = sorted([*ROOT.glob("lora_jax/**/*.py"), *ROOT.glob("examples/**/*.py")])
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/*.ipynb")])

# What reads like a translation, and what a colleague would write in its place.
FORBIDDEN = {
    r"\b(is|are|was|were|be) no (?!longer\b|more\b|less\b)": "is not a ..., has no ...",
    r"\bholds? no\b": "contains no",
    r"\banew\b": "again",
    r"\bbegun\b": "started",
    r"\b(be|is|are|was|were) had\b|\bhad from\b": "obtained from, computed from",
    r"\bauthor's\b": "user-defined, custom",
    r"\bof (one's|your|their|its|a user's) own\b": "custom, its own ...",
    r"\btorch's\b": "PyTorch's",
    r"(^|[.:;] )Of (the|a|an|what|its|each|every|all)\b": "put the subject first",
    r"\b(made|makes?|making) dense\b": "materialized, densified",
    r"\btrained whole\b|\btrain whole\b": "fully trained",
    r"\b(go|goes|going|went) on (from|with|to|at|as|after|where|in)\b": "continue, resume",
    r"\bone (letter|warning|line|key|number|axis|file|row) an? \w+": "per",
}

# A first word that starts a noun phrase; a function's docstring says what it does: "Return ...".
NOUNS = {
    *("The", "A", "An", "Whether", "What", "Which", "How", "Where", "Who", "One", "Two"),
    *("Every", "Each", "All", "Of", "In", "As", "For", "Some", "Any", "No", "Without", "With"),
}
VERBS_IN_S = {"Pass", "Process", "Compress", "Express", "Address", "Discuss", "Guess"}


def texts(path):
    """(line, text) of every comment and every string in a module."""
    source = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("#: ")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, " ".join(node.value.split())


def prose(path):
    """The text of a page, without its code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return " ".join(re.sub(r"^```.*?^```", "", text, flags=re.S | re.M).split())


def functions(path):
    """Functions and methods at the top of a module or class, properties left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for parent in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        for node in parent.body:
            decorators = [ast.unparse(d) for d in getattr(node, "decorator_list", ())]
            is_property = any("property" in d for d in decorators)
            if isinstance(node, ast.FunctionDef) and not is_property:
                yield node


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_plain_words(path):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]!r}: write {better!r}"
        for line, text in texts(path)
        for pattern, better in FORBIDDEN.items()
        for match in re.finditer(pattern, text, re.IGNORECASE if "Of" not in pattern else 0)
    ]
    assert found == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_plain_words_on_pages(path):
    text = prose(path)
    found = [
        f"...{text[max(match.start() - 30, 0) : match.end() + 30]}...: write {better!r}"
        for pattern, better in FORBIDDEN.items()
        for match in re.finditer(pattern, text, re.IGNORECASE if "Of" not in pattern else 0)
    ]
    assert found == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_functions_docstring_begins_with_a_verb(path):
    wrong = []
    for node in functions(path):
        doc = ast.get_docstring(node)
        word = re.match(r"[A-Za-z-]*", doc or "Verb")[0]
        is_noun = not word[:1].isupper() or word in NOUNS
        if is_noun or (word.endswith("s") and word not in VERBS_IN_S):
            wrong.append(f"{node.lineno}: {node.name}: {doc.splitlines()[0]}")
    assert wrong == []


def test_no_future_imports():
    """Python 3.11 is the minimum: forward references are the one use, and they can be quoted."""
    uses = [name_of(p) for p in MODULES if "from __future__" in p.read_text(encoding="utf-8")]
    assert uses == []
