"""Token sequences with targets: what a model is trained and evaluated on."""

import hashlib
import itertools
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from data.corpus import load_corpus
from data.files import InputError
from data.processes import rank_and_world
from data.records import encode_record, make_questions, read_records
from data.tokenizer import begin_token, end_token

CORPORA = ("prose", "stdlib")
TENTHS = ("train",) * 8 + ("val", "test")  # where each of ten examples in a row belongs
BEGINNING = 16  # tokens of a text that a model is shown to go on from


class Examples:
    """A list of samples: pairs (inputs, targets) of equally long id tensors; target -100 does not count.

    asked: how many tokens of each sample are the prompt of its answer; None where there is no answer.
    note: where the samples come from, to stand after their number: "from 3 lines of mine.txt".
    opening: the messages that all chats begin with before the user's first; None if these are no chats.
    """

    def __init__(self, samples, device="cpu", asked=None, note="", opening=None):
        self.samples = samples
        self.device = device
        self.asked = asked or [None] * len(samples)
        self.note = note
        self.opening = opening

    def __len__(self):
        return len(self.samples)

    def fingerprint(self):
        """A short hash of all samples: another Python version ships other texts, and this shows it."""
        ids = torch.cat([torch.cat(sample) for sample in self.samples])
        return hashlib.sha256(ids.numpy()).hexdigest()[:16]

    def batches(self, which, size):
        """The samples numbered `which`, `size` at a time, as a list of (inputs, targets), each (B, T).

        Padded on the right: a causal model's real positions never see it, and its targets do not count.
        """
        batches = []
        for start in range(0, len(which), size):
            inputs, targets = zip(*(self.samples[i] for i in which[start : start + size]))
            inputs = pad_sequence(inputs, batch_first=True)
            targets = pad_sequence(targets, batch_first=True, padding_value=-100)
            batches.append((inputs.to(self.device), targets.to(self.device)))
        return batches

    def spread(self, count, size):
        """`count` samples (all, if there are fewer), evenly spread over the list, as batches of `size`."""
        return self.batches(evenly(range(len(self)), count), size)

    def questions(self, count):
        """`count` samples that have an answer, evenly spread, as pairs of lists of ids: (prompt, answer).

        The answer is without the token that ends it. The shortest prompts come first, so that those which
        are read together are alike.
        """
        pairs = []
        for i in evenly([i for i, asked in enumerate(self.asked) if asked is not None], count):
            inputs, targets = self.samples[i]
            rest = targets[self.asked[i] - 1 :].tolist()
            answer = list(itertools.takewhile(lambda target: target != -100, rest))
            pairs.append((inputs[: self.asked[i]].tolist(), answer[:-1]))
        return sorted(pairs, key=lambda pair: len(pair[0]))

    def beginnings(self, count):
        """What `count` samples, evenly spread, begin with, as lists of ids: a prompt, or words of a text.

        A prompt holds nothing of its answer, and a text's beginning is at most half of it.
        """
        begun = []
        for i in evenly(range(len(self)), count):
            inputs, _ = self.samples[i]
            begun.append(inputs[: self.asked[i] or min(BEGINNING, (len(inputs) + 1) // 2)].tolist())
        return begun

    def sample(self, count, seed, size):
        """`count` samples (all, if there are fewer), drawn at random, as batches: none counts twice.

        Every process gets some. For that, batches may hold fewer than `size`, and samples may count twice if
        there are fewer than processes.
        """
        world = rank_and_world()[1]
        count = min(count, max(len(self), world))
        return self.draw(0, count, seed, min(size, max(1, count // world)))

    def draw(self, start, count, seed, size):
        """Samples number start ... start + count - 1 of an endless, every time reshuffled pass, as batches.

        A function of its arguments alone: whoever knows the step knows the data.
        """
        which = []
        for epoch in range(start // len(self), (start + count - 1) // len(self) + 1):
            generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
            which += torch.randperm(len(self), generator=generator).tolist()
        return self.batches(which[start % len(self) :][:count], size)


def evenly(items, count):
    """`count` of the items (all, if there are fewer), evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


class Part(NamedTuple):
    """Documents (texts, or records with where they stand) of one source, and what the source calls one."""

    name: str
    unit: str
    documents: list

    def __str__(self):
        return f"{len(self.documents):,} {self.unit}{'s' * (len(self.documents) != 1)} of {self.name}"


def load_examples(name, tokenizer, seq_len, device="cpu", only=("train", "val", "test"), val=""):
    """{split: Examples} of the data set `name`, for these splits only, in samples of at most seq_len tokens.

    name: prose, stdlib, gsm, gym:NAME, or a .jsonl or .txt file, of which a tenth each is held out as "val"
    and "test". val: a file to validate on instead, and to test on if there are fewer than ten examples.
    Raises InputError for what cannot be used.
    """
    splits = _split_corpus(name) if name in CORPORA else _split_tenths(name, has_val=bool(val))
    if val:
        train, held_out = splits["train"], _read(val)
        splits["train"] = train._replace(documents=train.documents + splits["val"].documents)
        splits["val"] = held_out
        if not splits["test"].documents:
            splits["test"] = held_out
    examples = {}
    for split in only:
        part = splits[split]
        prepare = _pack if isinstance(part.documents[0], str) else _pad
        examples[split] = prepare(part, tokenizer, seq_len, device)
        if len(examples[split]) == 0:
            raise InputError(f"{part}: none for {split} has at most {seq_len} tokens; --seq-len decides")
    return examples


def _split_corpus(name):
    return {split: Part(name, "document", documents) for split, documents in load_corpus(name).items()}


def _split_tenths(name, has_val):
    """{split: Part} of what is not split by its nature."""
    whole = _read(name)
    if len(whole.documents) < len(TENTHS) and not has_val:
        hint = "give ten or more, or another file with --val, which then serves as both"
        raise InputError(f"{whole}: too few to hold a tenth each out for validation and test; {hint}")
    splits = {split: whole._replace(documents=[]) for split in TENTHS}
    for place, document in enumerate(whole.documents):
        splits[TENTHS[place % len(TENTHS)]].documents.append(document)
    return splits


def _read(name):
    """All of the records of a task or a file as a Part."""
    task = {"gsm": "gym:gsm_symbolic"}.get(name, name)
    if task.startswith("gym:"):
        records, unit = make_questions(task.removeprefix("gym:")), "question"
    else:
        records, unit = read_records(Path(name))
    if not records:
        raise InputError(f"{name}: there is nothing in it")
    return Part(name, unit, records)


def _pack(part, tokenizer, seq_len, device):
    """Cut the documents, one after the other with an end token between, into samples of seq_len tokens."""
    end = end_token(tokenizer)
    ids = [end]
    for tokens in tokenizer.encode_ordinary_batch(part.documents, num_threads=2):
        ids += [*tokens, end]
    samples = _cut(torch.tensor(ids[:-1]), torch.tensor(ids[1:]), tokenizer, seq_len)
    return Examples(samples, device, note=f"from {part}")


def _cut(inputs, targets, tokenizer, seq_len):
    """Samples of at most seq_len tokens.

    Where the checkpoint wants a token in front of every text, the first input of each is that one, in place
    of what was there: such models are lost without it. The targets stay as they are.
    """
    pieces, begin = inputs.split(seq_len), begin_token(tokenizer)
    if begin is not None:
        for piece in pieces:
            piece[0] = begin
    return list(zip(pieces, targets.split(seq_len)))


def _pad(part, tokenizer, seq_len, device):
    """A sample a record. One of more than seq_len tokens is cut into several if a text, else left out."""
    samples, prompts, cut, left_out = [], [], 0, 0
    for where, record in part.documents:
        inputs, targets, asked = encode_record(where, record, tokenizer)
        is_long = len(inputs) > seq_len
        if is_long and asked is not None:
            left_out += 1
            continue
        cut += is_long
        pieces = _cut(inputs, targets, tokenizer, seq_len)
        samples += pieces
        prompts += [asked] * len(pieces)
    note = f"from {part}"
    note += f", {cut:,} of them longer than {seq_len} tokens and cut" if cut else ""
    note += f", {left_out:,} of them longer than {seq_len} tokens and left out" if left_out else ""
    return Examples(samples, device, prompts, note, _opening(record for _, record in part.documents))


def _opening(records):
    """The system's messages that all chats among the records begin with; None if there are no chats."""
    chats = [record["messages"] for record in records if record.get("messages")]
    openings = []
    for chat in chats:
        openings.append(list(itertools.takewhile(lambda message: message["role"] == "system", chat)))
    alike = all(opening == openings[0] for opening in openings)
    return (openings[0] if alike else []) if openings else None
