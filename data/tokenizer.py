"""BPE tokenizers, byte-level or SentencePiece's, as a `tiktoken.Encoding`.

Source: the documentation of the tokenizers library, huggingface.co/docs/tokenizers, for what a tokenizer.json
says and in which order its parts are applied.
"""

import functools
import itertools
import re

import regex  # comes with tiktoken
import tiktoken
from tiktoken.core import raise_disallowed_special_token

from data.bpe import byte_level, sentencepiece
from data.files import InputError, find, one_of, write_file, write_json
from data.splits import as_it_is, byte_pattern, flat_steps, nfc, normalizer, space_pattern, space_rule
from data.vocabulary import begins_with, describe, in_front

LONGEST = 500_000  # characters of a text that tiktoken splits: its matcher gives up after a million steps
# The tokens with a role, by the first name of each that a tokenizer has.
BEGINS = ("<|begin_of_text|>", "<bos>", "<s>")
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
PADS = ("<pad>", "<|finetune_right_pad_id|>")
CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}  # of transformers: takes a tokenizer.json as it is
UNKNOWN = "\ufffd".encode()  # a model may have more ids than its tokenizer


class Encoding(tiktoken.Encoding):
    """A `tiktoken.Encoding` with what the tokenizers library does to a text before it is split and merged.

    tokens: {bytes: ids they stand for, often one} in the order in which they are merged; meant: {id: bytes};
    added: a tokenizer.json's added tokens; normal(text): its normal form; prepare(text, first): that as it is
    split, `first` if nothing was before it; padded: whether one of these puts a space in front; begin, end:
    names of the tokens that stand before and after a text, if the checkpoint says so.

    As in tiktoken, special tokens are read from a text only where `encode` is told to. Other added tokens are
    part of the vocabulary and always read. This is what the tokenizers library does with
    `encode_special_tokens`, or without it where all special tokens are allowed. No token is ever put before
    or after a text. Decoding gives the normal form of a text, without the space that was put in front.
    """

    encode_to_numpy = encode_with_unstable = None  # tiktoken's would give ranks, not ids

    def __init__(self, name, pattern, tokens, meant, added, normal, prepare, padded, begin, end):
        ranks = {token: rank for rank, token in enumerate(tokens)}
        super().__init__(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.normal, self.prepare, self.padded = normal, prepare, padded
        self.begin, self.end = begin, end
        self.ids = list(tokens.values())
        self.missing = b"".join(token for token, ids in tokens.items() if not ids)
        self.added = {token["content"].encode(): token["id"] for token in added}
        self.meant = {number: content for content, number in self.added.items()} | meant
        self.max_token_value = max(self.meant)
        self._special_tokens = {token["content"]: token["id"] for token in added if token["special"]}
        self._special_token_values = set(self._special_tokens.values())
        normalized = {normal(token["content"]): token["id"] for token in added if token.get("normalized")}
        raw = {token["content"]: token["id"] for token in added if not token.get("normalized")}
        self.stages = [(tokens, _any_of(tokens)) for tokens in (raw, normalized)]

    def encode_ordinary(self, text):
        return self._encode(text, self._special_token_values)

    def encode(self, text, *, allowed_special=frozenset(), disallowed_special="all"):
        allowed = self.special_tokens_set if allowed_special == "all" else set(allowed_special)
        disallowed = self.special_tokens_set - allowed if disallowed_special == "all" else disallowed_special
        for name in disallowed:
            if name in text:
                raise_disallowed_special_token(name)
        plain = self.special_tokens_set - allowed
        return self._encode(text, {self._special_tokens[name] for name in plain})

    def encode_single_token(self, text_or_bytes):
        token = text_or_bytes.encode() if isinstance(text_or_bytes, str) else text_or_bytes
        if token in self.added:
            return self.added[token]
        ids = self.ids[super().encode_single_token(token)]
        if len(ids) != 1:
            raise KeyError(text_or_bytes)
        return ids[0]

    def decode_single_token_bytes(self, token):
        return self.meant[token]

    def decode_bytes(self, tokens):
        whole = b"".join(self.meant.get(token, UNKNOWN) for token in tokens)
        return whole[1:] if self.padded and whole.startswith(b" ") else whole

    def decode(self, tokens, errors="replace"):
        return self.decode_bytes(tokens).decode(errors=errors)

    def _encode(self, text, plain):
        """The ids of `text`, in which the added tokens whose ids are in `plain` are text like any other."""
        if not text.isascii():  # half a surrogate pair is no character: replaced, as tiktoken does
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        numbers = []
        for before, token in _cut(text, *self.stages[0], plain):
            for part, inner in _cut(self.normal(before), *self.stages[1], plain):
                numbers += self._merge(self.prepare(part, not numbers)) + inner
            numbers += token
        return numbers

    def _merge(self, text):
        """The ids of a text without added tokens.

        Long ones, and those with bytes that have no token, are split by the package regex, which may know
        more of the newest characters.
        """
        spelled = text.encode()
        if len(text) < LONGEST and len(spelled.translate(None, self.missing)) == len(spelled):
            ranks = super().encode_ordinary(text)
        else:
            # Bytes without a token vanish after the split: what was beside them may merge.
            pieces = (piece.group().encode() for piece in self.splitter.finditer(text))
            kept = filter(None, (piece.translate(None, self.missing) for piece in pieces))
            ranks = itertools.chain.from_iterable(map(self._encode_single_piece, kept))
        return list(itertools.chain.from_iterable(map(self.ids.__getitem__, ranks)))

    @functools.cached_property
    def splitter(self):
        return regex.compile(self._pat_str)


def _any_of(names):
    """A pattern for the longest of `names` at a place of a text; its first character rules most out."""
    ends = {}
    for name in sorted(names, key=len, reverse=True):
        ends.setdefault(name[0], []).append(re.escape(name[1:]))
    return re.compile("|".join(f"{re.escape(first)}(?:{'|'.join(rest)})" for first, rest in ends.items()))


def _cut(text, tokens, pattern, plain):
    """Cut `text` at the tokens {name: id}, but for ids in `plain`: pairs (text before one, [id] or [])."""
    start = 0
    if not plain.issuperset(tokens.values()):
        for found in pattern.finditer(text):
            if tokens[found.group()] not in plain:
                yield text[start : found.start()], [tokens[found.group()]]
                start = found.end()
    yield text[start:], []


def load_tokenizer(name):
    """The tokenizer of the model `name` (as `data.find` reads it) as an `Encoding`.

    Read are tokenizer.json, vocab.json + merges.txt, or a .gguf file, if they hold a BPE of bytes, or of
    characters that falls back on bytes; anything that would encode otherwise is an InputError.
    """
    path = find(name)
    try:
        return _load_described(path, *describe(path))
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, regex.error) as error:
        raise InputError(f"{path}: the tokenizer cannot be read ({type(error).__name__}: {error})") from None


def begin_token(tokenizer):
    """The id of the token that the checkpoint puts in front of every text, None if it puts none."""
    return None if tokenizer.begin is None else tokenizer.encode_single_token(tokenizer.begin)


def end_token(tokenizer):
    """The id of the token that ends a document; InputError if there is none."""
    name = _end_name(tokenizer.special_tokens_set, tokenizer.end)
    if name is None:
        raise InputError(f"{tokenizer.name}: the tokenizer has no token to end a document, like {ENDS[0]}")
    return tokenizer.encode_single_token(name)


def _load_described(path, described, config):
    model, added = described["model"], described["added_tokens"]
    one_of(path, "the tokenizer's type", model.get("type", "BPE"), ("BPE",))  # Unigram is another algorithm
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        one_of(path, option, model.get(option), (None, False, ""))
    for token, option in itertools.product(added, ("lstrip", "rstrip", "single_word")):
        one_of(path, f"{option} of an added token", token.get(option), (None, False))
    _check_ids(path, model["vocab"], added)
    # No merge may make a special token out of plain text.
    specials = {token["content"] for token in added if token["special"]}
    model = model | {"vocab": {token: i for token, i in model["vocab"].items() if token not in specials}}
    normal = normalizer(path, flat_steps(described.get("normalizer"), "normalizers"))
    steps = flat_steps(described.get("pre_tokenizer"), "pretokenizers")
    if model.get("byte_fallback"):
        tokens, meant = sentencepiece(path, model)
        prepare, padded = space_rule(path, normal, steps)
        pattern = space_pattern(tokens, steps)
    else:
        one_of(path, "the normalizer of bytes", normal, (str, nfc))
        tokens, meant = byte_level(path, model)
        pattern, prepare, padded = byte_pattern(path, steps), as_it_is, False
    begin, end = begins_with(described, config), config.get("eos_token")
    one_of(path, "the token in front of a text", begin, (None, *specials))
    return Encoding(str(path), pattern, tokens, meant, added, normal, prepare, padded, begin, end)


def _check_ids(path, vocab, added):
    """The library gives added tokens the vocabulary's ids, or the next free one, whatever the file says."""
    ids = {*vocab.values(), *(token["id"] for token in added)}
    if not all(type(n) is int and 0 <= n < 2**31 for n in ids) or len(set(vocab.values())) < len(vocab):
        raise InputError(f"{path}: the ids of the tokens are not different whole numbers")
    following = len(vocab)
    for token in added:
        one_of(path, "an added token without a name", token["content"] == "", (False,))
        expected = vocab.get(token["content"], following)
        one_of(path, f"the id of the token {token['content']!r:.100}", token["id"], (expected,))
        following = max(following, expected + 1)


def _end_name(names, said):
    """The one of the special tokens `names` that ends a document, None if there is none.

    said: the token that the checkpoint says it ends with. That of a model for chats ends a turn: then one
    that ends a document is taken, if there is any.
    """
    known = [name for name in (*ENDS, *TURN_ENDS) if name in names]
    return said if said in names and said not in TURN_ENDS else next(iter(known), None)


def write_tokenizer(folder, source):
    """Write the tokenizer of the model `source` (as `find` reads it) into `folder`.

    Read by transformers it makes the same tokens: tokenizer_config.json names the class that takes a
    tokenizer.json as it is, where those of the families would split or pad a text in their own way.
    """
    path = find(source)
    described, config = describe(path)
    begin = begins_with(described, config)
    if (path / "tokenizer.json").exists() and begins_with(described, {}) == begin:
        write_file(folder / "tokenizer.json", (path / "tokenizer.json").read_bytes())
    else:  # a reader may heed either file: both have to say the same
        write_json(folder / "tokenizer.json", described | {"post_processor": in_front(described, begin)})
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        if (path / name).exists():
            write_file(folder / name, (path / name).read_bytes())
    names = [token["content"] for token in described["added_tokens"] if token["special"]]
    write_json(folder / "tokenizer_config.json", _roles(names, config) | config | CLASS)


def _roles(names, config):
    """The tokens of `names` that begin, end and fill up texts, for a checkpoint that does not say."""
    end = _end_name(names, config.get("eos_token"))
    first = next((name for name in BEGINS if name in names), end)
    pad = next((name for name in PADS if name in names), end)
    roles = {"eos_token": end, "bos_token": first, "pad_token": pad, "clean_up_tokenization_spaces": False}
    return {role: value for role, value in roles.items() if value is not None}
