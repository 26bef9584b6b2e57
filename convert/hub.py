"""Published checkpoints, fetched through huggingface_hub at one commit, which goes into the manifest."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from streamt1_jax.errors import BadInputError, WeightsError

LONGLIVE = "Efficient-Large-Model/LongLive"
SELF_FORCING = "gdhe17/Self-Forcing"

# Files of the published checkpoints inside their repositories.
GENERATOR_FILES = {LONGLIVE: "models/longlive_base.pt", SELF_FORCING: "checkpoints/self_forcing_dmd.pt"}
LORA_FILES = {LONGLIVE: "models/lora.pt"}

_REPO = re.compile(r"[\w.-]+/[\w.-]+")


class Located(NamedTuple):
    """A file or folder on this machine, and where it came from (JSON types, for the manifest)."""

    path: Path
    origin: dict[str, str]


def locate_folder(source: str, revision: str | None, patterns: Sequence[str]) -> Located:
    """A folder given by its path, or the files of a hub repository that match `patterns`.

    Raises:
        BadInputError: `source` is neither a folder nor the name of a repository.
        WeightsError: the repository cannot be fetched and is not in the cache.
    """
    if Path(source).is_dir():
        return Located(Path(source), {"path": source})
    if Path(source).exists() or not _REPO.fullmatch(source):
        raise BadInputError(
            f"{source!r} is no folder, expected one or a hub repository such as Wan-AI/Wan2.1-T2V-1.3B. Check the path."
        )
    return _fetch(source, revision, patterns)


def locate_file(source: str, revision: str | None, files: dict[str, str]) -> Located:
    """A file given by its path, or one of a hub repository: `REPO`, or `REPO:FILE` where it is not in `files`.

    Raises:
        BadInputError: `source` is none of these.
        WeightsError: the repository cannot be fetched and is not in the cache.
    """
    if Path(source).exists():
        return Located(Path(source), {"path": source})
    repo, _, file = source.partition(":")
    file = file or files.get(repo, "")
    if not _REPO.fullmatch(repo) or not file or file.startswith("/") or ".." in file:
        known = " or ".join(files)
        raise BadInputError(
            f"{source!r} is no file, expected one, or a hub repository ({known}), or REPO:FILE. Check the path."
        )
    located = _fetch(repo, revision, [file])
    return Located(located.path / file, located.origin | {"file": file})


def _fetch(repo: str, revision: str | None, patterns: Sequence[str]) -> Located:
    if repo == LONGLIVE and revision in (None, "main"):
        raise BadInputError(
            f"{repo}: revision {revision or 'not given'}, expected a commit of LongLive 1.0: its main branch now holds "
            f"LongLive 2.0, another network. Look the last 1.0 commit up at https://huggingface.co/{repo}/commits/main "
            "and pass it with --revision, or give the path of a downloaded file."
        )
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(repo, revision=revision or "main", allow_patterns=list(patterns)))
    except Exception as error:  # Of the hub, the network, its libraries and the disk: all end the same way here.
        name, first = type(error).__name__, " ".join(str(error).split())[:300]
        raise WeightsError(
            f"{repo} at revision {revision or 'main'}: could not be fetched, nor found whole in the cache "
            f"({name}: {first}). Check the name, the revision and the network, or give the path of a download."
        ) from error
    return Located(path, {"repo": repo, "revision": path.name})
