"""What several test files build and compare: toy models with their data, bits, the memory of operations."""

import copy
import weakref

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from model import GPT, GPTConfig
from speft import SparseLinear, adapter, remask, sparsify

DTYPES = [torch.float32, torch.bfloat16, torch.float64]

FIRST_ORDER = ("grad", "snip", "force", "taylor")
NEEDS_DATA = (*FIRST_ORDER, "grasp", "fisher")
ALL = ("random", "magnitude", *FIRST_ORDER, "synflow", "grasp", "fisher")
DETERMINISTIC = ALL[1:]

LLAMA_LIKE = dict(
    gated_mlp=True, rms_norm=True, rope_theta=100.0, n_kv_head=1, tied_head=False, activation="silu",
    qkv_bias=False, out_bias=False, mlp_bias=False)  # fmt: skip
GPT_STYLES = {"gpt2": dict(qkv_bias=True), "llama": LLAMA_LIKE}


# --- the command line -----------------------------------------------------------------------------------


def run(out, *flags):
    """A training run of a few steps on the CPU into the folder `out`; later flags win. Returns its result."""
    small = "--device cpu --steps 4 --batch-size 4 --seq-len 64 --lr 2e-3 --score-examples 6"
    small += " --eval-examples 4 --eval-every 3"
    return train.main([*small.split(), "--out", str(out), *map(str, flags)])


# --- models and losses ----------------------------------------------------------------------------------

LAYERS = ("0", "3", "5")  # the linear layers of `mlp`


def mlp(dtype=torch.float32, seed=0):
    """The same small MLP for every seed, with other weights."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 8),
        nn.ReLU(inplace=True),
        nn.LayerNorm(8),
        nn.Linear(8, 5, bias=False),
        nn.Tanh(),
        nn.Linear(5, 4),
    )
    with torch.no_grad():
        model[0].weight[0] = -0.0  # -0.0 + d - d is +0.0: taking off by subtraction shows here
    return model.to(dtype)


def scramble(model, std=0.5):
    """Random values everywhere, gains and biases too, so that no term of an oracle is zero or one."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def random_mlp(seed, dtype=torch.float64):
    """A random chain of linear layers, activations and norms, with its batches of unequal sizes."""
    torch.manual_seed(seed)
    activation = [nn.Tanh(), nn.GELU(), nn.ReLU(inplace=True), nn.SiLU()][seed % 4]
    bias, norm = seed % 3 != 0, seed % 2 == 0
    widths = torch.randint(1, 5, (4,)).tolist()
    layers = []
    for fan_in, fan_out in zip(widths, widths[1:]):
        layers.append(nn.Linear(fan_in, fan_out, bias=bias))
        if norm and fan_out > 1:
            layers.append(nn.LayerNorm(fan_out))
        layers.append(activation)
    model = scramble(nn.Sequential(*layers[:-1])).to(dtype)
    batches = [
        (torch.randn(size, widths[0], dtype=dtype), torch.randn(size, widths[-1], dtype=dtype))
        for size in torch.randint(1, 5, (3,)).tolist() + [1]
    ]
    return model, batches


def random_gpt(style, seed=0, dtype=torch.float64, **changes):
    """A tiny GPT and batches whose samples have unequal numbers of counted targets (one sample has none)."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=7, block_size=5, n_layer=2, n_head=2, n_embd=4, n_inner=6)
    model = scramble(GPT(GPTConfig(**(shape | GPT_STYLES[style] | changes)))).to(dtype)
    batches = []
    for size, length in ((3, 5), (1, 4), (2, 3)):
        idx, targets = torch.randint(0, model.config.vocab_size, (2, size, length))
        targets[0, 1:] = -100
        batches.append((idx, targets))
    batches[-1][1][1] = -100
    return model, batches


def sample_losses(model, batch):
    """Mean squared error of every sample, (B,)."""
    x, y = batch
    return (model(x) - y).square().flatten(1).mean(1)


def mean_loss(model, batch):
    return sample_losses(model, batch).mean()


def gpt_losses(model, batch):
    return model(*batch, reduction="none")[1]


def gpt_mean_loss(model, batch):
    return model(*batch)[1]


def linears(model):
    """{name: module} of the plain and sparse linear layers."""
    return {n: m for n, m in model.named_modules() if type(m) in (nn.Linear, SparseLinear)}


def weights_of(model):
    """{layer's name: a copy of its weight}"""
    model.state_dict()  # brings the weights up to date, also where delta was changed since the last forward
    return {name: module.weight.detach().clone() for name, module in linears(model).items()}


def twin_of(model):
    """A deep copy that also has the gradients, which copy.deepcopy leaves out."""
    twin = copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters()):
        q.grad = None if p.grad is None else p.grad.clone()
    return twin


# --- masks and training ---------------------------------------------------------------------------------


def random_index(numel, count):
    return torch.randperm(numel)[:count].sort().values


def random_masks(model, density=0.4, layers=LAYERS):
    numels = {name: model.get_submodule(name).weight.numel() for name in layers}
    return {name: random_index(n, max(1, round(density * n))) for name, n in numels.items()}


def perturb(deltas, scale=0.1):
    for delta in deltas:
        delta.data.add_(scale * torch.randn_like(delta))


def sparse_layer(shape, index, bias=True, dtype=torch.float32):
    """A SparseLinear of shape (out, in) with a random delta, and its base weight."""
    layer = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    base = layer.weight.detach().clone()
    sparsify(nn.Sequential(layer), {"0": index})
    layer.delta.data.copy_(torch.randn(len(index)) / shape[1] ** 0.5)
    return layer, base


def train_steps(model, deltas, steps, seed):
    """A few AdamW steps of an `mlp` on random data with an optimizer of their own."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(deltas, lr=0.05, weight_decay=0.1)
    dtype = next(m.weight.dtype for m in linears(model).values())
    for _ in range(steps):
        x, y = torch.randn(7, 6, generator=generator), torch.randn(7, 4, generator=generator)
        optimizer.zero_grad()
        F.mse_loss(model(x.to(dtype)), y.to(dtype)).backward()
        optimizer.step()


def after_steps(model, masks):
    """Train the deltas of the named layers for three steps."""
    train_steps(model, [model.get_submodule(name).delta for name in masks], 3, seed=1)


def trained_mlp(dtype=torch.float32, seed=0, steps=3):
    """(a sparse `mlp` after a few steps, its deltas)"""
    model = mlp(dtype, seed)
    deltas = sparsify(model, random_masks(model))
    train_steps(model, deltas, steps, seed)
    return model, deltas


def probe(dtype):
    return torch.randn(11, 6, generator=torch.Generator().manual_seed(99)).to(dtype)


def outputs(model):
    """What an `mlp` says to the same inputs."""
    with torch.no_grad():
        return model(probe(next(m.weight.dtype for m in linears(model).values())))


def corrected(weight, index, values):
    """weight + values, added in float32 or better and rounded once to the weight's type: the dense oracle."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    flat = weight.to(wide).flatten().index_add(0, index.long(), values.to(wide))
    return flat.view(weight.shape).to(weight.dtype)


class Dense(nn.Module):
    """The oracle of a sparse layer: delta scattered into a dense weight, and nothing but autograd."""

    def __init__(self, layer, base):
        super().__init__()
        self.base, self.index = base, layer.index.clone()
        self.delta = nn.Parameter(layer.delta.detach().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def forward(self, x):
        return F.linear(x, corrected(self.base, self.index, self.delta), self.bias)


# --- layers that cannot be made sparse ------------------------------------------------------------------


def half_tied():
    model = mlp()
    model.embedding = nn.Embedding(4, 5)
    model.embedding.weight = model[5].weight
    return model


def tied_in_memory():
    # What load_state_dict(assign=True) makes of a tied head: two parameters, one memory.
    model = mlp()
    model.embedding = nn.Embedding(4, 5)
    model.embedding.weight = nn.Parameter(model[5].weight.data)
    return model


def tied_linears():
    model = mlp()
    model.twin = nn.Linear(5, 4)
    model.twin.weight = model[5].weight
    return model


def with_attention():
    model = mlp()
    model.attention = nn.MultiheadAttention(4, 2)
    return model


BAD_NAMES = {
    "unknown": (mlp, "7"),
    "empty name": (mlp, ""),
    "no linear layer": (mlp, "2"),
    "a parameter": (mlp, "0.weight"),
    "tied to an embedding": (half_tied, "5"),
    "tied to an embedding in memory": (tied_in_memory, "5"),
    "tied to a linear": (tied_linears, "5"),
    "bypassed by its parent": (with_attention, "attention.out_proj"),
}


def plain(make):
    return make()


def carrying(make):
    """A model that is sparse already, after a remask and some steps."""
    model = make()
    perturb(sparsify(model, random_masks(model, layers=("0", "3"))))
    perturb(remask(model, random_masks(model, layers=("0",))))
    return model


# --- bits -----------------------------------------------------------------------------------------------


def bits(tensor):
    """dtype, shape and every byte: -0.0 and 0.0 differ, NaN equals itself."""
    if tensor is None:
        return None
    data = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    return tensor.dtype, tensor.shape, data.numpy().tobytes()


def same_bits(a, b):
    return bits(a) == bits(b)


def assert_same_tensors(got, want):
    assert list(got) == list(want)
    for name in want:
        assert same_bits(got[name], want[name]), name


def assert_same_adapters(got, want):
    assert set(got) == set(want)
    for name, (index, values, shape) in want.items():
        assert torch.equal(got[name][0], index), name
        assert same_bits(got[name][1], values), name
        assert tuple(got[name][2]) == tuple(shape), name


def assert_near(got, want, dtype):
    """Equal up to the rounding of a sum in `dtype`, relative to the largest entry."""
    assert got.dtype == want.dtype and got.shape == want.shape
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    if dtype is torch.float64 and got.dtype is torch.float32:
        tolerance = 1e-6
    if want.numel():
        assert (got - want).abs().max() <= tolerance * want.abs().max()


def snapshot(model):
    """Everything that scoring, or a call that is refused, might leave behind, as comparable values."""
    state = {name: (bits(i), bits(v), shape) for name, (i, v, shape) in adapter(model).items()}
    model.state_dict()  # brings the weights up to date
    for name, p in model.named_parameters(remove_duplicate=False):
        layout = id(p), type(p), p.stride()
        state["parameter", name] = layout, bits(p), p.requires_grad, p.is_leaf, p._backward_hooks
        state["later hooks", name] = bool(getattr(p, "_post_accumulate_grad_hooks", None))
        state["grad", name] = p.grad if p.grad is None else id(p.grad), bits(p.grad)
    for name, buffer in model.named_buffers():
        state["buffer", name] = id(buffer), buffer.stride(), bits(buffer)
    for name, module in model.named_modules():
        hooks = [(key, len(value)) for key, value in vars(module).items() if value and key.endswith("hooks")]
        state["module", name] = id(module), type(module), module.training, sorted(vars(module)), hooks
    cuda = torch.backends.cuda
    state["kernels"] = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
    state["modes"] = torch.is_grad_enabled(), torch.get_default_dtype(), torch._C._len_torch_function_stack()
    state["random"] = bits(torch.get_rng_state())
    return state


def assert_as_found(model, before, draws=0):
    """The model, and torch's state, are those of the snapshot; `draws` times a new seed has been drawn."""
    after = snapshot(model)
    with torch.random.fork_rng():
        torch.set_rng_state(torch.frombuffer(bytearray(before["random"][2]), dtype=torch.uint8))
        for _ in range(draws):
            torch.manual_seed(torch.randint(2**63 - 1, ()).item())
        before = before | {"random": bits(torch.get_rng_state())}
    assert set(after) == set(before)
    assert not [key for key in before if before[key] != after[key]]


# --- memory ---------------------------------------------------------------------------------------------


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


class Memory(TorchDispatchMode):
    """What operators take for the tensors they make: `largest` in entries, `peak` in bytes alive at once."""

    def __init__(self):
        super().__init__()
        self.largest = self.peak = 0
        self.made = []  # (a weak reference to the tensor, the address of its memory, the bytes there)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        self.made = [entry for entry in self.made if entry[0]() is not None]
        known = {address for _, address, _ in self.made}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                size = t.untyped_storage().nbytes()
                if memory(t) not in given:
                    self.largest = max(self.largest, size // t.element_size())
                if memory(t) not in given or memory(t) in known:  # new, or a view that keeps it alive
                    self.made.append((weakref.ref(t), memory(t), size))
        self.peak = max(self.peak, sum({address: size for _, address, size in self.made}.values()))
        return result
