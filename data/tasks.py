"""Questions put to a model: how many of its answers are right, and prompts in the form of the data."""

import re
from decimal import Decimal

from data.records import TURN, encode_record
from data.tokenizer import end_token

READINGS = ("exact", "strict", "flexible")
MARK = "#### "  # stands before the number that a worked solution ends in
NUMBER = r"\$?(-?\d[\d,]*(?:\.\d+)?)"


def stop_tokens(tokenizer):
    """The ids that end an answer: of the end of a document, and of a turn in ChatML where it is known."""
    turn_ends = TURN[1] in tokenizer.special_tokens_set
    return [end_token(tokenizer)] + ([tokenizer.encode_single_token(TURN[1])] if turn_ends else [])


def format_prompt(text, tokenizer, like):
    """The ids of `text` as the prompt of an answer, in the form that the Examples `like` have.

    In a chat it is the user's first message, after what all chats begin with, and the assistant's turn has
    begun. Elsewhere it follows the token that examples begin with. Raises InputError for what has no tokens.
    """
    record = {"prompt": text, "completion": "."}  # some answer, of which nothing is kept
    if like.opening is not None:
        turns = [("user", text), ("assistant", ".")]
        record = {"messages": like.opening + [{"role": role, "content": content} for role, content in turns]}
    inputs, _, asked = encode_record("the prompt", record, tokenizer)
    return inputs[:asked].tolist()


def answer(model, questions, tokenizer, batch_size, progress=None):
    """Let the model answer `questions` (of `Examples.questions`) greedily; returns what `mark` says of each.

    An answer may have twice as many tokens as the right one, and eight. progress(done, total) is called
    after every batch. Marks of parts of the questions are those of all when put together.
    """
    marks = []
    for start in range(0, len(questions), batch_size):
        prompts, rights = zip(*questions[start : start + batch_size])
        limits = [2 * len(right) + 8 for right in rights]
        said = model.complete(prompts, max(limits), stop_tokens(tokenizer), batch_size)
        for ids, limit, right in zip(said, limits, rights):
            marks.append(mark(tokenizer.decode(ids[:limit]), tokenizer.decode(right)))
        if progress:
            progress(len(marks), len(questions))
    return marks


def mark(said, right):
    """Whether `said` is right, as {reading: bool}.

    exact: the same text, white space at the ends aside. For a worked solution, which has a "#### ", also
    strict: its number is said after "#### ", and flexible: its number is the last one said. What has no
    number is wrong.
    """
    marks = {"exact": said.strip() == right.strip()}
    if MARK in right:
        number = final_number(right, MARK)
        marks["strict"] = number is not None and final_number(said, MARK) == number
        marks["flexible"] = number is not None and final_number(said, "") == number
    return marks


def final_number(text, before):
    """The number after `before`, the last one if it stands there more than once; None if there is none."""
    found = re.findall(before + NUMBER, text)
    return Decimal(found[-1].replace(",", "")) if found else None


def accuracy(marks):
    """The share of right answers by each reading and its standard error, for result.json; None without marks.

    {"examples": n, "exact": share, "exact_error": error}, and the same of strict and flexible where some
    answers are worked solutions: their share is of these.
    """
    summary = {"examples": len(marks)}
    for reading in READINGS:
        hits = [found[reading] for found in marks if reading in found]
        if hits:
            share = sum(hits) / len(hits)
            summary |= {reading: share, f"{reading}_error": (share * (1 - share) / len(hits)) ** 0.5}
    return summary if marks else None


def in_words(summary):
    """A summary of `accuracy` on a line: "exact 55.0% ± 11.1% of 20 answers"."""
    shares = [f"{reading} {summary[reading]:.1%} ± {summary[f'{reading}_error']:.1%}"
              for reading in READINGS if reading in summary]  # fmt: skip
    return f"{', '.join(shares)} of {summary['examples']:,} answers"
