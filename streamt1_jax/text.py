"""Prompts: what may come in, how text is cleaned, and token ids of a fixed length (METHOD section 8).

- A prompt is checked before any weights load, and is never changed by the check; cleaning happens on the
  way into the tokenizer, so what a user typed is what is recorded.
- The tokenizer's file is read by the `tokenizers` library as it stands. transformers' `AutoTokenizer`
  opens the same folders, but version 5 builds a T5 tokenizer anew from the vocabulary and drops parts of
  the file (byte fallback, the pre-tokenizer), and importing it imports torch wherever torch is installed.
"""

import hashlib
import html
import re
import unicodedata
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from streamt1_jax.errors import BadInputError, WeightsError

MAX_PROMPT_CHARS = 20_000
PAD_TOKEN = "<pad>"
_FORBIDDEN = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of UTF-16 pairs, which no encoding can hold
_INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf")  # Unicode's separators, controls and formats, such as U+200B


class TokenizedPrompt(NamedTuple):
    """One prompt as the text encoder takes it."""

    ids: Int32[np.ndarray, "P"]
    """Token ids: the prompt's, the EOS, padding."""
    mask: Int32[np.ndarray, "P"]
    """1 for the prompt's tokens and the EOS, 0 for padding."""
    num_tokens: int
    """Tokens of the whole prompt with its EOS, before any was cut off; may be above P."""


def clean_prompt(text: str) -> str:
    """The text as the encoder was trained on it: encoding and HTML repaired, one space between words."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def check_prompt(prompt: Any) -> str:
    """The prompt itself, if it can be used.

    Raises:
        BadInputError: not text, nothing but white space, longer than `MAX_PROMPT_CHARS`, or holding a NUL
            or a lone surrogate.
    """
    if not isinstance(prompt, str):
        raise BadInputError(
            f"prompt is of type {type(prompt).__name__}, expected text; pass a str, or one str per prompt"
        )
    if len(prompt) > MAX_PROMPT_CHARS:  # First: the other checks need not walk a megabyte.
        raise BadInputError(
            f"prompt has {len(prompt)} characters, expected at most {MAX_PROMPT_CHARS}; "
            "shorten it: the text encoder sees its first few hundred words at most"
        )
    if found := _FORBIDDEN.search(prompt):
        raise BadInputError(
            f"prompt holds U+{ord(found.group()):04X} at character {found.start() + 1}, expected text "
            "without NUL or lone surrogates; remove it, or save the text as UTF-8"
        )
    if all(unicodedata.category(char) in _INVISIBLE for char in clean_prompt(prompt)):
        raise BadInputError("prompt is empty, expected at least one word; say what the video should show")
    return prompt


def read_prompts_file(path: str | Path) -> tuple[list[str], int]:
    """Reads one prompt per line of a UTF-8 file.

    Returns:
        The prompts, without the white space around them, and how many blank lines were skipped.

    Raises:
        BadInputError: no such file, not UTF-8, a prompt that `check_prompt` refuses (with its line
            number), or no prompt at all.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadInputError(
            f"prompts file {path}: {error.strerror or error}, expected a readable text file; "
            "give a file with one prompt per line"
        ) from error
    try:
        # A byte order mark is how some editors mark UTF-8; it belongs to no prompt.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInputError(
            f"prompts file {path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8, "
            "expected UTF-8 text; save the file as UTF-8"
        ) from error

    prompts, skipped = [], 0
    # Only these three end a line: `str.splitlines` would also split a prompt at U+2028 and the like.
    lines = re.split(r"\r\n|\n|\r", text)
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            skipped += 1
            continue
        try:
            prompts.append(check_prompt(line.strip()))
        except BadInputError as error:
            raise BadInputError(f"prompts file {path}, line {number}: {error}") from error
    if not prompts:
        raise BadInputError(
            f"prompts file {path} holds no prompt ({skipped} blank lines), expected one prompt per line; add one"
        )
    return prompts, skipped


def check_vocab(vocab: dict[str, int], vocab_size: int, folder: str | Path) -> None:
    """Raises `WeightsError` when a token's id has no row in an embedding of `vocab_size` rows.

    A gather clamps or fills such ids on the device without a word, so this is checked once, on the host.
    """
    token, largest = max(vocab.items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise WeightsError(
            f"tokenizer in {folder} has id {largest} ({token!r}), expected ids below the text encoder's "
            f"vocabulary of {vocab_size}; use the tokenizer that belongs to these weights"
        )


class Tokenizer:
    """Prompts to token ids of length `text_len`, ending in the EOS, from a local `tokenizer.json`.

    Special tokens spelled out in a prompt, such as `</s>`, are read as those tokens, as in the released code.

    Args:
        folder: holds `tokenizer.json`; nothing is ever downloaded.
        text_len: tokens that the network takes, P.
        vocab_size: rows of the text encoder's embedding.

    Raises:
        WeightsError: no usable tokenizer in the folder, or one with ids outside the vocabulary.
    """

    def __init__(self, folder: str | Path, *, text_len: int, vocab_size: int):
        self._backend = _load_backend(Path(folder))
        self.text_len = text_len
        check_vocab(self._backend.get_vocab(), vocab_size, folder)
        pad, closing = self._backend.token_to_id(PAD_TOKEN), self._backend.encode("").ids
        if pad is None or len(closing) != 1:
            raise WeightsError(
                f"tokenizer in {folder} has {PAD_TOKEN} id {pad} and closes a text with ids {closing}, "
                "expected a padding token and one EOS, as in T5; use the tokenizer of these weights"
            )
        self.sha256 = hashlib.sha256((Path(folder) / "tokenizer.json").read_bytes()).hexdigest()
        self.pad_id: int = pad
        self.eos_id: int = closing[0]

    def __call__(self, prompt: str) -> TokenizedPrompt:
        """Checks, cleans and tokenizes one prompt; one that is too long is cut, without a warning."""
        return self._fit(self._backend.encode(clean_prompt(check_prompt(prompt))).ids)

    def encode(self, prompt: str, *, strict: bool = False) -> TokenizedPrompt:
        """As `__call__`, but says what was cut off.

        Raises:
            BadInputError: the prompt is too long and `strict` is set; otherwise that is a warning.
        """
        cleaned = clean_prompt(check_prompt(prompt))
        encoding = self._backend.encode(cleaned)
        tokens = self._fit(encoding.ids)
        if tokens.num_tokens > self.text_len:
            start, _ = encoding.offsets[self.text_len - 1]  # The first token that made room for the EOS.
            message = (
                f"prompt has {tokens.num_tokens} tokens, expected at most {self.text_len}; shorten it: "
                f"what does not fit is {cleaned[start:].strip()!r}"
            )
            if strict:
                raise BadInputError(message)
            warnings.warn(f"{message}, and is cut off", stacklevel=2)
        return tokens

    def decode(self, ids: Int32[np.ndarray, "P"]) -> str:
        """The text of token ids, without special tokens."""
        return self._backend.decode(ids.tolist(), skip_special_tokens=True)

    def _fit(self, ids: list[int]) -> TokenizedPrompt:
        kept = ids if len(ids) <= self.text_len else [*ids[: self.text_len - 1], self.eos_id]
        padded = np.full((self.text_len,), self.pad_id, np.int32)
        padded[: len(kept)] = kept
        mask = (np.arange(self.text_len) < len(kept)).astype(np.int32)
        return TokenizedPrompt(padded, mask, len(ids))


def _load_backend(folder: Path) -> Any:
    import tokenizers

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise WeightsError(
            f"no tokenizer.json in {folder}, expected the tokenizer's files beside the weights; "
            "convert the checkpoint again, or copy google/umt5-xxl's tokenizer.json there"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises the bare class, whatever is wrong with the file.
        raise WeightsError(
            f"{file} ({file.stat().st_size} bytes) cannot be read as a tokenizer ({error}); "
            "expected the JSON file of the tokenizers library; fetch it again"
        ) from error
    # Lengths are ours to set: a file may carry those of its last use.
    backend.no_truncation()
    backend.no_padding()
    return backend
