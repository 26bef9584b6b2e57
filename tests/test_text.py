"""Prompts: cleaning, checks (FAULTS rows 1, 2 and 4), prompts files, and both kinds of tokenizer."""

import json
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import streamt1_jax.text
from streamt1_jax.config import ModelConfig
from streamt1_jax.errors import BadInputError, WeightsError
from streamt1_jax.mini import build_tokenizer
from streamt1_jax.text import (
    MAX_PROMPT_CHARS,
    Tokenizer,
    check_prompt,
    check_vocab,
    clean_prompt,
    read_prompts_file,
)

MINI = Path(build_tokenizer.__file__).parent / "tokenizer"
TEXT_LEN = ModelConfig.mini().dit.text_len
VOCAB_SIZE = ModelConfig.mini().text.vocab_size
MULTILINGUAL = [
    "a red circle moves right",
    "A cat 🔴 walks 👨‍👩‍👧 home ❤️ 🏳️‍🌈",
    "עיגול אדום נע ימינה",
    "دائرة حمراء تتحرك إلى اليمين",
    "left שלום right مرحبا 123 \u202bembedded\u202c",
    "赤い円が右に動く, ein größeres Quadrat, naïve café",
]


@pytest.fixture(scope="module")
def mini():
    return Tokenizer(MINI, text_len=TEXT_LEN, vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """A small tokenizer built as google/umt5-xxl's is: Unigram with byte fallback, Metaspace, EOS at the end."""
    from tokenizers import decoders, models, pre_tokenizers, processors

    words = ["▁", "▁a", "▁red", "▁circle", "▁moves", "▁right", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)] + [(word, -float(len(word))) for word in words]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    backend.enable_truncation(5)  # As a file carries the lengths of its last use.
    backend.enable_padding(length=7)
    folder = tmp_path_factory.mktemp("t5")
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a  red\t\tcircle \n moves ", "a red circle moves"),
        ("cats &amp; dogs", "cats & dogs"),
        ("cats &amp;amp;amp; dogs", "cats & dogs"),  # ftfy once, then twice
        ("1 &amp;lt; 2", "1 < 2"),
        ("schÃ¶n", "schön"),
        ("ﬁsh and “quotes”", 'fish and "quotes"'),
        ("a&nbsp;b\u3000c\u00a0d", "a b c d"),
        ("&nbsp; &#32;", ""),
        *[(text, text) for text in MULTILINGUAL],
    ],
)
def test_cleaning(text, cleaned):
    assert clean_prompt(text) == cleaned


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t ", "&nbsp;", "\u200b\u2060", None, 3, b"a cat", ["a cat"]])
def test_row_1_nothing_to_show(prompt):
    with pytest.raises(BadInputError, match=r"prompt is .*, expected "):
        check_prompt(prompt)


@pytest.mark.parametrize("prompt", [*MULTILINGUAL, "x" * MAX_PROMPT_CHARS])
def test_row_4_good_prompts_come_back_unchanged(prompt):
    assert check_prompt(prompt) == prompt


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a\0b", r"U\+0000 at character 2"),
        ("ab\ud83d", r"U\+D83D at character 3"),
        ("\ude00 ab", r"U\+DE00 at character 1"),
        ("x" * (MAX_PROMPT_CHARS + 1), r"20001 characters, expected at most 20000"),
        ("word " * 200_000, r"1000000 characters"),
    ],
)
def test_row_4_bad_prompts_are_refused(prompt, message, mini):
    for refuse in (check_prompt, mini, mini.encode):
        with pytest.raises(BadInputError, match=message) as error:
            refuse(prompt)
        assert "\n" not in str(error.value)
        assert str(error.value).isprintable()


@pytest.fixture
def write(tmp_path):
    def _write(data):
        path = tmp_path / "prompts.txt"
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return _write


def test_prompts_file_skips_and_counts_blank_lines(write):
    path = write("\ufeffa red circle\r\n\r\n  a שלום 🔴 cat \n   \nlast \u2028 one")
    assert read_prompts_file(path) == (["a red circle", "a שלום 🔴 cat", "last \u2028 one"], 2)
    assert read_prompts_file(str(write("one\n"))) == (["one"], 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("fine\n\nb\0d\n", r"line 3: prompt holds U\+0000"),
        ("fine\n" + "x" * 20_001, "line 2: prompt has 20001"),
        ("fine\n&nbsp;\n", "line 2: prompt is empty"),
        (b"fine\nb\xffd\n", "line 2: byte 0xff is not UTF-8"),
        ("", r"no prompt \(0 blank lines\)"),
        ("\n \n", r"no prompt \(2 blank lines\)"),
    ],
)
def test_prompts_file_errors_name_the_line(write, data, message):
    with pytest.raises(BadInputError, match=message):
        read_prompts_file(write(data))


def test_prompts_file_missing_or_a_folder(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(BadInputError, match=path.name):
            read_prompts_file(path)


def test_short_prompt_is_padded_after_its_eos(mini):
    ids, mask, num_tokens = mini("  a red circle\nmoves right ")
    assert ids.dtype == mask.dtype == np.int32
    assert ids.shape == mask.shape == (TEXT_LEN,)
    assert num_tokens == mask.sum() == 6  # every word of the grammar is one token
    np.testing.assert_array_equal(mask, np.arange(TEXT_LEN) < 6)
    assert ids[5] == mini.eos_id == 1
    assert set(ids[6:]) == {mini.pad_id} == {0}


def test_a_prompt_that_just_fits_is_whole(mini):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids, mask, num_tokens = mini.encode("red " * (TEXT_LEN - 1), strict=True)
    assert num_tokens == TEXT_LEN == mask.sum()
    assert ids[-1] == mini.eos_id


def test_row_2_too_long_warns_with_count_and_text(mini):
    prompt = "red " * (TEXT_LEN - 1) + "green circle 🔴 spins"
    with pytest.warns(UserWarning, match=rf"expected at most {TEXT_LEN}.*'green circle 🔴 spins'.*cut off") as caught:
        tokens = mini.encode(prompt)
    assert f"prompt has {tokens.num_tokens} tokens" in str(caught[0].message)
    assert tokens.num_tokens > TEXT_LEN
    assert tokens.mask.all()
    assert tokens.ids[-1] == mini.eos_id
    assert mini.decode(tokens.ids) == "red " * (TEXT_LEN - 2) + "red"
    np.testing.assert_array_equal(tokens.ids, mini(prompt).ids)


def test_row_2_too_long_is_an_error_when_strict(mini):
    with pytest.raises(BadInputError, match=r"'green circle'$"):
        mini.encode("red " * (TEXT_LEN - 1) + "green circle", strict=True)


@pytest.mark.parametrize("prompt", MULTILINGUAL)
@pytest.mark.parametrize("folder", ["mini", "t5"])
def test_row_4_round_trip(prompt, folder, t5_folder):
    path = MINI if folder == "mini" else t5_folder
    tokenizer = Tokenizer(path, text_len=256, vocab_size=1024)
    assert tokenizer.decode(tokenizer(prompt).ids) == prompt


@settings(max_examples=100, deadline=None, database=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_unicode_text_round_trips(mini, text):
    text = text.strip(" ")  # One leading space is the tokenizer's own.
    assume(not any(special in text for special in build_tokenizer.SPECIAL_TOKENS))
    ids = np.array(mini._backend.encode(text).ids, np.int32)
    assert mini.decode(ids) == text


def test_special_tokens_in_a_prompt_are_read_as_such(mini):
    assert mini("red </s> red").ids.tolist().count(mini.eos_id) == 2


@pytest.mark.parametrize("repeats", [1, 20])
@pytest.mark.parametrize("folder", ["mini", "t5"])
def test_ids_are_those_of_transformers(repeats, folder, t5_folder):
    """The fast tokenizer, padding and truncating by itself, keeps the EOS as the last token, and so do we."""
    from transformers import PreTrainedTokenizerFast

    path = MINI if folder == "mini" else t5_folder
    theirs = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    ours = Tokenizer(path, text_len=40, vocab_size=1024)
    for prompt in MULTILINGUAL[:4]:
        text = clean_prompt(f"{prompt} " * repeats)
        expected = theirs(text, padding="max_length", truncation=True, max_length=40)
        np.testing.assert_array_equal(ours(text).ids, expected["input_ids"], err_msg=text)
        np.testing.assert_array_equal(ours(text).mask, expected["attention_mask"], err_msg=text)


def test_the_mini_folder_opens_with_auto_tokenizer(mini):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(MINI, local_files_only=True)
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    assert theirs.model_max_length == TEXT_LEN
    expected = theirs("a red circle 🔴", padding="max_length")["input_ids"]
    np.testing.assert_array_equal(mini("a red circle 🔴").ids, expected)


def test_the_shipped_mini_tokenizer_is_what_its_script_makes(tmp_path):
    build_tokenizer.main(str(tmp_path))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        made, shipped = (json.loads((folder / name).read_text()) for folder in (tmp_path, MINI))
        assert made == shipped, f"{name} differs: run python -m streamt1_jax.mini.build_tokenizer {MINI}"


def test_mini_captions_take_about_a_token_a_word(mini):
    rng = random.Random(1)
    captions = [build_tokenizer.caption(rng) for _ in range(100)]
    for caption in captions:
        tokens = mini(caption)
        assert tokens.num_tokens <= TEXT_LEN
        assert tokens.num_tokens <= len(caption.split()) + 6, caption
        assert mini.decode(tokens.ids) == caption
    assert len(set(captions)) == len(captions)


def test_ids_outside_the_vocabulary_are_refused(mini):
    largest = max(mini._backend.get_vocab().values())
    check_vocab(mini._backend.get_vocab(), largest + 1, MINI)
    with pytest.raises(WeightsError, match=f"id {largest} .*expected ids below .* {largest};"):
        Tokenizer(MINI, text_len=TEXT_LEN, vocab_size=largest)


def test_broken_tokenizer_folders(tmp_path):
    def load():
        return Tokenizer(tmp_path, text_len=8, vocab_size=1024)

    with pytest.raises(WeightsError, match=r"no tokenizer\.json"):
        load()
    (tmp_path / "tokenizer.json").write_text("<html>not found</html>")
    with pytest.raises(WeightsError, match=r"22 bytes.*cannot be read as a tokenizer"):
        load()
    bare = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    bare.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(WeightsError, match=r"<pad> id None and closes a text with ids \[\]"):
        load()


def test_tokenizing_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from streamt1_jax.text import Tokenizer; "
        f"Tokenizer({str(MINI)!r}, text_len=8, vocab_size=1024)('a red circle'); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    root = Path(streamt1_jax.text.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
