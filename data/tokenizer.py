"""Byte-level BPE tokenizers from disk, as a `tiktoken.Encoding`.

Source: the documentation of the tokenizers library, huggingface.co/docs/tokenizers, for what a tokenizer.json
says; github.com/openai/gpt-2/blob/master/src/encoder.py for the byte alphabet and the first split pattern.
"""

import itertools
import unicodedata

import regex  # comes with tiktoken
import tiktoken

from data.files import InputError, find, one_of, read_json, write_json
from data.gguf import read_gguf

# The split patterns of the pre-tokenizers ByteLevel, and Digits before ByteLevel: there white space before a
# digit ends a piece, so that it is split as at the end of a text.
BYTE_LEVEL = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
STEP = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLITS = {"gpt-2": [STEP], "smollm": [{"type": "Digits", "individual_digits": True}, STEP]}  # by GGUF's names
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
# Vocabularies spell a byte as a printable character: itself, or the next free one from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = {chr(byte): byte for byte in PRINTABLE}
ALPHABET |= {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in PRINTABLE)}


class Encoding(tiktoken.Encoding):
    """A `tiktoken.Encoding` whose ids need not be in the order of its merges, and which may normalise to NFC.

    tokens: {bytes: id} in the order in which they are merged; specials: {name: id}. Decoding a text that was
    normalised gives the normal form. As in tiktoken, specials are read from a text only where `encode` is
    told to. An id of the vocabulary that no text is encoded as raises KeyError when decoded.
    """

    def __init__(self, name, pattern, tokens, specials, nfc):
        # Some vocabularies lack a few control characters; tiktoken needs all bytes. These get no id.
        tokens = tokens | {byte: None for byte in map(bytes, zip(range(256))) if byte not in tokens}
        ranks = {token: rank for rank, token in enumerate(tokens)}
        numbered = {name: len(ranks) + i for i, name in enumerate(specials)}
        super().__init__(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=numbered)
        self.ids = [*tokens.values(), *specials.values()]
        self.ranks = {number: rank for rank, number in enumerate(self.ids) if number is not None}
        self.normal = (lambda text: unicodedata.normalize("NFC", text)) if nfc else str
        self._special_tokens, self._special_token_values = specials, set(specials.values())

    def encode_ordinary(self, text):
        return self._numbers(super().encode_ordinary(self.normal(text)))

    def encode(self, text, **which):
        return self._numbers(super().encode(self.normal(text), **which))

    def encode_single_token(self, text_or_bytes):
        return self.ids[super().encode_single_token(text_or_bytes)]

    def decode_bytes(self, tokens):
        return super().decode_bytes([self.ranks[token] for token in tokens])

    def decode(self, tokens, errors="replace"):
        return self.decode_bytes(tokens).decode(errors=errors)

    def _numbers(self, ranks):
        return [self.ids[rank] for rank in ranks if self.ids[rank] is not None]


def load_tokenizer(name):
    """The tokenizer of the model `name` (as `data.find` reads it) as a `tiktoken.Encoding`.

    Read are tokenizer.json, vocab.json + merges.txt, or a .gguf file, if they hold a byte-level BPE; anything
    that would encode otherwise is an InputError. No special token is ever added.
    """
    path = find(name)
    try:
        return _load_described(path, _describe(path))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, regex.error) as error:
        raise InputError(f"{path}: the tokenizer cannot be read ({type(error).__name__}: {error})") from None


def _describe(path):
    """What a tokenizer.json says, or would say, about the tokenizer of `path`."""
    if (path / "tokenizer.json").exists():
        return read_json(path / "tokenizer.json")
    if path.suffix == ".gguf":
        fields = {name.removeprefix("tokenizer.ggml."): value for name, value in read_gguf(path)[0].items()}
        one_of(path, "tokenizer.ggml.model", fields["model"], ("gpt2",))  # "llama" is SentencePiece
        split = SPLITS[one_of(path, "tokenizer.ggml.pre", fields["pre"], SPLITS)]
        vocab, merges = {token: i for i, token in enumerate(fields["tokens"])}, fields["merges"]
        named = [token for token, kind in zip(fields["tokens"], fields["token_type"]) if kind in (3, 4)]
    elif (path / "vocab.json").exists():  # without a word on how to split: known for two families
        family = read_json(path / "config.json")["model_type"]
        one_of(path, "model_type without tokenizer.json", family, ("gpt2", "opt"))
        split, vocab = SPLITS["gpt-2"], read_json(path / "vocab.json")
        lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        named = [token for token in vocab.keys() - {m.replace(" ", "") for m in merges} if len(token) > 1]
    else:
        raise InputError(f"{path} has no tokenizer.json or vocab.json (SentencePiece is not supported)")
    return {
        "version": "1.0", "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
        "added_tokens": [{"id": vocab[token], "content": token, **ADDED} for token in named],
        "decoder": STEP, "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }  # fmt: skip


def write_tokenizer(folder, source):
    """Write the tokenizer of the model `source` (as `find` reads it) as the tokenizer.json of `folder`."""
    write_json(folder / "tokenizer.json", _describe(find(source)))


def _load_described(path, described):
    model, added = described["model"], described["added_tokens"]
    one_of(path, "the tokenizer's type", model.get("type", "BPE"), ("BPE",))  # Unigram is SentencePiece's
    for option in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        one_of(path, option, model.get(option), (None, False, ""))
    for token, option in itertools.product(added, ("lstrip", "rstrip", "single_word")):
        one_of(path, f"{option} of an added token", token.get(option), (None, False))
    normalizer = one_of(path, "normalizer", (described.get("normalizer") or {}).get("type"), (None, "NFC"))
    specials = {token["content"]: token["id"] for token in added}
    tokens = {_spelled(token): number for token, number in model["vocab"].items() if token not in specials}
    tokens.pop(None, None)
    ids = [*tokens.values(), *specials.values()]
    if not all(type(n) is int and 0 <= n < 2**31 for n in ids) or len(set(ids)) < len(ids):
        raise InputError(f"{path}: the ids of the tokens are not different whole numbers")
    order = {}
    for merge in model["merges"]:
        left, right = map(_spelled, merge.split(" ") if isinstance(merge, str) else merge)
        order.setdefault((left, right), len(order))
        if not {left, right, left + right} <= tokens.keys():
            raise InputError(f"{path}: the merge {merge!r:.100} is not of tokens")
    ordered = _in_merge_order(tokens, order)
    if model.get("ignore_merges") and len(ordered) < len(tokens):
        raise InputError(f"{path}: with ignore_merges, merges must make every token")
    pattern = _pattern(path, described["pre_tokenizer"])
    return Encoding(str(path), pattern, ordered, specials, nfc=normalizer == "NFC")


def _spelled(token):
    """The bytes that a token's name stands for, None if it is not in the byte alphabet."""
    return bytes(ALPHABET[char] for char in token) if ALPHABET.keys() >= set(token) else None


def _pattern(path, step):
    """The regular expression whose matches are the pieces that the pre-tokenizer makes."""
    *first, last = step.get("pretokenizers", [step])
    one_of(path, "add_prefix_space", last.get("add_prefix_space", True), (False,))
    kinds = [step["type"] for step in first] + [last["type"], last.get("use_regex", True)]
    if kinds == ["ByteLevel", True]:
        return BYTE_LEVEL
    if kinds == ["Digits", "ByteLevel", True] and first[0]["individual_digits"]:
        return DIGITS
    if kinds == ["Split", "ByteLevel", False]:
        given = first[0]["pattern"]["Regex"]
        isolated = first[0]["behavior"] == "Isolated" and not first[0]["invert"]
        if isolated and not regex.fullmatch(given, ""):  # tiktoken crashes on empty pieces
            return rf"{given}|(?:(?!{given})[\s\S])+"  # what lies between two matches is a piece, too
    raise InputError(f"{path}: the pre-tokenizer is not supported: {step!r:.300}")


def _in_merge_order(tokens, order):
    """The part of `tokens` that merging reaches, so ordered that tiktoken makes the same tokens.

    tiktoken joins any two neighbours whose joined bytes are a token, the first in order first, and never
    splits a piece that is a token; the file lists which pairs may be joined. Both come to the same if every
    token's own bytes, merged by the list, give that token: inside a longer piece they merge by the same
    steps, and the last of these is the token's place in the order. Of such tokens a list with ignore_merges
    (Llama 3's), which takes a whole piece that is a token, makes the same, too.
    """
    places = {token: merge_bytes(token, order) for token in tokens}
    return {token: tokens[token] for token in sorted(tokens, key=places.get) if places[token] < len(order)}


def merge_bytes(token, order):
    """Merge the bytes of `token` by {(left, right): rank}; the last rank, or len(order) if several stay."""
    parts, rank = [bytes([byte]) for byte in token], -1
    while len(parts) > 1 and rank < len(order):
        rank, at = min((order.get(pair, len(order)), i) for i, pair in enumerate(itertools.pairwise(parts)))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return rank
