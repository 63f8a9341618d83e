"""What is written of a mixture: under which names, in how many bytes, and what engines are told of its routers.

Oracle: the names that transformers' `save_pretrained` gives the same float model.
"""

import copy
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

import families
import trimtab as tt
from experts import CONFIGS, FOUR, IDS, mixture
from trimtab.bit_search.space import space
from trimtab.errors import UserError
from trimtab.formats.export import Options, write
from trimtab.formats.export_size import export_sizes
from trimtab.formats.file_size import file_size
from trimtab.methods import LrQat, Rtn
from trimtab.models.opening import open_layers
from trimtab.models.saved_names import SavedNames, held_as
from trimtab.models.targets import targets
from trimtab.models.transformers_bridge import cast_floats
from trimtab.quant.activations import Activations
from trimtab.quant.grid import Grid
from trimtab.recipe.rules import parse_rules


def grid(match: str, bits: int | None) -> dict[str, Any]:
    """A rule: so many bits for these layers, one scale a channel; None for float."""
    return {"match": match, "grid": bits and {"bits": bits, "group": None, "scale_dtype": "portable"}}


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as opened:
        return set(opened.keys())


def tensor_bytes(folder: Path) -> int:
    file = folder / "model.safetensors"
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - struct.unpack("<Q", opened.read(8))[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_names_are_those_of_the_familys_checkpoints(name: str, tmp_path: Path) -> None:
    mixture(name).save_pretrained(tmp_path / "float")
    model = tt.prepare(mixture(name), Rtn(), FOUR)
    write(model, None, "dense", tmp_path / "dense", source=tmp_path)
    assert names(tmp_path / "dense") == names(tmp_path / "float")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_packed_names_and_what_stays_in_float(name: str, tmp_path: Path) -> None:
    mixture(name).save_pretrained(tmp_path / "float")
    write(tt.prepare(mixture(name), Rtn(), FOUR), None, "compressed-tensors", tmp_path / "packed", source=tmp_path)
    values = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    (group,) = values["config_groups"].values()
    layers = {n.removesuffix(".weight") for n in names(tmp_path / "float") if "proj" in n or ".experts." in n}
    assert set(group["targets"]) == layers
    routers = {n.removesuffix(".weight") for n in names(tmp_path / "float") if n.endswith(".gate.weight")}
    assert len(routers) == 2
    assert set(values["ignore"]) == routers | {"lm_head"}


def check_in_transformers(model: PreTrainedModel, folder: Path) -> None:
    """transformers finds every tensor of a packed model, and computes its logits."""
    write(model, None, "compressed-tensors", folder, source=folder.parent)
    read, about = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not about["missing_keys"]
    torch.testing.assert_close(families.logits(read), families.logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["axk2", "deepseek_v4", "bailing_hybrid"])
def test_layers_that_files_call_otherwise_are_read_as_packed(name: str, tmp_path: Path) -> None:
    """transformers looks for targets by its own names, after it has renamed what it reads: these were left at random.

    Of Bailing's three convolutions it makes one, and dropped all of them, which are in float.
    """
    check_in_transformers(tt.prepare(families.random_model(name), Rtn(), [grid("*", 4)]), tmp_path / "out")


@pytest.mark.parametrize("first", [("*experts*", 8), ("*self_attn*", 8), ("model.layers.0.mlp.experts*", None)])
def test_experts_on_a_grid_of_their_own_are_read_by_it(first: tuple[str, int | None], tmp_path: Path) -> None:
    """transformers takes the first scheme of the config for that of experts: by that of attention, they were others."""
    check_in_transformers(tt.prepare(mixture("qwen3_moe"), Rtn(), [grid(*first), grid("*", 4)]), tmp_path / "out")


UNLIKE: dict[str, tuple[list[dict[str, Any]], str]] = {
    "by projection": ([grid("*down_proj", 8)], r"0\.down_proj is on int8 .* and transformers reads"),
    "by block": (
        [grid("model.layers.0.mlp.experts*", 8)],
        r"layers\.1\.mlp\.experts\.0\.gate_up_proj is on int4 .* and transformers reads",
    ),
    "a projection in float": ([grid("*down_proj", None)], r"beside some in float, and no engine reads such a block"),
    "an expert in float": ([grid("*experts.1.*", None)], r"beside some in float, and no engine reads such a block"),
}
"""Mixtures that transformers reads as others, or not at all."""


@pytest.mark.parametrize("case", UNLIKE)
def test_unlike_experts_are_refused_before_and_after_training(case: str, tmp_path: Path) -> None:
    rules, message = UNLIKE[case]
    rules = [*rules, grid("*", 4)]
    with torch.device("meta"):
        laid_out = mixture("qwen3_moe")
    planned = export_sizes(
        laid_out, targets(laid_out, Rtn(), parse_rules(rules)), Rtn(), dtype=torch.float32, only=["compressed-tensors"]
    )
    assert re.search(message, str(planned["compressed-tensors"])), planned
    model = tt.prepare(mixture("qwen3_moe"), Rtn(), rules)
    with pytest.raises(UserError, match=message):
        write(model, None, "compressed-tensors", tmp_path / "out", source=tmp_path)
    if case == "by projection":
        with pytest.raises(UserError, match="vllm reads those of a block as one kind"):
            write(model, None, "compressed-tensors", tmp_path / "out", source=tmp_path, options=Options(engine="vllm"))
    write(model, None, "dense", tmp_path / "dense", source=tmp_path)


@pytest.mark.parametrize("format_", ["native", "dense", "compressed-tensors"])
@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_known_before(name: str, format_: str, tmp_path: Path) -> None:
    model = mixture(name, torch.bfloat16)
    zero = "symmetric" if format_ == "compressed-tensors" else "integer"
    rules = parse_rules([{"match": "*", "grid": {"bits": 4, "group": 32, "zero": zero}}])
    with torch.device("meta"):
        laid_out = mixture(name)
    cast_floats(laid_out, torch.bfloat16)
    planned = export_sizes(laid_out, targets(laid_out, Rtn(), rules), Rtn(), dtype=torch.bfloat16, only=[format_])[
        format_
    ]
    tt.prepare(model, Rtn(), rules)
    if isinstance(planned, str):
        with pytest.raises(UserError, match="keep all of them in one tensor"):
            write(model, None, format_, tmp_path / "out", source=tmp_path)
        return
    write(model, None, format_, tmp_path / "out", source=tmp_path)
    found = tensor_bytes(tmp_path / "out")
    if format_ == "native":
        assert (
            found
            == file_size(copy.deepcopy(laid_out), LrQat(rank=2), rules, dtype=torch.bfloat16).tensor_bytes
            <= planned
        )
    else:
        assert found == planned


def test_an_engine_without_packed_experts_is_named(tmp_path: Path) -> None:
    model = tt.prepare(mixture("mixtral"), Rtn(), FOUR)
    with pytest.raises(
        UserError, match=r"experts\.0\.gate_up_proj: is a packed expert with a zero that is symmetric, which vllm-cpu"
    ):
        write(model, None, "compressed-tensors", tmp_path / "out", source=tmp_path, options=Options(engine="vllm-cpu"))
    write(model, None, "dense", tmp_path / "out", source=tmp_path, options=Options(engine="vllm"))


def test_zeros_of_packed_experts_are_left_out_by_every_engine(tmp_path: Path) -> None:
    """transformers 5.23 asks for zero points where it stacks what it has read, and finds none."""
    model = tt.prepare(mixture("mixtral"), Rtn(), [{"match": "*", "grid": {"bits": 4, "group": 32, "zero": "integer"}}])
    with pytest.raises(
        UserError, match=r"a packed expert with a zero that is integer, which .*; use `zero: symmetric`"
    ):
        write(model, None, "compressed-tensors", tmp_path / "out", source=tmp_path)


def test_a_search_has_a_unit_for_all_experts_of_a_block() -> None:
    """Engines run all of them at one width."""
    with torch.device("meta"):
        model = mixture("qwen3_moe")
    open_layers(model)
    found = space(model, LrQat(rank=2), bits=[4, 8], grid=Grid(4, 32), dtype=torch.bfloat16)
    assert [u.name for u in found.units[:4]] == [f"model.layers.0.{n}" for n in ("qkv", "o", "gate_up", "down")]
    assert found.units[3].layers == tuple(f"model.layers.0.mlp.experts.{e}.down_proj" for e in range(4))


def test_rows_of_stacks_are_found_in_checkpoints() -> None:
    model = mixture("qwen3_moe")
    open_layers(model)
    owner = "model.layers.1.mlp.experts"
    found = SavedNames(model).pieces(owner, "gate_up_proj", 128)
    assert [(p.layer, p.rows) for p in found[3]] == [
        (f"{owner}.3.gate_proj", slice(0, 64)),
        (f"{owner}.3.up_proj", slice(64, 128)),
    ]
    assert [held_as(mixture(n)) for n in CONFIGS] == ["alone", "alone", "stack", "stack"]


def test_experts_with_rounded_inputs_are_refused(tmp_path: Path) -> None:
    model = tt.prepare(mixture("qwen3_moe"), Rtn(), [grid("*", 8)])
    tt.simulate(model, activations=Activations(8, False, "dynamic"), calibration=IDS)
    with pytest.raises(UserError, match="has rounded inputs, with which transformers leaves them at random"):
        write(model, None, "compressed-tensors", tmp_path / "out", source=tmp_path)
