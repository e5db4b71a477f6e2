"""What the checkpoints of each family say and how they say it: a `Family` is one place to read, one to add.

Source: the documentation of the transformers library, for each family's config.json and its defaults.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from data.files import read_field


@dataclass
class Family:
    """The checkpoints of one model_type in the hub layout.

    fields: GPTConfig's field -> (config.json's, its kind, what null or a missing one stands for; ... where
    that is refused). names: model.py's module -> the stored one, {} being a block's number. switches: the
    GPTConfig fields that are the same in all of the family's checkpoints, whatever a config says. missing:
    fields of a config.json that are not null where they are missing. only: fields with the one value that
    model.py implements. local: a function (path, fields, layers) that tells of every layer whether it has a
    sliding window, where the config has no `layer_types`; None: no layer has one. rope_theta: the default
    base of rotary positions, None: positions are learned. rope_local_theta: the same for layers with a
    window, where theirs is another. transposed: a block's matrices are stored (in, out). first_position: the
    row of the learned position 0.
    """

    fields: dict
    names: dict
    switches: dict = field(default_factory=dict)
    missing: dict = field(default_factory=dict)
    only: dict = field(default_factory=dict)
    local: Callable | None = None
    rope_theta: float | None = 10000.0
    rope_local_theta: float | None = None
    transposed: bool = False
    first_position: int = 0


def everywhere(path, fields, layers):
    """Mistral's layers with a sliding window."""
    return [True] * layers


def in_the_last(path, fields, layers):
    """Qwen's: those from `max_window_layers` on, if a window is used at all."""
    first = read_field(path, {"max_window_layers": 28, **fields}, "max_window_layers", int, zero=True)
    return [layer >= first for layer in range(layers)]


def in_every_other(path, fields, layers):
    """Gemma 2's: the first, the third, ..."""
    return [layer % 2 == 0 for layer in range(layers)]


def but_in_every_sixth(path, fields, layers):
    """Gemma 3's: all but every sixth, or what the config says."""
    pattern = read_field(path, fields, "sliding_window_pattern", int, 6)
    return [(layer + 1) % pattern != 0 for layer in range(layers)]


GPT2 = Family(
    fields={
        "vocab_size": ("vocab_size", int, ...),
        "block_size": ("n_positions", int, ...),
        "n_layer": ("n_layer", int, ...),
        "n_head": ("n_head", int, ...),
        "n_embd": ("n_embd", int, ...),
        "n_inner": ("n_inner", int, None),
        "activation": ("activation_function", str, ...),
        "norm_eps": ("layer_norm_epsilon", float, ...),
        "tied_head": ("tie_word_embeddings", bool, True),
    },
    names={
        "wte": "transformer.wte",
        "wpe": "transformer.wpe",
        "norm1": "transformer.h.{}.ln_1",
        "attn.q": "transformer.h.{}.attn.c_attn",  # q, k and v in one
        "attn.k": "transformer.h.{}.attn.c_attn",
        "attn.v": "transformer.h.{}.attn.c_attn",
        "attn.o": "transformer.h.{}.attn.c_proj",
        "norm2": "transformer.h.{}.ln_2",
        "mlp.up": "transformer.h.{}.mlp.c_fc",
        "mlp.down": "transformer.h.{}.mlp.c_proj",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    only={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    rope_theta=None,
    transposed=True,
)
OPT = Family(
    fields={
        "vocab_size": ("vocab_size", int, ...),
        "block_size": ("max_position_embeddings", int, ...),
        "n_layer": ("num_hidden_layers", int, ...),
        "n_head": ("num_attention_heads", int, ...),
        "n_embd": ("hidden_size", int, ...),
        "n_inner": ("ffn_dim", int, ...),
        "activation": ("activation_function", str, ...),
        "qkv_bias": ("enable_bias", bool, True),
        "out_bias": ("enable_bias", bool, True),
        "mlp_bias": ("enable_bias", bool, True),
        "tied_head": ("tie_word_embeddings", bool, True),
        "n_wte": ("word_embed_proj_dim", int, None),
        "pre_norm": ("do_layer_norm_before", bool, True),
    },
    names={
        "wte": "model.decoder.embed_tokens",
        "proj_in": "model.decoder.project_in",
        "wpe": "model.decoder.embed_positions",
        "norm1": "model.decoder.layers.{}.self_attn_layer_norm",
        "attn.q": "model.decoder.layers.{}.self_attn.q_proj",
        "attn.k": "model.decoder.layers.{}.self_attn.k_proj",
        "attn.v": "model.decoder.layers.{}.self_attn.v_proj",
        "attn.o": "model.decoder.layers.{}.self_attn.out_proj",
        "norm2": "model.decoder.layers.{}.final_layer_norm",
        "mlp.up": "model.decoder.layers.{}.fc1",
        "mlp.down": "model.decoder.layers.{}.fc2",
        "norm": "model.decoder.final_layer_norm",
        "proj_out": "model.decoder.project_out",
        "head": "lm_head",
    },
    only={
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
    },
    rope_theta=None,
    first_position=2,
)
LLAMA = Family(
    fields={
        "vocab_size": ("vocab_size", int, ...),
        "block_size": ("max_position_embeddings", int, ...),
        "n_layer": ("num_hidden_layers", int, ...),
        "n_head": ("num_attention_heads", int, ...),
        "n_kv_head": ("num_key_value_heads", int, None),
        "head_dim": ("head_dim", int, None),
        "n_embd": ("hidden_size", int, ...),
        "n_inner": ("intermediate_size", int, ...),
        "activation": ("hidden_act", str, ...),
        "norm_eps": ("rms_norm_eps", float, ...),
        "qkv_bias": ("attention_bias", bool, False),
        "out_bias": ("attention_bias", bool, False),
        "mlp_bias": ("mlp_bias", bool, False),
        "tied_head": ("tie_word_embeddings", bool, False),
    },
    names={
        "wte": "model.embed_tokens",
        "norm1": "model.layers.{}.input_layernorm",
        "attn.q": "model.layers.{}.self_attn.q_proj",
        "attn.k": "model.layers.{}.self_attn.k_proj",
        "attn.v": "model.layers.{}.self_attn.v_proj",
        "attn.o": "model.layers.{}.self_attn.o_proj",
        "norm2": "model.layers.{}.post_attention_layernorm",
        "mlp.gate": "model.layers.{}.mlp.gate_proj",
        "mlp.up": "model.layers.{}.mlp.up_proj",
        "mlp.down": "model.layers.{}.mlp.down_proj",
        "norm": "model.norm",
        "head": "lm_head",
    },
    switches=dict(rms_norm=True, gated_mlp=True),
)

MISTRAL = Family(
    fields=LLAMA.fields,
    names=LLAMA.names,
    switches=LLAMA.switches | dict(qkv_bias=False, out_bias=False, mlp_bias=False),
    missing={"sliding_window": 4096},
    only={"layer_types": None, "use_sliding_window": True},
    local=everywhere,
)
QWEN2 = Family(
    fields=MISTRAL.fields,
    names=LLAMA.names,
    switches=MISTRAL.switches | dict(qkv_bias=True),
    missing={"sliding_window": 4096, "use_sliding_window": False},
    local=in_the_last,
)
HEAD_NORMS = {
    "attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "attn.k_norm": "model.layers.{}.self_attn.k_norm",
}
QWEN3 = Family(
    fields=LLAMA.fields | {"head_dim": ("head_dim", int, ...)},
    names=LLAMA.names | HEAD_NORMS,
    switches=LLAMA.switches | dict(mlp_bias=False, qk_norm=True),
    missing={"sliding_window": 4096, "use_sliding_window": False},
    local=in_the_last,
)
GEMMA2 = Family(
    fields=LLAMA.fields
    | {
        "n_kv_head": ("num_key_value_heads", int, ...),
        "head_dim": ("head_dim", int, ...),
        "activation": ("hidden_activation", str, "gelu_pytorch_tanh"),
        "tied_head": ("tie_word_embeddings", bool, True),
        "query_scalar": ("query_pre_attn_scalar", float, ...),
        "attn_cap": ("attn_logit_softcapping", float, None),
        "logit_cap": ("final_logit_softcapping", float, None),
    },
    names=LLAMA.names
    | {
        "norm1_out": "model.layers.{}.post_attention_layernorm",
        "norm2": "model.layers.{}.pre_feedforward_layernorm",
        "norm2_out": "model.layers.{}.post_feedforward_layernorm",
    },
    switches=LLAMA.switches | dict(mlp_bias=False, norm_offset=True, out_norms=True, scale_wte=True),
    missing={"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    only={"use_bidirectional_attention": False, "use_sliding_window": True},
    local=in_every_other,
)
GEMMA3 = Family(
    fields=GEMMA2.fields,
    names=GEMMA2.names | HEAD_NORMS,
    switches=GEMMA2.switches | dict(qk_norm=True, attn_cap=None),
    missing={"sliding_window": 4096},
    only=GEMMA2.only | {"attn_logit_softcapping": None},
    local=but_in_every_sixth,
    rope_theta=1000000.0,
    rope_local_theta=10000.0,
)
FAMILIES = {  # by model_type
    "gpt2": GPT2,
    "opt": OPT,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
}
