"""Train the base model's vocabulary, a byte-level BPE, on the two corpora: writes data/base/tokenizer.json.

    python tests/bench/vocabulary.py
"""

import collections
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from data.bpe import ALPHABET  # noqa: E402
from data.corpus import load_corpus  # noqa: E402
from data.files import write_file  # noqa: E402
from data.vocabulary import ADDED, STEP  # noqa: E402

# Pieces that merges never cross: a word, a number of up to three digits, or signs, each with the space
# before it; a line break with the indentation after it; other white space.
PATTERN = r" ?[^\W\d_]+| ?\d{1,3}| ?[^\s\w]+| ?_+|\n+ *|\s+"


def train_bpe(texts, n_vocab):
    """Learn byte-pair merges from `texts`: the n_vocab - 1 tokens, as bytes, and the merges, pairs of bytes.

    The most frequent pair of neighbouring tokens becomes a new token, again and again; equal counts go to
    the pair of lower ranks.
    """
    counts = collections.Counter()
    for text in texts:
        counts.update(re.findall(PATTERN, text))
    words = [list(piece.encode()) for piece in counts]
    times = list(counts.values())
    tokens, merges = [bytes([byte]) for byte in range(256)], []
    pairs = collections.Counter()  # (left, right) -> how often
    where = collections.defaultdict(set)  # (left, right) -> the words it stood in
    for at, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += times[at]
            where[pair].add(at)
    while len(tokens) < n_vocab - 1 and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], -pair[0], -pair[1]))
        merges.append((tokens[best[0]], tokens[best[1]]))
        tokens.append(b"".join(merges[-1]))
        for at in where[best]:
            merged = _merge(words[at], best, len(tokens) - 1)
            for pair in zip(words[at], words[at][1:]):
                pairs[pair] -= times[at]
            for pair in zip(merged, merged[1:]):
                pairs[pair] += times[at]
                where[pair].add(at)
            words[at] = merged
        del pairs[best], where[best]
    return tokens, merges


def _merge(word, pair, new):
    merged = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new
        else:
            merged.append(token)
    return merged


def describe(tokens, merges):
    """The tokenizer.json of a vocabulary; its last token ends a document."""
    spelling = {byte: char for char, byte in ALPHABET.items()}

    def spell(token):
        return "".join(spelling[byte] for byte in token)

    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    steps = [split, {**STEP, "use_regex": False}]
    vocab = {spell(token): rank for rank, token in enumerate(tokens)}
    return {
        "version": "1.0",
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "added_tokens": [{"id": len(tokens), "content": "<|endoftext|>", **ADDED}],
        "decoder": STEP,
        "model": {"type": "BPE", "vocab": vocab, "merges": [f"{spell(a)} {spell(b)}" for a, b in merges]},
    }


if __name__ == "__main__":
    texts = load_corpus("stdlib")["train"] + load_corpus("prose")["train"]
    described = json.dumps(describe(*train_bpe(texts, 4096)), separators=(",", ":"))
    write_file(ROOT / "data" / "base" / "tokenizer.json", described.encode() + b"\n")
