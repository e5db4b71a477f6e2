"""Token sequences with targets: what a model is trained and evaluated on."""

import hashlib
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from data.corpus import load_corpus
from data.files import InputError
from data.records import encode_record, end_token, make_gsm, read_records


class Examples:
    """A list of samples: pairs (inputs, targets) of equally long id tensors; target -100 does not count.

    too_long: how many samples had to be cut or left out.
    """

    def __init__(self, samples, device="cpu", too_long=0):
        self.samples = samples
        self.device = device
        self.too_long = too_long

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
        count = min(count, len(self))
        return self.batches([i * len(self) // count for i in range(count)], size)

    def questions(self, count):
        """`count` samples as pairs of lists: the tokens that are only read, and those that are learned."""
        pairs = []
        for inputs, targets in self.samples[:count]:
            learned = targets != -100
            pairs.append((inputs[: learned.int().argmax() + 1].tolist(), targets[learned].tolist()))
        return pairs

    def draw(self, start, count, seed, size):
        """Samples number start ... start + count - 1 of an endless, every time reshuffled pass, as batches.

        A function of its arguments alone: whoever knows the step knows the data.
        """
        which = []
        for epoch in range(start // len(self), (start + count - 1) // len(self) + 1):
            generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
            which += torch.randperm(len(self), generator=generator).tolist()
        return self.batches(which[start % len(self) :][:count], size)


def load_examples(name, tokenizer, seq_len, device="cpu", only=("train", "val", "test"), val=""):
    """{split: Examples} of the data set `name`, for these splits only, in samples of at most seq_len tokens.

    name: prose, stdlib, gsm, or a .jsonl or .txt file, of which a tenth each is held out as "val" and "test".
    val: a file to validate on instead. Raises InputError for what cannot be used.
    """
    if name in ("prose", "stdlib"):
        splits = load_corpus(name)
    else:
        records = make_gsm() if name == "gsm" else read_records(Path(name))
        train = [record for place, record in enumerate(records) if place % 10 < 8]
        splits = {"train": train, "val": records[8::10], "test": records[9::10]}
    if val:
        splits = splits | {"train": splits["train"] + splits["val"], "val": read_records(Path(val))}
    examples = {}
    for split in only:
        documents = splits[split]
        prepare = _pack if documents and isinstance(documents[0], str) else _pad
        examples[split] = prepare(documents, tokenizer, seq_len, device)
        if len(examples[split]) == 0:
            raise InputError(f"{name}: nothing of at most {seq_len} tokens is left for the {split} examples")
    return examples


def _pack(documents, tokenizer, seq_len, device):
    """Cut the documents, one after the other with an end token between, into samples of seq_len tokens."""
    end = end_token(tokenizer)
    ids = [end]
    for tokens in tokenizer.encode_ordinary_batch(documents, num_threads=2):
        ids += [*tokens, end]
    inputs, targets = (torch.tensor(part).split(seq_len) for part in (ids[:-1], ids[1:]))
    return Examples(list(zip(inputs, targets)), device)


def _pad(records, tokenizer, seq_len, device):
    """A sample a record. One of more than seq_len tokens is cut into several if a text, else left out."""
    samples, too_long = [], 0
    for where, record in records:
        inputs, targets = (ids.split(seq_len) for ids in encode_record(where, record, tokenizer))
        too_long += len(inputs) > 1
        if len(inputs) == 1 or "text" in record:
            samples += zip(inputs, targets)
    return Examples(samples, device, too_long)
