"""SentencePiece-style BPE, merges in any order, and added tokens: against a naive loop and the library.

IDS holds what tokenizers 0.23.3 computed for TEXTS; the rest runs against it where it is installed.
"""

import itertools
import json
import random

import pytest

from data.bpe import BYTES, merge_alone, place_tokens
from data.files import InputError
from data.tokenizer import end_token, load_tokenizer

SPACE = "▁"
WORDS = "▁the ▁then ▁is ▁▁ ▁▁▁▁ ▁a ▁an and ▁and the in ing 日本 ▁日本 éa ▁( \n\n ▁\n .. ... le ▁le".split(" ")
TEXTS = ["the then  is", " the", "", " ", "    a    and\n\n\n", "日本語 日本 éé 😀\x00", "the<s>the<s> the", "▁the",
         "x <think>  the</think>a<b>", "anding....le", "\tthe\r\n   \u3000in"]  # fmt: skip


def token(number, content, **options):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **plain, **options}


def make():
    """The model of a tokenizer.json: bytes, characters and WORDS, with every pair that makes a token."""
    chars = sorted({*"".join(WORDS), *"xyz.<>/bhk\t"})
    longer = {word[:end]: None for word in WORDS for end in range(2, len(word) + 1)}
    vocab = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *BYTES, *longer, *chars])}
    pairs = [(word[:cut], word[cut:]) for word in longer for cut in range(1, len(word))]
    merges = [list(pair) for pair in pairs if vocab.keys() >= set(pair)]
    return {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": True, "fuse_unk": True,
            "unk_token": "<unk>"}  # fmt: skip


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, REPLACE]}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def metaspace(scheme, split):
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}


KINDS = {  # the normalizer and the pre-tokenizer
    "llama 2": (PREPEND, None),
    "gemma": (REPLACE, None),
    "gemma 2": (REPLACE, SPLIT),
    **{f"metaspace {scheme} {split}": (None, metaspace(scheme, split))
       for scheme in ("always", "first", "never") for split in (True, False)},
    "both": (PREPEND, metaspace("first", False)),
}  # fmt: skip


def describe(kind):
    normalizer, splitter = KINDS[kind]
    model = make()
    count, vocab = len(model["vocab"]), model["vocab"]
    added = [token(vocab[name], name) for name in ("<unk>", "<s>", "</s>")]
    added += [token(count, "<think>", special=False), token(count + 1, "</think>", special=False),
              token(count + 2, "<b>", special=False, normalized=True),
              token(vocab["\n\n"], "\n\n", special=False)]  # fmt: skip
    unused = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    used = {"normalizer": normalizer, "pre_tokenizer": splitter, "added_tokens": added, "model": model}
    return {"version": "1.0", **unused, **used}


def load(folder, description):
    (folder / "tokenizer.json").write_text(json.dumps(description))
    return load_tokenizer(folder)


def naive(text, model):
    """The ids of one stretch of text: the first pair of the list is joined, the leftmost of several."""
    vocab, parts = model["vocab"], []
    for char in text:
        parts += [char] if char in vocab else [f"<0x{byte:02X}>" for byte in char.encode()]
    order = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    while True:
        found = [(order[pair], at) for at, pair in enumerate(zip(parts, parts[1:])) if pair in order]
        if not found:
            return [vocab[part] for part in parts]
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def some_text(chance, pieces):
    return "".join(chance.choice(pieces) for _ in range(chance.choice([1, 3, 10, 60])))


def test_equal_to_a_naive_loop_and_decoded(tmp_path):
    description = describe("llama 2")
    tokenizer, chance = load(tmp_path, description), random.Random(0)
    pieces = [*"the  in日本é語ü😀x▁.\t\0", *[word.replace(SPACE, " ") for word in WORDS if word != "\n\n"]]
    for _ in range(300):
        text = some_text(chance, pieces).replace("\n\n", "")  # an added token
        ids = tokenizer.encode_ordinary(text)
        assert ids == naive((" " + text).replace(" ", SPACE) if text else "", description["model"])
        assert tokenizer.decode(ids) == text.replace(SPACE, " ")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_library_s(kind, tmp_path):
    tokenizer = load(tmp_path, describe(kind))
    assert [tokenizer.encode(text, allowed_special="all") for text in TEXTS] == IDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_library(kind, tmp_path):
    library = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(describe(kind)))
    tokenizer, chance = load(tmp_path, describe(kind)), random.Random(1)
    names = ["\n\n", "<s>", "</s>", "<think>", "</think>", "<b>", "<"]
    pieces = [*"the  in\n日本é語ü😀x▁.\t\0", *names, " the", " a"]
    for _ in range(300):
        text = some_text(chance, pieces)
        library.encode_special_tokens = True
        assert tokenizer.encode_ordinary(text) == library.encode(text).ids
        library.encode_special_tokens = False
        assert tokenizer.encode(text, allowed_special="all") == library.encode(text).ids


@pytest.mark.parametrize(
    ("kind", "back"), [("llama 2", " the"), ("gemma", " the"), ("metaspace always True", "the")]
)
def test_a_leading_space_comes_back_where_the_file_keeps_it(kind, back, tmp_path):
    tokenizer = load(tmp_path, describe(kind))
    assert tokenizer.decode(tokenizer.encode_ordinary(" the")) == back
    assert tokenizer.decode_bytes(tokenizer.encode_ordinary("the")) == b"the"


def test_a_token_across_a_space_keeps_the_text_in_one_piece(tmp_path):
    model = make()
    model["vocab"] |= {name: len(model["vocab"]) + i for i, name in enumerate(("▁x", "e▁x"))}
    model["merges"] = [["▁", "x"], ["e", "▁x"], *model["merges"]]
    tokenizer = load(tmp_path, describe("gemma") | {"added_tokens": [], "model": model})
    for text in ("the xin", "e x  e xx", "x" * 300 + "e x"):
        assert tokenizer.encode_ordinary(text) == naive(text.replace(" ", SPACE), model)
        assert model["vocab"]["e▁x"] in tokenizer.encode_ordinary(text)


def random_merges(chance, full):
    """A vocabulary over three letters and merges in an order that no training would give.

    full: every pair that makes a token, in the order of what they make.
    """
    letters = "abc"
    words = ["".join(chance.choice(letters) for _ in range(chance.randint(2, 7))) for _ in range(30)]
    prefixes = (word[:end] for word in words[:9] for end in range(2, 7))
    tokens = list(dict.fromkeys([*letters, *words, *prefixes]))
    longer = [word for word in tokens if len(word) > 1]
    chance.shuffle(longer)
    pairs = [(word[:cut], word[cut:]) for word in longer for cut in range(1, len(word))]
    pairs = [pair for pair in pairs if set(pair) <= set(tokens)]
    if not full:
        pairs = chance.sample(pairs, len(pairs) * 2 // 3)
    return {word: i for i, word in enumerate(tokens)}, pairs


def test_merges_are_placed_as_merging_alone_does():
    chance, in_order = random.Random(2), 0
    for trial in range(300):
        vocab, merges = random_merges(chance, full=trial % 2)
        places, unreached = place_tokens("it", vocab, merges)
        order = {pair: rank for rank, pair in enumerate(merges)}
        for word in vocab:
            rank, parts = merge_alone(word, order)
            assert (places.get(word), unreached.get(word, 1)) == (rank if parts == 1 else None, parts)
            in_order += parts == 1 and len(word) > 3
    assert in_order > 100


@pytest.mark.slow
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_merges_in_any_order(ignore_merges, tmp_path):
    """The ids are those of a naive loop; with ignore_merges a whole piece that is a token is taken."""
    chance, read, unreachable = random.Random(3), 0, 0
    for trial in range(60):
        vocab, merges = random_merges(chance, full=trial % 2)
        model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}
        step = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        try:
            tokenizer = load(tmp_path, {"pre_tokenizer": step, "added_tokens": [], "model": model})
        except InputError as error:
            assert ignore_merges and "ignore_merges" in str(error)
            continue
        read += 1
        unreachable += len(place_tokens("it", vocab, merges)[1])
        lengths = [3, 9, 40, 150] * 8
        texts = ["".join(chance.choice("abc") for _ in range(length)) for length in lengths]
        for text in [*texts, *vocab]:
            whole = ignore_merges and text in vocab
            assert tokenizer.encode_ordinary(text) == ([vocab[text]] if whole else naive(text, model))
    assert read > 15 and unreachable > 20 and (ignore_merges or read == 60)


BAD = [  # (what changes at the top, in the model, what the message names)
    ({}, {"ignore_merges": True}, "ignore_merges"),
    ({"normalizer": None}, {}, "spaces are replaced"),
    ({"normalizer": {**REPLACE, "pattern": {"String": "a"}}}, {}, "pattern to replace"),
    ({"normalizer": {**REPLACE, "content": "_"}}, {}, "replacement"),
    ({"normalizer": {"type": "NFKC"}}, {}, "NFKC"),
    ({"normalizer": {"type": "NFC"}}, {}, "spaces are replaced"),
    ({"pre_tokenizer": {**metaspace("first", True), "replacement": "_"}}, {}, "replacement"),
    ({"pre_tokenizer": {**metaspace("first", True), "add_prefix_space": False}}, {}, "add_prefix_space"),
    ({"pre_tokenizer": metaspace("last", True)}, {}, "prepend_scheme"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, {}, "Whitespace"),
    ({"pre_tokenizer": {**SPLIT, "pattern": {"String": "a"}}}, {}, "pattern to split at"),
    ({}, {"merges": [["<0x41>", "a"]]}, "merge"),
    ({}, {"vocab": {SPACE: 0}, "merges": []}, "id of the token"),
]


@pytest.mark.parametrize(("top", "model", "named"), BAD)
def test_what_would_be_encoded_otherwise_is_named(top, model, named, tmp_path):
    description = describe("gemma")
    description["model"] |= model
    with pytest.raises(InputError, match=named):
        load(tmp_path, description | top)


@pytest.mark.parametrize("lacking", [SPACE, "<0x00>", "<0xE2>"])
def test_every_byte_needs_a_token(lacking, tmp_path):
    description = describe("gemma")
    names = [name for name in description["model"]["vocab"] if SPACE not in name and name != lacking]
    description |= {"added_tokens": []}
    description["model"] |= {"vocab": {name: i for i, name in enumerate(names)}, "merges": []}
    if lacking != SPACE:
        description["model"]["vocab"][SPACE] = len(names)
    with pytest.raises(InputError, match=lacking):
        load(tmp_path, description)


def test_added_tokens_are_read_from_plain_text_unless_special(tmp_path):
    """The longest at a place; those of the raw text before those of its normal form."""
    names = {"<x>": True, "<x>y": False, "ab": False, "abc": False, "c<x>": False, "yy": True, "y": False}
    chars = {char: i for i, char in enumerate("abcxyz<>")}
    number = {name: chars.get(name, 8 + i) for i, name in enumerate(names)}
    added = [token(number[name], name, special=special, normalized=name == "ab")
             for name, special in names.items()]  # fmt: skip
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": chars, "merges": []}
    description = describe("gemma") | {"normalizer": {"type": "Sequence", "normalizers": []}, "model": model,
                                       "pre_tokenizer": step, "added_tokens": added}  # fmt: skip
    tokenizer = load(tmp_path, description)
    assert tokenizer.encode_ordinary("<x>yab") == [number["<x>y"], number["ab"]]
    assert tokenizer.encode_ordinary("yy<x>") == [chars["y"], chars["y"], chars["<"], chars["x"], chars[">"]]
    assert tokenizer.encode("yy<x>", allowed_special={"yy"}, disallowed_special=()) == [
        number["yy"], chars["<"], chars["x"], chars[">"]]  # fmt: skip
    assert tokenizer.encode_single_token("c<x>") == tokenizer.encode_single_token(b"c<x>") == number["c<x>"]
    with pytest.raises(ValueError, match="yy"):
        tokenizer.encode("yy")
    library = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(description))
    for parts in itertools.product(["<x>", "y", "ab", "c", "yy", "z<"], repeat=4):
        text = "".join(parts)
        library.encode_special_tokens = True
        assert tokenizer.encode_ordinary(text) == library.encode(text).ids
        library.encode_special_tokens = False
        assert tokenizer.encode(text, allowed_special="all") == library.encode(text).ids


@pytest.mark.parametrize("kind", ["llama 2", "gemma"])
def test_gguf_has_scores_for_merges(kind, tmp_path):
    gguf = pytest.importorskip("gguf")
    vocab = make()["vocab"]
    own = [name for name in vocab if set(name) == {SPACE} and len(name) > 1]  # a user's: stored with spaces
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, "\n\n": 4} | dict.fromkeys(BYTES, 6) | dict.fromkeys(own, 4)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([name.replace(SPACE, " ") if name in own else name for name in vocab])
    writer.add_token_scores([-1000.0 if name in own else -float(i) for name, i in vocab.items()])
    writer.add_token_types([kinds.get(name, 1) for name in vocab])
    writer.add_eos_token_id(2)
    if kind == "gemma":
        writer.add_add_space_prefix(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    description = describe(kind)
    names = ("<unk>", "<s>", "</s>", "\n\n", *own)
    description["added_tokens"] = [token(vocab[name], name, special=kinds[name] != 4) for name in names]
    merges = description["model"]["merges"]
    first = sorted((pair for pair in merges if "".join(pair) in own), key=lambda pair: -len(pair[0]))
    description["model"]["merges"] = first + [pair for pair in merges if pair not in first]
    stored, told = load_tokenizer(tmp_path / "model.gguf"), load(tmp_path, description)
    chance = random.Random(4)
    for text in [*TEXTS, *(some_text(chance, [*"the  in\n日本é語▁", "    ", "and"]) for _ in range(200))]:
        assert stored.encode_ordinary(text) == told.encode_ordinary(text)
        if kind == "gemma":  # Llama 2 puts a space before what follows an added token
            assert stored.decode(stored.encode_ordinary(text)) == text.replace(SPACE, " ")
    assert end_token(stored) == 2


IDS = {
    "llama 2": [
        [261, 262, 312, 264], [312, 261], [], [265], [265, 266, 296, 267, 271, 282, 283], [279, 235, 173,
        161, 279, 312, 311, 311, 312, 243, 162, 155, 131, 3], [261, 1, 261, 1, 312, 261], [312, 261], [312,
        308, 312, 315, 265, 261, 316, 268, 294, 297, 295], [272, 276, 284, 284, 286], [312, 289, 274, 16,
        290, 266, 230, 131, 131, 275],
    ],
    "gemma": [
        [274, 262, 312, 264], [261], [], [312], [267, 296, 267, 271, 282, 290], [277, 235, 173, 161, 279,
        312, 311, 311, 312, 243, 162, 155, 131, 3], [274, 1, 274, 1, 261], [261], [308, 312, 315, 312, 261,
        316, 296, 317], [271, 276, 284, 284, 286], [289, 274, 16, 290, 266, 230, 131, 131, 275],
    ],
    "gemma 2": [
        [274, 262, 312, 264], [261], [], [312], [267, 296, 267, 271, 282, 290], [277, 235, 173, 161, 279,
        312, 311, 311, 312, 243, 162, 155, 131, 3], [274, 1, 274, 1, 261], [261], [308, 312, 315, 312, 261,
        316, 296, 317], [271, 276, 284, 284, 286], [289, 274, 16, 290, 266, 230, 131, 131, 275],
    ],
    "metaspace always True": [
        [261, 262, 312, 264], [261], [], [312], [312, 312, 312, 268, 312, 312, 312, 272, 282, 283], [279,
        235, 173, 161, 279, 312, 311, 311, 312, 243, 162, 155, 131, 3], [261, 1, 261, 1, 261], [261], [312,
        308, 312, 315, 312, 261, 316, 268, 317], [272, 276, 284, 284, 286], [312, 289, 274, 16, 290, 312,
        312, 312, 230, 131, 131, 275],
    ],
    "metaspace always False": [
        [261, 262, 312, 264], [261], [], [312], [267, 296, 267, 271, 282, 283], [279, 235, 173, 161, 279,
        312, 311, 311, 312, 243, 162, 155, 131, 3], [261, 1, 261, 1, 261], [261], [312, 308, 312, 315, 312,
        261, 316, 268, 317], [272, 276, 284, 284, 286], [312, 289, 274, 16, 290, 266, 230, 131, 131, 275],
    ],
    "metaspace first True": [
        [261, 262, 312, 264], [261], [], [312], [312, 312, 312, 268, 312, 312, 312, 272, 282, 290], [279,
        235, 173, 161, 279, 312, 311, 311, 312, 243, 162, 155, 131, 3], [261, 1, 274, 1, 261], [261], [312,
        308, 312, 315, 312, 261, 316, 296, 317], [272, 276, 284, 284, 286], [312, 289, 274, 16, 290, 312,
        312, 312, 230, 131, 131, 275],
    ],
    "metaspace first False": [
        [261, 262, 312, 264], [261], [], [312], [267, 296, 267, 271, 282, 290], [279, 235, 173, 161, 279,
        312, 311, 311, 312, 243, 162, 155, 131, 3], [261, 1, 274, 1, 261], [261], [312, 308, 312, 315, 312,
        261, 316, 296, 317], [272, 276, 284, 284, 286], [312, 289, 274, 16, 290, 266, 230, 131, 131, 275],
    ],
    "metaspace never True": [
        [274, 262, 312, 264], [261], [], [312], [312, 312, 312, 268, 312, 312, 312, 272, 282, 290], [277,
        235, 173, 161, 279, 312, 311, 311, 312, 243, 162, 155, 131, 3], [274, 1, 274, 1, 261], [261], [308,
        312, 315, 312, 261, 316, 296, 317], [271, 276, 284, 284, 286], [289, 274, 16, 290, 312, 312, 312,
        230, 131, 131, 275],
    ],
    "metaspace never False": [
        [274, 262, 312, 264], [261], [], [312], [267, 296, 267, 271, 282, 290], [277, 235, 173, 161, 279,
        312, 311, 311, 312, 243, 162, 155, 131, 3], [274, 1, 274, 1, 261], [261], [308, 312, 315, 312, 261,
        316, 296, 317], [271, 276, 284, 284, 286], [289, 274, 16, 290, 266, 230, 131, 131, 275],
    ],
    "both": [
        [261, 262, 312, 264], [312, 261], [], [265], [265, 266, 296, 267, 271, 282, 283], [279, 235, 173,
        161, 279, 312, 311, 311, 312, 243, 162, 155, 131, 3], [261, 1, 261, 1, 312, 261], [312, 261], [312,
        308, 312, 315, 265, 261, 316, 268, 294, 297, 295], [272, 276, 284, 284, 286], [312, 289, 274, 16,
        290, 266, 230, 131, 131, 275],
    ],
}  # fmt: skip
