"""Our MLX folders in mlx-lm itself: MLX reads the very numbers, and computes the model within its own noise.

It runs in an environment of its own, whose Python `TRIMTAB_MLX_PYTHON` names (`make test-serving` sets it).
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_llama_cpp import CONFIGS, byte_level_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
import trimtab as tt
from exported import EMBEDDING
from gguf_models import FAMILIES, GEMMA, SIZES, random_model
from trimtab.evaluation import serving
from trimtab.formats.export import write
from trimtab.methods import LrQat, Method, QaHira, Rtn
from trimtab.models import architecture
from trimtab.models.transformers_bridge import quant_layers

PERIODIC = Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 7}, **GEMMA)
COMPARED = {name for name, family in architecture.FAMILIES.items() if family.mlx is not None}
CASES: dict[str, Any] = {**{n: c for n, c in CONFIGS.items() if c.model_type in COMPARED}, "gemma3": PERIODIC}
IDS = torch.arange(96).view(2, 48) * 7 % 250
READ = """
import sys, json, mlx.core as mx
stored, about = mx.load(sys.argv[1]), json.loads(sys.argv[2])
matrices = {}
for name, x in about.items():
    if isinstance(x, dict):
        scales, biases = (stored[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        matrices[name] = mx.dequantize(stored[f"{name}.weight"], scales, biases, x["group_size"], x["bits"])
mx.save_safetensors(sys.argv[3], matrices)
"""


def test_the_environment_is_there() -> None:
    assert Path(os.environ.get("TRIMTAB_MLX_PYTHON", "")).is_file(), "run `make test-serving`"


def difference(model: PreTrainedModel, folder: Path) -> tuple[Tensor, Tensor]:
    """What mlx-lm computes less what we do, and what we do."""
    write(model, byte_level_tokenizer(), "mlx", folder, source=folder)
    expected = serving.model_logprobs(model, IDS)
    return serving.engine_logprobs(folder, "mlx", IDS) - expected, expected


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("name", CASES)
def test_every_family_is_computed_as_transformers_does(name: str, tmp_path: Path) -> None:
    """In float32, with one layer packed: a wrong row, norm or frequency is far above what is left."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CASES[name]), dtype=torch.float32).eval()
    model.load_state_dict({k: v.float() for k, v in random_model(CASES[name]).state_dict().items()})
    tt.prepare(model, Rtn(), [{"match": "*.1.mlp.down_proj", "grid": {"bits": 8, "group": 32}}])
    apart, expected = difference(model, tmp_path / "out")
    assert rms(apart) < 1e-4 * expected.std()


def test_the_table_of_families_is_what_was_tested() -> None:
    assert {config.model_type for config in CASES.values()} == COMPARED


def tuned(method: Method, rules: list[dict[str, Any]]) -> PreTrainedModel:
    model = tt.prepare(random_model(FAMILIES["llama"]), method, [EMBEDDING, *rules])
    torch.manual_seed(1)
    for layer in quant_layers(model).values():
        adapter = getattr(layer, "adapter", None)
        for p in () if adapter is None else adapter.parameters():
            p.data += torch.randn_like(p) * p.abs().mean().clamp(min=1e-3) * 0.1
    tt.fold(model)
    return model


MIXED: list[dict[str, Any]] = [
    {"match": "*.0.self_attn.q_proj", "grid": {"bits": 2, "group": 32}},
    {"match": "*.0.self_attn.*", "grid": {"bits": 8, "group": 64}},
    {"match": "*.0.mlp.down_proj", "grid": None},
    {"match": "*.0.mlp.*", "grid": {"bits": 3, "group": 32, "zero": "integer"}},
    {"match": "*.1.self_attn.*", "grid": {"bits": 4, "group": 64, "zero": "integer"}},
    {"match": "*", "grid": {"bits": 5, "group": None}},
]


@pytest.mark.parametrize("zero", ["mixed", "real"])
def test_mlx_reads_our_numbers_and_serves_them_within_its_noise(zero: str, tmp_path: Path) -> None:
    """2 to 8 bits, groups and channels: to the bit where MLX dequantizes in float32; noise is the rounded model's."""
    rules = MIXED if zero == "mixed" else [{"match": "*", "grid": {"bits": 3, "group": 32, "zero": "real"}}]
    method: Any = LrQat(rank=4, alpha=64.0) if zero == "mixed" else QaHira()
    noise = rms(difference(tuned(Rtn(), rules), tmp_path / "untuned")[0])
    model = tuned(method, rules)
    apart, expected = difference(model, tmp_path / "out")
    assert rms(apart) <= 1.5 * noise
    assert 0 < noise < 0.05 * expected.std()
    about = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    files = [str(tmp_path / "out/model.safetensors"), json.dumps(about), str(tmp_path / "read.safetensors")]
    subprocess.run([os.environ["TRIMTAB_MLX_PYTHON"], "-P", "-c", READ, *files], check=True)
    read = load_file(tmp_path / "read.safetensors")
    assert len(read) > 10
    for name, layer in quant_layers(model).items():
        if name in read:
            assert torch.equal(read[name], layer.base.dequantize(torch.float32)), name
