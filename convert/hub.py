"""Where a published checkpoint lies: a path on this machine, or a repository of the hub at one commit.

- No commit is pinned in this file: it was written without access to the hub, where alone a commit can be looked up.
  The default revision is `main`; the hub resolves it to a commit when files are fetched, and the manifest records that
  commit. `--revision` with it fetches the same files again.
- LongLive needs a revision: this program converts its 1.0 line, and its `main` now holds LongLive 2.0.
- Whatever is missing, the error says the command that downloads it.
"""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from streamt1_jax.errors import BadInputError, WeightsError

WAN = "Wan-AI/Wan2.1-T2V-1.3B"
WAN_DIFFUSERS = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
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

    @property
    def name(self) -> str:
        """What people call it: a file's name, or a folder's or repository's without its owner."""
        if "file" in self.origin:
            return Path(self.origin["file"]).name
        return self.origin["repo"].rpartition("/")[2] if "repo" in self.origin else self.path.absolute().name


def locate_folder(
    source: str, revision: str | None, patterns: Sequence[str], example: str = WAN, *, offline: bool = False
) -> Located:
    """A folder given by its path, or the files of a hub repository that match `patterns`.

    Args:
        example: a repository that would do, for the message.
        offline: look into the hub's cache alone.

    Raises:
        WeightsError: `source` is neither a folder nor the name of a repository, or the repository cannot be fetched
            and is not in the cache.
        BadInputError: a repository that needs a revision came without.
    """
    if os.path.isdir(source):
        return Located(Path(source), {"path": source})
    if os.path.exists(source) or not _REPO.fullmatch(source):
        what = "is a file" if os.path.exists(source) else "does not exist"
        raise WeightsError(
            f"{source!r} {what}, expected a folder or a hub repository. Check the path, give {example} to fetch it, or "
            f"download it: `{download_command(example)}`"
        )
    return _fetch(source, revision, patterns, offline=offline)


def locate_file(source: str, revision: str | None, files: dict[str, str]) -> Located:
    """A file given by its path, or one of a hub repository: `REPO`, or `REPO:FILE` where it is not in `files`.

    Raises:
        WeightsError: `source` is none of these, or the repository cannot be fetched and is not in the cache.
        BadInputError: a repository that needs a revision came without.
    """
    if os.path.isfile(source):
        return Located(Path(source), {"path": source})
    if os.path.isdir(source):
        raise WeightsError(f"{source!r} is a folder, expected a weights file. Give the path of the file inside it.")
    repo, _, file = source.partition(":")
    file = file or files.get(repo, "")
    if not _REPO.fullmatch(repo) or not file or file.startswith("/") or ".." in file:
        commands = " or ".join(f"`{download_command(known, [name])}`" for known, name in files.items())
        raise WeightsError(
            f"{source!r} does not exist, expected a file, a hub repository ({' or '.join(files)}) or REPO:FILE. Check "
            f"the path, give a repository, or download the file: {commands}; COMMIT is one of LongLive 1.0, main is 2.0"
        )
    located = _fetch(repo, revision, [file])
    return Located(located.path / file, located.origin | {"file": file})


def require_files(folder: Located, files: Sequence[str], repo: str) -> None:
    """Refuses a folder that lacks files of a published checkpoint.

    Args:
        repo: a repository that holds them.

    Raises:
        WeightsError: one error that lists all that are missing, with the command that downloads them.
    """
    missing = [name for name in files if not (folder.path / name).is_file()]
    if not missing:
        return
    if "repo" in folder.origin:
        source = folder.origin["repo"]
        how = f"Give a repository that has them, such as {repo}."
    else:
        source = str(folder.path)
        how = f"Download them: `{download_command(repo, missing, folder.path)}`"
    raise WeightsError(f"{source}: no {', '.join(missing)}, expected the files of {repo}. {how}")


def download_command(repo: str, files: Sequence[str] = (), folder: Path | None = None) -> str:
    """The command that downloads files of a repository, or all of it, into a folder (named after it by default)."""
    revision = ["--revision", "COMMIT"] if repo == LONGLIVE else []
    words = ["hf", "download", repo, *files, *revision, "--local-dir", str(folder or repo.rpartition("/")[2])]
    return shlex.join(words)


def _fetch(repo: str, revision: str | None, patterns: Sequence[str], *, offline: bool = False) -> Located:
    if repo == LONGLIVE and revision in (None, "main"):
        raise BadInputError(
            f"{repo}: revision {revision or 'not given'}, expected a commit of LongLive 1.0: its main branch now holds "
            f"LongLive 2.0, another network. Look the last 1.0 commit up at https://huggingface.co/{repo}/commits/main "
            "and pass it with --revision, or give the path of a downloaded file."
        )
    from huggingface_hub import snapshot_download

    try:
        options: dict[str, Any] = {"local_files_only": True} if offline else {}
        path = Path(snapshot_download(repo, revision=revision or "main", allow_patterns=list(patterns), **options))
    except Exception as error:  # Of the hub, the network, its libraries and the disk: all end the same way here.
        name, first = type(error).__name__, " ".join(str(error).split())[:300]
        raise WeightsError(
            f"{repo} at revision {revision or 'main'}: no path on this machine, could not be fetched from the hub, nor "
            f"found whole in its cache ({name}: {first}). Check the name, the revision and the network, or give the "
            "path of a download."
        ) from error
    return Located(path, {"repo": repo, "revision": path.name})
