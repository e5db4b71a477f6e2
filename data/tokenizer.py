"""Byte-level BPE: the trainer of the shipped vocabulary, and its loading as a `tiktoken.Encoding`."""

import base64
import collections
import re

import tiktoken

from data.checkpoints import find
from data.files import InputError, write_file

END = "<|endoftext|>"  # stands between documents
# Pieces that merges never cross: a word, a number of up to three digits, or signs, each with the space
# before it; a line break with the indentation after it; other white space.
PATTERN = r" ?[^\W\d_]+| ?\d{1,3}| ?[^\s\w]+| ?_+|\n+ *|\s+"


def train_bpe(texts, n_vocab):
    """Learn byte-pair merges from `texts`; returns {token bytes: rank} of size n_vocab - 1 (END is the last).

    The most frequent pair of neighbouring tokens becomes a new token, again and again; equal counts go to
    the pair of lower ranks.
    """
    counts = collections.Counter()
    for text in texts:
        counts.update(re.findall(PATTERN, text))
    words = [list(piece.encode()) for piece in counts]
    times = list(counts.values())
    tokens = [bytes([byte]) for byte in range(256)]
    pairs = collections.Counter()  # (left, right) -> how often
    where = collections.defaultdict(set)  # (left, right) -> the words it stood in
    for at, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += times[at]
            where[pair].add(at)
    while len(tokens) < n_vocab - 1 and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], -pair[0], -pair[1]))
        tokens.append(tokens[best[0]] + tokens[best[1]])
        for at in where[best]:
            merged = _merge(words[at], best, len(tokens) - 1)
            for pair in zip(words[at], words[at][1:]):
                pairs[pair] -= times[at]
            for pair in zip(merged, merged[1:]):
                pairs[pair] += times[at]
                where[pair].add(at)
            words[at] = merged
        del pairs[best], where[best]
    return {token: rank for rank, token in enumerate(tokens)}


def _merge(word, pair, new):
    merged = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new
        else:
            merged.append(token)
    return merged


def save_ranks(ranks, path):
    """Write {token bytes: rank} in tiktoken's own format: base64 and rank, a line each."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    write_file(path, "".join(lines).encode())


def load_tokenizer(name):
    """The tokenizer of the model `name` (as `data.find` reads it) as a `tiktoken.Encoding`."""
    path = find(name) / "vocab.tiktoken"
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise InputError(f"{path}, line {number}: expected a base64 token and its rank") from None
    return tiktoken.Encoding("speft", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
