"""Salience-aware sparse fine-tuning (SPEFT) of any PyTorch model, in one file.

    scores = salience(model, "grad", batches, loss_fn)     # how much does every weight matter?
    indices = select(scores, density=0.01, scope="global") # the mask: the top 1%
    deltas = sparsify(model, indices)                      # freeze the model, train those entries
    ...                                                    # any loop, any optimizer over `deltas`
    adapter(model)                                         # what was learned, as a few numbers

After Liu et al., "Refining Salience-Aware Sparse Fine-Tuning Strategies for Language Models", ACL 2025
(arXiv 2412.13488). In the formulas θ is a weight, ℓ the mean loss over the scoring samples, g = ∂ℓ/∂θ.
"""

import collections
import contextlib
import dataclasses
import math
import warnings

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree


def salience(model, metric, batches, loss_fn, layers=None):
    """Score every weight of the chosen linear layers (paper, section 3); the model is left as it was found.

    metric: a key of METRICS. batches: tuples or dicts of tensors (B, ...), the model's input first.
    loss_fn(model, batch): the samples' losses (B,) or their mean. layers: a predicate on module names.
    Returns {module name: score of the weight's shape}, finite, in float32 or float64. In a process group every
    process brings batches of its own, and all get the scores of all samples. Raises ValueError where a score
    would not be what the metric says.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}: choose from {', '.join(METRICS)}")
    modules = linear_layers(model, layers)
    if not modules:
        kinds = ", ".join(sorted({type(module).__name__ for module in model.modules()}))
        raise ValueError(f"no layer to score: `layers` matches no nn.Linear with its own weight in {kinds}")
    batches = [] if batches is None else list(batches)
    with _left_as_found(model):
        weights = {name: module.weight.requires_grad_() for name, module in modules.items()}
        scores = METRICS[metric](model, weights, batches, loss_fn)
    for name, weight in weights.items():
        if name not in scores or scores[name].shape != weight.shape or not scores[name].isfinite().all():
            raise ValueError(f"metric {metric!r}: layer {name!r} has no finite score of its weight's shape")
    scores = {name: score.detach().contiguous() for name, score in scores.items()}
    if dist.is_initialized():  # what is drawn or rounded may differ between processes
        for score in scores.values():
            dist.broadcast(score, 0)
    return scores


def linear_layers(model, layers=None):
    """{name: module} of the linear layers that can be scored and sparsified, named as before torch.compile.

    Their type is exactly nn.Linear or SparseLinear, and their weight a floating-point parameter of theirs
    alone: a correction of an output head that is tied to the embedding would change the embedding.
    """
    if layers is not None and not callable(layers):
        raise ValueError(f"`layers` has to be a function of a module's name, not {layers!r}")
    used = collections.Counter(p.data_ptr() for m in model.modules() for p in m.parameters(recurse=False))
    chosen = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight") if type(module) in (nn.Linear, SparseLinear) else None
        if weight is None or not weight.is_floating_point() or weight.numel() == 0:
            continue
        name = name.replace("_orig_mod.", "")
        if used[weight.data_ptr()] == 1 and (layers is None or layers(name)):
            chosen[name] = module
    return chosen


@contextlib.contextmanager
def _left_as_found(model):
    """Eval mode, no gradients and nothing that requires one; afterwards all is as it was, bit for bit."""
    if any(parameter._post_accumulate_grad_hooks for parameter in model.parameters()):
        raise ValueError("the model has a hook that acts on gradients, as an optimizer might: remove it first")
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    model.eval()
    model.requires_grad_(False)
    model.zero_grad()
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            # What a reentrant checkpoint says whose layers get no gradient, and so would score zero.
            warnings.filterwarnings("error", "None of the inputs have requires_grad")
            yield
    except UserWarning as warning:
        raise ValueError(f"{warning}: score with checkpoint(..., use_reentrant=False)") from None
    finally:
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad, parameter.grad = requires_grad, gradient
        for module, training in modes:
            module.training = training
        for module, name, buffer, value in buffers:
            buffer.data.copy_(value)
            setattr(module, name, buffer)


def _plain(value):
    """A batch or an output as what pytree knows: some are mappings or dataclasses of a library's own."""
    if isinstance(value, collections.abc.Mapping):
        return dict(value)
    return vars(value) if dataclasses.is_dataclass(value) else value


def _tensors(value):
    return [leaf for leaf in pytree.tree_leaves(_plain(value)) if isinstance(leaf, torch.Tensor)]


def _count_samples(batches, weights):
    """How many samples the batches of all processes hold; every process has to have some."""
    here = sum(len(_tensors(batch)[0]) for batch in batches)
    counts = torch.tensor([here, here == 0], device=next(iter(weights.values())).device)
    count, empty = sum_over_processes(counts).tolist()
    if empty:
        raise ValueError("this metric needs data, and `batches` is empty, at least in one process")
    return count


def sum_over_processes(tensor):
    """The tensor, summed in place over all processes if there is a process group."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def _own_random_state(weights):
    """What a forward pass draws (noise, a sample of the data) is not drawn from the caller's generators."""
    return torch.random.fork_rng({weight.device for weight in weights.values() if weight.is_cuda})


def mean_gradient(model, weights, batches, loss_fn, power=1):
    """{name: g}, the gradient of the mean loss over the samples of all processes.

    With a power, the mean of the samples' gradients to that power, where every batch is one sample.
    """
    mean = {w: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float)) for w in weights.values()}
    share = 1 / _count_samples(batches, weights)

    def consume(weight):
        mean[weight].add_(weight.grad.to(mean[weight]) ** power, alpha=share)
        weight.grad = None

    with _own_random_state(weights), contextlib.ExitStack() as hooks:
        # A sum may be taken in parts, as soon as they come: memory holds one layer's gradient at a time. A
        # power has to wait for the whole: a layer in a reentrant checkpoint may get its gradient in parts.
        for weight in weights.values() if power == 1 else ():
            hooks.enter_context(weight.register_post_accumulate_grad_hook(consume))
        for batch in batches:
            loss, count = loss_fn(model, batch), len(_tensors(batch)[0])
            if loss.shape not in ((), (count,)):
                raise ValueError(f"loss_fn returns {tuple(loss.shape)}, not {count} samples' losses or their mean")
            (loss.sum() if loss.dim() else loss * count).backward()
            for weight in weights.values():
                if weight.grad is not None:
                    consume(weight)
    return {name: sum_over_processes(mean[w].contiguous()) for name, w in weights.items()}


def random(model, weights, batches, loss_fn):
    """Uniform in [0, 1): the control. Drawn on the CPU, so that every device gets the same mask."""
    return {name: torch.rand(w.shape).to(w.device) for name, w in weights.items()}


def magnitude(model, weights, batches, loss_fn):
    """abs(θ)"""
    return {name: w.detach().abs().to(torch.promote_types(w.dtype, torch.float)) for name, w in weights.items()}


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
    return {name: p.double().square() for name, p in force(model, weights, batches, loss_fn).items()}


def grasp(model, weights, batches, loss_fn):
    """−(H g) ⊙ θ, with H the Hessian of ℓ over all chosen layers jointly.

    H g is the gradient of the slope of ℓ along g, that is of ∂ℓ/∂θ · g with g held constant.
    """
    g = mean_gradient(model, weights, batches, loss_fn)

    def slope(model, batch):
        loss = loss_fn(model, batch).mean()
        along = torch.autograd.grad(loss, list(weights.values()), create_graph=True, materialize_grads=True)
        # 0 · loss: where the loss is linear in the weights, the slope depends on none of them.
        return sum((part * held).sum() for part, held in zip(along, g.values())) + 0 * loss

    # Fused attention has no second derivative.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        product = mean_gradient(model, weights, batches, slope)
    return {name: product[name].mul_(w.detach()).neg_() for name, w in weights.items()}


def fisher(model, weights, batches, loss_fn):
    """E[g_n²], the mean over samples n of that sample's squared gradient: by definition, one by one."""
    samples = [pytree.tree_map_only(torch.Tensor, lambda part: part[n : n + 1], _plain(batch))
               for batch in batches for n in range(len(_tensors(batch)[0]))]  # fmt: skip
    return mean_gradient(model, weights, samples, loss_fn, power=2)


def synflow(model, weights, batches, loss_fn):
    """(∂R/∂θ) ⊙ θ, where R sums the outputs of the linearised network for an input of ones.

    Data-free: of the batches only the input's shape is used. ValueError for what cannot be linearised.
    """
    _count_samples(batches, weights)
    example = _tensors(batches[0])[0][:1]
    if example.is_floating_point():
        example = torch.ones_like(example, dtype=torch.float64, requires_grad=True)
    else:
        example = example[..., :1]  # token ids: one position
    positive = {w: w.detach().abs().double().requires_grad_() for w in weights.values()}
    with _own_random_state(weights), _Linearised(positive):
        named = isinstance(batches[0], collections.abc.Mapping)
        output = model(**{next(iter(batches[0])): example}) if named else model(example)
    total = _tensors(output)[0].sum()
    gradients = torch.autograd.grad(total, list(positive.values()), materialize_grads=True)
    return {name: g * positive[w].detach() for (name, w), g in zip(weights.items(), gradients)}


class _Linearised(torch.overrides.TorchFunctionMode):
    """The network as SynFlow sees it, in float64: absolute weights, no biases, no non-linearity.

    Activations, and attention over one position, pass on the signal (what requires a gradient); an embedding
    looks up ones; a norm is its gain. A product of two signals, as in a gated MLP, is their geometric mean: a
    plain product would square the signal in every block. All else has to be linear: it is tried on twice the
    signal.
    """

    ACTIVATIONS = set("relu6 elu celu selu gelu silu mish tanh sigmoid softplus softsign hardtanh hardswish "
                      "hardsigmoid logsigmoid pow square".split())  # fmt: skip
    GAINS = {"layer_norm": 2, "rms_norm": 2, "group_norm": 2, "batch_norm": 3}  # function: its argument

    def __init__(self, positive):
        super().__init__()
        self.positive = positive  # scored weight -> its absolute value, which collects the gradient

    def absolute(self, weight):
        return self.positive[weight] if weight in self.positive else weight.detach().abs().double()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__.strip("_"), kwargs or {}  # add_, __add__: add
        given = (*args, *kwargs.values())  # functions are called with and without keywords
        signals = [t for t in _tensors(given) if t.requires_grad and not isinstance(t, nn.Parameter)]
        if name == "embedding":
            return torch.ones_like(func(*args, **kwargs), dtype=torch.float64, requires_grad=True)
        if not signals:
            return func(*args, **kwargs)
        if name in ("linear", "conv1d", "conv2d", "conv3d"):
            return func(given[0], self.absolute(given[1]), None, *given[3:])
        if name in self.ACTIVATIONS or name in ("to", "float", "type"):  # the signal stays in float64
            return given[0]
        if name in self.GAINS:
            gain = given[self.GAINS[name]] if len(given) > self.GAINS[name] else None
            shape = (-1, *[1] * (given[0].dim() - 2)) if name in ("group_norm", "batch_norm") else (-1,)
            return given[0] if gain is None else given[0] * self.absolute(gain).view(shape)
        if name == "scaled_dot_product_attention":
            value = kwargs.get("value", given[2])
            return value.repeat_interleave(given[0].size(1) // value.size(1), 1)  # to all heads of a group
        if name == "rsqrt" or name == "softmax" and given[0].size(kwargs.get("dim", given[1])) == 1:
            return torch.ones_like(given[0]).detach()  # of a norm or of attention written by hand
        if name in ("mul", "rmul", "imul", "multiply") and len(signals) == 2:
            return math.prod(factor.clamp(min=1e-300).sqrt() for factor in signals)  # their product may overflow
        if name in ("matmul", "bmm", "einsum") and len(signals) == 2:
            return func(*args, **kwargs) * math.nan  # of queries and keys: only for softmax
        known = torch.zeros_like if name in ("add", "radd", "iadd") else self.absolute  # what is added is a bias
        args, kwargs = pytree.tree_map_only(nn.Parameter, known, (args, kwargs))
        twice = pytree.tree_map_only(torch.Tensor, lambda t: t + t if t.requires_grad else t, (args, kwargs))
        output, doubled = func(*args, **kwargs), func(*twice[0], **twice[1])
        for one, two in zip(_tensors(output), _tensors(doubled)):
            if one.requires_grad and not torch.allclose(one + one, two, rtol=1e-3, equal_nan=True):
                raise ValueError(f"SynFlow: the operation {name} of the model is not linear")
        return output


METRICS = {f.__name__: f for f in (random, magnitude, grad, snip, force, taylor, synflow, grasp, fisher)}

def select(scores, density, scope):
    """Keep the top `density` of all scores: {name: score} -> {name: sorted flat indices, int64}.

    scope: "global" keeps round(density * numel) of all layers together, "local" that of each, at least one.
    Ties go to the earlier layer and the lower index. Raises ValueError for a density outside (0, 1], a global
    count of zero, a score that is not a number.
    """
    if not (isinstance(density, (int, float)) and 0 < density <= 1):
        raise ValueError(f"density must be in (0, 1], not {density!r}")
    if scope not in ("global", "local"):
        raise ValueError(f"scope must be 'global' or 'local', not {scope!r}")
    if any(score.isnan().any() for score in scores.values()):
        raise ValueError("a score is not a number")
    groups = [scores] if scope == "global" else [{name: score} for name, score in scores.items()]
    indices = {}
    for group in groups:
        count = round(density * sum(score.numel() for score in group.values()))
        if scope == "global" and count == 0:
            raise ValueError(f"a density of {density} keeps none of the weights")
        indices |= _top({name: score.flatten() for name, score in group.items()}, max(1, count))
    return indices


def _top(scores, count):
    """The flat indices of the `count` largest scores; copies at most about `count` scores and one layer's."""
    top, least, indices = torch.empty(0), -math.inf, {}
    for score in scores.values():
        top = torch.cat((top, score[score >= least].detach().cpu()))
        if len(top) >= 1.5 * count:
            top = top.topk(count).values
            least = top[-1].item()  # what is lower than the least of the largest so far is not among them
    least = top.topk(count).values[-1].item()
    ties = count - (top > least).sum().item()
    for name, score in scores.items():
        tied = (score == least).nonzero()[:ties]
        indices[name] = torch.cat(((score > least).nonzero(), tied)).squeeze(1).sort().values
        ties -= len(tied)
    return indices


class SparseLinear(nn.Linear):
    """A linear layer whose weight (out, in) is frozen but for k entries, corrected by the vector `delta`.

    delta (k,): the trainable correction, float32 whatever the weight's type, zero at first. known (m,): sorted
    flat positions of all entries that a mask has trained; original (m,): their values in the base. Of the first
    mask `known` is the mask itself; later carried (m,) is what earlier masks learned, and place (k,) where the
    mask's entries stand in `known`. An entry of the weight is original + (carried + delta), written anew
    whenever the weight is read: nothing else may write there.
    """

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
        """What has been learned so far: the correction (m,) of each known entry."""
        delta = self.delta.detach()
        return delta if self.place is None else self.carried.index_add(0, self.place, delta)

    def sync(self):
        """Make the weight right, however `delta` was changed: m entries, cheap at every forward pass."""
        weight = self._parameters["weight"].data  # through .data, so that autograd takes no notice
        values = (self.original + self.total()).to(weight.dtype)  # the sum in float32 or wider
        weight.view(-1).scatter_(0, self.known, values)

    @property
    def weight(self):
        """The weight, corrected; whoever computes with it trains `delta`, by way of the dense gradient."""
        self.sync()
        weight = self._parameters["weight"]
        return _Corrected.apply(weight, self.delta, self.index) if self.trains() else weight

    def trains(self):
        scored = self._parameters["weight"].requires_grad
        return torch.is_grad_enabled() and self.delta.requires_grad and not scored

    def forward(self, x):
        if self.planned is None or not self.trains():
            return F.linear(x, self.weight, self.bias)
        self.sync()
        y = F.linear(x, self._parameters["weight"], self.bias)
        return _Tap.apply(y, x, self.delta, *self.planned)

    def plain(self):
        """Become an nn.Linear again, with the weight as it stands."""
        for name in ("delta", "planned", *self.BUFFERS):
            delattr(self, name)
        self.__class__ = nn.Linear

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.sync()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *others):
        if prefix + "known" not in state_dict:
            raise ValueError(f"layer {prefix[:-1]!r} is sparse: `merge` before you load the weights of a base")
        super()._load_from_state_dict(state_dict, prefix, *others)
        self.planned = cover(self.index, *self._parameters["weight"].shape)

    def _apply(self, fn, recurse=True):
        # .to(torch.bfloat16) means the weights; corrections move along, but stay float32.
        exact = (self.delta, self.delta.grad, self.carried)
        super()._apply(lambda t: t.to(fn(t).device) if any(t is e for e in exact) else fn(t), recurse)
        self.planned = cover(self.index, *self._parameters["weight"].shape)
        self.sync()  # round the sum, not the rounded sum
        return self


class _Corrected(torch.autograd.Function):
    """The weight as a function of delta, whose gradient is gathered from the weight's."""

    @staticmethod
    def forward(ctx, weight, delta, index):
        # delta: so that a backward pass after it has changed is an error, as with any parameter
        ctx.save_for_backward(index, delta)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, dweight):
        index, _ = ctx.saved_tensors
        return None, dweight.reshape(-1).index_select(0, index).float(), None


class _Tap(torch.autograd.Function):
    """Passes y (..., out) = x Wᵀ + b on; of W's gradient the backward pass forms what `cover` planned."""

    @staticmethod
    def forward(ctx, y, x, delta, places, columns, rows, n_crowded):
        # Keep a copy of few columns, or else x itself, which other layers may keep as well.
        ctx.n_crowded, ctx.copied = n_crowded, 2 * len(columns) < x.size(-1)
        kept = x.reshape(-1, x.size(-1)).index_select(1, columns) if ctx.copied else x
        ctx.save_for_backward(kept, delta, places, columns, rows)  # delta as in _Corrected
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        kept, _, places, columns, rows = ctx.saved_tensors
        x = kept if ctx.copied else kept.reshape(-1, kept.size(-1)).index_select(1, columns)
        x, dy_rows = x.to(dy.dtype), dy.reshape(-1, dy.size(-1))  # under autocast dy is narrower than x
        crowded, others = x[:, : ctx.n_crowded].T, x[:, ctx.n_crowded :].T
        products = dy.new_empty(len(crowded) * dy.size(-1) + len(others) * len(rows))
        first, second = products.split((len(crowded) * dy.size(-1), len(others) * len(rows)))
        torch.mm(crowded, dy_rows, out=first.view(len(crowded), dy.size(-1)))
        torch.mm(others, dy_rows.index_select(1, rows), out=second.view(len(others), len(rows)))
        return dy, None, products.index_select(0, places).float(), None, None, None, None


def cover(index, n_rows, n_columns):
    """The parts of the weight's gradient to form, so that they hold all the entries `index` and little else.

    Every entry of the gradient dyᵀ x is a product of one column of dy and one of x, so that
        x[:, crowded]ᵀ dy   and   x[:, others]ᵀ dy[:, rows]
    are exactly those parts of it, transposed. The entries that matter lie in few columns (input features) and
    rows (outputs): the first product takes whole the columns of which a 32nd is trained, the second the rows
    and columns of the entries outside them. Returns places (k,), where the entries stand in the two products,
    laid flat one after the other; columns, the crowded ones and then the others; rows; how many are crowded.
    None where the whole gradient is cheaper.
    """
    row, column = index // n_columns, index % n_columns
    is_crowded = column.bincount(minlength=n_columns) >= n_rows / 32
    crowded, outside = is_crowded.nonzero().squeeze(1), ~is_crowded[column]
    others, rows = column[outside].unique(), row[outside].unique()
    # In units of an entry's share of a product, as measured on a CPU: reading all of dy costs 16 columns, copying
    # a line of x or dy 64 entries. On CUDA starting up to three more kernels costs some 2^19.
    lines = len(crowded) + len(others) + len(rows)
    cost = n_rows * (len(crowded) + 16) + len(others) * len(rows) + 64 * lines
    if cost + 2**19 * index.is_cuda >= n_rows * n_columns:
        return None
    in_first = torch.searchsorted(crowded, column) * n_rows + row
    in_second = torch.searchsorted(others, column) * len(rows) + torch.searchsorted(rows, row)
    places = torch.where(outside, len(crowded) * n_rows + in_second, in_first)
    return places, torch.cat((crowded, others)), rows, len(crowded)


def sparsify(model, indices):
    """Make the named linear layers SparseLinears in place and freeze everything else; returns the deltas.

    indices: {module name: sorted flat indices (k,)}, as `select` returns it. Empty deltas are left out, those of
    an earlier call freeze (`remask` is the next mask's way). Buffers do not: BatchNorm's statistics still drift
    in training mode, and are in no adapter. Raises ValueError, before anything is changed, for a name or an
    index that does not fit.
    """
    modules = linear_layers(model)
    for name, index in indices.items():
        _check_index(modules, name, index)
    model.requires_grad_(False)
    for name, index in indices.items():
        # The module stays the same object, whoever refers to it; only its class and what it holds change.
        modules[name].__class__ = SparseLinear
        modules[name].set_mask(index)
    return [modules[name].delta for name in indices if modules[name].delta.numel()]


def remask(model, indices):
    """The dynamic step: what was learned stays, the new mask (as for `sparsify`) starts from zero deltas.

    Returns the new deltas; the old ones are no longer part of the model, so make a new optimizer.
    """
    emptied = {name: torch.empty(0, dtype=torch.int64) for name, _ in _sparse_layers(model)}
    return sparsify(model, emptied | indices)


def _sparse_layers(model):
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, SparseLinear)]
    return [(name.replace("_orig_mod.", ""), module) for name, module in layers]


def _check_index(modules, name, index):
    if name not in modules:
        raise ValueError(f"the model has no linear layer {name!r} with a weight of its own")
    size = modules[name].weight.numel()
    fits = index.dtype in (torch.int32, torch.int64) and index.dim() == 1
    if not fits or len(index) and not (0 <= index[0] and index[-1] < size and (index[1:] > index[:-1]).all()):
        raise ValueError(f"layer {name!r}: indices must be sorted, different integers below {size}")


def adapter(model):
    """What all masks learned: {module name: (flat indices (m,), float32 corrections (m,), weight's shape)}."""
    layers = _sparse_layers(model)
    return {name: (m.known.clone(), m.total().clone(), tuple(m.weight.shape)) for name, m in layers}


def load_adapter(model, state):
    """Put what `adapter` returned onto its base, in place of any other; returns the non-empty deltas.

    Outputs are equal bit for bit. Raises ValueError, before anything is changed, where it does not fit.
    """
    modules = linear_layers(model)
    for name, (index, values, shape) in state.items():
        _check_index(modules, name, index)
        fits = tuple(shape) == modules[name].weight.shape and values.shape == index.shape
        if not (fits and values.dtype == torch.float32 and values.isfinite().all()):
            raise ValueError(f"layer {name!r}: not finite float32 corrections, one an index, of its weight's shape")
    for _, module in _sparse_layers(model):
        module.weight.data.view(-1)[module.known] = module.original
        module.plain()
    deltas = sparsify(model, {name: index for name, (index, _, _) in state.items()})
    for name, (_, values, _) in state.items():
        modules[name].delta.data.copy_(values)
    return deltas


def merge(model):
    """Turn every SparseLinear into an nn.Linear with the corrected weight, still frozen; return the model."""
    for _, module in _sparse_layers(model):
        module.sync()
        module.plain()
    return model
