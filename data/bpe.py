"""Merge lists as tiktoken's ranks: which bytes it joins first, so that the tokens are those of the list.

Sources: the documentation of the tokenizers library, huggingface.co/docs/tokenizers, for what the lists mean;
github.com/openai/gpt-2/blob/master/src/encoder.py for the byte alphabet, github.com/openai/tiktoken for what
ranks are.

A list joins the pair of neighbours that comes first in it, the leftmost of several, again and again. tiktoken
joins the neighbours whose joined bytes have the lowest rank, and never splits a piece that is a token. Both
come to the same if every token, merged alone, gives itself, and is ranked by the merge that completes it:
inside a longer piece its characters merge by the same steps, the last of which can be no other pair.
"""

import itertools
import math

from data.files import InputError, one_of

# Byte-level vocabularies spell a byte as a printable character: itself, or the next free one from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = {chr(byte): byte for byte in PRINTABLE}
ALPHABET |= {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in PRINTABLE)}
# For str.translate to Latin-1, which has no character 256.
TO_LATIN_1 = {code: 256 for code in range(256)} | {ord(char): byte for char, byte in ALPHABET.items()}
SPACE = "\u2581"  # SentencePiece's
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}  # SentencePiece's names of bytes


def byte_level(path, model):
    """The tokens of a byte-level model in tiktoken's order, {bytes: their ids}, and {id: bytes} of all.

    model: the "model" of a tokenizer.json; its vocabulary may lack bytes: these are no tokens at all.
    """
    vocab = model["vocab"]
    meant = {number: spelled for token, number in vocab.items() if (spelled := _spelled(token)) is not None}
    places, unreached = place_tokens(path, vocab, model["merges"])
    reached = sorted(places, key=places.get)
    if model.get("ignore_merges"):  # a piece that is a token is taken whole, whatever merging makes of it
        # In a longer piece tiktoken would join the two parts in which a token stays, too.
        if halved := [token for token, parts in unreached.items() if parts == 2]:
            raise InputError(f"{path}: with ignore_merges a merge must make {halved[0]!r:.100} of its halves")
        reached += unreached
    tokens = {meant[vocab[token]]: (vocab[token],) for token in reached if vocab[token] in meant}
    missing = {byte: () for byte in map(bytes, zip(range(256))) if byte not in tokens}
    if missing:  # then the library has a token for what is unknown, if it is told one
        one_of(path, "unk_token", model.get("unk_token"), (None,))
    return missing | tokens, meant


def _spelled(token):
    """The bytes that a byte-level token's name stands for, None if it is not in the alphabet."""
    try:
        return token.translate(TO_LATIN_1).encode("latin-1")
    except UnicodeEncodeError:
        return None


def sentencepiece(path, model):
    """The same for a model of characters, spelled with real spaces: what is no token comes byte by byte.

    The lowest ranks join bytes into the vocabulary's characters, prefix by prefix. A prefix that stays
    unfinished stands for the tokens of its bytes.
    """
    vocab = model["vocab"]
    one_of(path, "ignore_merges", model.get("ignore_merges"), (None, False))
    one_of(path, f"a token {SPACE}", SPACE in vocab, (True,))
    meant = {number: token.replace(SPACE, " ").encode() for token, number in vocab.items()}
    meant |= {vocab[name]: bytes([byte]) for name, byte in BYTES.items() if name in vocab}
    # Merges make no token with a space, since every space of a text becomes a SPACE, and none of a byte.
    made = {token: number for token, number in vocab.items() if " " not in token and token not in BYTES}
    places, _ = place_tokens(path, made, model["merges"])
    chars = {meant[number]: number for token, number in made.items() if len(token) == 1}
    tokens = {}
    for name, byte in BYTES.items():
        number = chars.get(bytes([byte]), vocab.get(name))
        if number is None:
            raise InputError(f"{path}: with byte_fallback the vocabulary needs the token {name}")
        tokens[bytes([byte])] = (number,)
    for char, number in chars.items():
        for end in range(2, len(char)):
            tokens.setdefault(char[:end], sum((tokens[bytes([byte])] for byte in char[:end]), ()))
        tokens[char] = (number,)
    longer = sorted((token for token in places if len(token) > 1), key=places.get)
    return tokens | {meant[vocab[token]]: (vocab[token],) for token in longer}, meant


def place_tokens(path, vocab, merges):
    """{token: rank of the merge that completes it, -1 for a character}, and the tokens that merging alone
    does not reach: {token: number of parts that stay}.

    vocab: {token: id}; merges: pairs of tokens, or strings with a space between the two.
    """
    order, halves, places = {}, {}, {token: -1 for token in vocab if len(token) == 1}
    for rank, merge in enumerate(merges):
        left, right = pair = tuple(merge.split(" ") if isinstance(merge, str) else merge)
        whole = left + right
        if pair in order or not (left in vocab and right in vocab and whole in vocab):
            raise InputError(f"{path}: the merge {merge!r:.100} is not of tokens, or stands there twice")
        order[pair] = rank
        new = whole not in places and left in places and right in places
        if new and _boundary_lasts(left, right, order, places, halves):
            places[whole], halves[whole] = rank, pair
    unreached = {}
    for token in [token for token in vocab if token not in places]:  # or its parts come later in the list
        rank, parts = merge_alone(token, order)
        if parts == 1:
            places[token] = rank
        else:
            unreached[token] = parts
    return places, unreached


def _boundary_lasts(left, right, order, places, halves):
    """Whether merging makes the tokens `left` and `right` of their characters, and joins none across.

    Goes back in time: of the two tokens at the boundary, the one made last is taken apart. Nothing was joined
    across it before, if that merge came before the pair's own; of equal merges the leftmost is made first.
    The halves of tokens come earlier in `order` than these, so that merges are made in that order.
    """
    while True:
        if places[left] > places[right]:
            made, left = places[left], halves[left][1]
            joined = order.get((left, right), made) < made
        elif places[right] >= 0:
            made, right = places[right], halves[right][0]
            joined = order.get((left, right), made + 1) <= made
        else:
            return True
        if joined:
            return False


def merge_alone(token, order):
    """(rank of the last merge, number of parts that stay) when the characters of `token` are merged."""
    parts, rank = list(token), -1
    while len(parts) > 1:
        ranks = [order.get(pair, math.inf) for pair in itertools.pairwise(parts)]
        if min(ranks) == math.inf:
            break
        rank = min(ranks)
        at = ranks.index(rank)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return rank, len(parts)
