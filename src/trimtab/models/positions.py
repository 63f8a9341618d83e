"""How long a text a model can be shown: positions that were learned are a table, and past its end there is nothing."""

from typing import Any

from transformers import PreTrainedModel

from trimtab.errors import UserError

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
    limit = getattr(config, "max_position_embeddings", None)
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
    if tables:
        raise UserError(
            f"{key}: {tokens} tokens are more than the {limit} positions that the model has learned ({tables[0]}); "
            f"set {key} to {limit} or less"
        )
    return (
        f"{key}: {tokens} tokens are more than the {limit} that the model's config names; it was not trained on so long"
    )
