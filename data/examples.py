"""Token sequences with targets: what a model is trained and evaluated on."""

import torch
from torch.nn.utils.rnn import pad_sequence

from data.corpus import load_corpus
from data.files import InputError
from data.tokenizer import END

SPLITS = ("train", "val", "test")


class Examples:
    """A list of samples, each an (inputs, targets) pair of equally long id tensors; target -100: not counted."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def batch(self, which):
        """The samples numbered `which` as (inputs, targets), each (B, T), padded on the right.

        A causal model's real positions never see the padding, and its targets do not count.
        """
        inputs, targets = zip(*(self.samples[i] for i in which))
        return pad_sequence(inputs, batch_first=True), pad_sequence(targets, batch_first=True, padding_value=-100)

    def batches(self, size, limit=None):
        """All samples in order, `size` at a time; with `limit` only that many, spread evenly."""
        chosen = range(len(self))
        if limit is not None and limit < len(self):
            chosen = [i * len(self) // limit for i in range(limit)]
        return [self.batch(chosen[i : i + size]) for i in range(0, len(chosen), size)]

    def draw(self, start, count, seed):
        """Samples number start ... start + count - 1 of an endless, every time reshuffled pass, as one batch.

        A function of its arguments alone: whoever knows the step knows the data.
        """
        which = []
        for position in range(start, start + count):
            epoch, place = divmod(position, len(self))
            generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
            which.append(torch.randperm(len(self), generator=generator)[place].item())
        return self.batch(which)


def load_examples(name, tokenizer, seq_len):
    """{"train", "val", "test": Examples} of the data set `name`, in samples of at most seq_len tokens."""
    if name not in ("stdlib", "prose"):
        raise InputError(f"no data set {name}")
    return {split: pack(documents, tokenizer, seq_len) for split, documents in load_corpus(name).items()}


def pack(documents, tokenizer, seq_len):
    """Cut the documents, one after the other with END between, into samples of seq_len tokens."""
    end = tokenizer.encode_single_token(END)
    ids = [end]
    for tokens in tokenizer.encode_ordinary_batch(documents, num_threads=2):
        ids += [*tokens, end]
    ids = torch.tensor(ids)
    inputs, targets = ids[:-1].split(seq_len), ids[1:].split(seq_len)
    return Examples(list(zip(inputs, targets)))
