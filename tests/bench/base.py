"""How well does the shipped base read code? Bits a byte on held-out `stdlib` files, against `xz -9`.

python tests/bench/base.py [MODEL]
"""

import lzma
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import data  # noqa: E402
from data.corpus import load_corpus  # noqa: E402


def main(name="base"):
    model, tokenizer = data.load_model(name), data.load_tokenizer(name)
    splits = data.load_examples("stdlib", tokenizer, model.config.block_size)
    size = nats = 0
    for split in ("val", "test"):
        documents = load_corpus("stdlib")[split]
        size += sum(len(document.encode()) for document in documents)
        with torch.no_grad():
            for inputs, targets in splits[split].spread(10**9, 16):
                losses = model(inputs, targets, reduction="none")[1]
                nats += (losses * (targets != -100).sum(1)).sum().item()
    documents = (d for split in ("val", "test") for d in load_corpus("stdlib")[split])
    packed = len(lzma.compress("".join(documents).encode(), preset=9))
    print(f"{size:,} bytes of held-out files: {name} {nats / math.log(2) / size:.3f} bits a byte, "
          f"xz -9 {8 * packed / size:.3f}")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
