"""Qwen2-VL with a reward head: transformers' networks (5.x), put together for scoring and nothing else.

- No language-model head, no cache, no generation: hidden states at the reserved tokens are all that is wanted.
- Positions are plain 0..L-1 on all three rotary axes, as the published scores were made. The default of transformers 5
  gives image tokens positions in time, height and width, which makes other scores.
- Rows are padded on the right. Attention is causal, so what is scored never sees the padding and no mask is needed.
- Clips of one batch have one size, so the vision tower attends to all their frames at once; transformers goes frame by
  frame.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen

from streamt1_jax.errors import WeightsError
from streamt1_jax.rewards.frames import Grid
from streamt1_jax.rewards.model_settings import HPSV3, VIDEOREWARD

M = TypeVar("M", bound=nn.Module)
Config: TypeAlias = Any  # a Qwen2VLConfig, whose parts its own annotations do not tell from plain dicts


class FrameAttention(qwen.VisionAttention):
    """The same attention, within each of many frames of one size, as one call."""

    def forward(
        self,
        hidden_states: Float[Tensor, "s d"],
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "s d"]:
        del max_seqlen, kwargs  # of other attention kernels
        frames = len(cu_seqlens) - 1
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        assert position_embeddings is not None
        q, k = qwen.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        q, k, v = (x.unflatten(0, (frames, -1)).transpose(1, 2) for x in (q, k, v))
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(seen.transpose(1, 2).flatten(2).flatten(0, 1))


class RowEmbed(qwen.PatchEmbed):
    """The same convolution over whole patches, as the matrix product that it is."""

    def forward(self, hidden_states: Float[Tensor, "s p"]) -> Float[Tensor, "s d"]:
        kernel = self.proj.weight
        return nn.functional.linear(hidden_states.to(kernel.dtype), kernel.flatten(1))


class RewardNetwork(nn.Module):
    """The vision tower and the language model of Qwen2-VL, and a head.

    Args:
        config: its `vocab_size` is the tokenizer's length.
        head: takes hidden states [..., D].
        pad_id: the token that a clip's features take the place of.
    """

    def __init__(self, config: Config, head: nn.Module, pad_id: int):
        super().__init__()
        self.config, self.pad_id = config, pad_id
        self.model = qwen.Qwen2VLModel(config)
        vision = config.vision_config
        for block in self.model.visual.blocks:
            block.attn = FrameAttention(vision)
        self.model.visual.patch_embed = RowEmbed(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            in_channels=vision.in_channels,
            embed_dim=vision.embed_dim,
        )
        self.rm_head = head

    @property
    def body_dtype(self) -> torch.dtype:
        return self.model.language_model.norm.weight.dtype

    def look(self, patches: Float[Tensor, "n p d"], grid: Grid) -> Float[Tensor, "n v D"]:
        """The visual tokens of n clips of one size."""
        grids = torch.tensor([grid] * len(patches), device=patches.device)
        made = self.model.visual(patches.flatten(0, 1).to(self.body_dtype), grid_thw=grids)
        return made.pooler_output.unflatten(0, (len(patches), -1))

    def read(
        self, ids: Int64[Tensor, "n L"], features: Float[Tensor, "n v D"], places: Int64[Tensor, "n k"]
    ) -> Float[Tensor, "n k D"]:
        """The last hidden states at some places of every row.

        Args:
            ids: padded on the right; `pad_id` stands v times in every row.
            features: what takes the place of the pads.
        """
        language = self.model.language_model
        embeds = language.embed_tokens(ids)
        embeds[ids == self.pad_id] = features.flatten(0, 1).to(embeds.dtype)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, len(ids), -1)
        hidden = language(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
        return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))


def reward_config(values: Mapping[str, Any], vocab_size: int) -> Config:
    """A published `config.json`, flat as on the hub or nested, for this tokenizer.

    Raises:
        WeightsError: the config is of another model.
    """
    if values.get("model_type") != "qwen2_vl":
        raise WeightsError(
            f"the base's config.json is of {values.get('model_type')!r}, expected 'qwen2_vl'; give the Qwen2-VL that "
            "the reward was trained on"
        )
    config: Config = Qwen2VLConfig.from_dict(copy.deepcopy(dict(values)))
    config.text_config.vocab_size = vocab_size
    config.text_config.pad_token_id = None  # the published one lies past some tokenizers' end
    config._attn_implementation = "sdpa"
    return config


def published_sizes(name: str) -> dict[str, Any]:
    """The `config.json` of the base of a published reward, as far as sizes go: to plan memory and to measure."""
    hidden, middle, heads, groups = {HPSV3: (3584, 18944, 28, 4), VIDEOREWARD: (1536, 8960, 12, 2)}[name]
    return {
        "model_type": "qwen2_vl",
        "hidden_size": hidden,
        "intermediate_size": middle,
        "num_hidden_layers": 28,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": hidden},
    }


def empty_network(config: Config, head: Callable[[int], nn.Module], pad_id: int) -> RewardNetwork:
    """The network without memory for its parameters; its few constants are real.

    Args:
        head: makes the head for a hidden size.
    """
    with torch.device("meta"):
        network = RewardNetwork(config, head(config.text_config.hidden_size), pad_id)
    # Rotary frequencies are not stored in any file. A network without layers makes the same.
    small = copy.deepcopy(config)
    small.text_config.num_hidden_layers, small.text_config.layer_types, small.vision_config.depth = 0, [], 0
    small.text_config.vocab_size = 1
    small.vision_config.hidden_size = small.vision_config.embed_dim  # a smaller merger; its head size stays
    constants = dict(qwen.Qwen2VLModel(small).named_buffers())
    for name, _ in list(network.model.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        setattr(network.model.get_submodule(parent), leaf, constants[name])
    return network.eval().requires_grad_(False)


def parameter_shapes(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter by name; those of `empty_network` are shapes alone."""
    return dict(network.named_parameters())


def is_linear(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is the weight of a linear layer of the body: what eight bits change."""
    return name.startswith("model.") and len(shape) == 2 and not name.endswith("embed_tokens.weight")


def fill(network: M, tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> M:
    """Puts tensors in the place of the empty parameters, and everything on the device.

    Raises:
        WeightsError: one error with every tensor that is missing, unknown or of another shape.
    """
    left = parameter_shapes(network)
    problems = []
    for name, tensor in tensors:
        empty = left.pop(name, None)
        if empty is None or empty.shape != tensor.shape:
            problems.append(f"+ {name} {tuple(tensor.shape)}")
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, nn.Parameter(tensor.to(device), requires_grad=False))
    problems += [f"- {name} {tuple(empty.shape)}" for name, empty in left.items()]
    if problems:
        raise WeightsError(
            f"the reward's weights do not fit its config: {', '.join(problems[:20])}"
            f"{f' and {len(problems) - 20} more' if len(problems) > 20 else ''}; convert them again"
        )
    return network.to(device)


def pad_rows(rows: list[np.ndarray], fill_with: int = 0) -> Int64[np.ndarray, "n L"]:
    """Rows of ids, padded on the right to the longest."""
    length = max(map(len, rows))
    return np.stack([np.pad(row, (0, length - len(row)), constant_values=fill_with) for row in rows])
