"""Floating-point operations by formula: matrix products and convolutions, a multiply-add counted as two.

What is left out (norms, softmax, activations, resizing) is below one per cent of them.
"""

from streamt1_jax.config import PATCH, DiTConfig, ModelConfig, RunConfig, UMT5Config, VAEConfig
from streamt1_jax.models.vae import decoder_widths


def dit_forward(config: DiTConfig, tokens: int, past_tokens: int | float, *, context: bool = False) -> int | float:
    """One forward of one candidate's chunk.

    Args:
        tokens: of the chunk itself.
        past_tokens: of earlier chunks that it attends to; a mean where they vary.
        context: the context pass, which needs no head and of the last block only keys and values.
    """
    dim, seen = config.dim, tokens + past_tokens
    # Self-attention q, k, v, o; cross-attention q, o (its k, v are made once per prompt); feed-forward.
    linears = 2 * tokens * (6 * dim * dim + 2 * dim * config.ffn_dim)
    attention = 4 * tokens * dim * (seen + config.text_len)
    patch = 2 * tokens * dim * PATCH * PATCH * config.in_dim
    if context:
        return patch + (config.num_layers - 1) * (linears + attention) + 2 * tokens * 2 * dim * dim
    head = 2 * tokens * dim * PATCH * PATCH * config.out_dim
    return patch + config.num_layers * (linears + attention) + head


def dit_text(config: DiTConfig) -> int:
    """Cross-attention keys and values of one prompt."""
    return 2 * config.text_len * config.dim * (config.text_dim + config.dim * (1 + 2 * config.num_layers))


def vae_decode_frame(config: VAEConfig, h: int, w: int, *, first: bool) -> int:
    """The decoder for one latent frame of h by w.

    Args:
        first: the first of a video, which is one pixel frame instead of `time_factor`.
    """
    widths = decoder_widths(config)
    deepest = widths[0][0]
    frames, pixels, total = 1, h * w, 0

    def conv(taps: int, din: int, dout: int) -> int:
        return 2 * taps * din * dout * pixels * frames

    def residual(din: int, dout: int) -> int:
        shortcut = conv(1, din, dout) if din != dout else 0
        return conv(27, din, dout) + conv(27, dout, dout) + shortcut

    total += conv(1, config.z_dim, config.z_dim) + conv(27, config.z_dim, deepest)
    total += 2 * residual(deepest, deepest) + conv(4, deepest, deepest) + 4 * pixels * pixels * deepest
    in_time = (*reversed(config.temporal_downsample), None)
    for (din, dout), up in zip(widths, in_time, strict=True):
        total += residual(din, dout) + config.num_res_blocks * residual(dout, dout)
        if up is None:
            continue
        if up and not first:
            total += conv(3, dout, 2 * dout)
            frames *= 2
        pixels *= 4
        total += conv(9, dout, dout // 2)
    return total + conv(27, widths[-1][1], 3)


def umt5_encode(config: UMT5Config, tokens: int) -> int:
    """The text encoder for one prompt of `tokens`, padding included."""
    inner = config.num_heads * config.head_dim
    linears = 2 * tokens * config.dim * (4 * inner + 3 * config.ffn_dim)
    return config.num_layers * (linears + 4 * tokens * tokens * inner)


def chunk(model: ModelConfig, run: RunConfig, height: int, width: int, appended: int | float) -> dict[str, int | float]:
    """Work of one chunk with a full window, by stage of the step, of valid tokens.

    Args:
        height, width: pixels.
        appended: sink chunks appended so far, the mean over chunks and beams.
    """
    beams, count = run.search.grid
    stream, factor = run.stream, model.vae.space_factor
    h, w = height // factor, width // factor
    tokens = stream.latent_frames_per_chunk * (h // PATCH) * (w // PATCH)
    past = tokens * (stream.sink_chunks + stream.window_chunks + appended)
    frames = stream.latent_frames_per_chunk * vae_decode_frame(model.vae, h, w, first=False)
    if run.search.decode == "window":  # The chunk and all of its window, each from a fresh decoder.
        first = vae_decode_frame(model.vae, h, w, first=True) - vae_decode_frame(model.vae, h, w, first=False)
        frames = frames * (1 + run.search.sliding_window_size) + 2 * first
    return {
        "propose": beams * count * len(stream.denoising_steps) * dit_forward(model.dit, tokens, past),
        "recall": beams * dit_forward(model.dit, tokens, past, context=True),
        "watch": beams * count * frames,
    }
