"""An independent reading of checkpoints in the hub layout."""

import cmath
import math

import numpy as np
import torch


class Plain:
    """The families once more, a vector at a time, in numpy, from config.json and the tensors as stored."""

    NAMES = {  # of the parts that Llama, Mistral and Qwen call otherwise
        "gpt2": dict(first="transformer.", wte="wte", block="h.", norm1="ln_1", norm2="ln_2",
                     out="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj", norm="ln_f"),
        "opt": dict(first="model.decoder.", norm1="self_attn_layer_norm", norm2="final_layer_norm",
                    out="self_attn.out_proj", up="fc1", down="fc2", norm="final_layer_norm"),
        "gemma2": dict(norm2="pre_feedforward_layernorm"),
        "gemma3_text": dict(norm2="pre_feedforward_layernorm"),
    }  # fmt: skip
    LLAMA = dict(first="model.", wte="embed_tokens", block="layers.", norm1="input_layernorm",
                 norm2="post_attention_layernorm", out="self_attn.o_proj", gate="mlp.gate_proj",
                 up="mlp.up_proj", down="mlp.down_proj", norm="norm")  # fmt: skip

    def __init__(self, config, tensors):
        self.config, self.kind = config, config["model_type"]
        self.get = {name: tensor.double().numpy() for name, tensor in tensors.items()}
        self.names = self.LLAMA | self.NAMES.get(self.kind, {})
        self.hidden = config.get("n_embd") or config["hidden_size"]
        self.n_layer = config.get("n_layer") or config["num_hidden_layers"]
        self.n_head = config.get("n_head") or config["num_attention_heads"]
        self.n_kv = config.get("num_key_value_heads") or self.n_head
        self.size = config.get("head_dim") or self.hidden // self.n_head
        self.rotary = self.kind not in ("gpt2", "opt")
        self.gemma = self.kind.startswith("gemma")
        self.norms_last = config.get("do_layer_norm_before") is False
        self.kinds = config.get("layer_types") or ["full_attention"] * self.n_layer
        if self.kind == "mistral" and config["sliding_window"]:
            self.kinds = ["sliding_attention"] * self.n_layer

    def linear(self, x, name):
        weight = self.get[name + ".weight"]
        y = x @ weight if self.kind == "gpt2" else x @ weight.T
        return y + self.get[name + ".bias"] if name + ".bias" in self.get else y

    def norm(self, x, name):
        if name + ".weight" not in self.get:
            return x
        weight = self.get[name + ".weight"]
        if self.rotary:
            return x / math.sqrt(np.mean(x * x) + self.config["rms_norm_eps"]) * (weight + self.gemma)
        scale = math.sqrt(x.var() + self.config.get("layer_norm_epsilon", 1e-5))
        return (x - x.mean()) / scale * weight + self.get[name + ".bias"]

    def activate(self, x):
        names = ("hidden_activation", "hidden_act", "activation_function")
        name = next(self.config[name] for name in names if name in self.config)
        if name == "relu":
            return np.maximum(x, 0)
        if name == "silu":
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def cap(self, x, name):
        cap = self.config.get(name)
        return cap * np.tanh(x / cap) if cap else x

    def speed(self, i, half, layer):
        """By how much the i-th pair of channels turns from one position to the next."""
        rope = self.config.get("rope_parameters") or {
            "rope_theta": self.config["rope_theta"],
            **(self.config["rope_scaling"] or {}),
        }
        rope = rope.get(self.kinds[layer], rope)
        speed = rope["rope_theta"] ** (-i / half)
        if rope.get("rope_type", "default") != "llama3":
            return speed
        wavelength, context = 2 * math.pi / speed, rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if wavelength > context / low:
            return speed / rope["factor"]
        if wavelength > context / high:
            smooth = (context / wavelength - low) / (high - low)
            return (1 - smooth) * speed / rope["factor"] + smooth * speed
        return speed

    def turn(self, x, position, layer):
        if not self.rotary:
            return x
        half = len(x) // 2
        y = np.empty_like(x)
        for i in range(half):
            turned = complex(x[i], x[i + half]) * cmath.exp(1j * position * self.speed(i, half, layer))
            y[i], y[i + half] = turned.real, turned.imag
        return y

    def embed(self, ids):
        table = self.get[self.names["first"] + self.names["wte"] + ".weight"]
        xs = [table[i] * (math.sqrt(self.hidden) if self.gemma else 1) for i in ids]
        if "model.decoder.project_in.weight" in self.get:
            xs = [self.linear(x, "model.decoder.project_in") for x in xs]
        if self.kind == "gpt2":
            xs = [x + self.get["transformer.wpe.weight"][t] for t, x in enumerate(xs)]
        if self.kind == "opt":
            xs = [x + self.get["model.decoder.embed_positions.weight"][t + 2] for t, x in enumerate(xs)]
        return table, xs

    def heads(self, x, block, position, layer):
        """The queries, keys and values of one position, each a list of heads."""
        if self.kind == "gpt2":
            q, k, v = np.split(self.linear(x, block + "attn.c_attn"), 3)
        else:
            q, k, v = (self.linear(x, block + f"self_attn.{part}_proj") for part in "qkv")
        q, k, v = (np.split(part, len(part) // self.size) for part in (q, k, v))
        q = [self.norm(head, block + "self_attn.q_norm") for head in q]
        k = [self.norm(head, block + "self_attn.k_norm") for head in k]
        return [self.turn(head, position, layer) for head in q], [self.turn(h, position, layer) for h in k], v

    def attend(self, xs, block, layer):
        scalar = self.config.get("query_pre_attn_scalar") or self.size
        window = self.config["sliding_window"] if self.kinds[layer] == "sliding_attention" else len(xs)
        norm = block + self.names["norm1"]
        read = [self.heads(x if self.norms_last else self.norm(x, norm), block, t, layer)
                for t, x in enumerate(xs)]  # fmt: skip
        for t, x in enumerate(xs):
            mixed, seen = [], read[max(0, t + 1 - window) : t + 1]
            for h in range(self.n_head):
                shared = h // (self.n_head // self.n_kv)
                scores = np.array([read[t][0][h] @ keys[shared] / math.sqrt(scalar) for _, keys, _ in seen])
                scores = self.cap(scores, "attn_logit_softcapping")
                share = np.exp(scores - max(scores))
                share /= share.sum()
                mixed.append(sum(p * values[shared] for p, (_, _, values) in zip(share, seen)))
            y = self.linear(np.concatenate(mixed), block + self.names["out"])
            y = self.norm(y, block + "post_attention_layernorm") if self.gemma else y
            yield self.norm(x + y, norm) if self.norms_last else x + y

    def feed_forward(self, x, block):
        norm = block + self.names["norm2"]
        normed = x if self.norms_last else self.norm(x, norm)
        inner = self.linear(normed, block + self.names["up"])
        if self.rotary:
            inner = self.activate(self.linear(normed, block + self.names["gate"])) * inner
        else:
            inner = self.activate(inner)
        y = self.linear(inner, block + self.names["down"])
        y = self.norm(y, block + "post_feedforward_layernorm") if self.gemma else y
        return self.norm(x + y, norm) if self.norms_last else x + y

    def logits(self, ids):
        """(T, vocab) for one sequence of T tokens."""
        table, xs = self.embed(ids)
        for layer in range(self.n_layer):
            block = f"{self.names['first']}{self.names['block']}{layer}."
            xs = [self.feed_forward(x, block) for x in self.attend(xs, block, layer)]
        xs = [self.norm(x, self.names["first"] + self.names["norm"]) for x in xs]
        if "model.decoder.project_out.weight" in self.get:
            xs = [self.linear(x, "model.decoder.project_out") for x in xs]
        head = self.get.get("lm_head.weight", table)
        return torch.tensor(self.cap(np.array([head @ x for x in xs]), "final_logit_softcapping"))
