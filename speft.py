"""Salience-aware sparse fine-tuning (SPEFT) of any PyTorch model, in one file.

    scores = salience(model, "grad", batches, loss_fn)     # how much does every weight matter?
    indices = select(scores, density=0.01, scope="global") # the mask: the top 1%
    deltas = sparsify(model, indices)                      # freeze the model, train those entries
    ...                                                    # any loop, any optimizer over `deltas`
    adapter(model)                                         # what was learned, as a few numbers

After Liu et al., "Refining Salience-Aware Sparse Fine-Tuning Strategies for Language Models", ACL 2025
(arXiv 2412.13488). In the formulas θ is a weight, ℓ the mean loss over the scoring samples, g = ∂ℓ/∂θ.
"""

import contextlib
import math

import numpy as np
import torch
import torch.nn as nn

# ----------------------------------------------------------------------------------------------------------
# 1. Salience: a score for every weight


def salience(model, metric, batches, loss_fn, layers=None):
    """Score every weight of the chosen linear layers (paper, section 3).

    metric: a key of METRICS. batches: tuples of tensors (B, ...), the model's input first. loss_fn(model,
    batch): the samples' losses (B,) or their mean. layers: a predicate on module names; default all.
    Returns {module name: float32 score of the weight's shape}; scores too large or too small for float32 are
    all multiplied by one power of two. The model is left exactly as it was found.
    Raises ValueError for an unknown metric, no matching layer, missing data, or a score that is missing, not
    of its weight's shape or not finite.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}: choose from {', '.join(METRICS)}")
    weights = {name: module.weight for name, module in linear_layers(model, layers).items()}
    if not weights:
        raise ValueError("no layer to score: `layers` matches no nn.Linear with a weight of its own")
    for _, module in _sparse_layers(model):
        module.sync()
    with torch.enable_grad(), _left_as_found(model):
        for weight in weights.values():
            weight.requires_grad_(True)
        scores = METRICS[metric](model, weights, list(batches or ()), loss_fn)
    for name, weight in weights.items():
        if name not in scores or scores[name].shape != weight.shape:
            raise ValueError(f"metric {metric!r}: layer {name!r} has no score of its weight's shape")
        if not scores[name].isfinite().all():
            raise ValueError(f"metric {metric!r}: layer {name!r} has a score that is not finite")
    return {name: score.detach().float() for name, score in _in_range(scores).items()}


def linear_layers(model, layers=None):
    """{name: module} of the linear layers that can be scored and sparsified.

    These are the modules whose type is exactly nn.Linear or SparseLinear and whose weight is theirs alone: a
    correction of an output head that is tied to the embedding would change the embedding.
    """
    used = [p.data_ptr() for m in model.modules() for p in m.parameters(recurse=False)]
    own = {name: m for name, m in model.named_modules()
           if type(m) in (nn.Linear, SparseLinear) and used.count(m.weight.data_ptr()) == 1}  # fmt: skip
    return {name: module for name, module in own.items() if layers is None or layers(name)}


@contextlib.contextmanager
def _left_as_found(model):
    """Eval mode, no gradients and nothing that requires one; afterwards all is as it was, bit for bit."""
    with contextlib.ExitStack() as afterwards:
        for parameter in model.parameters():
            afterwards.callback(setattr, parameter, "requires_grad", parameter.requires_grad)
            afterwards.callback(setattr, parameter, "grad", parameter.grad)
        for module in model.modules():
            afterwards.callback(setattr, module, "training", module.training)
            for name, buffer in module.named_buffers(recurse=False):
                afterwards.callback(setattr, module, name, buffer)
                afterwards.callback(buffer.data.copy_, buffer.clone())
        model.eval().requires_grad_(False)
        model.zero_grad()
        yield


def _in_range(scores, power=1):
    """The scores; all multiplied by one power of two if the largest, to this power, is beyond float32."""
    largest = max(score.abs().max().item() for score in scores.values())
    exponent = power * math.frexp(largest)[1]
    if -125 <= exponent <= 127:
        return scores
    scale = 2.0 ** min((127 - exponent) // power, 1023)
    return {name: score.double() * scale for name, score in scores.items()}


def _count_samples(batches):
    count = sum(len(batch[0]) for batch in batches)
    if count == 0:
        raise ValueError("this metric needs data, and `batches` is empty")
    return count


def _own_random_state(weights):
    """What a forward pass draws (noise, a sample of the data) is not drawn from the caller's generators."""
    return torch.random.fork_rng({weight.device for weight in weights.values() if weight.is_cuda})


def mean_gradient(model, weights, batches, loss_fn, power=1):
    """{name: g}, the gradient of the mean loss over all samples, from one backward pass a batch.

    With a power, the mean of the samples' gradients to that power, where every batch is one sample. A
    gradient is used and freed as soon as it has been produced: memory holds one layer's at a time.
    """
    mean = {w: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float)) for w in weights.values()}
    share = 1 / _count_samples(batches)

    def consume(weight):
        mean[weight].add_(weight.grad.to(mean[weight]) ** power, alpha=share)
        weight.grad = None

    with contextlib.ExitStack() as meanwhile:
        meanwhile.enter_context(_own_random_state(weights))
        for weight in weights.values():
            meanwhile.enter_context(weight.register_post_accumulate_grad_hook(consume))
        for batch in batches:
            loss = loss_fn(model, batch)
            (loss.sum() if loss.dim() else loss * len(batch[0])).backward()
    return {name: mean[w] for name, w in weights.items()}


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
    """−g ⊙ θ, rounded to float32 once, so that the metrics made from it agree on which entries tie."""
    g = mean_gradient(model, weights, batches, loss_fn)
    product = _in_range({name: g[name].mul_(w.detach()).neg_() for name, w in weights.items()})
    return {name: p.float() for name, p in product.items()}


def snip(model, weights, batches, loss_fn):
    """abs(g ⊙ θ)"""
    return {name: p.abs_() for name, p in force(model, weights, batches, loss_fn).items()}


def taylor(model, weights, batches, loss_fn):
    """(g ⊙ θ)²: ranks exactly like SNIP."""
    product = _in_range(force(model, weights, batches, loss_fn), power=2)  # so that no square overflows
    return {name: p.square_() for name, p in product.items()}


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
    """E[g_n²], the mean over samples n of the squared gradient of that sample's loss.

    By definition: a backward pass a sample.
    """
    samples = [tuple(part[n : n + 1] for part in batch) for batch in batches for n in range(len(batch[0]))]
    return mean_gradient(model, weights, samples, loss_fn, power=2)


def synflow(model, weights, batches, loss_fn):
    """(∂R/∂θ) ⊙ θ, where R sums the outputs of the linearised network for an input of ones.

    Data-free: of the batches only the input's shape is used. For networks of linear layers, embeddings,
    norms, attention by scaled_dot_product_attention and the activations named below.
    """
    _count_samples(batches)
    example = batches[0][0][:1]
    if example.is_floating_point():
        example = torch.ones_like(example, dtype=torch.float64, requires_grad=True)
    else:
        example = example[..., :1]  # token ids: one position
    positive = {w: w.detach().abs().double().requires_grad_() for w in weights.values()}
    with _own_random_state(weights), _Linearised(positive):
        output = model(example)
    output = output[0] if isinstance(output, tuple) else output
    gradients = torch.autograd.grad(output.sum(), list(positive.values()), materialize_grads=True)
    return {name: g * positive[w].detach() for (name, w), g in zip(weights.items(), gradients)}


class _Linearised(torch.overrides.TorchFunctionMode):
    """The network as SynFlow sees it, in float64: absolute weights, no biases, no non-linearity.

    Activations, and attention over one position, pass their input on; an embedding looks up ones; a norm is
    its gain. A product of two activations (a gated MLP) is their geometric mean, since a plain product would
    square the signal in every block.
    """

    PASSED_ON = {"scaled_dot_product_attention": 2} | dict.fromkeys(
        "relu relu_ relu6 leaky_relu prelu elu celu selu gelu silu mish tanh tanh_ sigmoid sigmoid_ softplus "
        "softsign hardtanh hardswish hardsigmoid logsigmoid".split(), 0)  # function: its argument # fmt: skip
    PRODUCTS = set("mul mul_ multiply multiply_ __mul__ __rmul__ __imul__".split())
    GAINS = {"layer_norm": 2, "rms_norm": 2, "batch_norm": 3}

    def __init__(self, positive):
        super().__init__()
        self.positive = positive  # scored weight -> its absolute value, which collects the gradient

    def absolute(self, weight):
        return self.positive[weight] if weight in self.positive else weight.detach().abs().double()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        given = (*args, *kwargs.values())  # functions are called with and without keywords
        if name == "linear":
            return nn.functional.linear(given[0], self.absolute(given[1]))
        if name == "embedding":
            return torch.ones_like(func(*args, **kwargs), dtype=torch.float64, requires_grad=True)
        if name in self.PASSED_ON:
            return kwargs.get("value", given[self.PASSED_ON[name]])
        if name in self.GAINS:
            gain = given[self.GAINS[name]] if len(given) > self.GAINS[name] else None
            return given[0] * self.absolute(gain) if isinstance(gain, torch.Tensor) else given[0]
        if name in self.PRODUCTS and all(isinstance(factor, torch.Tensor) for factor in given):
            a, b = (self.absolute(factor) if isinstance(factor, nn.Parameter) else factor for factor in given)
            if a.requires_grad and b.requires_grad:  # the roots first: the product may overflow
                a, b = a.clamp(min=1e-300).sqrt(), b.clamp(min=1e-300).sqrt()
            return a * b
        return func(*args, **kwargs)


METRICS = {f.__name__: f for f in (random, magnitude, grad, snip, force, taylor, synflow, grasp, fisher)}

# ----------------------------------------------------------------------------------------------------------
# 2. Masks: which entries to train


def select(scores, density, scope):
    """Keep the top `density` of all scores: {name: score} -> {name: sorted flat indices, int64}.

    scope: "global" ranks all layers together and keeps round(density * numel) in all; "local" keeps that of
    each layer, at least one. Ties go to the earlier layer and the lower index; scores compare in float32.
    Raises ValueError for a density outside (0, 1], a global count of zero, a score that is not a number.
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
        indices |= _top({name: score.float().flatten() for name, score in group.items()}, max(1, count))
    return indices


def _top(scores, count):
    """The flat indices of the `count` largest scores; copies at most about `count` scores and one layer's."""
    top, least, indices = [], math.nan, {}
    for score in scores.values():
        # What is no larger than the least of the largest so far cannot raise it. At first, with nan, every
        # comparison is false: all scores pass.
        top.append(score[~(score <= least)].detach().cpu().numpy())
        if sum(map(len, top)) >= 1.5 * count:
            top = [np.sort(np.concatenate(top))[-count:]]
            least = float(top[0][0])
    top = np.sort(np.concatenate(top))[-count:]
    threshold, ties = float(top[0]), count - (top > top[0]).sum()
    for name, score in scores.items():
        tied = (score == threshold).nonzero()[:ties]
        indices[name] = torch.cat(((score > threshold).nonzero(), tied)).squeeze(1).sort().values
        ties -= len(tied)
    return indices


# ----------------------------------------------------------------------------------------------------------
# 3. Training the kept entries


class SparseLinear(nn.Linear):
    """A linear layer whose weight is frozen but for the entries `index`, corrected by the vector `delta`.

    weight (out, in): the effective weight, corrected in place, so that a forward pass is one F.linear.
    index (k,): the trained entries' flat positions, row-major and sorted. delta (k,): the trainable
    correction, float32 whatever the weight's type, zero at first. Of every entry that this mask or an earlier
    one trains, `known` (m,) is the position, sorted, `original` the value in the base, and `carried` what
    earlier masks learned; `place` (k,) is where `index` stands in `known`. The effective value is
        original + (carried + delta).
    """

    BUFFERS = ("index", "place", "known", "original", "carried")

    def set_mask(self, index):
        """Train the entries `index` from now on. What was learned stays in the weight, exactly."""
        self.weight.data = self.weight.data.contiguous()  # else there is no flat view
        weight = self.weight.data.view(-1)
        index = index.to(weight.device, torch.int64, copy=True)
        known, carried = index.clone(), torch.zeros_like(index, dtype=torch.float32)
        if "known" in self._buffers:  # no plain linear layer any more
            weight[self.known] = self.original  # for a moment the layer is its original self
            known = torch.cat((self.known, index)).unique()
            carried = torch.zeros_like(known, dtype=torch.float32)
            carried[torch.searchsorted(known, self.known)] = self.total()
        buffers = (index, torch.searchsorted(known, index), known, weight[known], carried)
        for name, buffer in zip(self.BUFFERS, buffers):
            self.register_buffer(name, buffer)
        self.delta = nn.Parameter(torch.zeros_like(index, dtype=torch.float32))
        self.planned = None
        self.sync()

    def total(self):
        """What has been learned so far: the correction (m,) of each known entry."""
        return self.carried.index_add(0, self.place, self.delta.detach())

    def sync(self):
        """Make the weight right, however `delta` was changed: m entries, cheap at every forward pass."""
        # Through .data, so that autograd takes no notice: delta is not to change between a forward pass and
        # its backward pass.
        values = (self.original + self.total()).to(self.weight.dtype)  # the sum in float32 or wider
        self.weight.data.view(-1).scatter_(0, self.known, values)

    def forward(self, x):
        self.sync()
        trained = torch.is_grad_enabled() and self.delta.requires_grad and self.delta.numel()
        if not trained or self.weight.requires_grad:  # frozen, or being scored
            return nn.functional.linear(x, self.weight, self.bias)
        y = _SparseGradient.apply(x, self.weight, self.bias, self.delta, *self.plan())
        return y.view(*x.shape[:-1], self.out_features)

    def plan(self):
        """`cover` of the mask, found again only if `index` is another tensor or has changed in place."""
        key = self.index.data_ptr(), self.index._version
        if self.planned is None or self.planned[0] != key:
            # The tensor is kept, so that no other can come to stand at its address.
            self.planned = key, cover(self.index, *self.weight.shape), self.index
        return self.planned[1]

    def plain(self):
        """Become an nn.Linear again, with the weight as it stands."""
        for name in ("delta", "planned", *self.BUFFERS):
            delattr(self, name)
        self.__class__ = nn.Linear

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.sync()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn, recurse=True):
        # .to(torch.bfloat16) means the weights; corrections move along, but stay float32.
        exact = (self.delta, self.delta.grad, self.carried)
        super()._apply(lambda t: t.to(fn(t).device) if any(t is e for e in exact) else fn(t), recurse)
        self.sync()  # round the sum, not the rounded sum
        return self


# A column is crowded if this share of it is kept. 0: every column is, the dense product; inf: none is.
LIMITS = (0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, math.inf)


def cover(index, n_rows, n_columns):
    """The parts of the weight's gradient to form, so that they hold all the entries `index` and little else.

    Every entry of the gradient dyᵀ x is a product of one column of dy and one of x, so that
        x[:, crowded]ᵀ dy   and   x[:, others]ᵀ dy[:, rows]
    are exactly those parts of it, transposed. Salience forms lines: the entries that matter lie in few
    columns (input features) and rows (outputs). The first product takes crowded columns whole, the second the
    columns and rows of the entries outside them. What counts as crowded is the cheapest of a few LIMITS.
    Returns places (k,), where the entries stand in the two products, laid flat one after the other; columns,
    the crowded ones and then the others; how many are crowded; rows.
    """
    row, column = index // n_columns, index % n_columns
    kept = column.bincount(minlength=n_columns)

    def split(limit):
        crowded = kept >= limit * n_rows
        outside = ~crowded[column]
        rows, others = row[outside].bincount(minlength=n_rows), column[outside].bincount(minlength=n_columns)
        return outside, *(lines.nonzero().squeeze(1) for lines in (crowded, others, rows))

    def cost(parts):
        _, crowded, others, rows = parts
        if len(crowded) == n_columns:
            return n_rows * n_columns  # the dense product copies nothing
        # The unit is the time that one entry's share of a product takes. As measured on a CPU, reading all of
        # dy costs as much as 16 columns more, and copying a line of x or dy as much as 64 entries. On CUDA
        # up to three more kernels have to be started, which takes as long as some 2^19 entries.
        whole = n_rows * (len(crowded) + 16) + 64 * len(crowded) if len(crowded) else 0
        return whole + len(others) * len(rows) + 64 * (len(others) + len(rows)) + 2**19 * index.is_cuda

    outside, crowded, others, rows = min(map(split, LIMITS), key=cost)
    in_first = torch.searchsorted(crowded, column) * n_rows + row
    in_second = torch.searchsorted(others, column) * len(rows) + torch.searchsorted(rows, row)
    places = torch.where(outside, len(crowded) * n_rows + in_second, in_first)
    return places, torch.cat((crowded, others)), len(crowded), rows


class _SparseGradient(torch.autograd.Function):
    """y (N, out) = x Wᵀ + b for x (..., in), N rows; of W's gradient only what `cover` planned, for delta."""

    @staticmethod
    def forward(ctx, x, weight, bias, delta, places, columns, n_crowded, rows):
        # Keep a copy of few columns, or else x itself, which other layers may keep as well.
        x_rows = x.reshape(-1, x.size(-1))
        ctx.shape, ctx.n_crowded, ctx.copied = x.shape, n_crowded, 2 * len(columns) < x.size(-1)
        kept = x_rows.index_select(1, columns) if ctx.copied else x_rows
        ctx.save_for_backward(kept, weight, places, columns, rows)
        return nn.functional.linear(x_rows, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        kept, weight, places, columns, rows = ctx.saved_tensors
        # Where all columns are crowded, they stand in order and need no copy.
        x = kept if ctx.copied or ctx.n_crowded == kept.size(1) else kept.index_select(1, columns)
        # Under autocast dy is narrower than the weight and x.
        x, weight = x.to(dy.dtype), weight.to(dy.dtype)
        dx = (dy @ weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        n, n_rows = ctx.n_crowded, dy.size(1)
        products = dy.new_empty(n * n_rows + (x.size(1) - n) * len(rows))
        if n:
            torch.mm(x[:, :n].T, dy, out=products[: n * n_rows].view(n, n_rows))
        if len(rows):
            torch.mm(x[:, n:].T, dy.index_select(1, rows), out=products[n * n_rows :].view(-1, len(rows)))
        return dx, None, dbias, products.index_select(0, places).float(), None, None, None, None


def sparsify(model, indices):
    """Make the named linear layers SparseLinears in place and freeze everything else; returns the deltas.

    Deltas of an empty mask are left out, those of an earlier call freeze with everything else (`remask` is
    the next mask's way). The layers have to be called as modules: a parent that reads
    `layer.weight` itself, as nn.TransformerEncoderLayer's fast path does, gets the weight of the last forward
    pass, and trains nothing.

    indices: {module name: sorted flat indices (k,)}, as `select` returns it.
    Raises ValueError, before anything is changed, for a name or an index that does not fit.
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
    """The dynamic step: what was learned stays, the new mask starts from zero deltas.

    indices as for `sparsify`, of the same or of other layers. Returns the new deltas; the old ones are no
    longer part of the model, so make a new optimizer.
    """
    emptied = {name: torch.empty(0, dtype=torch.int64) for name, _ in _sparse_layers(model)}
    return sparsify(model, emptied | indices)


def _sparse_layers(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SparseLinear)]


def _check_index(modules, name, index):
    if name not in modules:
        raise ValueError(f"the model has no linear layer {name!r} with a weight of its own")
    size = modules[name].weight.numel()
    fits = index.dtype in (torch.int32, torch.int64) and index.dim() == 1
    if not fits or len(index) and not (0 <= index[0] and index[-1] < size and (index[1:] > index[:-1]).all()):
        raise ValueError(f"layer {name!r}: indices must be sorted, different integers below {size}")


# ----------------------------------------------------------------------------------------------------------
# 4. What was learned: out of a model, onto a model, into its weights


def adapter(model):
    """Everything learned: {module name: (flat indices int64 (m,), float32 corrections (m,), weight's shape)}.

    Over remasks it is the union of all masks.
    """
    return {name: (m.known.clone(), m.total(), tuple(m.weight.shape)) for name, m in _sparse_layers(model)}


def load_adapter(model, state):
    """Put what `adapter` returned onto its base, with bit-equal outputs and ready to train on.

    An adapter that the model already carries is taken off first. Returns the non-empty deltas.
    Raises ValueError, before anything is changed, where the state does not fit the model.
    """
    modules = linear_layers(model)
    for name, (index, values, shape) in state.items():
        _check_index(modules, name, index)
        if tuple(shape) != modules[name].weight.shape:
            raise ValueError(f"layer {name!r} is not of the shape {tuple(shape)} that its adapter has")
        if values.dtype != torch.float32 or values.shape != index.shape or not values.isfinite().all():
            raise ValueError(f"layer {name!r}: the corrections must be finite float32, one an index")
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
