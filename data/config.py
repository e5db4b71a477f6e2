"""From what a config.json says to the `GPTConfig` that means the same, or to an error that says why not."""

from data.families import FAMILIES
from data.files import InputError, one_of, read_field
from model import GPTConfig

LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
LAYER_TYPES = ("full_attention", "sliding_attention")


def gpt_config(path, fields):
    """The `GPTConfig` of a model with these `fields` of a config.json; `path` is for messages.

    An option that would change the model's outputs and that model.py does not implement is a ValueError that
    names it. Dropout acts in training alone, and there is none here.
    """
    family = FAMILIES[one_of(path, "model_type", fields.get("model_type"), FAMILIES)]
    fields = family.missing | fields
    for name, value in {"quantization_config": None, "partial_rotary_factor": 1.0, **family.only}.items():
        one_of(path, name, fields.get(name), (None, value))
    config = dict(family.switches)
    for name, (stored, kind, default) in family.fields.items():
        if name not in family.switches:
            config[name] = read_field(path, fields, stored, kind, *(() if default is ... else (default,)))
    if family.rope_local_theta:
        config["rope_local_theta"], fields = _read_local_rope(path, fields, family.rope_local_theta)
    if family.rope_theta:
        config["rope_theta"], config["rope_scaling"] = _read_rope(path, fields, family.rope_theta)
    config["windows"] = _read_windows(path, fields, family.local, config["n_layer"])
    return GPTConfig(**config)


def _read_windows(path, fields, local, n_layer):
    """Of every layer its sliding window or None. local: `Family.local`."""
    window = read_field(path, fields, "sliding_window", int, None) if local else None
    if not read_field(path, fields, "use_sliding_window", bool, True):
        window = None
    kinds = read_field(path, fields, "layer_types", list, None)
    if kinds is None:
        slides = local(path, fields, n_layer) if window else [False] * n_layer
    else:
        known = LAYER_TYPES if window else LAYER_TYPES[:1]
        slides = [one_of(path, "layer_types", kind, known) == LAYER_TYPES[1] for kind in kinds]
    return [window if slide else None for slide in slides]


def _read_rope(path, fields, default):
    """(rope_theta, rope_scaling) from `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""
    rope = {"rope_theta": fields.get("rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        rope |= read_field(path, fields, name, dict, {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    names = LLAMA3_ROPE if one_of(path, "rope_type", kind, ("default", "llama3")) == "llama3" else ()
    if surplus := sorted(rope.keys() - {*names, "rope_theta", "rope_type", "type"}):
        raise InputError(f"{path}: the rope setting {surplus[0]!r:.100} is not supported")
    scaling = {name: read_field(path, rope, name, float) for name in names} or None
    return read_field(path, rope, "rope_theta", float, default), scaling


def _read_local_rope(path, fields, default):
    """(rope_local_theta, the fields as they would be if all layers were like those without a window).

    `rope_parameters` has an entry a kind of layer; the older spelling is `rope_local_base_freq`.
    """
    given = read_field(path, fields, "rope_parameters", dict, {})
    for kind in given:
        one_of(path, "rope_parameters", kind, LAYER_TYPES)
    full, local = (read_field(path, given, kind, dict, {}) for kind in LAYER_TYPES)
    local = {"rope_theta": fields.get("rope_local_base_freq"), "rope_parameters": local}
    theta, scaling = _read_rope(path, local, default)
    one_of(path, "the scaling of rope_parameters of sliding_attention", scaling, (None,))
    return theta, fields | {"rope_parameters": full}
