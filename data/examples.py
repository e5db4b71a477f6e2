"""Token sequences with targets: what a model is trained and evaluated on."""

import torch
from torch.nn.utils.rnn import pad_sequence

from data.corpus import load_corpus
from data.files import InputError
from data.tokenizer import END


class Examples:
    """A list of samples: pairs (inputs, targets) of equally long id tensors; target -100 does not count."""

    def __init__(self, samples, device="cpu"):
        self.samples = samples
        self.device = device

    def __len__(self):
        return len(self.samples)

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

    def draw(self, start, count, seed, size=None):
        """Samples number start ... start + count - 1 of an endless, every time reshuffled pass, as batches.

        A function of its arguments alone: whoever knows the step knows the data. One batch without `size`.
        """
        which = []
        for epoch in range(start // len(self), (start + count - 1) // len(self) + 1):
            generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
            which += torch.randperm(len(self), generator=generator).tolist()
        return self.batches(which[start % len(self) :][:count], size or count)


def load_examples(name, tokenizer, seq_len, device="cpu"):
    """{"train", "val", "test": Examples} of the data set `name`, in samples of at most seq_len tokens."""
    if name not in ("stdlib", "prose"):
        raise InputError(f"no data set {name}")
    corpus = load_corpus(name)
    return {split: pack(documents, tokenizer, seq_len, device) for split, documents in corpus.items()}


def pack(documents, tokenizer, seq_len, device):
    """Cut the documents, one after the other with END between, into samples of seq_len tokens."""
    end = tokenizer.encode_single_token(END)
    ids = [end]
    for tokens in tokenizer.encode_ordinary_batch(documents, num_threads=2):
        ids += [*tokens, end]
    ids = torch.tensor(ids)
    inputs, targets = ids[:-1].split(seq_len), ids[1:].split(seq_len)
    return Examples(list(zip(inputs, targets)), device)
