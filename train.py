"""Fine-tune a language model by salience-aware sparse fine-tuning: score, mask, train, save.

    python train.py --metric grad --density 0.01
    torchrun --nproc-per-node 2 train.py --metric grad --density 0.01

The flags are in data/settings.py. Started by torchrun, each process takes its share of every list of batches.
"""

import math
import re
import sys
import time

import torch

import data
import speft


def choose_mask(model, train, args, draw):
    """Score on the `draw`-th set of training examples; returns the mask, {module name: flat indices}."""
    seed = args.seed + 1000 * draw  # other examples in every run whose seed is small
    torch.manual_seed(seed)
    batches = data.share(train.sample(args.score_examples, seed + 1, args.batch_size))
    progress = data.Progress("scoring", sum(len(inputs) for inputs, _ in batches), "examples")

    def losses(model, batch):
        progress.count(len(batch[0]))
        return model.sample_losses(batch)

    scores = speft.salience(model, args.metric, batches, losses, re.compile(args.layers).search)
    indices = speft.select(scores, args.density, args.scope)
    data.show_mask(scores, indices)
    return indices


def learning_rate(step, args):
    """Linear warm-up to --lr, then half a cosine down to zero."""
    warmup = math.ceil(args.warmup * args.steps)
    progress = max(0, step - warmup) / max(1, args.steps - warmup)  # of the cosine
    return args.lr * min(1, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(params, args):
    """AdamW, whose rate is set at every step."""
    return torch.optim.AdamW(params, weight_decay=args.weight_decay, fused=True)


def sum_gradients(params, loss):
    """Add up the gradients of all processes, and the loss, which is returned: one collective a step."""
    if data.rank_and_world()[1] == 1:
        return loss
    gradients = [parameter.grad for parameter in params]
    last = gradients[0].new_tensor([loss], dtype=torch.float32)  # narrower gradients are summed so, too
    flat = speft.sum_over_processes(torch.cat([gradient.flatten() for gradient in gradients] + [last]))
    for gradient, summed in zip(gradients, flat[:-1].split([gradient.numel() for gradient in gradients])):
        gradient.copy_(summed.view_as(gradient))
    return flat[-1].item()


def fit(model, params, train, val, args, log, saved=None, save=None):
    """The training loop: appends a row to `log` after every step, and returns the trained parameters.

    params: what to train; None for masks, which are chosen here. save: takes a checkpoint when one is due.
    saved: the one to go on from. A checkpoint is a dict: the "log" so far; of a mask its "indices", and what
    was "learned" before it; of all parameters the "values" and the "optimizer"'s state. Which examples a step
    reads, and what is drawn at random, depends on its number and the seed alone, so that a run can go on
    anywhere, and with another number of processes.
    """
    sparse = params is None
    learned = indices = None
    if saved:
        log += saved["log"]
        learned, indices = saved["learned"], saved["indices"]
        if sparse:
            speft.load_adapter(model, learned)
            params = speft.remask(model, indices)
        for parameter, value in zip(params, saved["values"], strict=True):
            parameter.data.copy_(value)
    optimizer = None if params is None else make_optimizer(params, args)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    step_size = args.batch_size * args.accumulate * data.rank_and_world()[1]  # in examples
    while len(log) < args.steps:
        step, start = len(log), time.time()
        row = {"step": step + 1, "lr": learning_rate(step, args), "loss": 0.0}
        if sparse and (step == 0 or args.mask == "dynamic" and step % args.refresh == 0):
            learned, indices = speft.adapter(model), choose_mask(model, train, args, step // args.refresh)
            params = speft.remask(model, indices)
            optimizer = make_optimizer(params, args)
            row["score_seconds"] = time.time() - start
        optimizer.param_groups[0]["lr"] = row["lr"]
        optimizer.zero_grad()
        batches = train.draw(step * step_size, step_size, args.seed, args.batch_size)
        for batch in data.share(batches):
            loss = model.sample_losses(batch).sum() / step_size
            loss.backward()
            row["loss"] += loss.item()
        row["loss"] = sum_gradients(params, row["loss"])
        row["gradient_norm"] = torch.nn.utils.clip_grad_norm_(params, args.clip).item()
        if not math.isfinite(row["loss"] + row["gradient_norm"]):
            raise ArithmeticError(f"step {step + 1}: the loss or its gradient is not finite: {row}")
        optimizer.step()
        row["seconds"] = time.time() - start - row.get("score_seconds", 0)
        row["tokens_per_second"] = sum(batch[0].numel() for batch in batches) / row["seconds"]
        if (step + 1) % args.eval_every == 0:
            row["val"] = data.mean_loss(model, val)
        log.append(row)
        data.show_step(row, args.steps)
        is_last = len(log) == args.steps
        if save and args.checkpoint_every and (is_last or len(log) % args.checkpoint_every == 0):
            values, state = [parameter.detach() for parameter in params], optimizer.state_dict()
            save({"log": log, "learned": learned, "indices": indices, "values": values, "optimizer": state})
    return params or []


def run(args, adapt, log):
    """Load, evaluate, train, save, evaluate; returns what result.json holds."""
    start, is_first = time.time(), data.rank_and_world()[0] == 0
    data.show(f"reading {args.model} and {args.data}")
    torch.manual_seed(args.seed)
    model = data.load_model(args.model, getattr(torch, args.dtype)).to(args.device)
    data.check_fit(args, model.config, speft.linear_layers(model), adapt)
    tokenizer, base = data.load_tokenizer(args.model), model.fingerprint()
    total = sum(parameter.numel() for parameter in model.parameters())
    if args.adapter:
        speft.load_adapter(model, data.read_adapter(args.adapter, base))
    splits = data.load_examples(args.data, tokenizer, args.seq_len, args.device, val=args.val)
    splits["source"] = data.load_examples("stdlib", tokenizer, args.seq_len, args.device, ["test"])["test"]
    report, train = data.Report(splits, tokenizer, args), splits["train"]

    settings = data.run_settings(args, base, model.fingerprint() if args.adapter else base, splits)
    finished, saved = data.resume(args, settings)
    if finished:
        return finished
    data.show(f"{args.model}: {total:,} weights; {len(train):,} examples {train.note}")

    result = vars(args) | settings | report(model, "before")
    if args.method != "none":
        params = list(speft.merge(model).requires_grad_().parameters()) if args.method == "full" else None
        if adapt is not None:
            params = adapt(model, train.sample(args.score_examples, args.seed + 1, args.batch_size))
        save = lambda progress: data.write_progress(args.out, progress | {"settings": settings})  # noqa: E731
        params = fit(model, params, train, report.held_out["val"], args, log, saved, is_first and save)
        if is_first and args.method == "sparse" and adapt is None:
            data.write_adapter(args.out, speft.adapter(model), settings)
    if is_first and (args.method == "full" or args.merge):
        dtype = torch.float16 if args.method == "full" else getattr(torch, args.dtype)
        data.write_checkpoint(args.merge or args.out, args.model, speft.merge(model).state_dict(), dtype)
    if args.method != "none":
        result |= report(model, "after")
        result |= {"trained": sum(parameter.numel() for parameter in params), "steps_done": len(log)}
        result["score_seconds"] = sum(row.get("score_seconds", 0) for row in log)
        result |= {"seconds": time.time() - start, **data.environment(args.device)}
        if is_first:
            data.write_result(args.out, log, result)
        data.show(f"{result['seconds']:.0f} s, {result['score_seconds']:.1f} of them scoring; see {args.out}")
    return result


def main(argv=None, adapt=None):
    """Run the command line `argv` (default: the program's own); returns what result.json holds.

    adapt(model, batches) -> parameters takes the place of scoring and masking: so a baseline plugs in.
    Raises SystemExit: 2 for wrong usage, 1 for other errors, 130 for Ctrl-C.
    """
    args, log = data.parse_args(argv, speft.METRICS), []
    try:
        data.join_processes(args.device)
        return run(args, adapt, log)
    except KeyboardInterrupt:
        data.show(f"stopped after step {len(log)}; --resume goes on from {args.out}'s newest checkpoint")
        sys.exit(130)
    except (OSError, ValueError, ArithmeticError, torch.OutOfMemoryError) as error:
        data.complain(f"train.py: error: {error}")
        sys.exit(1)
    finally:
        data.leave_processes()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a sample may hold what the terminal cannot show
    main()
