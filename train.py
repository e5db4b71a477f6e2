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
from model import GPT

POSITIVE = lambda x: 0 < x < math.inf  # noqa: E731
NOT_NEGATIVE = lambda x: 0 <= x < math.inf  # noqa: E731
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]

FLAGS = {  # name: (default, the values allowed, help)
    "metric": ("grad", list(speft.METRICS), "how weights are scored"),
    "density": (0.01, lambda x: 0 < x <= 1, "share of the linear layers' weights to train"),
    "scope": ("global", ["global", "local"], "rank the weights of the whole model, or of each layer"),
    "mask": ("static", ["static", "dynamic"], "score once, or again every --refresh steps"),
    "refresh": (40, POSITIVE, "steps between the masks of --mask dynamic"),
    "method": ("sparse", ["sparse", "full", "none"], "what to train: a mask, every weight, or nothing"),
    "model": ("base", None, "base (shipped), scratch (random weights), smollm2, or a checkpoint"),
    "adapter": ("", None, "adapter.pt of an earlier run, to start from"),
    "data": ("prose", None, "prose, stdlib, gsm, or a .jsonl or .txt file"),
    "val": ("", None, "file to validate on; by default a tenth of the examples is held out"),
    "layers": ("", None, "regular expression: train only linear layers whose name it matches"),
    "score-examples": (128, POSITIVE, "training examples to score with"),
    "steps": (120, NOT_NEGATIVE, "optimizer steps"),
    "batch-size": (8, POSITIVE, "examples read at once"),
    "accumulate": (1, POSITIVE, "batches whose gradients make a step"),
    "seq-len": (256, POSITIVE, "longest example, in tokens"),
    "lr": (1e-2, POSITIVE, "peak learning rate"),
    "warmup": (0.03, lambda x: 0 <= x <= 1, "share of the steps in which the learning rate rises"),
    "weight-decay": (0.0, NOT_NEGATIVE, "AdamW's weight decay"),
    "clip": (1.0, POSITIVE, "norm that a larger gradient is scaled down to"),
    "eval-every": (40, POSITIVE, "steps between validations"),
    "eval-examples": (64, POSITIVE, "held-out examples that an evaluation reads"),
    "seed": (0, NOT_NEGATIVE, "of the data order and of random numbers"),
    "device": (DEVICES[0], DEVICES, "where to compute"),
    "dtype": ("float32", ["float32", "bfloat16"], "type of the weights; corrections are always float32"),
    "prompt": ("", None, "text for the samples to continue, instead of a held-out example's beginning"),
    "out": ("out", None, "folder for the results"),
    "merge": ("", None, "folder for the whole model; --method full: in float16, by default in --out"),
    "checkpoint-every": (0, NOT_NEGATIVE, "steps between checkpoints in --out; 0: only when stopped"),
}


def parse_args(argv):
    """Read the command line; what is wrong with it ends the program with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for name, (default, allowed, text) in FLAGS.items():
        choices = allowed if isinstance(allowed, list) else None
        text += f" (default: {default})" if default != "" else ""
        parser.add_argument(f"--{name}", type=type(default), default=default, choices=choices, help=text)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = parser.parse_args(argv)
    for name, (_, allowed, _) in FLAGS.items():
        value = getattr(args, name.replace("-", "_"))
        if callable(allowed) and not allowed(value):
            parser.error(f"argument --{name}: {value} is out of range")
    try:
        re.compile(args.layers)
    except re.error as error:
        parser.error(f"argument --layers: {args.layers!r} is no regular expression: {error}")
    return args


def choose_mask(model, train, args, draw):
    """Score on the `draw`-th set of training examples; returns the mask, {module name: flat indices}."""
    seed = args.seed + 1000 * draw  # no two runs share a set, if their seeds are small
    torch.manual_seed(seed)
    batches = train.draw(0, args.score_examples, seed + 1, args.batch_size)
    scores = speft.salience(model, args.metric, batches, GPT.sample_losses, re.compile(args.layers).search)
    indices = speft.select(scores, args.density, args.scope)
    shares = {}
    for name, index in indices.items():
        # by kind: blocks.3.attn.q is one of the attn.q
        shares.setdefault(name.split(".", 2)[-1], []).append(len(index) / scores[name].numel())
    kinds = ", ".join(f"{kind} {sum(part) / len(part):.2%}" for kind, part in shares.items())
    print(f"training {sum(map(len, indices.values())):,} weights: {kinds}", flush=True)
    return indices


def learning_rate(step, args):
    """Linear warm-up to --lr, then half a cosine down to zero."""
    warmup = math.ceil(args.warmup * args.steps)
    progress = max(0, step - warmup) / max(1, args.steps - warmup)  # of the cosine
    return args.lr * min(1, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * progress))


def fit(model, params, train, val, args, stop, saved):
    """The training loop; returns (log: a row a step, the trained parameters).

    params: what to train; None for masks, which are chosen here. Ends early, after a step, once `stop` has an
    item. saved: the checkpoint to go on from, or None. Which examples a step reads, and what is drawn at
    random, depends on its number and the seed alone, so that a run can go on anywhere.
    """
    log, masks, optimizer = [], None, None
    if saved:
        log, masks = list(saved["log"]), saved["masks"]
        if masks:
            speft.load_adapter(model, masks["learned"])
            params = speft.remask(model, masks["indices"])
        for parameter, value in zip(params, saved["values"], strict=True):
            parameter.data.copy_(value)
        optimizer = torch.optim.AdamW(params, fused=True)
        optimizer.load_state_dict(saved["optimizer"])
    while len(log) < args.steps and args.method != "none" and not stop:
        step, start = len(log), time.time()
        row = {"step": step + 1, "lr": learning_rate(step, args), "loss": 0.0}
        if params is None or masks and args.mask == "dynamic" and step % args.refresh == 0:
            indices = choose_mask(model, train, args, draw=step // args.refresh)
            masks = {"learned": speft.adapter(model), "indices": indices}
            params, optimizer = speft.remask(model, indices), None
            row["score_seconds"] = time.time() - start
        optimizer = optimizer or torch.optim.AdamW(params, weight_decay=args.weight_decay, fused=True)
        optimizer.param_groups[0]["lr"] = row["lr"]
        optimizer.zero_grad()
        count = args.batch_size * args.accumulate
        batches = train.draw(step * count, count, args.seed, args.batch_size)
        for batch in batches:
            loss = model.sample_losses(batch).sum() / count
            loss.backward()
            row["loss"] += loss.item()
        row["gradient_norm"] = torch.nn.utils.clip_grad_norm_(params, args.clip).item()
        if not math.isfinite(row["loss"] + row["gradient_norm"]):
            raise ArithmeticError(f"step {step + 1}: the loss or its gradient is not finite: {row}")
        optimizer.step()
        row["seconds"] = time.time() - start - row.get("score_seconds", 0)
        row["tokens_per_second"] = sum(batch[0].numel() for batch in batches) / row["seconds"]
        if (step + 1) % args.eval_every == 0:
            row["val"] = model.mean_loss(val)
        log.append(row)
        show_progress(row, args.steps)
        if stop or args.checkpoint_every and len(log) % args.checkpoint_every == 0:
            data.write_progress(args, log, masks, params, optimizer)
    return log, params or []


def show_progress(row, steps):
    """A line that the next one overwrites on a terminal, unless it brings a validation."""
    line = f"step {row['step']}/{steps}  loss {row['loss']:.4f}  lr {row['lr']:.1e}"
    line += f"  {row['tokens_per_second']:,.0f} tokens/s  {row['seconds'] * (steps - row['step']):.0f} s left"
    line += f"  validation {row['val']:.4f}" if "val" in row else ""
    print(line, end="\r" if sys.stdout.isatty() and "val" not in row else "\n", flush=True)


def run(args, adapt, stop):
    """Load, evaluate, train, save, evaluate; returns what result.json holds."""
    start = time.time()
    out, merged = (data.check_folder(folder) for folder in (args.out, args.merge or args.out))
    torch.manual_seed(args.seed)
    model = data.load_model(args.model, getattr(torch, args.dtype)).to(args.device)
    tokenizer = data.load_tokenizer(args.model)
    # These and args.corpus become settings that --resume compares.
    args.base, args.total = model.fingerprint(), sum(parameter.numel() for parameter in model.parameters())
    if args.adapter:
        speft.load_adapter(model, data.read_adapter(args.adapter, args.base))
    splits = data.load_examples(args.data, tokenizer, args.seq_len, args.device, val=args.val)
    splits["source"] = data.load_examples("stdlib", tokenizer, args.seq_len, args.device, ["test"])["test"]
    train = splits.pop("train")
    held_out = {name: split.spread(args.eval_examples, args.batch_size) for name, split in splits.items()}
    args.corpus = train.fingerprint()
    saved = data.read_progress(args) if args.resume else None
    if args.resume:
        print(f"{out}: going on after step {len(saved['log']) if saved else 0}")
    if saved and "result" in saved:
        return saved["result"]
    result = dict(vars(args))
    print(f"{args.model}: {args.total:,} weights; {len(train):,} examples ({train.too_long} were too long)")

    end, beginning = data.end_token(tokenizer), splits["val"].samples[0][0][:32].tolist()
    beginning = [end, *tokenizer.encode_ordinary(args.prompt)] if args.prompt else beginning

    def report(when, *names):
        if stop:
            return
        for name in names:
            loss = result[f"{name}_{when}"] = model.mean_loss(held_out[name])
            print(f"{name} loss {when}: {loss:.4f} nats a token", flush=True)
        if args.data == "gsm":
            prompts, solutions = zip(*splits["test"].questions(args.eval_examples))
            # Four times a batch fits, since no activations are kept.
            said = tokenizer.decode_batch(model.complete(prompts, args.seq_len, [end], 4 * args.batch_size))
            match = result[f"exact_match_{when}"] = data.exact_match(said, tokenizer.decode_batch(solutions))
            print(f"exact match {when}: {match}", flush=True)
        words = beginning + model.complete([beginning], 48, [end], 1)[0]
        print(f"sample {when}: {tokenizer.decode(words)!r}", flush=True)

    report("before", "val", "source")
    params = list(speft.merge(model).requires_grad_().parameters()) if args.method == "full" else None
    if adapt is not None:
        params = adapt(model, train.draw(0, args.score_examples, args.seed + 1, args.batch_size))
    log, params = fit(model, params, train, held_out["val"], args, stop, saved)
    if args.method == "sparse" and adapt is None:
        data.write_adapter(args, speft.adapter(model))
    if args.method == "full" or args.merge:
        dtype = torch.float16 if args.method == "full" else getattr(torch, args.dtype)
        data.write_checkpoint(merged, args.model, speft.merge(model).state_dict(), dtype)
    report("after", "val", "test", "source")
    result |= {"trained": sum(parameter.numel() for parameter in params), "steps_done": len(log)}
    result["score_seconds"] = sum(row.get("score_seconds", 0) for row in log)
    result |= {"seconds": time.time() - start, **data.environment(args.device)}
    data.write_json_lines(out / "log.jsonl", log)
    data.write_json(out / "result.json", result)
    print(f"{result['seconds']:.0f} s, scoring {result['score_seconds']:.1f} s of it; see {out}/")
    return result


def main(argv=None, adapt=None):
    """Run the command line `argv` (default: the program's own); returns what result.json holds.

    adapt(model, batches) -> parameters takes the place of scoring and masking: so a baseline plugs in.
    Raises SystemExit: 2 for wrong usage, 1 for other errors, 128 + n if stopped by signal n (after saving).
    """
    args, stop = parse_args(argv), []

    def finish(number, frame):
        print("train.py: stopping after this step; once more stops at once", file=sys.stderr)
        stop.append(number)
        signal.signal(number, usual[number])

    usual = {number: signal.signal(number, finish) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        result = run(args, adapt, stop)
    except (OSError, ValueError, ArithmeticError, torch.OutOfMemoryError) as error:
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
