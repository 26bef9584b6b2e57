"""LongLive with prompt switches in plain NumPy and float64, after METHOD sections 1, 2, 3 and 9 alone.

Nothing is shared with the package: weights have their published names, keys and values are kept in lists of chunks,
every angle is that of a frame's own position, and a window is cut from the list. Slow, and plain to read.
"""

from typing import Any, TypeAlias

import numpy as np

KV: TypeAlias = list[tuple[np.ndarray, np.ndarray]]  # a layer each: keys (rotated) and values of some frames, [t, N, D]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def rms_norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def rotate(x, start, frames, height, width):
    """RoPE of [t, N, D] at global frame positions."""
    pairs = x.shape[-1] // 2
    counts = (pairs - 2 * (x.shape[-1] // 6), x.shape[-1] // 6, x.shape[-1] // 6)
    axes = np.meshgrid(np.arange(frames) + start, np.arange(height), np.arange(width), indexing="ij")
    angles = [
        place.reshape(-1, 1) * 10000.0 ** (-np.arange(count) / count) for place, count in zip(axes, counts, strict=True)
    ]
    turn = np.exp(1j * np.concatenate(angles, axis=1))[:, None]
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def attend(q, k, v):
    scores = np.einsum("qnd,knd->nqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nqk,knd->qnd", weights / weights.sum(-1, keepdims=True), v).reshape(len(q), -1)


class ReferenceLongLive:
    """One recorded case: its weights, its noise and its prompts."""

    def __init__(self, tensors: dict[str, np.ndarray], sizes: dict[str, Any]):
        self.tensors = {key: x.astype(np.float64) for key, x in tensors.items()}
        prefix = "dit.model."
        self.weights = {key.removeprefix(prefix): x for key, x in self.tensors.items() if key.startswith(prefix)}
        self.sizes, self.dit = sizes, sizes["dit"]
        u = np.linspace(1, 0, 1001)[:-1]
        self.sigmas = 5 * u / (1 + 4 * u)
        self.steps = [float(np.append(1000 * self.sigmas, 0)[1000 - step]) for step in sizes["steps"]]

    def sigma(self, timestep: float) -> float:
        return self.sigmas[np.abs(1000 * self.sigmas - timestep).argmin()]

    def linear(self, name: str, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def heads(self, name: str, kind: str, x):
        x = self.linear(f"{name}.{kind}", x)
        if kind in "qk":
            x = rms_norm(x, self.weights[f"{name}.norm_{kind}.weight"])
        return x.reshape(len(x), self.dit["num_heads"], -1)

    def forward(self, x, timestep: float, prompt, past: list[KV], start: int) -> tuple[np.ndarray, KV]:
        """(flow, keys and values) of frames [f, C, h, w], all attending to each other and to the past."""
        f, channels, height, width = x.shape
        h, w, dim = height // 2, width // 2, self.dit["dim"]
        patches = x.reshape(f, channels, h, 2, w, 2).transpose(0, 2, 4, 1, 3, 5).reshape(f * h * w, -1)
        y = patches @ self.weights["patch_embedding.weight"].reshape(dim, -1).T + self.weights["patch_embedding.bias"]
        text = self.linear("text_embedding.2", gelu(self.linear("text_embedding.0", prompt)))
        half = self.dit["freq_dim"] // 2
        angles = timestep * 10000.0 ** (-np.arange(half) / half)
        time = np.concatenate([np.cos(angles), np.sin(angles)])
        e = self.linear("time_embedding.2", silu(self.linear("time_embedding.0", time)))
        e0 = self.linear("time_projection.1", silu(e)).reshape(6, dim)

        made: KV = []
        for layer in range(self.dit["num_layers"]):
            block = f"blocks.{layer}"
            shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.weights[f"{block}.modulation"][0] + e0
            z = layer_norm(y) * (1 + scale_a) + shift_a
            q, k, v = (self.heads(f"{block}.self_attn", kind, z) for kind in "qkv")
            q, k = (rotate(part, start, f, h, w) for part in (q, k))
            made.append((k, v))
            seen = [*(chunk[layer] for chunk in past), (k, v)]
            keys, values = (np.concatenate(parts) for parts in zip(*seen, strict=True))
            y = y + gate_a * self.linear(f"{block}.self_attn.o", attend(q, keys, values))
            z = layer_norm(y) * self.weights[f"{block}.norm3.weight"] + self.weights[f"{block}.norm3.bias"]
            q = self.heads(f"{block}.cross_attn", "q", z)
            k, v = (self.heads(f"{block}.cross_attn", kind, text) for kind in "kv")
            y = y + self.linear(f"{block}.cross_attn.o", attend(q, k, v))
            z = layer_norm(y) * (1 + scale_f) + shift_f
            y = y + gate_f * self.linear(f"{block}.ffn.2", gelu(self.linear(f"{block}.ffn.0", z)))
        shift, scale = self.weights["head.modulation"][0] + e
        out = self.linear("head.head", layer_norm(y) * (1 + scale) + shift).reshape(f, h, w, 2, 2, channels)
        return out.transpose(0, 5, 1, 3, 2, 4).reshape(x.shape), made

    def denoise(self, chunk: int, prompt, past: list[KV]) -> np.ndarray:
        f = self.tensors["renoise"].shape[2]
        x = self.tensors["noise"][0, chunk * f : (chunk + 1) * f]
        for number, timestep in enumerate(self.steps):
            if number > 0:
                sigma = self.sigma(timestep)
                x = (1 - sigma) * x + sigma * self.tensors["renoise"][chunk, number - 1]
            flow, _ = self.forward(x, timestep, prompt, past, chunk * f)
            x = x - self.sigma(timestep) * flow
        return x

    def recache(self, made: list[np.ndarray], prompt, cache: list[KV], *, global_sink: bool) -> list[KV]:
        """The last chunks once more, all together, at timestep 0; one sink chunk, as in all recorded cases."""
        f, local = len(made[0]), self.sizes["local"] // len(made[0])
        kept = cache[:1] if global_sink and len(made) > local else []
        first = max(len(made) - local, 0) + len(kept)
        _, kv = self.forward(np.concatenate(made[first:]), 0.0, prompt, kept, first * f)
        count = len(made) - first
        parts = [[np.split(x, count) for x in layer] for layer in kv]
        return kept + [[(k[i], v[i]) for k, v in parts] for i in range(count)]

    def run(self, *, global_sink: bool) -> np.ndarray:
        """The latents, [F, C, h, w]."""
        f = self.tensors["renoise"].shape[2]
        window = (self.sizes["local"] - self.sizes["sink"]) // f - 1
        prompts = iter(self.tensors["prompt_embeds"])
        prompt = next(prompts)
        made: list[np.ndarray] = []
        cache: list[KV] = []
        for chunk in range(self.sizes["chunks"]):
            if chunk * f in self.sizes["switch_frames"]:
                prompt = next(prompts)
                cache = self.recache(made, prompt, cache, global_sink=global_sink)
            if len(cache) > 1 + window:
                cache = [cache[0], *cache[-window:]]
            made.append(self.denoise(chunk, prompt, cache))
            cache.append(self.forward(made[-1], 0.0, prompt, cache, chunk * f)[1])
        return np.concatenate(made)
