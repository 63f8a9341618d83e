"""gpt-oss as it is published is a base, its experts code for code.

Oracle: transformers' own reader, which dequantizes blocks and scales (`Mxfp4Config(dequantize=True)`).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import trimtab as tt
from experts import IDS, mixture
from trimtab.errors import UserError
from trimtab.formats.export import same
from trimtab.formats.mxfp4.read import Mxfp4Source
from trimtab.layers.weights import CodebookWeight
from trimtab.methods import Qlora, Rtn
from trimtab.models.load import load, load_float
from trimtab.models.sources import open_source
from trimtab.models.transformers_bridge import quant_layers
from trimtab.quant import mxfp4
from trimtab.reading import read_mapping

FIRST = "model.layers.0.mlp.experts"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny gpt-oss whose blocks and scales are random bytes of the published layout; it has every code, -0 too."""
    path = tmp_path / "model"
    mixture("gpt_oss", torch.bfloat16).save_pretrained(path)
    state = load_file(path / "model.safetensors")
    torch.manual_seed(2)
    for name in [n for n in state if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, k, n = state.pop(name).shape
        state[f"{name}_blocks"] = torch.randint(256, (experts, n, k // 32, 16), dtype=torch.uint8)
        state[f"{name}_scales"] = torch.randint(119, 123, (experts, n, k // 32), dtype=torch.uint8)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    config = read_mapping(path / "config.json") | {"quantization_config": {"quant_method": "mxfp4"}}
    (path / "config.json").write_text(json.dumps(config))
    return path


def opened(path: Path) -> Mxfp4Source:
    source = open_source(str(path))
    assert isinstance(source, Mxfp4Source)
    source.tokenizer = lambda: None  # type: ignore[method-assign]
    return source


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def test_experts_code_for_code(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    model, _ = load(str(folder), Rtn(), source=opened(folder), quiet=True)
    layers = quant_layers(model)
    assert len(layers) == 2 * 4 * 2, "what is float in the file stays float without rules"
    for own in ("gate_up_proj", "down_proj"):
        blocks, scales = state[f"{FIRST}.{own}_blocks"], state[f"{FIRST}.{own}_scales"]
        theirs = convert_moe_packed_tensors(blocks.clone(), scales.clone())
        for e in range(4):
            base = layers[f"{FIRST}.{e}.{own}"].base
            assert isinstance(base, CodebookWeight)
            assert torch.equal(mxfp4.to_blocks(base.integer_codes()), blocks[e])
            assert torch.equal(base.absmax, scales[e])
            assert torch.equal(base.dequantize(torch.bfloat16), theirs[e].T)


def test_what_holds_it_is_named(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"that is read and not written \(mxfp4\): native holds its codes, and dense"
    ) as raised:
        same(opened(folder))
    assert str(raised.value).startswith("export: same: ")


def test_as_transformers_dequantizes_it(folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    ours = load_float(str(folder), source=opened(folder))
    for (name, p), (_, q) in zip(sorted(ours.state_dict().items()), sorted(theirs.state_dict().items()), strict=True):
        assert torch.equal(p, q), name
    assert torch.equal(logits(ours), logits(theirs))


def test_tuned_and_saved(folder: Path, tmp_path: Path) -> None:
    """QLoRA on the experts' own grid; what else is linear, on another."""
    rules = [
        {"match": "*.experts.*", "grid": "same"},
        {"match": "*", "grid": {"codebook": "nf4", "group": 32}},
    ]
    model, _ = load(str(folder), Qlora(rank=2), rules, dtype=torch.float32, source=opened(folder), quiet=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.02 * torch.randn_like(p))
    expected = logits(model)
    tt.save(model, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again), expected)
    assert (
        quant_layers(again)[f"{FIRST}.0.down_proj"].base.grid == quant_layers(model)[f"{FIRST}.0.down_proj"].base.grid
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop(f"{FIRST}.down_proj_scales"), r"down_proj: has blocks but no scales"),
        (
            lambda s: s.update({f"{FIRST}.down_proj_scales": torch.zeros(4, 32, 3, dtype=torch.uint8)}),
            r"no stack in MXFP4",
        ),
        (
            lambda s: s[f"{FIRST}.down_proj_scales"].__setitem__((2, 0, 0), 255),
            r"down_proj, expert 2: a scale's exponent is",
        ),
    ],
    ids=["no scales", "other scales", "no number"],
)
def test_what_is_no_stack_is_named(folder: Path, change: Any, said: str) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=said):
        load(str(folder), Rtn(), source=opened(folder), quiet=True)
