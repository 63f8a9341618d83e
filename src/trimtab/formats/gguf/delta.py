"""Gated delta nets, Qwen3.5's linear attention, as llama.cpp computes them.

Each key head serves v / k value heads: transformers' value head h belongs to key head h // (v / k), llama.cpp's to h mod k.
So whatever belongs to value heads changes places,

    head of the file  j k + i   <-   head i (v / k) + j        i < k, j < v / k

    in_proj_z, in_proj_a, in_proj_b, A_log, dt_bias     rows
    in_proj_qkv, conv1d                                 rows after those of queries and keys
    out_proj                                            columns: groups of its grid move whole, or it is refused

and the decay is stored as -exp(A_log), which llama.cpp multiplies by.

Legend: k key heads, v value heads.
"""

from typing import Any

import torch
from torch import Tensor

INSIDE = ".linear_attn."
"""In the name of every parameter of such a layer."""
KEYS = ("conv_kernel", "state_size", "group_count", "time_step_rank", "inner_size")


def metadata(config: Any) -> dict[str, Any]:
    """The keys that say its sizes, and the period of its layers."""
    values = (
        config.linear_conv_kernel_dim,
        config.linear_key_head_dim,
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_value_head_dim * config.linear_num_value_heads,
    )
    found: dict[str, Any] = {f"ssm.{key}": value for key, value in zip(KEYS, values, strict=True)}
    return found | {"full_attention_interval": period(config), "rope.dimension_sections": [*sections(config), 0]}


def sections(config: Any) -> list[int]:
    """How many rotary frequencies are of positions in time, height and width: equal ones in a text."""
    found: list[int] = config.rope_parameters.get("mrope_section", [11, 11, 10])
    return found


def period(config: Any) -> int:
    """Layers from one of full attention to the next."""
    kinds = config.layer_types
    return kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1


def row_order(config: Any, name: str, rows: int) -> Tensor | None:
    """Where each row of a parameter comes from: int64 (rows,), or None if they stay."""
    part = name.rpartition(INSIDE)[2].removesuffix(".weight")
    if part in ("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias"):
        return _heads(config, rows)
    if part in ("in_proj_qkv", "conv1d"):
        before = 2 * config.linear_key_head_dim * config.linear_num_key_heads
        moved = _heads(config, rows - before)
        return None if moved is None else torch.cat([torch.arange(before), before + moved])
    return None


def column_order(config: Any, name: str, columns: int) -> Tensor | None:
    """The same of columns."""
    return _heads(config, columns) if name.endswith(f"{INSIDE}out_proj.weight") else None


def _heads(config: Any, size: int) -> Tensor | None:
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    if keys == values:
        return None
    return torch.arange(size).view(keys, values // keys, size // values).transpose(0, 1).flatten()


def values(name: str, value: Tensor) -> Tensor:
    """A parameter's numbers as llama.cpp takes them, in float32 where it is not a matrix."""
    if name.endswith(".A_log"):
        return -value.float().exp()
    if name.endswith("conv1d.weight"):
        return value.float().squeeze(1)
    return value if value.dim() > 1 else value.float()
