"""Whether a model may be what its config says, asked before anybody acts on it: the config comes from anywhere.

transformers makes a list with an entry for each layer, then a module for each, and every buffer that no file holds; of a
thousand million of them it would not come back. So sizes have a largest value, far above that of any model there is, and
where tensors are at hand there are at most as many layers: each has a tensor of its own. And a config may name kernels on
the hub, which transformers would fetch and run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from trimtab.errors import UserError
from trimtab.reading import MOST_OF_A_TEMPLATE, read_mapping, require_regular, told

_MOST = {
    1024: "num_hidden_layers n_layer n_layers num_layers num_decoder_layers num_encoder_layers block_count",
    2
    ** 16: "num_attention_heads n_head n_heads num_heads num_key_value_heads n_kv_heads num_kv_heads attention.head_count "
    "attention.head_count_kv head_dim attention.key_length attention.value_length num_experts num_local_experts "
    "n_routed_experts num_experts_per_tok expert_count",
    2**22: "hidden_size n_embd d_model embedding_length",
    2**24: "intermediate_size ffn_dim n_inner ffn_hidden_size feed_forward_length",
    2**28: "vocab_size max_position_embeddings n_positions context_length sliding_window",
}
MOST = {name: most for most, names in _MOST.items() for name in names.split()}
"""The largest value of a size, by the names that configs and GGUF files give it; for comparison, models of 2026 have
130 layers, a width of 32,768 and 10,000,000 positions at most."""


def check(where: object, values: Mapping[str, Any]) -> None:
    """Raise a `UserError` for a size that no model has.

    Args:
        where: what holds the values, for the message.
        values: of a config, as they stand in its file; those of its parts, too.
    """
    for name, value in values.items():
        if str(name).endswith("_implementation") and "/" in str(value):
            raise UserError(f"{where}: {name} names code to be fetched ({value}), which is not run; take it out")
        most = MOST.get(name)
        if isinstance(value, Mapping):
            check(where, value)
        elif most is not None and isinstance(value, int | float) and not -most <= value <= most:
            raise UserError(f"{where}: {name} is {value:.6g}, where models have at most {most:,}; fetch it again")


def require_tensors(path: object, config: Any, count: int) -> None:
    """Raise a `UserError` if a config has more layers than there are tensors.

    Args:
        path: for the message.
        config: of transformers.
        count: tensors in the model's files.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > count:
        raise UserError(
            f"{path}: its config says that there are {layers:,} layers (num_hidden_layers), but its files hold {count:,} "
            "tensors; the checkpoint is incomplete or of another model, fetch it again"
        )


_WIDTHS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""What layers of a kind need a number for."""


def require_windows(path: object, config: PreTrainedConfig) -> None:
    """Raise a `UserError` if layers have a window and nothing says how wide it is: transformers fails on the first text.

    Args:
        path: for the message.
        config: of transformers; its parts are looked at, too.
    """
    values = vars(config)
    for kind, width in _WIDTHS.items():
        if kind in (values.get("layer_types") or ()) and values.get(config.attribute_map.get(width, width)) is None:
            raise UserError(f"{path}: its config has layers of {kind} in layer_types, but no {width}; fetch it again")
    for part in values.values():
        if isinstance(part, PreTrainedConfig):
            require_windows(path, part)


_MOST_OF_A_VOCABULARY = 2**30
"""Bytes, with all its merges; the largest have 40 MB."""
_BESIDE_WEIGHTS = (".json", ".jinja", ".txt", ".model", ".vocab", ".tiktoken")
_GENERATION = "generation_config.json"
_SWITCHES = ("output_", "return_", "use_cache", "do_sample")
"""How keys begin that are true or false."""
_SMALL = (_GENERATION, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def look_over(folder: Path) -> None:
    """Raise a `UserError` for what transformers would read of a folder beside weights, and never come back from.

    That is a pipe, a file of terabytes, and JSON in whose depth what copies it is lost. Nothing for what is not a folder.
    """
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix in _BESIDE_WEIGHTS:
            require_regular(file, MOST_OF_A_TEMPLATE if file.suffix == ".jinja" else _MOST_OF_A_VOCABULARY)
            if file.name in _SMALL:
                read_mapping(file)


def read_generation(folder: Path) -> GenerationConfig | None:
    """How a model is said to generate; None where nothing is said.

    Raises:
        UserError: for what transformers does not take, or would stumble over when it generates.
    """
    file = folder / _GENERATION
    if not file.exists() and not file.is_symlink():
        return None
    for name, value in read_mapping(file).items():
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if name.endswith("_token_id") and not all(type(i) is int and 0 <= i < MOST["vocab_size"] for i in ids):
            raise UserError(f"{file}: {name} is {value!r}, where a token's number stands; fetch it again")
        if name.startswith(_SWITCHES) and not isinstance(value, bool | None):
            raise UserError(f"{file}: {name} is {value!r}, where true or false stands; fetch it again")
    with told(lambda words: f"{folder}: its {_GENERATION} cannot be read ({words}); fetch it again"):
        return GenerationConfig.from_pretrained(folder)
