"""PEFT LoRA files beside the dequantized base that they belong to: what PEFT and vLLM add to a model at run time.

Every output or offset update is an ordinary LoRA, y = x W^T + (alpha / r) x A'^T B'^T, with

    A' = A Pool   (R, K)      B' = Repeat B   (N, R)      alpha = R * gain,   one R and alpha for each layer

(Q-BaRA: rank k r; a single matrix M: A' = Pool of rank K / p, B' = Repeat M). Where they differ between layers they go
into `rank_pattern` and `alpha_pattern`. The folder holds both:

    base/                          dense safetensors of the quantized base, as the adapters were trained on
    adapter_config.json            adapter_model.safetensors      the factors in the adapters' own dtype

An update of integer zeros is not a LoRA: it is rounded inside the base, so it is refused.

Legend: N out features, K in features, R rank.
"""

from collections.abc import Sequence
from pathlib import Path

from trimtab.formats.declaration import ALL_KINDS, Engine, Format, Layer, Refusal, Writing
from trimtab.formats.dense.write import add_matrix
from trimtab.formats.directory import Shards, write_surroundings
from trimtab.formats.files import Files
from trimtab.formats.manifest import write_json
from trimtab.layers.linear import QuantLinear
from trimtab.models.adapter_files import any_transposed, config, factors, tensor_name
from trimtab.models.transformers_bridge import quant_layers


class PeftLora(Format):
    """Adapters as LoRA files."""

    name = "peft"
    summary = "LoRA files, and the dequantized base that they were trained on"
    forms = ()
    dense = ALL_KINDS
    transposed = True
    adapters = "kept"
    engines = (
        Engine(name="transformers", bits=(), zeros=()),
        Engine(name="vllm", bits=(), zeros=(), lacks=frozenset({"implied heads"})),
    )

    def adapter_refusal(self, layer: Layer) -> Refusal | None:
        """Only what is an ordinary LoRA."""
        if layer.adapter is None or layer.adapter.is_lora(layer.grid):
            return None
        if layer.adapter.acts_in_codes:
            return Refusal(
                layer.name, "is trained in its codes, and no LoRA equals that", "fold it, export to another format"
            )
        cause = "rounds its update to integer zeros, and no LoRA equals that"
        return Refusal(layer.name, cause, "fold it and export to compressed-tensors, or train with `zero: real`")

    def model_refusal(self, layers: Sequence[Layer], engine: str | None) -> Refusal | None:
        """At least one adapter."""
        if any(layer.adapter is not None for layer in layers):
            return None
        remedy = "train with lora, qlora or q-bara; a qa-* method folds, so put peft into its recipe's `export`"
        return Refusal("the model", "keeps no adapter", remedy)

    def write(self, folder: Path, writing: Writing) -> None:
        """The base, then the adapters."""
        files = Files(writing.model)
        base = folder / "base"
        base.mkdir()
        shards = Shards(base, writing.max_shard_bytes)
        for name, tensor in files.floats(writing.dtype):
            shards.add(name, tensor)
        for held in files.layers():
            add_matrix(shards, held, held.layer.base.dequantize(writing.dtype))
        shards.close()
        write_surroundings(base, writing.model, writing.tokenizer, writing.dtype, None)
        found = {
            n: x.adapter
            for n, x in quant_layers(writing.model).items()
            if isinstance(x, QuantLinear) and x.adapter is not None
        }
        tensors = Shards(folder, writing.max_shard_bytes, stem="adapter_model")
        ranks, alphas = {}, {}
        for name, adapter in found.items():
            (a, b), ranks[name], alphas[name] = factors(adapter)
            tensors.add(tensor_name(name, "A"), a)
            tensors.add(tensor_name(name, "B"), b)
        tensors.close()
        write_json(folder / "adapter_config.json", config(ranks, alphas, "base", any_transposed(writing.model)))
