"""How long a text a model can be shown: positions in a table end with it, computed ones do not."""

import logging
from typing import Any

from transformers import PreTrainedModel

from trimtab.errors import UserError

_log = logging.getLogger("trimtab")
_EXTRA = 8
"""Rows that a table may have besides its positions: OPT and BioGPT begin to count at 2."""
_NAMES = ("pos", "wpe")


def check_length(model: PreTrainedModel, tokens: int, key: str) -> str | None:
    """Refuse a text that is longer than a model's table of positions; a line to say where it is only untried.

    Args:
        model: on any device, the meta device included.
        tokens: length of a text.
        key: the recipe's, for the error message.

    Returns:
        A line where positions are computed (rotary), so that a longer text runs, on positions that were never trained.
    """
    config: Any = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if not isinstance(limit, int) or tokens <= limit:
        return None
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tables = [
        name
        for name, tensor in tensors
        if tensor.ndim == 2
        and limit <= tensor.shape[0] <= limit + _EXTRA
        and any(n in part for part in name.lower().split(".") for n in _NAMES)
    ]
    if config.model_type == "mpt":  # its biases are made for so many positions, in every forward
        tables.append("max_seq_len")
    if tables:
        raise UserError(
            f"{key}: {tokens} tokens are more than the {limit} positions that the model has ({tables[0]}); set {key} to "
            f"{limit} or less"
        )
    return (
        f"{key}: {tokens} tokens are more than the {limit} that the model's config names; it was not trained on so long"
    )


def require_length(model: PreTrainedModel, tokens: int, key: str) -> None:
    """`check_length`, whose line is said by the logger `trimtab`."""
    line = check_length(model, tokens, key)
    if line is not None:
        _log.warning("%s", line)
