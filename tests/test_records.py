"""One's own data: .jsonl and .txt files, as people have them."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

import data
from data.corpus import load_corpus
from data.files import InputError
from data.records import read_records
from data.tokenizer import load_tokenizer

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "tokenizers.json").read_text())
PAIRS = [{"prompt": f"What is {n}? ", "completion": f"{n} is {n % 2} modulo 2."} for n in range(30)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def chat_tokenizer(folder):
    """A tokenizer with ChatML's tokens."""
    variant = {key: value for key, value in FIXTURE["variants"]["digits"].items() if key != "ids"}
    model = {"type": "BPE", "vocab": FIXTURE["vocab"], "merges": FIXTURE["merges"]} | variant["model"]
    (folder / "tokenizer.json").write_text(json.dumps(variant | {"model": model}))
    return load_tokenizer(folder)


def learned(sample):
    """The tokens of a sample that count, checked to be its inputs one step on."""
    inputs, targets = sample
    assert len(inputs) == len(targets)
    for place, target in enumerate(targets[:-1]):
        assert target in (-100, inputs[place + 1])
    return [target for target in targets.tolist() if target != -100]


def test_only_completions_count(tmp_path):
    tokenizer = data.load_tokenizer("base")
    end = tokenizer.encode_single_token("<|endoftext|>")
    splits = data.load_examples(write(tmp_path / "a.jsonl", PAIRS), tokenizer, 64)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [24, 3, 3]
    held_out = [PAIRS[place] for place in (8, 18, 28)]
    for pair, sample in zip(held_out, splits["val"].samples):
        assert sample[0][0] == end
        assert tokenizer.decode(sample[0].tolist()) == "<|endoftext|>" + pair["prompt"] + pair["completion"]
        assert learned(sample) == [*tokenizer.encode_ordinary(pair["completion"]), end]


def test_of_a_chat_the_assistant_s_turns_count(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    turns = [("system", "Be the best."), ("user", "in <|im_end|> at"), ("assistant", "is on"), ("user", "it"),
             ("assistant", "here")]  # fmt: skip
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    splits = data.load_examples(write(tmp_path / "a.jsonl", [record] * 10), tokenizer, 999)
    ids, wanted = [], []
    for role, content in turns:
        start, stop = (tokenizer.encode_single_token(name) for name in ("<|im_start|>", "<|im_end|>"))
        ids += [start, *tokenizer.encode_ordinary(role + "\n"), *tokenizer.encode_ordinary(content), stop]
        ids += tokenizer.encode_ordinary("\n")
        if role == "assistant":
            wanted += [*tokenizer.encode_ordinary(content), stop]
    inputs, targets = splits["train"].samples[0]
    assert inputs.tolist() == ids[:-1] and learned((inputs, targets)) == wanted
    assert ids.count(stop) == len(turns)  # what a user writes is never a special token


def test_long_texts_are_cut_into_several_and_long_pairs_left_out(tmp_path):
    tokenizer = data.load_tokenizer("base")
    text = "The value of the argument is returned. " * 9
    ids = tokenizer.encode_ordinary(text)
    path = write(tmp_path / "a.jsonl", [{"text": text}] * 10)
    texts = data.load_examples(path, tokenizer, 20)["train"]
    assert len(texts) == 8 * math.ceil((len(ids) + 1) / 20)
    assert texts.note == f"from 8 lines of {path}, 8 of them longer than 20 tokens and cut"
    pieces = texts.samples[: len(texts) // 8]
    assert torch.cat([inputs for inputs, _ in pieces]).tolist()[1:] == ids
    assert [t for sample in pieces for t in learned(sample)][:-1] == ids
    path = write(tmp_path / "b.jsonl", [*PAIRS, *[{"prompt": text, "completion": "x"}] * 10])
    pairs = data.load_examples(path, tokenizer, 40)
    assert sum(len(split) for split in pairs.values()) == 30
    assert pairs["train"].note == f"from 32 lines of {path}, 8 of them longer than 40 tokens and left out"
    corpus = data.load_examples("stdlib", tokenizer, 40, only=["test"])["test"]
    assert corpus.note == f"from {len(load_corpus('stdlib')['test'])} documents of stdlib"


def test_one_text_of_300_000_words_is_one_text_and_thousands_of_examples(tmp_path):
    texts = tmp_path / "a.txt"
    texts.write_text("the value is " * 100_000)
    held_out = write(tmp_path / "b.jsonl", PAIRS)
    splits = data.load_examples(str(texts), data.load_tokenizer("base"), 64, val=held_out)
    assert len(splits["train"]) > 4000
    assert splits["train"].note == f"from 1 line of {texts}, 1 of them longer than 64 tokens and cut"


def texts_of(split, tokenizer):
    """The texts of examples, checked to begin with the token that ends a document."""
    read = [tokenizer.decode(inputs.tolist()) for inputs, _ in split.samples]
    assert all(text.startswith("<|endoftext|>") for text in read)
    return [text.removeprefix("<|endoftext|>") for text in read]


@pytest.mark.parametrize("mark", (b"", b"\xef\xbb\xbf"))
@pytest.mark.parametrize("end", ("\n", "\r\n"))
def test_a_txt_file_is_read_by_paragraphs_or_by_lines_and_says_so(tmp_path, end, mark):
    tokenizer = data.load_tokenizer("base")
    sentences = [f"Sentence {n} is\u2028here, and\x0b  there." for n in range(20)]
    by_line, by_paragraph = tmp_path / "lines.txt", tmp_path / "paragraphs.txt"
    by_line.write_bytes(mark + (end * 2 + end.join(sentences) + end * 3).encode())
    by_paragraph.write_bytes(mark + (end + " " + end).join("A title" + end + s for s in sentences).encode())
    for path, unit, first in ((by_line, "line", ""), (by_paragraph, "paragraph", "A title\n")):
        splits = data.load_examples(str(path), tokenizer, 64)
        held_out = [sentences[8], sentences[18], sentences[9], sentences[19]]
        read = texts_of(splits["val"], tokenizer) + texts_of(splits["test"], tokenizer)
        assert read == [first + sentence for sentence in held_out]
        assert splits["train"].note == f"from 16 {unit}s of {path}"
        assert len(splits["train"]) == 16


def test_a_txt_file_knows_where_its_texts_stand(tmp_path):
    (tmp_path / "a.txt").write_text("\n \none\ntwo\n\n\nsix\n")
    records, unit = read_records(tmp_path / "a.txt")
    places = [(where.rpartition(" ")[2], record["text"]) for where, record in records]
    assert (places, unit) == ([("3", "one\ntwo"), ("7", "six")], "paragraph")


@pytest.mark.parametrize("mark", (b"", b"\xef\xbb\xbf"))
@pytest.mark.parametrize("end", (b"\n", b"\r\n", b"\n\n"))
def test_a_jsonl_file_may_have_a_mark_other_line_ends_and_empty_lines(tmp_path, end, mark):
    texts = [f"{n}\u2028\x85 \x0c and" for n in range(10)]
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    (tmp_path / "a.jsonl").write_bytes(mark + end.join(lines) + end)
    tokenizer = data.load_tokenizer("base")
    splits = data.load_examples(str(tmp_path / "a.jsonl"), tokenizer, 64)
    read = [text for split in splits.values() for text in texts_of(split, tokenizer)]
    assert read == texts


@pytest.mark.parametrize("form", (
    {"text": "A text."}, {"prompt": "A", "completion": " text."}, {"prompt": "", "completion": "x"},
    {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "text."}]},
))  # fmt: skip
def test_other_keys_and_nulls_beside_a_known_form_change_nothing(tmp_path, form):
    others = [{"weight": 0}, {"id": 3, "tags": ["a", None]}, {"note": None}]
    others += [{key: None} for key in ("text", "prompt", "completion", "messages") if key not in form]
    tokenizer = chat_tokenizer(tmp_path)
    plain = data.load_examples(write(tmp_path / "a.jsonl", [form] * 10), tokenizer, 99)["train"]
    for other in others:
        for record in ({**other, **form}, {**form, **other}):
            read = data.load_examples(write(tmp_path / "b.jsonl", [record] * 10), tokenizer, 99)["train"]
            assert read.fingerprint() == plain.fingerprint() and read.asked == plain.asked, other


def test_a_file_to_validate_on(tmp_path):
    tokenizer = data.load_tokenizer("base")
    one, two = write(tmp_path / "a.jsonl", PAIRS), write(tmp_path / "b.jsonl", PAIRS[:5])
    splits = data.load_examples(one, tokenizer, 64, val=two)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [27, 5, 3]
    mixed = data.load_examples("prose", tokenizer, 64, val=two)
    assert len(mixed["val"]) == 5 and len(mixed["train"]) > 1000


@pytest.mark.parametrize("count", (1, 3, 9))
def test_few_examples_are_counted_and_need_a_file_to_validate_on(tmp_path, count):
    tokenizer = data.load_tokenizer("base")
    few, held_out = write(tmp_path / "a.jsonl", PAIRS[:count]), write(tmp_path / "b.jsonl", PAIRS[10:12])
    number = "1 line" if count == 1 else f"{count} lines"
    with pytest.raises(InputError, match=f"^{number} of {few}: too few .*--val") as error:
        data.load_examples(few, tokenizer, 64)
    assert "\n" not in str(error.value)
    splits = data.load_examples(few, tokenizer, 64, val=held_out)
    assert [len(split) for split in splits.values()] == [count, 2, 2]
    assert splits["val"].fingerprint() == splits["test"].fingerprint() != splits["train"].fingerprint()
    enough = write(tmp_path / "c.jsonl", PAIRS[:10])
    assert [len(split) for split in data.load_examples(enough, tokenizer, 64).values()] == [8, 1, 1]


def test_examples_that_are_all_too_long_are_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIRS)
    with pytest.raises(InputError, match="^24 lines of .*a.jsonl: none for train has at most 5 tokens"):
        data.load_examples(path, data.load_tokenizer("base"), 5)
    with pytest.raises(InputError, match="^5 lines of .*b.jsonl: none for val has"):
        long = write(tmp_path / "b.jsonl", [{"prompt": "a " * 99, "completion": "b"}] * 5)
        data.load_examples(path, data.load_tokenizer("base"), 64, val=long)


@pytest.mark.parametrize(("name", "content", "line"), (
    ("a.jsonl", '\n{"text": "fine"}\n{"prompt": "a", "completion": "SPACES"}\n', 3),
    ("a.jsonl", '{"messages": [{"role": "assistant", "content": "SPACES"}]}', 1),
    ("a.txt", "fine\n\n\nfine\nSPACES", 4),
))  # fmt: skip
def test_what_the_tokenizer_refuses_is_named_with_its_line(tmp_path, monkeypatch, name, content, line):
    tokenizer = chat_tokenizer(tmp_path)
    usual = tokenizer.encode_ordinary

    def refuse(text):
        if "SPACES" in text:
            raise ValueError("a run of 1,000,000 white spaces is too long")
        return usual(text)

    monkeypatch.setattr(tokenizer, "encode_ordinary", refuse)
    path = tmp_path / name
    path.write_text(content)
    val = write(tmp_path / "b.jsonl", PAIRS)
    with pytest.raises(InputError, match=f"^{path}, line {line}: a run of 1,000,000"):
        data.load_examples(str(path), tokenizer, 64, val=val)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_padding_changes_no_loss(tmp_path, seed):
    tokenizer, model = data.load_tokenizer("base"), data.load_model("base")
    chance = random.Random(seed)
    lengths = [(chance.randint(1, 40), chance.randint(1, 20)) for _ in range(20)]
    pairs = [{"prompt": "x" * prompt, "completion": "the " * completion} for prompt, completion in lengths]
    examples = data.load_examples(write(tmp_path / "a.jsonl", pairs), tokenizer, 99)["train"]
    together = torch.cat([model.sample_losses(b) for b in examples.batches(range(16), 8)])
    alone = torch.cat([model.sample_losses(b) for b in examples.batches(range(16), 1)])
    torch.testing.assert_close(together, alone)
    byhand = []
    for inputs, targets in examples.samples:
        logits = model(inputs[None])[0][0].log_softmax(-1)
        counted = [-logits[i, t].item() for i, t in enumerate(targets.tolist()) if t != -100]
        byhand.append(sum(counted) / len(counted))
    torch.testing.assert_close(together, torch.tensor(byhand))


BROKEN = {
    "nothing": (b"", "nothing"),
    "blank lines": (b"\n \n", "nothing"),
    "no JSON": (b'{"text": "a"}\n{"text": \n', "line 2"),
    "an array": (b'\n["text"]', "line 2"),
    "binary": (bytes(range(256)), "line 1"),
    "broken UTF-8": (b'{"text": "a"}\n{"text": "\xff"}', "line 2"),
    "no known key": (b'{"txt": "a"}', "line 1: expected text"),
    "no completion": (b'{"prompt": "a"}', "line 1: expected text"),
    "empty completion": (b'{"prompt": "a", "completion": ""}', "line 1: the text to learn is empty"),
    "empty text": (b'{"text": ""}', "line 1: the text to learn is empty"),
    "a number": (b'{"text": 3}', "line 1: expected text"),
    "true": (b'{"text": true}', "line 1: expected text"),
    "a list": (b'{"prompt": [1, 2], "completion": "x"}', "line 1: expected text"),
    "null": (b'{"prompt": null, "completion": "x"}', "line 1: expected text"),
    "messages, one string": (b'{"messages": "hello"}', "line 1: expected text"),
    "messages, no content": (b'{"messages": [{"role": "user"}]}', "line 1: expected text"),
    "messages, no assistant": (b'{"messages": [{"role": "user", "content": "x"}]}', "line 1: no message"),
    "no messages": (b'{"messages": []}', "line 1"),
    "an empty turn": (b'{"messages": [{"role": "assistant", "content": ""}]}', "line 1: the text to learn"),
    "deep": (b'{"text": ' + b"[" * 100_000, "line 1"),
    "only a mark": (b"\xef\xbb\xbf", "nothing"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "line 1"),
    "only nulls": (b'{"text": null, "prompt": "a", "completion": null}', "line 1: expected text"),
    "too few": (b'{"text": "a"}\n' * 3, "3 lines"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_with_its_line(tmp_path, kind):
    content, named = BROKEN[kind]
    (tmp_path / "a.jsonl").write_bytes(content)
    val = "" if kind == "too few" else write(tmp_path / "b.jsonl", PAIRS)
    with pytest.raises(InputError, match=named) as error:
        data.load_examples(str(tmp_path / "a.jsonl"), chat_tokenizer(tmp_path), 64, val=val)
    assert "a.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_other_files_that_cannot_be_used(tmp_path):
    base = data.load_tokenizer("base")
    (tmp_path / "a.txt").write_bytes(b"fine\n\n\xff\xfe")
    with pytest.raises(InputError, match="a.txt is not UTF-8"):
        data.load_examples(str(tmp_path / "a.txt"), base, 64)
    (tmp_path / "a.txt").write_text("the value is " * 9)
    with pytest.raises(InputError, match="^1 line of .*a.txt: too few"):
        data.load_examples(str(tmp_path / "a.txt"), base, 64)
    with pytest.raises(InputError, match="choose prose"):
        data.load_examples(str(tmp_path / "a.csv"), base, 64)
    with pytest.raises(OSError, match="nowhere.jsonl"):
        data.load_examples(str(tmp_path / "nowhere.jsonl"), base, 64)
    chat = write(tmp_path / "chat.jsonl", [{"messages": [{"role": "assistant", "content": "x"}]}] * 10)
    with pytest.raises(InputError, match="line 1: a chat is written in ChatML, whose tokens"):
        data.load_examples(chat, base, 64)
