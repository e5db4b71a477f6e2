"""A GPT in one file. GPT-2 by default; a few switches of `GPTConfig` make it OPT, Llama, Mistral or Qwen2.

Shapes in the comments: B samples, T positions, C = n_embd channels, H heads, K key/value heads, D = head_dim.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

ACTIVATIONS = {  # by their names in config.json
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass
class GPTConfig:
    """The shape of a `GPT`. The defaults are the base model that this repository ships."""

    vocab_size: int = 4096
    block_size: int = 256  # the longest sequence, in tokens
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 256
    n_kv_head: int | None = None  # grouped-query attention; None: n_head
    head_dim: int | None = None  # None: n_embd / n_head
    n_inner: int | None = None  # the MLP's width; None: 4 * n_embd
    activation: str = "gelu_new"  # a key of ACTIVATIONS
    gated_mlp: bool = False  # down(activation(gate(x)) * up(x)), as in Llama
    rms_norm: bool = False  # RMSNorm, else LayerNorm
    norm_eps: float = 1e-5
    qkv_bias: bool = True
    out_bias: bool = True  # of the attention's output projection
    mlp_bias: bool = True
    tied_head: bool = True  # the output head is the token embedding
    rope_theta: float | None = None  # base of the rotary positions; None: learned positions
    rope_scaling: dict | None = None  # Llama 3's stretching of the slow rotations, see `rotary_angles`

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"{self.n_embd} channels cannot be split among {self.n_head} heads")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_inner = self.n_inner or 4 * self.n_embd
        if self.n_layer > 1000:
            raise ValueError(f"{self.n_layer} layers are too many")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}: choose from {', '.join(ACTIVATIONS)}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} heads cannot share {self.n_kv_head} key/value heads evenly")
        if self.rope_theta and self.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs of channels, but a head has {self.head_dim}")
        scaling = self.rope_scaling
        if scaling and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise ValueError(f"rope_scaling: low_freq_factor is not below high_freq_factor in {scaling}")


def make_norm(config):
    """The configured norm over the last of C channels."""
    if config.rms_norm:
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps)


def rotary_angles(config, positions):
    """The rotation angle of every pair of channels: positions (T,) -> (T, D / 2), in radians, float32."""
    pair = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = 1.0 / config.rope_theta ** (pair / config.head_dim)
    if config.rope_scaling is not None:
        # Llama 3: channels that turn fewer than `low` times in the original context turn `factor` times
        # slower, those above `high` turns stay, and between the two the change is gradual.
        scaling = config.rope_scaling
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling["factor"])
    return positions.float()[:, None] * frequency


def rotate(x, angles):
    """Rotary positions: turn the channel pairs (i, i + D/2) of x (B, H, T, D) by `angles` (T, D / 2)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention; queries, keys and values are linear layers of their own, in every family."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.n_head // config.n_kv_head  # query heads that share a key/value head
        self.q = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.qkv_bias)
        self.o = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.out_bias)

    def forward(self, x, angles=None, cache=None):
        B, T, _ = x.shape
        q = self.q(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:  # [] at first, then the keys and values of all earlier positions
            if cache:
                k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
            cache[:] = k, v
        if self.groups > 1:
            k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))  # (B, H, T, D)
        # A single new position may look at everything in the cache; several are the start of a sequence.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """The feed-forward half of a block."""

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate = None
        if config.gated_mlp:
            self.gate = nn.Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.up = nn.Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.down = nn.Linear(config.n_inner, config.n_embd, bias=config.mlp_bias)

    def forward(self, x):
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = Attention(config)
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, angles=None, cache=None):
        x = x + self.attn(self.norm1(x), angles, cache)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder-only language model over token ids."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.rope_theta else nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        # No nn.Linear, so that nothing takes the output head for one of the network's linear layers.
        self.head = None if config.tied_head else nn.Parameter(torch.empty(config.vocab_size, config.n_embd))
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer if into_residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(self, idx, cache=None):
        """Token ids (B, T) -> the last block's normed output (B, T, C).

        `cache`, one list a block, holds the keys and values of the positions before `idx` and grows by it.
        """
        start = cache[0][0].size(2) if cache and cache[0] else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} positions, but the model's context is {self.config.block_size}")
        positions = torch.arange(start, end, device=idx.device)
        x = self.wte(idx)
        angles = None
        if self.wpe is None:
            angles = rotary_angles(self.config, positions)
        else:
            x = x + self.wpe(positions)
        for i, block in enumerate(self.blocks):
            x = block(x, angles, cache[i] if cache else None)
        return self.norm(x)

    def logits(self, x):
        """Scores of every token of the vocabulary: (..., C) -> (..., vocab_size)."""
        return F.linear(x, self.wte.weight if self.head is None else self.head)

    def forward(self, idx, targets=None, reduction="mean"):
        """Without targets (logits (B, T, vocab_size), None), else (None, loss).

        idx, targets: (B, T) token ids, the targets already shifted; -100 does not count, and is never sent
        through the head. A sample's loss is the mean over its counted tokens, in nats (0 if it has none).
        reduction: "none" returns the samples' losses (B,), "mean" their mean, so that every sample weighs
        the same however long it is.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"unknown reduction {reduction!r}: choose mean or none")
        if targets is None:
            return self.logits(self.features(idx)), None
        counted = targets != -100  # (B, T)
        places = counted.nonzero(as_tuple=True)  # found once, and first: on CUDA the program waits for it
        logits = self.logits(self.features(idx)[places])  # (counted tokens, vocab_size)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats = F.cross_entropy(logits, targets[places], reduction="none")
        nats = logits.new_zeros(targets.shape).index_put(places, nats)  # (B, T)
        losses = nats.sum(1) / counted.sum(1).clamp(min=1)
        return None, losses if reduction == "none" else losses.mean()

    def sample_losses(self, batch):
        """The loss of every sample of a batch (inputs, targets), (B,), in nats a token."""
        return self(*batch, reduction="none")[1]

    @torch.no_grad()
    def mean_loss(self, batches):
        """The mean loss of all samples in `batches`, in nats a token."""
        return torch.cat([self.sample_losses(batch) for batch in batches]).mean().item()

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=0, top_k=None, stop=(), lengths=None):
        """Continue every prompt of idx (B, T) by max_new_tokens; returns prompts and continuations.

        temperature: 0 takes the likeliest token, else tokens are drawn from softmax(logits / temperature),
        among the `top_k` likeliest if given. stop: token ids that end a sample, which then repeats its stop
        token; generation ends early once all samples have ended. lengths: of the prompts, (B,), where idx is
        padded on the right; a longer prompt's tokens are read one by one while a shorter one is continued
        already. Past the context length the window slides: learned positions shift under it, so the cache is
        no use there and every step reads the whole window.
        """
        cache = [[] for _ in self.blocks]
        given = idx
        lengths = torch.full_like(idx[:, 0], idx.size(1)) if lengths is None else lengths.to(idx.device)
        idx = given[:, : lengths.min()]
        ended = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        stop = torch.tensor(list(stop), dtype=torch.long, device=idx.device)
        unread = idx  # what the cache does not hold yet
        for at in range(idx.size(1), given.size(1) + max_new_tokens):
            if idx.size(1) > self.config.block_size:
                unread, cache = idx[:, -self.config.block_size :], None
            logits = self.logits(self.features(unread, cache)[:, -1]).float()  # (B, vocab_size)
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                if top_k is not None:
                    least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -torch.inf)
                token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1).squeeze(1)
            token = torch.where(ended, idx[:, -1], token)
            if at < given.size(1):
                token = torch.where(at < lengths, given[:, at], token)
            unread = token[:, None]
            idx = torch.cat((idx, unread), dim=1)
            ended = ended | torch.isin(token, stop) & (at >= lengths)
            if ended.all():
                break
        return idx

    def complete(self, prompts, max_new_tokens, stop, batch_size):
        """Continue prompts of any length greedily, `batch_size` at a time: lists of token ids, in and out.

        What is returned starts after the prompt and ends before a stop token.
        """
        order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))  # alike lengths in a batch
        completions = [None] * len(prompts)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            lengths = torch.tensor([len(prompts[n]) for n in batch])
            idx = pad_sequence([torch.tensor(prompts[n]) for n in batch], batch_first=True)
            rows = self.generate(idx.to(self.wte.weight.device), max_new_tokens, stop=stop, lengths=lengths)
            for n, row in zip(batch, rows.tolist()):
                said = row[len(prompts[n]) :][:max_new_tokens]
                ends = [at for at, token in enumerate(said) if token in stop]
                completions[n] = said[: min(ends, default=None)]
        return completions

    def fingerprint(self):
        """A short hash of the weights: names, types, shapes and bytes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]
