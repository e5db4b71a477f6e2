"""What the checkpoints of each family say and how they say it: a `Family` is one place to read, one to add.

Source: the documentation of the transformers library, for each family's config.json and its defaults.
"""

import warnings
from dataclasses import dataclass, field

from data.files import InputError, one_of, read_field
from model import GPTConfig


@dataclass
class Family:
    """The checkpoints of one model_type in the hub layout.

    fields: GPTConfig's field -> (config.json's, its kind, what a missing one stands for; ... where it must
    not be missing). names: model.py's module -> the stored one, {} being a block's number. switches: the
    GPTConfig fields that are the same in all of the family's checkpoints. only: fields of a config.json with
    the one value that model.py implements. rotary: positions are rotated, with settings of their own.
    transposed: a block's matrices are stored (in, out). first_position: the row of the learned position 0.
    """

    fields: dict
    names: dict
    switches: dict = field(default_factory=dict)
    only: dict = field(default_factory=dict)
    rotary: bool = True
    transposed: bool = False
    first_position: int = 0


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
    rotary=False,
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
    },
    names={
        "wte": "model.decoder.embed_tokens",
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
        "head": "lm_head",
    },
    only={
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
    },
    rotary=False,
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
NO_BIAS = dict(qkv_bias=False, out_bias=False, mlp_bias=False)  # whatever the config says
MISTRAL = Family(
    fields={name: value for name, value in LLAMA.fields.items() if name not in NO_BIAS},
    names=LLAMA.names,
    switches=LLAMA.switches | NO_BIAS,
)
QWEN2 = Family(
    fields=MISTRAL.fields,
    names=LLAMA.names,
    switches=MISTRAL.switches | dict(qkv_bias=True),
)
FAMILIES = {"gpt2": GPT2, "opt": OPT, "llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2}  # by model_type

LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def gpt_config(path, fields):
    """The `GPTConfig` of a model with these `fields` of a config.json; `path` is for messages.

    An option that would change the model's outputs and that model.py does not implement is a ValueError that
    names it. Dropout acts in training alone, and there is none here. A sliding attention window is the same
    as full attention up to its length: it limits `block_size`, with a warning.
    """
    kind = one_of(path, "model_type", fields.get("model_type"), FAMILIES)
    family = FAMILIES[kind]
    only = family.only | {"quantization_config": None, "partial_rotary_factor": 1.0}
    for name, value in {**only, "word_embed_proj_dim": fields.get("hidden_size")}.items():
        one_of(path, name, fields.get(name), (None, value))
    config = dict(family.switches)
    for name, (stored, kind_of, default) in family.fields.items():
        config[name] = read_field(path, fields, stored, kind_of, *(() if default is ... else (default,)))
    if family.rotary:
        config["rope_theta"], config["rope_scaling"] = _read_rope(path, fields)
    window, used = None, read_field(path, fields, "use_sliding_window", bool, False)
    if kind == "mistral" or kind == "qwen2" and used:
        # null says that there is no window; a missing field stands for the library's default
        window = read_field(path, {"sliding_window": 4096, **fields}, "sliding_window", int, None)
    for layer_type in read_field(path, fields, "layer_types", list, []):
        one_of(path, "layer_types", layer_type, ("full_attention", window and "sliding_attention"))
    if window is not None and window < config["block_size"]:
        warnings.warn(f"{path}: sliding_window limits the context to {window} tokens", stacklevel=2)
        config["block_size"] = window
    return GPTConfig(**config)


def _read_rope(path, fields):
    """(rope_theta, rope_scaling) from `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""
    rope = {"rope_theta": fields.get("rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        rope |= read_field(path, fields, name, dict, {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    names = LLAMA3_ROPE if one_of(path, "rope_type", kind, ("default", "llama3")) == "llama3" else ()
    if surplus := sorted(rope.keys() - {*names, "rope_theta", "rope_type", "type"}):
        raise InputError(f"{path}: the rope setting {surplus[0]!r:.100} is not supported")
    scaling = {name: read_field(path, rope, name, float) for name in names} or None
    return read_field(path, rope, "rope_theta", float, 10000.0), scaling
