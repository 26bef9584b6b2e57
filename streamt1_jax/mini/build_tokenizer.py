"""Makes the embedded model's tokenizer: `python -m streamt1_jax.mini.build_tokenizer FOLDER`.

A byte-level BPE, so that any Unicode text has ids and comes back unchanged; its merges are learned from
captions of a little grammar of moving shapes, in which nearly every word becomes one token. As in T5, pad,
EOS and unknown are ids 0, 1 and 2, and every text is closed by the EOS. The result is the same on every run.
"""

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

MAX_VOCAB = 1024  # Rows of the embedded text encoder's embedding.
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2

# Each name stands for one of its alternatives, drawn evenly; one written twice is drawn twice as often.
GRAMMAR = {
    "caption": "{scene}|{scene} on a {backdrop} background",
    "scene": "{act}|{act}|{act} and {act}|{act} while {act}|{act} {relation} {object}|{act}, then it {motion}",
    "act": "{object} {motion}",
    "object": "a {thing}|a {thing}|a {thing}|the {thing}",
    "thing": "{kind}|{size} {kind}|{shade} {kind}|{size} {shade} {kind}",
    "kind": "{colour} {shape}",
    "motion": "{path}|{path} {manner}",
    "path": "{verb} {way}|{deed}",
    "backdrop": "{colour}|striped|checkered|plain|dotted|gradient|solid|noisy|empty|starry|dark",
    "colour": "red|orange|yellow|green|blue|purple|pink|brown|black|white|gray|grey|cyan|magenta|teal|violet|"
    "golden|silver|turquoise|maroon|navy|olive|lime|beige",
    "shade": "dark|light|bright|pale|deep|soft|vivid",
    "size": "small|large|tiny|big|huge|medium|little|giant|thin|thick|wide|tall",
    "shape": "circle|square|triangle|star|diamond|ring|cross|heart|hexagon|pentagon|rectangle|oval|ellipse|"
    "disc|ball|arrow|crescent|cube|bar|box|dot|shape|object",
    "verb": "moves|slides|drifts|rolls|flies|glides",
    "way": "right|left|up|down|upward|downward|diagonally|away|closer|forward|backward|sideways|around|"
    "in a circle|across the screen|to the right|to the left|to the center|from left to right|"
    "from top to bottom|toward the edge",
    "deed": "spins|rotates|bounces|shrinks|grows|turns|stops|waits|blinks|fades in|fades out|orbits|"
    "stands still|does not move|jumps|falls|rises|shakes|swings|pulses|changes color|turns clockwise|"
    "rotates counterclockwise|appears|disappears|stays in the middle|moves back and forth|moves up and down",
    "manner": "slowly|quickly|fast|smoothly|steadily|gently|twice|again",
    "relation": "above|below|behind|in front of|next to|left of|right of|on top of|under|near|inside|beside|"
    "past|over|into",
}


def _expand(name: str, rng: random.Random) -> str:
    text = rng.choice(GRAMMAR[name].split("|"))
    return re.sub(r"\{(\w+)\}", lambda found: _expand(found[1], rng), text)


def caption(rng: random.Random) -> str:
    """One caption, such as "a small red circle moves right on a striped background"; some are sentences."""
    text = re.sub(r"\ba (?=[aeiou])", "an ", _expand("caption", rng))
    return f"{text[0].upper()}{text[1:]}." if rng.random() < 0.2 else text


def build() -> Any:
    """Trains the tokenizer on 20,000 captions (about a second)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    rng = random.Random(0)
    tokenizer = Tokenizer(models.BPE())
    # A space before the first word makes it the same token there as anywhere else; decoding strips it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((caption(rng) for _ in range(20_000)), trainer)
    eos = SPECIAL_TOKENS[1]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, SPECIAL_TOKENS.index(eos))]
    )
    return tokenizer


def main(folder: str) -> None:
    """Writes `tokenizer.json`, and the `tokenizer_config.json` that lets transformers open the folder."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(build().to_str(pretty=False) + "\n", encoding="utf-8")
    pad, eos, unk = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "eos_token": eos,
        "unk_token": unk,
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
