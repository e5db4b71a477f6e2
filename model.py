"""A GPT in one file. GPT-2 by default; switches of `GPTConfig` make it OPT, Llama, Mistral, Qwen or Gemma.

Shapes in the comments: B samples, T positions, C = n_embd channels, H heads, K key/value heads, D = head_dim,
S positions that are looked at: the T new ones and those in the cache.
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
    norm_offset: bool = False  # an RMSNorm's gain is 1 + its weight
    pre_norm: bool = True  # attention and MLP read a norm's output, else a norm follows each residual sum
    out_norms: bool = False  # what attention and MLP return goes through a norm, too
    qk_norm: bool = False  # a norm over every head's queries and keys
    qkv_bias: bool = True
    out_bias: bool = True  # of the attention's output projection
    mlp_bias: bool = True
    tied_head: bool = True  # the output head is the token embedding
    n_wte: int | None = None  # the token embedding's width; None: n_embd, without projections in and out
    scale_wte: bool = False  # embeddings times the root of n_embd
    rope_theta: float | None = None  # base of the rotary positions; None: learned positions
    rope_scaling: dict | None = None  # Llama 3's stretching of the slow rotations, see `rotary_turns`
    windows: list | None = None  # of every block: how far back it looks, its own position included; None: all
    rope_local_theta: float | None = None  # base, without scaling, of the blocks with a window
    query_scalar: float | None = None  # attention scores are divided by its root; None: head_dim
    attn_cap: float | None = None  # scores s become cap * tanh(s / cap)
    logit_cap: float | None = None

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"{self.n_embd} channels cannot be split among {self.n_head} heads")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_inner = self.n_inner or 4 * self.n_embd
        self.n_wte = self.n_wte or self.n_embd
        if self.n_layer > 1000:
            raise ValueError(f"{self.n_layer} layers are too many")
        self.windows = self.windows or [None] * self.n_layer
        if len(self.windows) != self.n_layer:
            raise ValueError(f"{len(self.windows)} windows for {self.n_layer} layers")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}: choose from {', '.join(ACTIVATIONS)}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} heads cannot share {self.n_kv_head} key/value heads evenly")
        if self.rope_theta and self.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs of channels, but a head has {self.head_dim}")
        scaling = self.rope_scaling
        if scaling and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise ValueError(f"rope_scaling: low_freq_factor is not below high_freq_factor in {scaling}")


class OffsetRMSNorm(nn.RMSNorm):
    """An RMSNorm whose gain is 1 + weight."""

    def reset_parameters(self):
        nn.init.zeros_(self.weight)

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


def make_norm(config, width=None):
    """The configured norm over the last of `width` (default: n_embd) channels."""
    kind = (OffsetRMSNorm if config.norm_offset else nn.RMSNorm) if config.rms_norm else nn.LayerNorm
    return kind(width or config.n_embd, eps=config.norm_eps)


def rotary_turns(config, positions, local=False):
    """Rotary positions: cosine and sine of the angle by which each pair of channels turns, both (T, D / 2).

    positions (T,); local: for blocks with a window. Angles are float32, in radians.
    """
    theta, scaling = config.rope_theta, config.rope_scaling
    if local and config.rope_local_theta:
        theta, scaling = config.rope_local_theta, None
    pair = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = 1.0 / theta ** (pair / config.head_dim)
    if scaling is not None:
        # Llama 3: channels that turn fewer than `low` times in the original context turn `factor` times
        # slower, those above `high` turns stay, and between the two the change is gradual.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling["factor"])
    angles = positions.float()[:, None] * frequency
    return angles.cos(), angles.sin()


def rotate(x, turns):
    """Turn the channel pairs (i, i + D/2) of x (B, H, T, D)."""
    cos, sin = (turn.to(x.dtype) for turn in turns)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(q, k, v, window=None, scale=None, cap=None):
    """Causal attention of the last T of S positions: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    window: how many positions each may look at, the last one being itself; None: all. scale: of the scores;
    None: 1 / sqrt(D). cap: scores s become cap * tanh(s / cap).
    """
    T, S = q.size(2), k.size(2)
    window = window or S
    if cap is None and window >= S and T in (1, S):
        # A single new position looks at all; several are the start of a sequence.
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, scale=scale)
    age = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    seen = (age >= 0) & (age < window)  # (T, S)
    if cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    if S == 1:
        return v  # the only position looks at itself, whatever the score
    scores = q @ k.transpose(2, 3) * (scale or q.size(3) ** -0.5)
    scores = cap * torch.tanh(scores / cap)
    return F.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1) @ v


class Cache:
    """The keys and values (B, K, S, D) that every block may still look at, of the positions read so far."""

    def __init__(self, n_layer):
        self.length = 0  # how many positions were read
        self.blocks = [[] for _ in range(n_layer)]


class Attention(nn.Module):
    """Causal self-attention; queries, keys and values are linear layers of their own, in every family."""

    def __init__(self, config, window=None):
        super().__init__()
        self.head_dim, self.window, self.cap = config.head_dim, window, config.attn_cap
        self.scale = config.query_scalar and config.query_scalar**-0.5
        self.groups = config.n_head // config.n_kv_head  # query heads that share a key/value head
        self.q = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.qkv_bias)
        self.o = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.out_bias)
        self.q_norm = make_norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_dim) if config.qk_norm else None

    def forward(self, x, turns=None, cache=None):
        B, T, _ = x.shape
        q = self.q(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if turns is not None:
            q, k = rotate(q, turns), rotate(k, turns)
        if cache is not None:  # [] at first, then the keys and values of earlier positions
            if cache:
                k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
            # The next position looks at itself and window - 1 before it.
            first = max(0, k.size(2) - self.window + 1) if self.window else 0
            cache[:] = k[:, :, first:], v[:, :, first:]
        if self.groups > 1:
            k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))  # (B, H, S, D)
        y = attend(q, k, v, self.window, self.scale, self.cap)
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
    """One transformer block."""

    def __init__(self, config, window=None):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.norm1 = make_norm(config)
        self.attn = Attention(config, window)
        self.norm1_out = make_norm(config) if config.out_norms else None
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)
        self.norm2_out = make_norm(config) if config.out_norms else None

    def forward(self, x, turns=None, cache=None):
        y = self.attn(self.norm1(x) if self.pre_norm else x, turns, cache)
        x = x + (y if self.norm1_out is None else self.norm1_out(y))
        if not self.pre_norm:
            x = self.norm1(x)
        y = self.mlp(self.norm2(x) if self.pre_norm else x)
        x = x + (y if self.norm2_out is None else self.norm2_out(y))
        return x if self.pre_norm else self.norm2(x)


class GPT(nn.Module):
    """A decoder-only language model over token ids."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_wte)
        self.wpe = None if config.rope_theta else nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, window) for window in config.windows)
        self.norm = make_norm(config) if config.pre_norm else None  # else the last sum has its own
        self.proj_in = self.proj_out = None
        if config.n_wte != config.n_embd:
            self.proj_in = nn.Linear(config.n_wte, config.n_embd, bias=False)
            self.proj_out = nn.Linear(config.n_embd, config.n_wte, bias=False)
        # No nn.Linear, so that nothing takes the output head for one of the network's linear layers.
        self.head = None if config.tied_head else nn.Parameter(torch.empty(config.vocab_size, config.n_wte))
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer if into_residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(self, idx, cache=None):
        """Token ids (B, T) -> the last block's normed output (B, T, C).

        `cache` holds what the positions before `idx` left behind, and grows by `idx`.
        """
        start = cache.length if cache else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} positions, but the model's context is {self.config.block_size}")
        positions = torch.arange(start, end, device=idx.device)
        x = self.wte(idx)
        if self.config.scale_wte:
            x = x * math.sqrt(self.config.n_embd)
        if self.proj_in is not None:
            x = self.proj_in(x)
        turns = {}  # of the two kinds of blocks, with and without a window
        if self.wpe is not None:
            x = x + self.wpe(positions)
        else:
            for local in {window is not None for window in self.config.windows}:
                turns[local] = rotary_turns(self.config, positions, local)
        for i, block in enumerate(self.blocks):
            local = self.config.windows[i] is not None
            x = block(x, turns.get(local), cache.blocks[i] if cache else None)
        if cache:
            cache.length = end
        return x if self.norm is None else self.norm(x)

    def logits(self, x):
        """Scores of every token of the vocabulary: (..., C) -> (..., vocab_size)."""
        if self.proj_out is not None:
            x = self.proj_out(x)
        scores = F.linear(x, self.wte.weight if self.head is None else self.head)
        cap = self.config.logit_cap
        return scores if cap is None else cap * torch.tanh(scores / cap)

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
    def generate(self, idx, max_new_tokens, temperature=0, top_k=None, stop=(), lengths=None):
        """Continue every prompt of idx (B, T) by max_new_tokens; returns prompts and continuations.

        temperature: 0 takes the likeliest token, else tokens are drawn from softmax(logits / temperature),
        among the `top_k` likeliest if given. stop: token ids that end a sample, which then repeats its stop
        token; generation ends early once all samples have ended. lengths: of the prompts, (B,), where idx is
        padded on the right; a longer prompt's tokens are read one by one while a shorter one is continued
        already. Past the context length the window slides: learned positions shift under it, so the cache is
        no use there and every step reads the whole window.
        """
        cache = Cache(len(self.blocks))
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
