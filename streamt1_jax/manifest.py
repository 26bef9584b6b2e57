"""The manifest of a folder that was written whole: size and sha256 of every file, and a seal of the manifest itself.

Formats load a flipped bit without a word: hence the hashes.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamt1_jax.atomic_folder import MARKER
from streamt1_jax.errors import WeightsError


@dataclass(frozen=True)
class Format:
    """What a manifest says of itself.

    Args:
        what: what such a folder is, for people.
        how_to: the command that makes one in a given folder.
    """

    name: str
    version: int
    what: str
    how_to: str


def is_of_format(folder: Path, form: Format) -> bool:
    """Whether a folder is of this format by its manifest; nothing is verified."""
    try:
        return json.loads((folder / "manifest.json").read_text())["format"] == form.name
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_manifest(folder: Path, form: Format, fields: Mapping[str, Any]) -> None:
    """Hashes every file below a folder and writes `manifest.json` and `manifest.sha256`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER]
    with ThreadPoolExecutor() as pool:
        entries = {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256}
            for path, sha256 in zip(files, pool.map(file_sha256, files), strict=True)
        }
    write_plain_json(
        folder / "manifest.json", {"format": form.name, "version": form.version, **fields, "files": entries}
    )
    (folder / "manifest.sha256").write_bytes(_seal(file_sha256(folder / "manifest.json")))


def read_manifest(folder: Path, form: Format) -> dict[str, Any]:
    """The manifest of a folder, its seal checked; the files are left to `refuse_changed`.

    Raises:
        WeightsError: there is none (with the command that makes one), it was changed, or it is of another version.
    """
    if not folder.exists():
        how_to = form.how_to.format(out=folder)
        raise WeightsError(f"{folder}: no such folder, expected {form.what}. Make one: {how_to}")
    if not (folder / "manifest.json").is_file():
        how_to = form.how_to.format(out=folder.with_name(folder.name + "-jax"))
        raise WeightsError(
            f"{folder}: has no manifest.json, expected {form.what}. Convert PyTorch weights into a new folder first: "
            f"{how_to}"
        )
    path, seal = folder / "manifest.json", folder / "manifest.sha256"
    found = file_sha256(path)
    expected = seal.read_bytes() if seal.is_file() else b"nothing: it is missing"
    if expected != _seal(found):
        raise WeightsError(f"{path}: sha256 is {found}, {seal.name} says {expected!r}. Convert the weights again.")
    manifest = json.loads(path.read_text())
    came = (manifest.get("format"), manifest.get("version"))
    if came != (form.name, form.version):
        raise WeightsError(f"{path}: is {came}, expected {(form.name, form.version)}. Convert the weights again.")
    return manifest


def refuse_changed(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises one `WeightsError` that lists all files that are missing or not as the manifest says."""
    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run.
        found = pool.map(lambda item: _file_problem(folder, *item), files.items())
        problems = [problem for problem in found if problem]
    if problems:
        raise WeightsError(
            f"{folder}: {len(problems)} files are not as they were written: {'; '.join(problems)}. Convert the weights "
            "again, or copy the folder again."
        )


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_plain_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _seal(sha256: str) -> bytes:
    """What `manifest.sha256` holds, to the byte: it is compared as it is."""
    return f"{sha256}\n".encode()


def _file_problem(folder: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry["size"]:
        return f"{name} has {size} bytes, expected {entry['size']}"
    sha256 = file_sha256(path)
    return None if sha256 == entry["sha256"] else f"{name} has sha256 {sha256}, expected {entry['sha256']}"
