"""Corpora, the vocabulary, samples and files."""

import collections
import errno
import io
import itertools
import lzma
import os
import random
import re
import sys
from pathlib import Path

import pytest
import torch

import data
from data import files
from data.corpus import load_corpus
from data.examples import Examples, Part, _pack
from data.files import find
from model import GPT

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import vocabulary  # noqa: E402


def windows(text, length=16):
    """Every run of `length` white-space separated words."""
    words = text.split()
    return {" ".join(words[i : i + length]) for i in range(len(words) - length + 1)}


@pytest.mark.slow
def test_documents_and_long_runs_of_words_are_in_one_place_only():
    code, english = load_corpus("stdlib"), load_corpus("prose")
    places = {f"prose {split}": documents for split, documents in english.items()}
    places["stdlib"] = code["train"] + code["val"] + code["test"]
    runs = {place: set().union(*map(windows, documents)) for place, documents in places.items()}
    for one, other in itertools.combinations(runs, 2):
        assert min(len(runs[one]), len(runs[other])) > 1000
        assert runs[one].isdisjoint(runs[other]), (one, other, runs[one] & runs[other])


@pytest.mark.slow
def test_the_corpora_are_of_a_useful_size_and_stable():
    for name, least in (("stdlib", 4_000_000), ("prose", 300_000)):
        splits = load_corpus(name)
        assert list(splits) == ["train", "val", "test"]
        assert sum(map(len, splits["train"])) > least
        assert min(sum(map(len, splits[split])) for split in ("val", "test")) > 30_000


@pytest.mark.slow
def test_stdlib_has_no_docstrings_and_prose_no_code():
    text = "".join(load_corpus("stdlib")["train"])
    assert (
        "Return a copy of the string" not in text and '"""' in text
    )  # long strings that are not docstrings stay
    english = "".join(load_corpus("prose")["train"])
    assert ">>>" not in english
    letters = sum(c.isalpha() or c in " ,.\n" for c in english)
    assert letters / len(english) > 0.9


def naive_bpe(pieces, size):
    """The textbook loop: count all pairs, merge the most frequent one everywhere, repeat."""
    words = [[bytes([b]) for b in piece.encode()] for piece in pieces]
    ranks, merges = {bytes([b]): b for b in range(256)}, []
    while len(ranks) < size:
        counts = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], -ranks[pair[0]], -ranks[pair[1]]))
        merges.append(best)
        ranks[b"".join(best)] = len(ranks)
        for n, word in enumerate(words):
            merged = []
            while word:
                step = 2 if tuple(word[:2]) == best else 1
                merged.append(b"".join(word[:step]))
                word = word[step:]
            words[n] = merged
    return list(ranks), merges


@pytest.mark.parametrize("seed", range(8))
def test_bpe_training_agrees_with_the_textbook_loop(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice("ab  \ncé_1(") for _ in range(400))
    learned = vocabulary.train_bpe([text], 300)
    assert learned == naive_bpe(re.findall(vocabulary.PATTERN, text), 299)


@pytest.mark.parametrize("seed", range(20))
def test_the_shipped_tokenizer_returns_every_text(seed):
    encoding = data.load_tokenizer("base")
    assert encoding.n_vocab == 4096
    rng = random.Random(seed)
    text = "".join(chr(rng.choice((rng.randrange(1, 128), rng.randrange(128, 0xD800)))) for _ in range(300))
    text += " \t\n\r\n  def f(x):\n        return x_1 ** 22, 'é' \u0301\u200b 𝛼 _ __init__"
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_samples_are_shifted_by_one_and_miss_nothing():
    encoding = data.load_tokenizer("base")
    end = encoding.n_vocab - 1
    examples = _pack(Part("two", "text", ["x = 1\n" * 9, "y"]), encoding, seq_len=7, device="cpu")
    stream = [end, *encoding.encode_ordinary("x = 1\n" * 9), end, *encoding.encode_ordinary("y"), end]
    inputs, targets = (torch.cat(parts).tolist() for parts in zip(*examples.samples))
    assert inputs == stream[:-1] and targets == stream[1:]
    assert {len(sample[0]) for sample in examples.samples[:-1]} == {7}


def numbered(count):
    return Examples([(torch.tensor([n] * (n + 1)), torch.tensor([n] * (n + 1))) for n in range(count)])


def test_every_process_has_examples_to_score_if_there_are_as_many(monkeypatch):
    cases = ((1, 50, 128), (8, 50, 128), (3, 9, 7), (7, 7, 7), (4, 40, 40), (4, 5, 5), (4, 3, 9), (2, 1, 2))
    for world, count, wanted in cases:
        monkeypatch.setattr("data.examples.rank_and_world", lambda: (0, world))
        batches = numbered(count).sample(wanted, seed=0, size=8)
        sampled = [x.item() for inputs, _ in batches for x in inputs[:, 0]]
        assert len(batches) >= world and len(sampled) == min(max(count, world), wanted)
        assert len(set(sampled)) == min(len(sampled), count)  # twice only where there are too few
        assert max(len(inputs) for inputs, _ in batches) <= 8
        assert min(wanted, count) < 8 * world or len(batches[0][0]) == 8  # smaller only where it has to be


@pytest.mark.parametrize("count", (1, 5, 8))
def test_drawing_is_a_reshuffled_pass_and_a_function_of_its_arguments(count):
    examples = numbered(count)
    for wanted in (1, count, 3 * count):  # for scoring none counts twice
        sampled = [x.item() for inputs, _ in examples.sample(wanted, seed=5, size=2) for x in inputs[:, 0]]
        assert len(set(sampled)) == len(sampled) == min(wanted, count)
        of_the_seed = [x.item() for inputs, _ in examples.draw(0, len(sampled), 5, 2) for x in inputs[:, 0]]
        assert sampled == of_the_seed
    drawn = [examples.draw(at, 1, seed=3, size=1)[0][0][0, 0].item() for at in range(4 * count)]
    for epoch in range(4):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))
    for start in range(2 * count):
        (batch,) = examples.draw(start, count + 1, seed=3, size=count + 1)
        assert batch[0][:, 0].tolist() == drawn[start : start + count + 1]
    if count > 1:
        assert drawn != [examples.draw(at, 1, seed=4, size=1)[0][0][0, 0].item() for at in range(4 * count)]


def test_batches_are_padded_on_the_right_without_counting_it():
    inputs, targets = numbered(4).batches([1, 3], size=2)[0]
    assert inputs.tolist() == [[1, 1, 0, 0], [3, 3, 3, 3]]
    assert targets.tolist() == [[1, 1, -100, -100], [3, 3, 3, 3]]
    assert [len(batch[0]) for batch in numbered(10).spread(5, size=2)] == [2, 2, 1]
    assert [batch[0][:, 0].tolist() for batch in numbered(10).spread(5, size=5)] == [[0, 2, 4, 6, 8]]


@pytest.mark.parametrize("broken", ("write", "flush", "fsync", "replace"))
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, broken):
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    class FullDisk(io.FileIO):
        write = full if broken == "write" else io.FileIO.write
        flush = full if broken == "flush" else io.FileIO.flush

    if broken in ("write", "flush"):
        monkeypatch.setattr(files, "open", FullDisk, raising=False)
    else:
        monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"a": 2})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["result.json"]


def test_equal_tensors_make_equal_files(tmp_path):
    content = {"adapter": {"0": (torch.arange(5), torch.rand(5), (2, 3))}, "base": "x"}
    for name in ("one.pt", "another.pt"):
        files.write_tensors(tmp_path / name, content)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another.pt").read_bytes()
    assert torch.load(tmp_path / "one.pt", weights_only=True)["base"] == "x"


def test_fingerprints_see_names_types_shapes_and_bits():
    def like(**tensors):
        model = torch.nn.ParameterDict(tensors)
        return GPT.fingerprint(model)

    base = dict(a=torch.zeros(2, 3), b=torch.ones(1))
    others = [
        like(a=torch.zeros(2, 3), c=torch.ones(1)),
        like(a=torch.zeros(2, 3), b=torch.ones(1, dtype=torch.float64)),
        like(a=torch.zeros(3, 2), b=torch.ones(1)),
        like(a=-torch.zeros(2, 3), b=torch.ones(1)),
    ]
    assert len({like(**base), *others}) == 5 and like(**dict(reversed(base.items()))) == like(**base)


def test_a_fingerprint_of_examples_sees_every_token_and_target():
    sample = torch.arange(4), torch.arange(1, 5)
    base = Examples([sample, sample]).fingerprint()
    assert base == Examples([sample, sample]).fingerprint() and len(base) == 16
    for place in range(4):
        for part in range(2):
            changed = [tensor.clone() for tensor in sample]
            changed[part][place] = -100
            assert Examples([sample, changed]).fingerprint() != base


@pytest.mark.slow
def test_the_shipped_base_is_small_and_reads_code_better_than_xz():
    folder = find("base")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000
    text = "".join(load_corpus("stdlib")["test"])[:60_000]
    encoding, model = data.load_tokenizer("base"), data.load_model("base")
    batches = _pack(Part("stdlib", "document", [text]), encoding, 256, "cpu").spread(1000, 16)
    with torch.no_grad():
        nats = sum(
            model(*batch, reduction="none")[1].mul((batch[1] != -100).sum(1)).sum() for batch in batches
        )
    bits = nats.item() / torch.log(torch.tensor(2.0)).item()
    assert bits < 8 * len(lzma.compress(text.encode(), preset=9))
