"""Salience-aware sparse fine-tuning (SPEFT) of any PyTorch model, in one file.

    scores = salience(model, "grad", batches, loss_fn)     # how much does every weight matter?
    indices = select(scores, density=0.01, scope="global") # the mask: the top 1%
    deltas = sparsify(model, indices)                      # freeze all but those entries: what to train
    adapter(model)                                         # what was learned, as a few numbers

After Liu et al., "Refining Salience-Aware Sparse Fine-Tuning Strategies for Language Models", ACL 2025
(arXiv 2412.13488). In the formulas θ is a weight, ℓ the mean loss over the scoring samples, g = ∂ℓ/∂θ.
"""

import collections
import contextlib
import math
import warnings

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils import _pytree as pytree


def salience(model, metric, batches, loss_fn, layers=None):
    """Score every weight of the chosen linear layers (paper, section 3); the model is left as it was found.
    metric: a key of METRICS. batches: tuples or dicts of tensors (B, ...), the model's input first.
    loss_fn(model, batch): the samples' losses (B,) or their mean. layers: a predicate on module names.
    Returns {module name: score of the weight's shape}. In a process group every process brings batches of its
    own, and all get the scores of all samples. Raises ValueError where a score would be wrong."""
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}: choose from {', '.join(METRICS)}")
    modules = linear_layers(model, layers)
    if not modules:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(f"`layers` matches no nn.Linear with a weight of its own; the model is of {kinds}")
    with _left_as_found(model):
        weights = {name: module.weight.requires_grad_() for name, module in modules.items()}
        batches = [batch for batch in (() if batches is None else batches) if _tensors(batch)]
        scores = METRICS[metric](model, weights, batches, loss_fn)
    for name, weight in weights.items():
        if name not in scores or scores[name].shape != weight.shape or not scores[name].isfinite().all():
            raise ValueError(f"metric {metric!r}: layer {name!r} has no finite score of its weight's shape")
        scores[name] = scores[name].detach().contiguous()
        if dist.is_initialized():
            dist.broadcast(scores[name], 0)  # what is drawn or rounded may differ between processes
    return scores


def linear_layers(model, layers=None):
    """{name: module}, named as before torch.compile, of the linear layers that can be scored and trained: of
    type nn.Linear or SparseLinear, unpatched, with a floating-point parameter of their own as the weight."""
    used = collections.Counter(p.data_ptr() for m in model.modules() for p in m.parameters(recurse=False))
    chosen = {}
    for name, module in model.named_modules():
        fits = type(module) is nn.Linear and "forward" not in vars(module) or isinstance(module, SparseLinear)
        weight = module._parameters.get("weight") if fits else None  # a computed one is no parameter
        fits = weight is not None and weight.numel() and weight.is_floating_point() and weight.itemsize > 1
        name = ".".join(part for part in name.split(".") if part != "_orig_mod")
        if fits and used[weight.data_ptr()] == 1 and (layers is None or layers(name)):
            chosen[name] = module
    return chosen


@contextlib.contextmanager
def _left_as_found(model):
    """Eval mode, no gradients, nothing that requires one; afterwards the model is as it was, bit for bit."""
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters()):
        raise ValueError("a hook waits for a gradient, where an optimizer may step: remove it first")
    parameters = [(p, p.requires_grad, p.grad_dtype, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    model.eval()
    model.requires_grad_(False)
    model.zero_grad()
    try:
        devices = {p.device for p in model.parameters() if p.is_cuda}
        with torch.enable_grad(), torch.random.fork_rng(devices), warnings.catch_warnings():
            # A reentrant checkpoint warns so where it drops all gradients: its layers would score zero.
            warnings.filterwarnings("error", "None of the inputs have requires_grad")
            yield
    except Warning as warning:
        raise ValueError(f"stopped by a warning: {warning} (checkpoints: use_reentrant=False)") from warning
    finally:
        model.zero_grad()
        torch.clear_autocast_cache()  # it holds the weights as they are now
        for p, *found in parameters:
            p.requires_grad, p.grad_dtype, p.grad = found
        for module, training in modes:
            module.training = training
        for module, name, buffer, value in buffers:
            buffer.data.copy_(value)
            setattr(module, name, buffer)
    torch.default_generator.manual_seed(torch.randint(2**63 - 1, ()).item())  # fork_rng put it back: go on

def _plain(value):
    """A batch or an output, with the mappings and dataclasses of any library turned into dicts."""
    value = vars(value) if hasattr(value, "__dataclass_fields__") else value
    value = dict(value) if isinstance(value, collections.abc.Mapping) else value
    return pytree.tree_map(lambda part: part if part is value else _plain(part), value)

def _tensors(value):
    return [leaf for leaf in pytree.tree_leaves(_plain(value)) if isinstance(leaf, torch.Tensor)]

def _signals(value):
    return [t for t in _tensors(value) if t.requires_grad and not hasattr(t, "is_weight")]

def _count_samples(batches, weights):
    """How many samples the batches of all processes hold; every process has to have some."""
    here = sum(len(_tensors(batch)[0]) for batch in batches)
    counts = torch.tensor([here, here == 0], device=next(iter(weights.values())).device)
    count, empty = sum_over_processes(counts).tolist()
    if empty:
        raise ValueError("this metric needs data, and `batches` holds no tensors, at least in one process")
    return count

def sum_over_processes(tensor):
    """The tensor, summed in place over all processes of a process group."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

def mean_gradient(model, weights, batches, loss_fn, squared=False):
    """{name: g}, the gradient of the mean loss over the samples of all processes.
    squared: the mean of the samples' squared gradients instead; then every batch has to be one sample."""
    count, total = _count_samples(batches, weights), {}
    for name, w in weights.items():
        w.grad_dtype = torch.promote_types(w.dtype, torch.float32)
        w.grad = torch.zeros(w.shape, dtype=w.grad_dtype, device=w.device)  # to which backward passes add
        total[name] = torch.zeros_like(w.grad) if squared else w.grad
    for batch in batches:
        loss, size = loss_fn(model, batch), len(_tensors(batch)[0])
        if loss.shape not in ((), (size,)):
            raise ValueError(f"loss_fn: shape {tuple(loss.shape)} is not that of {size} losses or their mean")
        (loss.sum() if loss.dim() else loss * size).backward()
        if squared:
            for name, w in weights.items():
                total[name] += w.grad**2
                w.grad.zero_()
    return {name: sum_over_processes(gradient.div_(count)) for name, gradient in total.items()}


def random(model, weights, batches, loss_fn):
    """Uniform in [0, 1): the control. Drawn on the CPU, so that every device gets the same mask."""
    return {name: torch.rand(w.shape).to(w.device) for name, w in weights.items()}

def magnitude(model, weights, batches, loss_fn):
    """abs(θ)"""
    return {name: w.detach().abs() for name, w in weights.items()}

def grad(model, weights, batches, loss_fn):
    """abs(g)"""
    return {name: g.abs_() for name, g in mean_gradient(model, weights, batches, loss_fn).items()}

def force(model, weights, batches, loss_fn):
    """−g ⊙ θ"""
    g = mean_gradient(model, weights, batches, loss_fn)
    return {name: g[name].mul_(w.detach()).neg_() for name, w in weights.items()}

def snip(model, weights, batches, loss_fn):
    """abs(g ⊙ θ)"""
    return {name: p.abs_() for name, p in force(model, weights, batches, loss_fn).items()}

def taylor(model, weights, batches, loss_fn):
    """(g ⊙ θ)², which ranks exactly like SNIP: in float64, where no float32's square is rounded or lost."""
    return {name: p.double().square_() for name, p in force(model, weights, batches, loss_fn).items()}

def grasp(model, weights, batches, loss_fn):
    """−(H g) ⊙ θ, where H g is the gradient of ℓ's slope along g: of ∂ℓ/∂θ · g, with g held constant."""
    g = mean_gradient(model, weights, batches, loss_fn)

    def slope(model, batch):
        loss = loss_fn(model, batch).mean()
        along = torch.autograd.grad(loss, list(weights.values()), create_graph=True, materialize_grads=True)
        # 0 · loss: where the loss is linear in the weights, the slope depends on none of them.
        return sum((part * held).sum() for part, held in zip(along, g.values())) + 0 * loss

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the only twice derivable
        return force(model, weights, batches, slope)  # −(∂slope/∂θ) ⊙ θ

def fisher(model, weights, batches, loss_fn):
    """E[g_n²], the mean over samples n of that sample's squared gradient: by definition, one by one."""
    if any(t.shape[:1] != _tensors(batch)[0].shape[:1] for batch in batches for t in _tensors(batch)):
        raise ValueError("fisher splits batches into samples: their tensors need one first dimension")
    samples = [pytree.tree_map_only(torch.Tensor, lambda part: part[n : n + 1], _plain(batch))
               for batch in batches for n in range(len(_tensors(batch)[0]))]  # fmt: skip
    return mean_gradient(model, weights, samples, loss_fn, squared=True)

def synflow(model, weights, batches, loss_fn):
    """(∂R/∂θ) ⊙ θ, R the summed output of the linearised network for ones of the first sample's shape."""
    _count_samples(batches, weights)
    example = _tensors(batches[0])[0][:1]
    ones = torch.ones_like(example, dtype=torch.float64, requires_grad=True)
    x = example[..., :1] if example.dtype in (torch.int32, torch.int64) else ones  # of token ids one
    args, kwargs = ((), {next(iter(batches[0])): x}) if hasattr(batches[0], "keys") else ((x,), {})
    tensors = {f"{path}.{name}".lstrip("."): getattr(module, name) for path, module in model.named_modules()
               for name in (*module._parameters, *module._buffers)}  # fmt: skip
    doubles = {t: t.detach().double() for t in tensors.values() if t is not None and t.is_floating_point()}
    for double in doubles.values():
        double.is_weight = True
    scored = [doubles[w].requires_grad_() for w in weights.values()]
    named = {name: doubles[t] for name, t in tensors.items() if t in doubles}
    # Every module's own places are named, tied ones too, but each module once: so all of them are put back.
    with _Linearised():
        output = _tensors(torch.func.functional_call(model, named, args, kwargs, tie_weights=False))[0]
    gradients = torch.autograd.grad(output.sum(), scored, materialize_grads=True) if _signals(output) else []
    scores = {name: g * w.detach() for name, w, g in zip(weights, scored, gradients)}
    if not any(s.any() for s in scores.values()) or any((s < 0).any() for s in scores.values()):
        raise ValueError("SynFlow: the model subtracts, or no scored weight lies between input and output")
    return scores


class _Linearised(torch.overrides.TorchFunctionMode):
    """The network as SynFlow sees it: absolute weights, no biases, no non-linearity.
    The signal is what requires a gradient and is no weight. Activations, powers and casts pass it on;
    attention gives all positions the mean; embeddings look up ones; a norm is its gain. What it is multiplied
    with counts by its size, what is added or put beside it not at all; two signals' product (a gated MLP) is
    their geometric mean, as a plain one would square them in every block. All else has to be linear."""

    ACTIVATIONS = set("relu6 elu celu selu gelu silu mish tanh sigmoid softplus softsign hardtanh hardswish "
                      "hardsigmoid log_sigmoid erf pow square to float type".split())  # fmt: skip
    GAINS = {"layer_norm": 2, "rms_norm": 2, "group_norm": 2, "batch_norm": 3}  # function: its argument
    ADD, MULTIPLY = "add sub rsub subtract".split(), "mul multiply div divide true_divide".split()
    OTHERS = dict.fromkeys(ADD + "cat concat concatenate stack hstack".split(), torch.zeros_like)  # no signal
    OTHERS |= dict.fromkeys(MULTIPLY + "matmul mm bmm mv einsum".split(), lambda t: abs(1.0 * t).double())
    # A layer's vectors are biases; what is infinite is an attention's mask.
    OTHERS |= dict.fromkeys("linear conv1d conv2d conv3d addmm multi_head_attention_forward".split(),
                            lambda t: t.abs().nan_to_num(posinf=0) if t.dim() > 1 else 0 * t)  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__.strip("_"), kwargs or {}  # add_, __add__: add
        signals = _signals((args, kwargs))
        given = lambda place, key: args[place] if len(args) > place else kwargs.get(key)  # noqa: E731
        if name in ("embedding", "one_hot"):
            return torch.ones_like(func(*args, **kwargs), dtype=torch.float64, requires_grad=True)
        if not signals:
            output = func(*args, **kwargs)
            for weight in _signals(output):
                weight.is_weight = True  # made of weights alone
            return output
        x = signals[0]
        if name == "rsqrt" or name == "pow" and given(1, "exponent") < 0:  # of a norm written by hand
            return torch.ones_like(x)
        if name in self.ACTIVATIONS and (not args or args[0] is x):
            return x
        if name in self.GAINS:
            gain, spread = given(self.GAINS[name], "weight"), name in ("group_norm", "batch_norm")
            return x if gain is None else x * (gain.view(-1, *[1] * (x.dim() - 2)) if spread else gain).abs()
        if name == "scaled_dot_product_attention":
            query, value = given(0, "query"), given(2, "value")
            value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)  # to all heads of a group
            return value.mean(-2, keepdim=True).expand(*query.shape[:-1], -1)
        if name == "softmax" and x.isnan().any():  # of attention written by hand
            return torch.full_like(x, 1 / x.size(given(1, "dim")))
        if name in ("mul", "multiply") and len(signals) == 2:  # without overflow
            return math.prod(factor.clamp(min=1e-300).sqrt() * (factor > 0) for factor in signals)
        if name in ("matmul", "bmm", "baddbmm", "einsum") and len(signals) == 2:
            return func(*args, **kwargs) * math.nan  # queries and keys: marked, for softmax alone
        is_signal, other = lambda t: any(t is s for s in signals), self.OTHERS.get(name, lambda t: t)
        if name in self.ADD + self.MULTIPLY:  # numbers are no signals, either
            args = [torch.tensor(part) if isinstance(part, (int, float)) else part for part in args]
        parts = pytree.tree_map_only(torch.Tensor, lambda t: t if is_signal(t) else other(t), (args, kwargs))
        twice = pytree.tree_map_only(torch.Tensor, lambda t: t + t if is_signal(t) else t, parts)
        doubled, output = func(*twice[0], **twice[1]), func(*parts[0], **parts[1])
        for one, two in zip(_tensors(output), _tensors(doubled)):
            if one.requires_grad and not torch.allclose(one + one, two, rtol=1e-3, equal_nan=True):
                raise ValueError(f"SynFlow: the operation {name} of the model is not linear")
        return output


METRICS = {f.__name__: f for f in (random, magnitude, grad, snip, force, taylor, synflow, grasp, fisher)}


def select(scores, density, scope):
    """Keep the top `density` of all scores: {name: score} -> {name: sorted flat indices, int64}.
    scope: "global" keeps round(density * numel) of all layers together, "local" that of each, at least one.
    Ties go to the earlier layer and the lower index. Raises ValueError for what cannot be ranked so."""
    if not (isinstance(density, (int, float)) and 0 < density <= 1 and scope in ("global", "local")):
        raise ValueError(f"density has to be in (0, 1], scope global or local, not {density!r} and {scope!r}")
    if any(score.isnan().any() for score in scores.values()):
        raise ValueError("a score is not a number")
    if scope == "local":
        return {name: _top({name: s}, max(1, round(density * s.numel())))[name] for name, s in scores.items()}
    count = round(density * sum(score.numel() for score in scores.values()))
    if count == 0:
        raise ValueError(f"a density of {density} keeps none of the weights")
    return _top(scores, count)

def _top(scores, count):
    """The flat indices of the `count` largest scores; copies at most about `count` scores and one layer's."""
    scores = {name: score.detach().flatten() for name, score in scores.items()}
    top, least, indices = [], torch.tensor([-math.inf]), {}  # of one dimension: types widen for it
    for score in scores.values():
        top.append(score[score >= least.to(score.device)].cpu())
        if sum(map(len, top)) >= 1.5 * count:
            top = [torch.cat(top).topk(count, sorted=False).values]
            least = top[0].min()[None]  # what is lower than the least of the largest so far is not among them
    top = torch.cat(top).topk(count, sorted=False).values
    least = top.min()[None]
    ties = count - (top > least).sum().item()
    for name, score in scores.items():
        least = least.to(score.device)
        tied = (score == least).nonzero()[:ties]
        indices[name] = torch.cat(((score > least).nonzero(), tied)).squeeze(1).sort().values
        ties -= len(tied)
    return indices


class SparseLinear(nn.Linear):
    """A linear layer whose weight (out, in) is frozen but for k entries, corrected by the vector `delta`.
    delta (k,): the trainable correction, float32. known (m,): sorted flat places of all entries that a mask
    has trained; original (m,): their values in the base. From the second mask on, carried (m,) is what the
    earlier ones learned, and place (k,) where the mask stands in `known`. Nothing else writes the weight."""

    BUFFERS = ("known", "original", "carried", "place")

    def set_mask(self, index):
        """Train the entries `index` from now on. What was learned stays in the weight, exactly."""
        weight = self._parameters["weight"]
        weight.data = weight.data.contiguous()  # else there is no flat view
        flat = weight.data.view(-1)
        known = index = index.to(flat.device, torch.int64, copy=True)
        carried = place = None
        if "known" in self._buffers:  # no plain linear layer any more
            flat[self.known] = self.original  # for a moment the layer is its original self
            known = torch.cat((self.known, index)).unique()
            carried = torch.zeros_like(known, dtype=torch.float32)
            carried[torch.searchsorted(known, self.known)] = self.total()
            place = torch.searchsorted(known, index)
        for name, buffer in zip(self.BUFFERS, (known, flat[known], carried, place)):
            self.register_buffer(name, buffer)
        self.delta = nn.Parameter(torch.zeros_like(index, dtype=torch.float32), requires_grad=len(index) > 0)
        self.planned = cover(index, *weight.shape)
        self.sync()

    @property
    def index(self):
        """The mask's entries (k,): sorted flat positions, row-major."""
        return self.known if self.place is None else self.known[self.place]

    def total(self):
        delta = self.delta.detach()
        return delta if self.place is None else self.carried.index_add(0, self.place, delta)

    def corrected(self, dtype):
        return (self.original + self.total()).to(dtype)  # the sum in float32 or wider

    def sync(self):
        """Make the weight right, however `delta` was changed."""
        weight = self._parameters["weight"].data  # through .data, so that autograd takes no notice
        weight.view(-1).scatter_(0, self.known, self.corrected(weight.dtype))

    @property
    def weight(self):
        """The weight, corrected. Who reads it computes right, but trains nothing: that takes a call."""
        weight = self._parameters["weight"]
        if isinstance(weight, nn.Parameter) and isinstance(self.delta, nn.Parameter):
            self.sync()
        elif not hasattr(weight, "is_weight"):  # of functional_call, not ours to write; else SynFlow's
            weight = weight.flatten().scatter(0, self.known, self.corrected(weight.dtype)).view(weight.shape)
        return weight

    def forward(self, x):
        if not (self.delta.requires_grad and torch.is_grad_enabled()):
            return nn.functional.linear(x, self.weight, self.bias)  # being scored, or frozen
        y = _MaskedLinear.apply(x, self.weight, self.bias, self.delta, *self.planned)
        return y.view(*x.shape[:-1], self.out_features)

    def plain(self):
        """Become an nn.Linear again, with the weight as it stands."""
        for name in ("delta", "planned", *self.BUFFERS):
            delattr(self, name)
        self.__class__ = nn.Linear

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.sync()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *others):
        if prefix + "weight" in state_dict and prefix + "known" not in state_dict:
            raise ValueError(f"layer {prefix[:-1]!r} is sparse: `merge` before loading a base")
        super()._load_from_state_dict(state_dict, prefix, *others)
        self.planned = cover(self.index, *self._parameters["weight"].shape)

    def _apply(self, fn, recurse=True):
        exact = (self.delta, self.delta.grad, self.carried)  # .to(torch.bfloat16) means the weights alone
        super()._apply(lambda t: t.to(fn(t).device) if any(t is e for e in exact) else fn(t), recurse)
        self.planned = cover(self.index, *self._parameters["weight"].shape)
        self.sync()  # round the sum, not the rounded sum
        return self


class _MaskedLinear(torch.autograd.Function):
    """y (N, out) = x Wᵀ + b for x (..., in), N rows; of W's gradient it forms what `cover` planned."""

    @staticmethod
    def forward(ctx, x, weight, bias, delta, places, columns, rows, n_crowded):
        # Keep few columns of x, or x, as others may; and delta, so that autograd sees if it was changed.
        ctx.shape, ctx.n_crowded, ctx.copied = x.shape, n_crowded, 2 * len(columns) < x.size(-1)
        x = x.reshape(-1, x.size(-1))
        kept = x.index_select(1, columns) if ctx.copied else x
        ctx.save_for_backward(kept, weight, delta, places, columns, rows)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, _, places, columns, rows = ctx.saved_tensors
        x, weight = x.to(dy.dtype), weight.to(dy.dtype)  # autocast narrows dy
        dx = (dy @ weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        x = x.index_select(1, columns) if not ctx.copied and ctx.n_crowded < x.size(1) else x
        products = (x[:, : ctx.n_crowded].T @ dy).view(-1)
        if len(rows):
            products = torch.cat((products, (x[:, ctx.n_crowded :].T @ dy.index_select(1, rows)).view(-1)))
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, products.index_select(0, places).float(), None, None, None, None


def cover(index, n_rows, n_columns):
    """The parts of the weight's gradient to form, so that they hold all the entries `index` and little else.
    An entry of the gradient dyᵀ x is a product of a column of dy and one of x: its parts, transposed, are
        x[:, crowded]ᵀ dy   and   x[:, others]ᵀ dy[:, rows].
    The entries that matter lie in few columns (input features) and rows (outputs): the first part takes whole
    the columns of which a 32nd is trained, if it pays, the second the rows and columns of the other entries.
    Returns the entries' places (k,) in both parts laid flat; columns, crowded first; rows; number crowded."""
    row, column = index // n_columns, index % n_columns
    kept, plans = column.bincount(minlength=n_columns), []
    for limit in (0, 1 / 32, math.inf):  # crowded are all columns (the whole gradient), some, or none
        crowded = (kept >= limit * n_rows).nonzero().squeeze(1)
        outside = ~torch.isin(column, crowded)
        others, rows = column[outside].unique(), row[outside].unique()
        # As measured on a CPU, reading all of dy costs as much as 16 columns of a product, copying a line of
        # x or dy as much as 64 entries; on CUDA starting up to three more kernels as much as some 2^19.
        lines = len(crowded) + len(others) + len(rows)
        cost = n_rows * (len(crowded) + 16) + len(others) * len(rows) + 64 * lines + 2**19 * index.is_cuda
        plans.append((cost if limit else n_rows * n_columns, crowded, others, rows, outside))
    _, crowded, others, rows, outside = min(plans, key=lambda plan: plan[0])
    in_first = torch.searchsorted(crowded, column) * n_rows + row
    in_second = torch.searchsorted(others, column) * len(rows) + torch.searchsorted(rows, row)
    places = torch.where(outside, len(crowded) * n_rows + in_second, in_first)
    return places, torch.cat((crowded, others)), rows, len(crowded)


def sparsify(model, indices):
    """Make the named linear layers SparseLinears in place and freeze everything else; returns the deltas.
    indices: {module name: sorted flat indices (k,)}, of `select`. Empty deltas are left out; those of earlier
    masks freeze (next masks: `remask`). Raises ValueError, before any change, for what does not fit."""
    modules = linear_layers(model)
    for name, index in indices.items():
        _check_index(modules, name, index)
    model.requires_grad_(False)
    for name, index in indices.items():
        modules[name].__class__ = SparseLinear  # still the same object, whoever refers to it
        modules[name].set_mask(index)
    return [modules[name].delta for name in indices if modules[name].delta.numel()]

def remask(model, indices):
    """The next mask: what was learned stays, the new corrections start from zero; returns their deltas."""
    emptied = dict.fromkeys(_sparse_layers(model), torch.empty(0, dtype=torch.int64))
    return sparsify(model, emptied | indices)

def _sparse_layers(model):
    return {name: m for name, m in linear_layers(model).items() if isinstance(m, SparseLinear)}

def _check_index(modules, name, index):
    if name not in modules:
        raise ValueError(f"the model has no linear layer {name!r} with a weight of its own")
    size = modules[name].weight.numel()
    is_list = index.dtype in (torch.int32, torch.int64) and index.dim() == 1
    if not (is_list and ((0 <= index) & (index < size)).all() and (index.diff() > 0).all()):
        raise ValueError(f"layer {name!r}: indices must be sorted, different integers below {size}")

def adapter(model):
    """All that was learned: {module name: (flat indices (m,), float32 corrections (m,), weight's shape)}."""
    layers = _sparse_layers(model).items()
    return {name: (m.known.clone(), m.total().clone(), tuple(m.weight.shape)) for name, m in layers}

def load_adapter(model, state):
    """Put what `adapter` returned onto its base, bit for bit, in place of any other; returns the deltas.
    Raises ValueError, before anything is changed, where it does not fit."""
    modules = linear_layers(model)
    for name, (index, values, shape) in state.items():
        _check_index(modules, name, index)
        fits = tuple(shape) == modules[name].weight.shape and values.shape == index.shape
        if not (fits and values.dtype == torch.float32 and values.isfinite().all()):
            raise ValueError(f"layer {name!r}: not finite float32, one an index, of shape {tuple(shape)}")
    for module in _sparse_layers(model).values():
        module._parameters["weight"].data.view(-1)[module.known] = module.original
        module.plain()
    deltas = sparsify(model, {name: index for name, (index, _, _) in state.items()})
    for name, (_, values, _) in state.items():
        modules[name].delta.data.copy_(values)
        modules[name].sync()
    return deltas

def merge(model):
    """Turn every SparseLinear into an nn.Linear with the corrected weight, still frozen; return the model."""
    for module in _sparse_layers(model).values():
        module.sync()
        module.plain()
    return model
