"""The normalizers and pre-tokenizers of a tokenizer.json, as functions of a text and a split pattern.

Source: the documentation of the tokenizers library, huggingface.co/docs/tokenizers, for what each step does;
github.com/openai/gpt-2/blob/master/src/encoder.py for the first split pattern.
"""

import functools
import itertools
import unicodedata

import regex  # comes with tiktoken

from data.bpe import SPACE
from data.files import InputError, one_of

# The split patterns of the pre-tokenizers ByteLevel, and Digits before ByteLevel: there white space before a
# digit ends a piece, so that it is split as at the end of a text.
BYTE_LEVEL = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
PAIRS = "".join(map("".join, itertools.product(map(chr, range(128)), repeat=2)))  # of neighbours in a text


def flat_steps(step, inside):
    """The steps of a normalizer and the like, of which a Sequence has several `inside` it, null none."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step[inside] for inner in flat_steps(part, inside)]


# --- normal forms ---


def nfc(text):
    """The text with composed characters."""
    return unicodedata.normalize("NFC", text)


def _spaces(text):
    return text.replace(SPACE, " ")


def _space_first(text):
    return _spaces(" " + text) if text else text


NORMALIZERS = {(): str, ("NFC",): nfc, ("Replace",): _spaces, ("Prepend", "Replace"): _space_first}


def normalizer(path, steps):
    """The function from a text to its normal form; spaces stay, where the file wants SPACE."""
    for step in steps:
        if step["type"] == "Prepend":
            one_of(path, "prepend", step["prepend"], (SPACE,))
        if step["type"] == "Replace":
            one_of(path, "the pattern to replace", step["pattern"], ({"String": " "},))
            one_of(path, "the replacement", step["content"], (SPACE,))
    return NORMALIZERS[one_of(path, "normalizer", tuple(step["type"] for step in steps), NORMALIZERS)]


# --- pre-tokenizers ---


def as_it_is(text, first):
    """No step of preparation."""
    return text


def _metaspace(scheme, text, first):
    """`text` with spaces for SPACE, and one in front, if `scheme` wants one and there is none."""
    wanted = text and (scheme == "always" or scheme == "first" and first)
    return _spaces(text if not wanted or text[0] in (" ", SPACE) else " " + text)


def space_rule(path, normal, steps):
    """For SentencePiece: (function from a normal form to what is split, whether a space is put in front)."""
    kinds = [step["type"] for step in steps]
    replaced = normal in (_spaces, _space_first)
    if kinds == ["Metaspace"]:
        scheme = steps[0].get("prepend_scheme", "always")
        one_of(path, "replacement", steps[0]["replacement"], (SPACE,))
        one_of(path, "prepend_scheme", scheme, ("always", "first", "never"))
        one_of(path, "add_prefix_space", steps[0].get("add_prefix_space"), (None, True, scheme != "never"))
        one_of(path, "normalizer before Metaspace", normal, (str, _spaces, _space_first))
        return functools.partial(_metaspace, scheme), scheme != "never" or normal is _space_first
    one_of(path, "a model of characters whose spaces are replaced", replaced, (True,))
    for step in steps:  # one that has nothing to split
        one_of(path, "pre-tokenizer", step["type"], ("Split",))
        one_of(path, "the pattern to split at", step["pattern"], ({"String": " "},))
    return as_it_is, normal is _space_first


def space_pattern(tokens, steps):
    """The pieces that merging can be left to. A text may be cut before a space, if no token crosses that."""
    if steps and steps[0]["type"] == "Metaspace" and steps[0].get("split", True):
        return " ?[^ ]+| "
    crossing = any(b" " in token.lstrip(b" ") for token in tokens)
    return r"[\s\S]+" if crossing else " *[^ ]+| +"


def byte_pattern(path, steps):
    """The regular expression whose matches are the pieces that the pre-tokenizer makes."""
    *first, last = steps
    one_of(path, "add_prefix_space", last.get("add_prefix_space", True), (False,))
    kinds = [step["type"] for step in first] + [last["type"], last.get("use_regex", True)]
    if kinds == ["ByteLevel", True]:
        return BYTE_LEVEL
    if kinds == ["Digits", "ByteLevel", True] and first[0]["individual_digits"]:
        return DIGITS
    if kinds == ["Split", "ByteLevel", False]:
        given, kept = first[0]["pattern"]["Regex"], (first[0]["behavior"], first[0]["invert"])
        if all(piece.group() for piece in regex.finditer(given, PAIRS)):  # tiktoken loses text at empty ones
            if kept in (("Isolated", False), ("Isolated", True)):
                return rf"{given}|(?:(?!{given})[\s\S])+"  # what lies between two matches is a piece, too
            if kept == ("Removed", True):
                return given
    raise InputError(f"{path}: the pre-tokenizer is not supported: {steps!r:.300}")
