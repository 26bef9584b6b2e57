"""The instruction texts that the reward models were trained with: read as data from their authors' packages.

- They are not part of this project. `hpsv3` is a wheel of the package index, VideoAlign a repository; both are only
  parsed: constants that are literals are read, nothing of them is imported or run.
- Which constant is meant is known by what it holds: the place of the prompt and the reserved tokens.
"""

import ast
import json
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from convert.reward_files import read_text
from streamt1_jax.compile_cache import cache_folder
from streamt1_jax.errors import WeightsError
from streamt1_jax.rewards.chat import PLACEHOLDER
from streamt1_jax.rewards.model_settings import HPSV3, MODELS, RESERVED, VIDEOREWARD

HPSV3_WHEEL, HPSV3_FILE = "hpsv3==1.0.0", "hpsv3/dataset/data_collator_qwen.py"
VIDEOALIGN_FILE = "prompt_template.py"
VIDEOALIGN_COMMIT = "219ab9db64c045e5181a2202d11f686439351292"
VIDEOALIGN_URL = f"https://raw.githubusercontent.com/KlingTeam/VideoAlign/{VIDEOALIGN_COMMIT}/{VIDEOALIGN_FILE}"
HOW_TO = {
    HPSV3: f"`{Path(sys.executable).name} -m pip download --no-deps {HPSV3_WHEEL}` and give the .whl",
    VIDEOREWARD: f"clone https://github.com/KlingTeam/VideoAlign and give its {VIDEOALIGN_FILE}",
}
_MAIN = "INSTRUCTION"  # of several constants with the prompt's place, the one that HPSv3 uses
_MAX_BYTES = 10_000_000


def read_instructions(paths: Sequence[str], models: Iterable[str] = MODELS, *, offline: bool = False) -> dict[str, str]:
    """The instruction text of each model: `text.format(text_prompt=prompt)` is what the model is asked.

    Args:
        paths: wheels, checkouts, Python files, or JSON files `{model: text}`; what they do not hold is downloaded.
        offline: take what was downloaded before, and nothing else.

    Raises:
        WeightsError: a text is missing (with what to fetch), or a file holds none or several that could be it.
    """
    found: dict[str, str] = {}
    for path in paths:
        found |= _read(Path(path))
    for model in models:
        if model not in found:
            found |= _read(_downloaded(model, offline=offline))
        if model not in found:
            raise WeightsError(
                f"no instruction text of {model} was found, expected one; {HOW_TO[model]} to --templates"
            )
    return {model: found[model] for model in models}


def _read(path: Path) -> dict[str, str]:
    """The texts of one file or folder, by model."""
    if path.is_dir():
        inside = [path / HPSV3_FILE, path / "dataset" / Path(HPSV3_FILE).name, path / VIDEOALIGN_FILE]
        files = [file for file in inside if file.is_file()]
        if not files:
            raise WeightsError(f"{path}: holds none of {HPSV3_FILE} and {VIDEOALIGN_FILE}, expected a checkout")
        return {model: text for file in files for model, text in _read(file).items()}
    if not path.is_file():
        raise WeightsError(f"{path}: no such file, expected a wheel, a Python file, a checkout or a JSON file")
    if path.stat().st_size > _MAX_BYTES:
        raise WeightsError(f"{path}: {path.stat().st_size} bytes, expected a small file; give the package itself")
    if path.suffix == ".json":
        return _read_json(path)
    if path.suffix == ".whl":
        return texts_of(_from_wheel(path), str(path))
    return texts_of(read_text(path), str(path))


def _read_json(path: Path) -> dict[str, str]:
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
        known = {model: texts[model] for model in MODELS if model in texts}
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path}: cannot be read ({error}), expected JSON {{model: text}}") from error
    if not known or not all(isinstance(text, str) for text in known.values()):
        raise WeightsError(f"{path}: holds no text of {' or '.join(MODELS)}, expected JSON {{model: text}}")
    return known


def _from_wheel(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(HPSV3_FILE).decode("utf-8")
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
        raise WeightsError(
            f"{path}: {error}, expected the wheel of hpsv3 with {HPSV3_FILE}; download it again"
        ) from error


def texts_of(source: str, name: str) -> dict[str, str]:
    """The instruction texts among the constants of Python source; nothing is run.

    Raises:
        WeightsError: not Python, or no constant or several that could be meant.
    """
    constants = _constants(source, name)
    whole = {
        model: [
            key for key, text in constants.items() if PLACEHOLDER in text and all(t in text for t in RESERVED[model])
        ]
        for model in MODELS
    }
    found = {model: constants[_one(keys, model, name)] for model, keys in whole.items() if keys}
    if HPSV3 not in found:
        found |= _hpsv3_of_two(constants, name)
    if not found:
        raise WeightsError(
            f"{name}: none of its constants ({', '.join(constants) or 'none'}) holds {PLACEHOLDER} and reserved "
            f"tokens, expected an instruction text; {HOW_TO[HPSV3]}, and {HOW_TO[VIDEOREWARD]}"
        )
    return found


def _hpsv3_of_two(constants: dict[str, str], name: str) -> dict[str, str]:
    """HPSv3 keeps the text with the prompt and the one with the reserved token apart; the second is not formatted."""
    (token,) = RESERVED[HPSV3]
    tails = [key for key, text in constants.items() if token in text and PLACEHOLDER not in text]
    heads = [key for key, text in constants.items() if PLACEHOLDER in text and "<|" not in text]
    if not tails or not heads:
        return {}
    head = _MAIN if _MAIN in heads else _one(heads, HPSV3, name)
    tail = constants[_one(tails, HPSV3, name)].replace("{", "{{").replace("}", "}}")
    return {HPSV3: constants[head] + tail}


def _one(keys: list[str], model: str, name: str) -> str:
    if len(keys) != 1:
        raise WeightsError(
            f"{name}: {', '.join(keys)} could all be the instruction text of {model}, expected one; give the texts as "
            'a JSON file {"' + model + '": text}'
        )
    return keys[0]


def _constants(source: str, name: str) -> dict[str, str]:
    """Every text that is assigned, as a literal, to a name of the module."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise WeightsError(f"{name}: is not Python ({error}), expected {VIDEOALIGN_FILE} or {HPSV3_FILE}") from error
    found: dict[str, str] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        try:
            value = ast.literal_eval(node.value)
        except (ValueError, TypeError, SyntaxError):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        found |= {target.id: value for target in targets if isinstance(target, ast.Name) and isinstance(value, str)}
    return found


def _downloaded(model: str, *, offline: bool) -> Path:
    """The file of a model's authors, from the user's cache or fetched into it."""
    cache = cache_folder()
    folder = (Path.home() / ".cache" / "streamt1-jax" if cache is None else cache.parent) / "instructions"
    name = "hpsv3-*.whl" if model == HPSV3 else f"videoalign-{VIDEOALIGN_COMMIT[:8]}-{VIDEOALIGN_FILE}"
    if kept := sorted(folder.glob(name)):
        return kept[-1]
    if offline:
        raise WeightsError(
            f"the instruction text of {model} is not in {folder}, and --offline was given; {HOW_TO[model]}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if model == HPSV3:
            pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", HPSV3_WHEEL, "--dest", str(folder))
            subprocess.run(pip, check=True, capture_output=True, text=True, timeout=300)
            return sorted(folder.glob(name))[-1]
        with urllib.request.urlopen(VIDEOALIGN_URL, timeout=60) as answer:
            data = answer.read(_MAX_BYTES)
        partial = folder / f".{name}.part"
        partial.write_bytes(data)
        return partial.replace(folder / name)
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise WeightsError(
            f"the instruction text of {model} could not be downloaded ({type(error).__name__}: {error}); "
            f"{HOW_TO[model]} to --templates"
        ) from error
