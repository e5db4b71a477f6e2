"""Fine-tune a language model by salience-aware sparse fine-tuning: score, mask, train, save.

    python train.py --metric grad --density 0.01
"""

import argparse
import math
import re
import signal
import sys
import time

import torch

import data
import speft
from model import GPT, GPTConfig

POSITIVE = lambda x: 0 < x < math.inf  # noqa: E731
NOT_NEGATIVE = lambda x: 0 <= x < math.inf  # noqa: E731

FLAGS = {  # name: (default, the values allowed, help)
    "metric": ("grad", list(speft.METRICS), "how weights are scored"),
    "density": (0.01, lambda x: 0 < x <= 1, "share of the linear layers' weights to train"),
    "scope": ("global", ["global", "local"], "rank the weights of the whole model, or of each layer"),
    "mask": ("static", ["static", "dynamic"], "score once, or again every --refresh steps"),
    "refresh": (40, POSITIVE, "steps between the masks of --mask dynamic"),
    "method": ("sparse", ["sparse", "full", "none"], "what to train: a mask, every weight, or nothing"),
    "model": ("base", None, "base (shipped), scratch (random weights), or a checkpoint"),
    "data": ("prose", None, "prose or stdlib"),
    "layers": ("", None, "regular expression: train only linear layers whose name it matches"),
    "score-examples": (128, POSITIVE, "training examples to score with"),
    "steps": (120, NOT_NEGATIVE, "optimizer steps"),
    "batch-size": (8, POSITIVE, "examples a step"),
    "seq-len": (256, POSITIVE, "longest example, in tokens"),
    "lr": (1e-2, POSITIVE, "peak learning rate"),
    "warmup": (0.03, lambda x: 0 <= x <= 1, "share of the steps in which the learning rate rises"),
    "weight-decay": (0.0, NOT_NEGATIVE, "AdamW's weight decay"),
    "clip": (1.0, POSITIVE, "largest norm of the gradient"),
    "eval-every": (40, POSITIVE, "steps between validations"),
    "eval-examples": (64, POSITIVE, "held-out examples that an evaluation reads"),
    "seed": (0, NOT_NEGATIVE, "of the data order and of random numbers"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", ["cpu", "cuda"], "where to compute"),
    "dtype": ("float32", ["float32", "bfloat16"], "type of the weights; corrections are always float32"),
    "out": ("out", None, "folder for the results"),
}


def parse_args(argv):
    """Read the command line; what is wrong with it ends the program with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for name, (default, allowed, text) in FLAGS.items():
        choices = allowed if isinstance(allowed, list) else None
        text = f"{text} (default: {default})"
        parser.add_argument(f"--{name}", type=type(default), default=default, choices=choices, help=text)
    args = parser.parse_args(argv)
    for name, (_, allowed, _) in FLAGS.items():
        value = getattr(args, name.replace("-", "_"))
        if callable(allowed) and not allowed(value):
            parser.error(f"argument --{name}: {value} is out of range")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no CUDA device here")
    try:
        re.compile(args.layers)
    except re.error as error:
        parser.error(f"argument --layers: {args.layers!r} is no regular expression: {error}")
    return args


def sample_losses(model, batch):
    """The loss of every sample of a batch, (B,), in nats a token: what is minimised and what is scored."""
    return model(*batch, reduction="none")[1]


@torch.no_grad()
def evaluate(model, batches):
    """The mean loss of all samples in `batches`."""
    return torch.cat([sample_losses(model, batch) for batch in batches]).mean().item()


def choose_weights(model, train, args, draw):
    """Score on the `draw`-th set of training examples, mask the model, and return the deltas to train."""
    batches = train.draw(0, args.score_examples, args.seed + 1 + draw, args.batch_size)
    scores = speft.salience(model, args.metric, batches, sample_losses, re.compile(args.layers).search)
    indices = speft.select(scores, args.density, args.scope)
    shares = {}
    for name, index in indices.items():
        # by kind: blocks.3.attn.q is one of the attn.q
        shares.setdefault(name.split(".", 2)[-1], []).append(len(index) / scores[name].numel())
    print("density:", ", ".join(f"{kind} {sum(part) / len(part):.2%}" for kind, part in shares.items()))
    return speft.remask(model, indices)


def learning_rate(step, args):
    """Linear warm-up to --lr, then half a cosine down to zero."""
    warmup = math.ceil(args.warmup * args.steps)
    progress = max(0, step - warmup) / max(1, args.steps - warmup)  # of the cosine
    return args.lr * min(1, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * progress))


def fit(model, params, train, val, args, stop):
    """The training loop; returns the log, a row a step. Ends early, after a step, once `stop` has an item."""
    log, optimizer = [], None
    while len(log) < args.steps and not stop:
        step, start = len(log), time.time()
        row = {"step": step + 1, "lr": learning_rate(step, args)}
        if args.method == "sparse" and args.mask == "dynamic" and step and step % args.refresh == 0:
            params, optimizer = choose_weights(model, train, args, draw=step // args.refresh), None
            row["score_seconds"] = time.time() - start
        optimizer = optimizer or torch.optim.AdamW(params, weight_decay=args.weight_decay, fused=True)
        for group in optimizer.param_groups:
            group["lr"] = row["lr"]
        (batch,) = train.draw(step * args.batch_size, args.batch_size, args.seed)
        loss = sample_losses(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        row["gradient_norm"] = torch.nn.utils.clip_grad_norm_(params, args.clip).item()
        row["loss"] = loss.item()
        if not math.isfinite(row["loss"] + row["gradient_norm"]):
            raise ArithmeticError(f"step {step + 1}: the loss or its gradient is not finite: {row}")
        optimizer.step()
        row["seconds"] = time.time() - start - row.get("score_seconds", 0)
        row["tokens_per_second"] = batch[0].numel() / row["seconds"]
        if (step + 1) % args.eval_every == 0:
            row["val"] = evaluate(model, val)
        show_progress(row, args.steps)
        log.append(row)
    return log


def show_progress(row, steps):
    """A line that the next one overwrites on a terminal; elsewhere a line for every twentieth of the run."""
    line = f"step {row['step']}/{steps}  loss {row['loss']:.4f}  lr {row['lr']:.1e}"
    line += f"  {row['tokens_per_second']:,.0f} tokens/s  {row['seconds'] * (steps - row['step']):.0f} s left"
    if "val" in row:
        print(f"{line}  validation {row['val']:.4f}", flush=True)
    elif sys.stdout.isatty():
        print(line, end="\r", flush=True)
    elif row["step"] % max(1, steps // 20) == 0:
        print(line, flush=True)


def run(args, adapt, stop):
    """Load, evaluate, choose the weights, train them, evaluate, save; returns what result.json holds."""
    start = time.time()
    out = data.check_folder(args.out)
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    model = GPT(GPTConfig()) if args.model == "scratch" else GPT.from_pretrained(args.model, dtype)
    model.to(args.device, dtype)
    if args.seq_len > model.config.block_size:
        raise ValueError(f"--seq-len {args.seq_len} exceeds the model's context, {model.config.block_size}")
    tokenizer = data.load_tokenizer(args.model)
    splits = data.load_examples(args.data, tokenizer, args.seq_len, args.device)
    splits["source"] = data.load_examples("stdlib", tokenizer, args.seq_len, args.device)["test"]
    train = splits.pop("train")
    held_out = {name: split.spread(args.eval_examples, args.batch_size) for name, split in splits.items()}
    result = dict(vars(args), base=data.fingerprint(model.state_dict()), corpus=data.corpus_hash(args.data))
    total = result["total"] = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.model}: {total:,} weights; {args.data}: {len(train):,} training examples", flush=True)

    def report(when, *names):
        for name in names:
            loss = result[f"{name}_{when}"] = evaluate(model, held_out[name])
            print(f"{name} loss {when}: {loss:.4f} nats a token", flush=True)
        torch.manual_seed(args.seed)
        words = model.generate(held_out["val"][0][0][:1, :32], 48, temperature=0.7, top_k=40)[0].tolist()
        print(f"sample {when}: {tokenizer.decode(words[:32])!r} -> {tokenizer.decode(words[32:])!r}")

    report("before", "val", "source")
    begin = time.time()
    if adapt is not None:
        params = adapt(model, train.draw(0, args.score_examples, args.seed + 1, args.batch_size))
    elif args.method == "sparse":
        params = choose_weights(model, train, args, draw=0)
    else:
        params = list(model.parameters()) if args.method == "full" else []
    seconds = time.time() - begin
    trained = result["trained"] = sum(parameter.numel() for parameter in params)
    print(f"training {trained:,} weights ({trained / total:.3%}), chosen in {seconds:.1f} s", flush=True)
    log = fit(model, params, train, held_out["val"], args, stop) if params else []
    if args.method == "full":
        data.write_checkpoint(out, vars(model.config), model.state_dict(), torch.float16)
        data.copy_tokenizer(args.model, out)
    elif args.method == "sparse" and adapt is None:
        learned = {"adapter": speft.adapter(model), "base": result["base"], "settings": vars(args)}
        data.write_tensors(out / "adapter.pt", learned)
    report("after", "val", "test", "source")
    result["steps_done"] = len(log)
    result["score_seconds"] = seconds + sum(row.get("score_seconds", 0) for row in log)
    result |= data.environment(args.device)
    result["seconds"] = time.time() - start
    data.write_json_lines(out / "log.jsonl", log)
    data.write_json(out / "result.json", result)
    print(f"{result['seconds']:.0f} s, {result['peak_memory_bytes'] / 1e6:,.0f} MB at the peak; see {out}/")
    return result


def main(argv=None, adapt=None):
    """Run the command line `argv` (default: the program's own); returns what result.json holds.

    adapt(model, batches) -> parameters takes the place of scoring and masking: so a baseline plugs in.
    Raises SystemExit: 2 for wrong usage, 1 for other errors, 128 + n if stopped by signal n (after saving).
    """
    args = parse_args(argv)
    stop = []

    def catch(number, frame):
        stop.append(number)
        signal.signal(number, usual[number])  # the second one ends the program at once

    usual = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        result = run(args, adapt, stop)
    except (OSError, ValueError, ArithmeticError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    if stop:
        sys.exit(128 + stop[0])
    return result


if __name__ == "__main__":
    main()
