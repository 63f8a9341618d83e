"""AWQ's `gemm` packing, against words that AutoAWQ's own packing made (`stored/awq.py`), and read by another hand's reader:
compressed-tensors' converter of AutoAWQ's files.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import tiny
import trimtab as tt
from exported import EMBEDDING, everywhere, linears, prepared, shake, tensors, write
from trimtab.errors import UserError
from trimtab.formats.awq.write import packed
from trimtab.methods import Lora, LrQat, Method, QaHira, Rtn
from trimtab.quant.grid import Grid, Range


def settings(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_words_are_those_of_autoawq() -> None:
    theirs = load_file(Path(__file__).parents[1] / "stored/awq.safetensors")
    found = packed(theirs["codes"], Range(theirs["scale"], theirs["zero"], None), Grid(4, 32, "integer"))
    assert set(found) == {"qweight", "qzeros", "scales"}
    for name, tensor in found.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize(
    ("zero", "method"), [("symmetric", LrQat(rank=4)), ("integer", LrQat(rank=4)), ("integer", QaHira())]
)
def test_what_was_trained_is_what_others_read(tmp_path: Path, zero: str, method: Method, group: int | None) -> None:
    model = prepared(EMBEDDING, everywhere(bits=4, zero=zero, group=group), method=method)
    shake(model, 0.5)
    tt.fold(model)
    assert write(model, "awq", tmp_path / "out").kind == "exact"
    config = settings(tmp_path / "out")
    assert config == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group or -1, "zero_point": True,
        "modules_to_not_convert": None,
    }  # fmt: skip
    converted = AutoAWQConverter.from_autoawq_config(config).process(tensors(tmp_path / "out"))
    write(model, "compressed-tensors", tmp_path / "same")
    for name, tensor in tensors(tmp_path / "same").items():
        assert torch.equal(converted.pop(name).to(tensor.dtype), tensor), name
    middle = converted if zero == "symmetric" else {}  # compressed-tensors leaves these out
    assert converted.keys() == middle.keys() == {f"{n}.weight_zero_point" for n in linears(model) if middle}
    assert {word for t in middle.values() for word in t.flatten().tolist()} <= {-0x77777778}  # eights


def test_it_is_read_as_what_it_is(tmp_path: Path) -> None:
    """By our own reader, whose words are AutoAWQ's (`test_read_packed`): to the last bit of the folded matrices."""
    model = prepared(everywhere(bits=4, zero="symmetric", group=32), method=LrQat(rank=4), tied=False)
    shake(model, 0.5)
    tt.fold(model)
    write(model, "awq", tmp_path / "out")
    tiny.tokenizer().save_pretrained(tmp_path / "out")
    again, _ = tt.load(str(tmp_path / "out"))
    assert linears(again).keys() == linears(model).keys()
    for name, layer in linears(model).items():
        assert torch.equal(linears(again)[name].dequantize(torch.float64), layer.dequantize(torch.float64)), name
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_layers_in_float_are_named(tmp_path: Path) -> None:
    """Those that were left alone, and those of which --allow-lossy makes float matrices."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=100, num_hidden_layers=1, num_attention_heads=2, head_dim=32
    )  # fmt: skip
    rules = [{"match": "*.o_proj", "grid": None}, everywhere(bits=4, group=None)]
    up, down, out = (f"model.layers.0.{x}" for x in ("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"))

    def made() -> Any:
        torch.manual_seed(0)
        return tt.prepare(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), Rtn(), rules)

    with pytest.raises(
        UserError, match=r"gate_proj: has 100 outputs, which awq does not hold; leave it in .*of 8 is held"
    ):
        write(made(), "awq", tmp_path / "no")
    assert write(made(), "awq", tmp_path / "awq", allow_lossy=True).kind == "lossy"
    named = settings(tmp_path / "awq")["modules_to_not_convert"]
    assert sorted(named) == sorted([out, up, up.replace("up", "gate")])
    found = AutoAWQConverter.from_autoawq_config(settings(tmp_path / "awq")).process(tensors(tmp_path / "awq"))
    model = made()
    assert torch.equal(found[f"{up}.weight"], linears(model)[up].dequantize(torch.bfloat16))
    assert torch.equal(found[f"{out}.weight"], model.get_submodule(out).weight)
    assert found[f"{down}.weight_packed"].dtype == torch.int32


def test_a_name_inside_another_is_refused(tmp_path: Path) -> None:
    """Readers would leave both in float."""
    model = prepared({"match": "*.1.mlp.gate_proj", "grid": None}, everywhere(bits=4, group=32))
    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.gate_proj_2 = mlp.up_proj
    del mlp.up_proj
    with pytest.raises(UserError, match=r"1.mlp.gate_proj: is in float, and its name is a part of .*gate_proj_2"):
        write(model, "awq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_is_float_to_every_reader_whatever_its_name_is(tmp_path: Path) -> None:
    """GIT calls it `output`, which is a part of other layers' names."""
    model = prepared(everywhere(bits=4, group=32), tied=False)
    model.layers = head = model.lm_head
    del model.lm_head
    model.get_output_embeddings = lambda: head  # type: ignore[method-assign,assignment]
    write(model, "awq", tmp_path / "out")
    assert settings(tmp_path / "out")["modules_to_not_convert"] is None
    assert torch.equal(tensors(tmp_path / "out")["layers.weight"], head.weight)


def test_refused(tmp_path: Path) -> None:
    def refuses(words: str, *rules: dict[str, Any], method: Method | None = None, **options: Any) -> None:
        with pytest.raises(UserError, match=words):
            write(prepared(*rules, method=method), "awq", tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    wide = {"match": "*.1.mlp.up_proj", "grid": {"bits": 4, "group": 64}}
    refuses("1.mlp.up_proj: is int4 g64 .* beside int4 g32 .*; give all layers one", wide, everywhere(bits=4, group=32))
    refuses("has 3 bits, which awq does not hold; use a grid of 4 bits", everywhere(bits=3, group=32))
    refuses("zero that is real, .*; use `zero: symmetric or integer`", everywhere(bits=4, group=32, zero="real"))
    refuses("bfloat16 scales.*portable or float16", everywhere(bits=4, group=32, scale_dtype="bfloat16"))
    nf4 = everywhere(codebook="nf4", group=32)
    refuses("keeps an adapter beside its weight, which awq does not hold", nf4, method=Lora(rank=2))
    refuses(
        "g16 symmetric, which vllm does not run in awq; use a group of per channel, 32, 64 or 128",
        everywhere(bits=4, group=16),
        engine="vllm",
    )
