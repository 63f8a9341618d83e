"""All that is known of families of models, one frozen description each: adding a family is one entry of `FAMILIES`.

A family is what transformers calls a `model_type`. Its description names modules and keys of the config, never numbers:
those are in the config of each model. What follows from a description and a live model is in `decoder`.

    decoder blocks, final norm     where they stand in the base model
    attention, MLP                 names of their linear layers; from them, what engines join and what pruning cuts
    logits                         head(norm(h)), then capped or multiplied, by which keys of the config
    embedding, windows, rope       what a reader of the weights alone would miss
    GGUF, MLX                      what llama.cpp and mlx-lm compute otherwise than transformers writes it

Any other model made of `nn.Linear` has a description, too, derived from its structure. It is right about what can be seen:
the blocks are the first list of modules of the decoder, and layers are told by their names. It says None where it does not
know, and then what needs the fact refuses the model by its type. Keys of a config that one family or another has are
looked for in it, since a factor that is not noticed would make a wrong loss and no error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from torch import nn

from trimtab.models.in_llama_cpp import GGUF, Gguf

T = TypeVar("T")


class Attention(NamedTuple, Generic[T]):
    """The linear layers of a block's attention: their names, or the layers themselves."""

    queries: T
    keys: T
    values: T
    output: T


class Mlp(NamedTuple, Generic[T]):
    """The linear layers of a block's MLP, down(act(gate(x)) up(x)): their names, or the layers themselves."""

    gate: T
    up: T
    down: T


_ATTENTION = Attention("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = Mlp("gate_proj", "up_proj", "down_proj")


Feature = Literal[
    "windows",
    "attention cap",
    "logit cap",
    "attention bias",
    "MLP bias",
    "implied heads",
    "partial rotary",
    "linear",
    "llama3",
    "yarn",
    "other rope",
    "yarn's own",
]
"""What a config may ask for beside its sizes, and a reader may lack."""


@dataclass(frozen=True, kw_only=True)
class Mlx:
    """How mlx-lm computes a family that was compared with it (`tests/serving/test_mlx.py`)."""

    periodic: bool = False
    """Whether it knows sliding windows, as a period of layers with one full layer at its end; else it leaves them out."""
    computes: frozenset[Feature] = frozenset()
    """Which of `features` it computes as transformers does."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family. Paths are relative to the base model; None where a path is not known, or a family has no such thing."""

    model_type: str
    known: bool = True
    """False for a description that was derived."""
    blocks: str | None = "layers"
    """The list of decoder blocks."""
    norm: str | None = "norm"
    """The norm after the last block, whose output enters the head."""
    attention: Attention[str] = _ATTENTION
    mlp: Mlp[str] = _MLP
    embedding_scale: str | None = None
    """Attribute of the embedding with the number that its rows are multiplied by."""
    softcap: str | None = None
    """Key of c in c tanh(logits / c)."""
    attention_softcap: str | None = None
    """The same for scores of attention."""
    logit_factors: tuple[str, ...] = ()
    """Keys of numbers that may multiply or divide the logits: what `head` tries."""
    window_everywhere: bool = False
    """Whether all layers see a window where the config has one; else those that `layer_types` names do."""
    by_layer: tuple[str, ...] = ("layer_types", "no_rope_layers", "mlp_layer_types")
    """Keys of values for each layer, where the config has them."""
    implied_head_dim: bool = False
    """Whether engines (vLLM, mlx-lm) take hidden size / heads for the head dimension, whatever `head_dim` says."""
    gguf: Gguf | None = None
    """None if it is not written."""
    mlx: Mlx | None = None
    """None if it was not compared."""

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """Layers of one block that are given the same input, so that engines join them into one, by a name for all."""
        return {"qkv": self.attention[:3], "gate_up": self.mlp[:2]}

    def fusion(self, layer: str) -> tuple[str, tuple[str, ...]]:
        """A name for what engines join with a layer, and the last parts of these layers' names, its own among them."""
        last = layer.rpartition(".")[2]
        found = (item for item in self.fused.items() if last in item[1])
        return next(found, (last.removesuffix("_proj"), (last,)))


_ROPES: frozenset[Feature] = frozenset({"linear", "llama3", "yarn"})
_BIASES: frozenset[Feature] = frozenset({"attention bias", "MLP bias"})
_GEMMA: dict[str, Any] = {"embedding_scale": "scalar_embed_scale"}
_CAPS: dict[str, Any] = {"softcap": "final_logit_softcapping", "attention_softcap": "attn_logit_softcapping"}

FAMILIES: Mapping[str, Architecture] = {
    family.model_type: family
    for family in (
        Architecture(
            model_type="llama",
            gguf=GGUF["llama"],
            mlx=Mlx(computes=_ROPES | _BIASES),
        ),
        Architecture(
            model_type="mistral",
            window_everywhere=True,
            gguf=GGUF["mistral"],
            mlx=Mlx(computes=_ROPES | _BIASES),
        ),
        Architecture(
            model_type="smollm3",
            gguf=GGUF["smollm3"],
            mlx=Mlx(computes=_ROPES | _BIASES),
        ),
        Architecture(
            model_type="qwen2",
            implied_head_dim=True,
            gguf=GGUF["qwen2"],
            mlx=Mlx(computes=_ROPES),
        ),
        Architecture(
            model_type="qwen3",
            gguf=GGUF["qwen3"],
            mlx=Mlx(computes=_ROPES),
        ),
        Architecture(
            model_type="gemma",
            **_GEMMA,
        ),
        Architecture(
            model_type="gemma2",
            **_GEMMA,
            **_CAPS,
            gguf=GGUF["gemma2"],
        ),
        Architecture(
            model_type="gemma3_text",
            **_GEMMA,
            **_CAPS,
            gguf=GGUF["gemma3_text"],
            mlx=Mlx(periodic=True, computes=frozenset({"windows", "linear"})),
        ),
    )
}
"""By transformers' `model_type`."""

PARTLY: Mapping[str, Architecture] = {
    family.model_type: family
    for family in (
        Architecture(model_type="phi3", window_everywhere=True, implied_head_dim=True),
        *(Architecture(model_type=name, implied_head_dim=True) for name in ("olmo", "olmo2", "olmo3")),
    )
}
"""Families of which little is described beside how GGUF holds them; all else is derived."""

ASKS_FOR: Mapping[str, str] = {
    "idefics": "pixel_values",
    "kosmos-2": "pixel_values",
    "molmo2": "mm_token_type_ids",
    "voxtral_realtime": "input_features",
}
"""What models that see or hear cannot be trained without, where it is not seen in how they are called."""

IN_WORDS = "Llama, Mistral, Qwen2, Qwen3, SmolLM and Gemma"
"""The families as people call them."""

FUSED = tuple(dict.fromkeys(parts for family in FAMILIES.values() for parts in family.fused.values()))
"""Last parts of the names of layers that are joined, in any family: for a caller that has names and no model."""


def architecture_of(model_or_config: Any) -> Architecture:
    """The description of a model or a config: its family's, or what can be derived from it.

    Of a model that also sees or hears it is the description of its language model, with paths that lead there.
    """
    live = isinstance(model_or_config, nn.Module)
    config = getattr(model_or_config, "config", None) if live else model_or_config
    model_type = getattr(config, "model_type", type(model_or_config).__name__)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    family = FAMILIES.get(getattr(text_config(model_or_config), "model_type", "")) if live else None
    if family is not None:
        inside = _path_in(base_of(model_or_config), base_of(language_model(model_or_config)))
        return replace(family, blocks=f"{inside}.{family.blocks}", norm=f"{inside}.{family.norm}")
    blocks = _first_list(model_or_config) if live else None
    return replace(
        PARTLY.get(model_type, Architecture(model_type=model_type)),
        known=False,
        gguf=GGUF.get(model_type),
        blocks=blocks,
        norm=None if blocks is None else _norm_beside(model_or_config, blocks),
        embedding_scale="scalar_embed_scale",
        softcap="final_logit_softcapping",
        attention_softcap="attn_logit_softcapping",
        logit_factors=("logit_scale", "logits_scaling", "lm_head_multiplier"),
    )


def base_of(model: Any) -> nn.Module:
    """The model without its head, which transformers finds; a module of another make is its own base."""
    return getattr(model, "base_model", model)


def text_config(model: Any) -> Any:
    """The config of the language model in a model that may also see or hear."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def language_model(model: Any) -> nn.Module:
    """The part of a model that reads text, which transformers finds; its head stands beside it in most families.

    This is all that decides what is trained and quantized by default: towers and projectors are what is outside of it.
    """
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def in_language_model(model: Any, name: str) -> str | None:
    """What a language model by itself calls a tensor of its base or its head; None of one that is of neither.

    Args:
        model: that may also see or hear.
        name: of a tensor in it, for example `model.language_model.norm.weight`.
    """
    base, head = base_of(language_model(model)), model.get_output_embeddings()
    for module, called in ((base, "model"), (head, "lm_head")):
        inside = _path_in(model, module) if module is not None else None
        if inside is not None and name.startswith(f"{inside}."):
            return f"{called}{name.removeprefix(inside)}"
    return None


def sees_or_hears(model: Any) -> bool:
    """Whether a model is more than a language model."""
    return base_of(language_model(model)) is not base_of(model)


def _path_in(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, inside in model.named_modules() if inside is module)


def _first_list(model: Any) -> str | None:
    """Of a model that reads more than text, the first of its text decoder."""
    lists = {id(module) for module in language_model(model).modules() if isinstance(module, nn.ModuleList)}
    return next((name for name, module in base_of(model).named_modules() if id(module) in lists), None)


def _norm_beside(model: Any, blocks: str) -> str | None:
    """What Llama's children call `norm`; under another name it may be anything."""
    path = f"{blocks.rpartition('.')[0]}.norm".lstrip(".")
    return path if any(name == path for name, _ in base_of(model).named_modules()) else None
