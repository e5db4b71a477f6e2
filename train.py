"""Fine-tune a language model by salience-aware sparse fine-tuning: score, mask, train, save.

    python train.py --metric grad --density 0.01
"""

import argparse
import math
import platform
import resource
import signal
import sys
import time
from pathlib import Path

import torch

import data
import speft
from model import GPT, GPTConfig


def number(kind, least=-math.inf, above=-math.inf, most=math.inf):
    """An argparse type: a number of `kind` (int or float) in the given range."""

    def parse(text):
        value = kind(text)
        if not (least <= value <= most and above < value < math.inf):
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value

    parse.__name__ = kind.__name__  # argparse names the type when `kind` cannot read the text
    return parse


def parse_args(argv):
    """Read the command line; a wrong flag ends the program with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--metric", default="grad", choices=list(speft.METRICS), help="how weights are scored")
    add("--density", default=0.01, type=number(float, above=0, most=1), help="share of the weights to train")
    add("--scope", default="global", choices=["global", "local"], help="rank the whole model or each layer")
    add("--mask", default="static", choices=["static", "dynamic"], help="score once, or every --refresh steps")
    add("--refresh", default=50, type=number(int, least=1), help="steps between the masks of --mask dynamic")
    add("--method", default="sparse", choices=["sparse", "full", "none"], help="what is trained")
    add("--model", default="base", help="base (shipped), scratch (random weights) or a checkpoint folder")
    add("--data", default="prose", help="prose or stdlib")
    add("--layers", default="", help="regular expression: the linear layers that may be trained")
    add("--score-examples", default=256, type=number(int, least=1), help="training examples to score with")
    add("--steps", default=120, type=number(int, least=0), help="optimizer steps")
    add("--batch-size", default=16, type=number(int, least=1), help="examples a step")
    add("--seq-len", default=256, type=number(int, least=1), help="tokens an example")
    add("--lr", default=3e-3, type=number(float, above=0), help="peak learning rate")
    add("--warmup", default=0.03, type=number(float, least=0, most=1), help="share of the steps to warm up")
    add("--weight-decay", default=0.0, type=number(float, least=0), help="AdamW's decay")
    add("--clip", default=1.0, type=number(float, above=0), help="largest norm of the gradient")
    add("--eval-every", default=40, type=number(int, least=1), help="steps between validations")
    add("--eval-examples", default=64, type=number(int, least=1), help="held-out examples an evaluation reads")
    add("--seed", default=0, type=number(int, least=0, most=2**31), help="of data order and random numbers")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the frozen weights")
    add("--out", default="out", type=Path, help="folder of the results")
    args = parser.parse_args(argv)
    if args.device not in ("cpu", "cuda") or args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"argument --device: {args.device} is not to be had here")
    if args.model == "scratch" and args.method != "full":
        parser.error("argument --model: random weights are for --method full")
    return args


def sample_losses(model, batch):
    """The loss of every sample of a batch, (B,): what salience differentiates."""
    return model(*batch, reduction="none")[1]


@torch.no_grad()
def evaluate(model, batches):
    """The mean loss of the samples in `batches`, in nats a token."""
    return torch.cat([sample_losses(model, batch) for batch in batches]).mean().item()


def learning_rate(step, args):
    """Linear warm-up to --lr, then half a cosine down to zero."""
    warmup = math.ceil(args.warmup * args.steps)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))


def peak_memory(device):
    """The most bytes held so far: of the device's allocator, or the process's resident set."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run(args, adapt):
    start = time.time()
    data.check_folder(args.out)
    torch.manual_seed(args.seed)

    model = GPT(GPTConfig()) if args.model == "scratch" else GPT.from_pretrained(args.model)
    if args.seq_len > model.config.block_size:
        raise data.InputError(f"--seq-len {args.seq_len} is longer than the model's {model.config.block_size}")
    model.to(args.device, getattr(torch, args.dtype))
    base = data.fingerprint(model.state_dict())
    tokenizer = data.load_tokenizer("base" if args.model == "scratch" else args.model)
    splits = data.load_examples(args.data, tokenizer, args.seq_len)
    source = data.load_examples("stdlib", tokenizer, args.seq_len)["test"]

    def to_device(batch):
        return tuple(tensor.to(args.device) for tensor in batch)

    def held_out(examples):
        return [to_device(batch) for batch in examples.batches(args.batch_size, limit=args.eval_examples)]

    val, test, source = held_out(splits["val"]), held_out(splits["test"]), held_out(source)

    def show_sample():
        prompt = val[0][0][:1, :32]
        torch.manual_seed(args.seed)
        tokens = model.generate(prompt, max_new_tokens=48, temperature=0.8, top_k=40)[0].tolist()
        print("sample:", tokenizer.decode(tokens[:32]), "|", tokenizer.decode(tokens[32:]), flush=True)

    result = {**vars(args), "out": str(args.out), "total": sum(p.numel() for p in model.parameters())}
    result |= {"val_before": evaluate(model, val), "source_before": evaluate(model, source)}
    print(f"{args.model} on {args.data}: {result['total']:,} weights, {len(splits['train']):,} training examples")
    print(f"before: validation {result['val_before']:.4f}, source {result['source_before']:.4f} nats a token")
    show_sample()

    def choose_mask(draw):
        """Score with the `draw`-th set of training examples and return the indices to train."""
        begin = time.time()
        count = min(args.score_examples, len(splits["train"]))
        batches = [to_device(splits["train"].draw(at, min(args.batch_size, count - at), args.seed + 1 + draw))
                   for at in range(0, count, args.batch_size)]  # fmt: skip
        scores = speft.salience(model, args.metric, batches, sample_losses, layers)
        indices = speft.select(scores, args.density, args.scope)
        result["score_seconds"] = result.get("score_seconds", 0.0) + time.time() - begin
        return indices

    # --- training ---
    model.train()
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    begin = time.time()
    log = []
    for step in range(args.steps):
        batch = to_device(splits["train"].draw(step * args.batch_size, args.batch_size, args.seed))
        loss = sample_losses(model, batch).mean()
        if not math.isfinite(loss.item()):
            raise ArithmeticError(f"the loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, args.clip)
        rate = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        speed = (step + 1) * batch[0].numel() / (time.time() - begin)
        log.append({"step": step, "loss": loss.item(), "lr": rate, "tokens_per_second": speed})
        if (step + 1) % args.eval_every == 0:
            log[-1]["val"] = evaluate(model, val)
        if step % 10 == 0 or "val" in log[-1]:
            print(log[-1], flush=True)
    result["val_after"] = evaluate(model, val)
    result["test_after"] = evaluate(model, test)
    result["source_after"] = evaluate(model, source)
    result["seconds"] = time.time() - start
    result["peak_memory_bytes"] = peak_memory(args.device)
    result["base"] = base
    show_sample()
    data.write_checkpoint(args.out, vars(model.config), model.state_dict(), torch.float16)
    data.write_json(args.out / "result.json", result)
    data.write_file(args.out / "log.jsonl", "".join(__import__("json").dumps(r) + "\n" for r in log).encode())
    return result


def main(argv=None, adapt=None):
    return run(parse_args(argv), adapt)


if __name__ == "__main__":
    main()
