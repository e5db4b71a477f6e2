"""A task like GLUE's SST-2: is a snippet of a movie review positive or negative?

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python tests/bench/sentiment.py vaderSentiment-3.3.2.tar.gz     # writes out/sentiment/{train,test}.jsonl
    python tests/bench/compare.py sentiment

Snippets with the mean of twenty people's ratings, from -4 to 4: Hutto & Gilbert, "VADER: A Parsimonious
Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014. Those rated at least 1 away from 0
are kept. 2,000 are for the test alone; of the others train.py validates on a tenth.
"""

import argparse
import json
import random
import sys
import tarfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import data  # noqa: E402

FOLDER = Path("out/sentiment")
RATED = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
ANSWERS = (" negative", " positive")
TEST = 2000


def read_ratings(path):
    """[(rating, snippet)] from the package's source archive, which holds another archive."""
    with tarfile.open(path) as package:
        inner = next(member for member in package if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=package.extractfile(inner)) as resources:
            text = resources.extractfile(RATED).read().decode("latin-1")
    lines = [line.split("\t") for line in text.splitlines()]
    return [(float(rating), snippet.strip()) for _, rating, snippet in lines]


def make_records(ratings):
    """(training records, test records): prompt and completion, no snippet twice, in a shuffled order."""
    clear = {snippet: rating for rating, snippet in ratings if abs(rating) >= 1}
    records = [
        {"prompt": f"Review: {snippet}\nSentiment:", "completion": ANSWERS[rating > 0]}
        for snippet, rating in clear.items()
    ]
    random.Random(0).shuffle(records)
    return records[TEST:], records[:TEST]


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@torch.no_grad()
def measure(model, tokenizer, records, batch_size=16):
    """Which of the two answers is likelier? {accuracy, standard_error, loss, right}.

    "loss" is that of the right answer among all tokens, in nats. "right" has a 1 or a 0 for each record, so
    that two runs compare example by example. The answers are a token each. Prompts of alike lengths share a
    batch.
    """
    answers = [tokenizer.encode_ordinary(answer) for answer in ANSWERS]
    assert max(map(len, answers)) == 1, "an answer has to be one token"
    plain = data.Examples([])  # no chats
    prompts = [data.format_prompt(record["prompt"], tokenizer, plain) for record in records]
    order = sorted(range(len(records)), key=lambda n: len(prompts[n]))
    right, losses = [0] * len(records), 0.0
    for start in range(0, len(order), batch_size):
        which = order[start : start + batch_size]
        rows = [torch.tensor(prompts[n]) for n in which]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        last = torch.tensor([len(row) - 1 for row in rows])
        features = model.features(padded)[torch.arange(len(rows)), last]
        logits = model.logits(features).float()
        wanted = torch.tensor([ANSWERS.index(records[n]["completion"]) for n in which])
        tokens = torch.tensor(answers).squeeze(1)
        for n, is_right in zip(which, (logits[:, tokens].argmax(1) == wanted).tolist()):
            right[n] = int(is_right)
        losses += torch.nn.functional.cross_entropy(logits, tokens[wanted], reduction="sum").item()
    share = sum(right) / len(records)
    error = (share * (1 - share) / len(records)) ** 0.5
    right = "".join(map(str, right))
    return {"accuracy": share, "standard_error": error, "loss": losses / len(records), "right": right}


def measure_test(model, tokenizer):
    """`measure` on the test examples of the study."""
    lines = (FOLDER / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return measure(model, tokenizer, [json.loads(line) for line in lines])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("archive", help="vaderSentiment's source archive")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    train, test = make_records(read_ratings(args.archive))
    for name, records in (("train", train), ("test", test)):
        write_records(FOLDER / f"{name}.jsonl", records)
        share = sum(record["completion"] == ANSWERS[1] for record in records) / len(records)
        print(f"{FOLDER / name}.jsonl: {len(records):,} examples, {share:.1%} of them positive")


if __name__ == "__main__":
    main()
