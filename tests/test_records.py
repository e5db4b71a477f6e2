"""One's own data: .jsonl and .txt files, chats, word problems and their answers."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

import data
from data.files import InputError
from data.records import final_number
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
    for (prompt, completion), sample in zip(splits["val"].questions(3), splits["val"].samples):
        assert prompt + completion == [*sample[0].tolist(), end] and completion == learned(sample)


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
    texts = data.load_examples(write(tmp_path / "a.jsonl", [{"text": text}] * 10), tokenizer, 20)["train"]
    assert texts.too_long == 8 and len(texts) == 8 * math.ceil((len(ids) + 1) / 20)
    pieces = texts.samples[: len(texts) // 8]
    assert torch.cat([inputs for inputs, _ in pieces]).tolist()[1:] == ids
    assert [t for sample in pieces for t in learned(sample)][:-1] == ids
    records = [*PAIRS, *[{"prompt": text, "completion": "x"}] * 10]
    pairs = data.load_examples(write(tmp_path / "b.jsonl", records), tokenizer, 40)
    assert sum(len(split) for split in pairs.values()) == 30
    assert sum(split.too_long for split in pairs.values()) == 10
    (tmp_path / "c.txt").write_text("\n\n".join(f"Paragraph {n}\nof two lines." for n in range(20)))
    paragraphs = data.load_examples(str(tmp_path / "c.txt"), tokenizer, 64)
    assert [len(split) for split in paragraphs.values()] == [16, 2, 2]
    assert tokenizer.decode(paragraphs["val"].samples[0][0].tolist()[1:]) == "Paragraph 8\nof two lines."


def test_a_file_to_validate_on(tmp_path):
    tokenizer = data.load_tokenizer("base")
    one, two = write(tmp_path / "a.jsonl", PAIRS), write(tmp_path / "b.jsonl", PAIRS[:5])
    splits = data.load_examples(one, tokenizer, 64, val=two)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [27, 5, 3]
    mixed = data.load_examples("prose", tokenizer, 64, val=two)
    assert len(mixed["val"]) == 5 and len(mixed["train"]) > 1000


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
    "too few": (b'{"text": "a"}\n' * 3, "val"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_with_its_line(tmp_path, kind):
    content, named = BROKEN[kind]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=named) as error:
        data.load_examples(str(tmp_path / "a.jsonl"), chat_tokenizer(tmp_path), 64)
    assert "a.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_other_files_that_cannot_be_used(tmp_path):
    base = data.load_tokenizer("base")
    (tmp_path / "a.txt").write_bytes(b"fine\n\n\xff\xfe")
    with pytest.raises(InputError, match="a.txt is not UTF-8"):
        data.load_examples(str(tmp_path / "a.txt"), base, 64)
    with pytest.raises(InputError, match="choose prose"):
        data.load_examples(str(tmp_path / "a.csv"), base, 64)
    with pytest.raises(OSError, match="nowhere.jsonl"):
        data.load_examples(str(tmp_path / "nowhere.jsonl"), base, 64)
    chat = write(tmp_path / "chat.jsonl", [{"messages": [{"role": "assistant", "content": "x"}]}] * 10)
    with pytest.raises(InputError, match="ChatML"):  # the base's tokenizer does not know it
        data.load_examples(chat, base, 64)


def test_one_enormous_line(tmp_path):
    (tmp_path / "a.txt").write_text("the value is " * 200_000)
    with pytest.raises(InputError, match="val"):  # one paragraph leaves nothing to validate on
        data.load_examples(str(tmp_path / "a.txt"), data.load_tokenizer("base"), 64)


@pytest.mark.parametrize(("text", "strict", "flexible"), (
    ("6 * 7 = 42\n#### 42", 42, 42), ("so 1,234.50\n#### 1,234.50", 1234.5, 1234.5), ("#### -3", -3, -3),
    ("The answer is 42.", None, 42), ("#### 7 or 8", 7, 8), ("#### $5", 5, 5), ("####9", None, 9),
    ("no", None, None), ("", None, None), ("a 3-4 split", None, -4), ("#### 10\nFour more: #### 11", 11, 11),
))  # fmt: skip
def test_final_numbers(text, strict, flexible):
    assert final_number(text, "#### ") == strict and final_number(text, "") == flexible


def test_exact_match_and_its_standard_error():
    right = ["1\n#### 1", "#### 2", "#### 3", "#### 4"]
    said = ["I say 1", "#### 2", "#### 4", "three\n#### 4.0"]
    found = data.exact_match(iter(said), iter(right))
    assert (found["strict"], found["flexible"], found["examples"]) == (0.5, 0.75, 4)
    assert found["standard_error"] == pytest.approx(math.sqrt(0.5 * 0.5 / 4))


def test_gsm_is_split_by_question_and_ends_in_numbers():
    pytest.importorskip("reasoning_gym")
    tokenizer = data.load_tokenizer("base")
    splits = data.load_examples("gsm", tokenizer, 1000)
    questions = {}
    for name, split in splits.items():
        for prompt, solution in split.questions(len(split)):
            assert questions.setdefault(tokenizer.decode(prompt), name) == name
            assert final_number(tokenizer.decode(solution), "#### ") is not None
    assert len(questions) == sum(map(len, splits.values())) > 3900
    assert min(map(len, splits.values())) > 380


def test_gsm_names_the_package_it_needs(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(InputError, match="pip install reasoning-gym"):
        data.load_examples("gsm", data.load_tokenizer("base"), 64)
