"""Files written once, by the version that decided the format: every later version must read the same numbers.

`python tests/test_stored.py` wrote tests/stored; it is not to be run again for the same format version.
Format 1 is `model`; format 2, which says how inputs and the KV cache are rounded, is `rounded`.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import trimtab
from trimtab.layers import linear
from trimtab.layers.linear import QuantLinear
from trimtab.methods import LrQat, QaHira, Qlora, Rtn
from trimtab.models.transformers_bridge import quant_layers
from trimtab.quant import packing
from trimtab.quant.grid import CodebookGrid, Grid

STORED = Path(__file__).parents[1] / "stored"
N, K = 6, 64


def layers() -> dict[str, QuantLinear]:
    """Every form that is stored."""
    torch.manual_seed(0)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    made = {}
    grids = [Grid(bits, 32, zero) for bits in range(1, 9) for zero in ("symmetric", "integer", "real")]  # type: ignore[arg-type]
    for grid in (*grids, Grid(4, None), CodebookGrid("nf4", 32), CodebookGrid("nf4", 32, double_quant=True)):
        made[f"rtn {grid.describe()}"] = QuantLinear(Rtn().build(weight, grid)[0])
    for storage in ("fixed8", "int", "bf16", "fp32"):
        method = LrQat(rank=2, storage=storage)  # type: ignore[arg-type]
        made[f"lr-qat {storage}"] = QuantLinear(*method.build(weight, Grid(3, 32, "integer")))
    made["qlora"] = QuantLinear(*Qlora(rank=2).build(weight, CodebookGrid("nf4", 32)))
    made["qa-hira"] = QuantLinear(*QaHira(alpha=1.0, repeat=2).build(weight, Grid(4, 32, "real")))
    for layer in made.values():
        if layer.adapter is not None:
            for p in layer.adapter.parameters():
                p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return made


def model() -> LlamaForCausalLM:
    """A model of two grids with a tied 8-bit head and adapters kept."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=64, tie_word_embeddings=True, dtype="bfloat16")
    rules = [
        {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}},
        {"match": "*mlp*", "grid": {"bits": 3, "group": 32, "zero": "integer"}},
        {"match": "*", "grid": {"bits": 4, "group": 32, "zero": "integer"}},
    ]
    return trimtab.prepare(LlamaForCausalLM(config).bfloat16(), trimtab.methods.make("lr-qat", rank=2), rules)  # type: ignore[return-value]


def rounded_model() -> LlamaForCausalLM:
    """The same with inputs and KV cache rounded, by ranges that were measured and by those of each token."""
    made = model()
    tokens = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    trimtab.simulate(made, activations=trimtab.Activations(8, mode="static"), kv=trimtab.KvCache(4), calibration=tokens)
    return made


def values(layer: QuantLinear) -> Tensor:
    with torch.no_grad():
        return layer.dequantize(torch.float32)


SPECS = json.loads((STORED / "layers.json").read_text()) if STORED.exists() else {}


@pytest.mark.parametrize("name", SPECS)
def test_a_stored_layer_reads_the_same(name: str) -> None:
    tensors = load_file(STORED / "layers.safetensors")
    with torch.device("meta"):
        layer = linear.from_spec(SPECS[name], torch.float32)
    own = {key.partition("/")[2]: t for key, t in tensors.items() if key.startswith(f"{name}/base")}
    own |= {key.partition("/")[2]: t for key, t in tensors.items() if key.startswith(f"{name}/adapter")}
    layer.load_state_dict(own, assign=True)
    assert isinstance(layer, QuantLinear)
    assert torch.equal(values(layer), tensors[f"{name}/values"])
    if SPECS[name]["weight"].get("storage") == "int":  # folding packs by the torch function, loading by C
        base = layer.base
        assert torch.equal(packing.pack(base.integer_codes(), base.grid.bits), base.codes)  # type: ignore[operator,union-attr,arg-type]


def test_forms_are_stored_as_they_were() -> None:
    """What this version would write is what that version wrote."""
    tensors = load_file(STORED / "layers.safetensors")
    for name, layer in layers().items():
        assert layer.spec() == SPECS[name]
        for (
            key,
            tensor,
        ) in layer.named_parameters():  # the state has a marker besides, which that version kept elsewhere
            assert torch.equal(tensor, tensors[f"{name}/{key}"]), (name, key)


def test_a_stored_model_gives_the_same_logits() -> None:
    loaded = AutoModelForCausalLM.from_pretrained(STORED / "model", dtype=torch.float32).eval()
    expected = load_file(STORED / "logits.safetensors")
    with torch.no_grad():
        logits = loaded(input_ids=expected["ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)


def test_a_stored_model_rounds_as_it_did() -> None:
    loaded = AutoModelForCausalLM.from_pretrained(STORED / "rounded", dtype=torch.float32).eval()
    rounding = [layer for layer in quant_layers(loaded).values() if getattr(layer, "inputs", None) is not None]
    assert len(rounding) == 7
    expected = load_file(STORED / "rounded_logits.safetensors")
    with torch.no_grad():
        logits = loaded(input_ids=expected["ids"]).logits
    # Sums in another order may move a value across the border of two codes.
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=2e-3)
    plain = load_file(STORED / "logits.safetensors")
    assert (plain["logits"] - expected["logits"]).abs().max() > 1e-2


def _write() -> None:
    """All of format 1."""
    STORED.mkdir()
    made = layers()
    (STORED / "layers.json").write_text(
        json.dumps({name: layer.spec() for name, layer in made.items()}, indent=1) + "\n"
    )
    tensors = {f"{name}/{key}": t for name, layer in made.items() for key, t in layer.state_dict().items()}
    tensors |= {f"{name}/values": values(layer) for name, layer in made.items()}
    save_file(tensors, STORED / "layers.safetensors")
    _write_model(model(), STORED / "model", STORED / "logits.safetensors")


def _write_model(made: LlamaForCausalLM, folder: Path, file: Path) -> None:
    trimtab.save(made, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        save_file({"ids": ids, "logits": loaded(input_ids=ids).logits}, file)


if __name__ == "__main__":
    if not STORED.exists():
        _write()
    _write_model(rounded_model(), STORED / "rounded", STORED / "rounded_logits.safetensors")
