"""How good is a model, and what does it say? Losses, task accuracy and samples, on held-out examples."""

import torch

from data.processes import Progress, gather, share, show
from data.tasks import accuracy, answer, format_prompt, in_words, stop_tokens

SAMPLES, SAMPLE_TOKENS = 3, 48


@torch.no_grad()
def mean_loss(model, batches):
    """The mean loss of all samples in `batches`, in nats a token; the processes share them."""
    losses = [loss for batch in share(batches) for loss in model.sample_losses(batch).tolist()]
    everyone = [loss for theirs in gather(losses) for loss in theirs]
    return sum(everyone) / len(everyone)


class Report:
    """Evaluates the models of a run, always on the same examples.

    splits: {name: Examples}, of which "test" has the questions and the samples' beginnings; settings: the
    flags of train.py.
    """

    def __init__(self, splits, tokenizer, settings):
        self.tokenizer, self.batch_size = tokenizer, settings.batch_size
        count, test = settings.eval_examples, splits["test"]
        self.held_out = {name: split.spread(count, self.batch_size) for name, split in splits.items()
                         if name != "train"}  # fmt: skip
        self.questions = test.questions(count)
        self.prompts = test.beginnings(SAMPLES)
        self.is_untrained = settings.method == "none"  # there is no "after"
        self.is_asked = self.is_untrained and bool(settings.prompt)
        if settings.prompt:
            self.prompts = [format_prompt(settings.prompt, tokenizer, like=test)]

    def losses(self, model, when):
        """{"NAME_WHEN": loss} on the held-out splits, shown as they come; on "test" only in the end."""
        found = {}
        for name in ("val", "test", "source") if when == "after" or self.is_untrained else ("val", "source"):
            loss = found[f"{name}_{when}"] = mean_loss(model, self.held_out[name])
            show(f"{name} loss {when}: {loss:.4f} nats a token")
        return found

    def accuracy(self, model, when):
        """{"accuracy_WHEN": see `data.accuracy`}, empty if the test examples have no answers."""
        # Four times a batch fits, since no activations are kept.
        mine, size = share(self.questions), 4 * self.batch_size
        progress = Progress("answering", len(mine), "questions")
        marks = answer(model, mine, self.tokenizer, size, lambda done, total: progress.show(done))
        found = accuracy([mark for theirs in gather(marks) for mark in theirs])
        if found is None:
            return {}
        show(f"accuracy {when}: {in_words(found)}")
        return {f"accuracy_{when}": found}

    def samples(self, model, when):
        """Show how the model goes on from the prompts."""
        said = model.complete(self.prompts, SAMPLE_TOKENS, stop_tokens(self.tokenizer), len(self.prompts))
        for prompt, completion in zip(self.prompts, said):
            show(f"sample {when}: {self.tokenizer.decode(prompt + completion)!r}")

    def __call__(self, model, when):
        """All of the above, or the samples alone where one only asks; returns what goes into result.json."""
        found = {} if self.is_asked else self.losses(model, when) | self.accuracy(model, when)
        self.samples(model, when)
        return found


def show_mask(scores, indices):
    """What a mask trains: the density by kind of layer, blocks.3.attn.q being one of the attn.q."""
    kinds = {}
    for name, index in indices.items():
        kinds.setdefault(name.split(".", 2)[-1], []).append(len(index) / scores[name].numel())
    means = ", ".join(f"{kind} {sum(part) / len(part):.2%}" for kind, part in kinds.items())
    show(f"training {sum(map(len, indices.values())):,} weights: {means}")


def show_step(row, steps):
    """A step's row of the log as a line, which stays if it is the first, the last, or has a validation."""
    line = f"step {row['step']}/{steps}  loss {row['loss']:.4f}  lr {row['lr']:.1e}"
    line += f"  {row['tokens_per_second']:,.0f} tokens/s  {row['seconds'] * (steps - row['step']):.0f} s left"
    line += f"  validation {row['val']:.4f}" if "val" in row else ""
    show(line, passing="val" not in row and 1 < row["step"] < steps)
