"""Bad input: one line that names the layer, file or key and the remedy, exit status 2, and nothing written.

Through the real entry point, mostly in this process for speed; the model has layers of 64 x 64, 32 x 64, 128 x 64 and
64 x 128, so 3 and 48 divide nothing.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from trimtab import cli
from trimtab.formats.native.write import save
from trimtab.methods import LrQat, Qlora
from trimtab.models.load import load
from trimtab.models.prepare import fold

Refused = Callable[..., str]
Q_PROJ = "model.layers.0.self_attn.q_proj"
UP_PROJ = "model.layers.1.mlp.up_proj.weight"
CLI = [sys.executable, "-m", "trimtab.cli"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command line that must be refused, and gives its one line."""

    def refused(*arguments: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["trimtab", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        lines = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return refused


@pytest.fixture
def refused(given: Path, tmp_path: Path, command: Refused) -> Refused:
    """Runs a changed recipe that must be refused without writing anything, and gives its one line."""

    def run(
        *flags: str, start: Path | None = None, rows: Path | None = None, drop: tuple[str, ...] = (), **changes: Any
    ) -> str:
        output = tmp_path / "out" / "run"
        values = tiny.recipe(start or given / "model", rows or given / "data.jsonl", output, **changes)
        for key in drop:
            del values[key]
        line = command("run", tiny.write(tmp_path / "recipe.yaml", values), *flags)
        assert not output.parent.exists()
        return line

    return run


def everywhere(**grid: Any) -> dict[str, Any]:
    return {"rules": [{"match": "*", "grid": grid}]}


def holds(line: str, *parts: str) -> None:
    assert not [part for part in parts if part not in line], line


REAL = everywhere(bits=4, group=32, zero="real")
# what is changed -> what the line must hold
RECIPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "group": (everywhere(bits=4, group=48), (Q_PROJ, "group 48", "64 input features", "use one of [16, 32, 64]")),
    "embedding's group": (
        {"rules": [{"match": "model.embed_tokens", "grid": {"group": 48}}]},
        ("model.embed_tokens", "group 48", "use one of"),
    ),
    "rule without a layer": (
        {"rules": [{"match": "*.q_prj", "grid": None}, *tiny.RULES]},
        ("rules[0].match", "'*.q_prj'", "matches no layer", "did you mean 'q_proj'?"),
    ),
    "rule far from any layer": (
        {"rules": [*tiny.RULES, {"match": "transformer.h.*", "grid": None}]},
        ("rules[2].match", "'transformer.h.*'", "its layers are called embed_tokens, q_proj, k_proj"),
    ),
    "rule's layer number": (
        {"rules": [{"match": "model.layers.7.mlp.up_proj", "grid": None}, *tiny.RULES]},
        ("rules[0].match", "did you mean 'model.layers."),
    ),
    "rule for a tied head": (
        {"rules": [{"match": "lm_head", "grid": {"bits": 8}}]},
        ("rules[0]", "lm_head is tied", "leave it out"),
    ),
    "key": ({"trian": {}}, ("recipe.yaml: trian", "did you mean 'train'?")),
    "key in a block": ({"train": {"stpes": 3}}, ("train.stpes", "did you mean 'steps'?")),
    "key like no other": ({"zzz": 1}, ("zzz", "known are version, name, model, method")),
    "key of a grid": (everywhere(bit=4), ("rules[0].grid.bit", "did you mean 'bits'?")),
    "method": ({"method": {"name": "lr-qta"}}, ("method.name", "'lr-qta'", "did you mean 'lr-qat'?")),
    "method's option": ({"method": {"name": "lr-qat", "rnk": 3}}, ("method.rnk", "did you mean 'rank'?")),
    "method without a name": ({"method": {"rank": 3}}, ("method.name: missing", "`trimtab methods`")),
    "method of a wrong kind": ({"method": 3}, ("method: 3", "write {name: lr-qat")),
    "k over K": ({"method": {"name": "q-bara", "k": 3}}, (Q_PROJ, " 3 does not divide the 64", "use one of")),
    "k over N": (
        {"method": {"name": "q-bara", "k": 64}},
        ("model.layers.0.self_attn.k_proj", " 64 does not divide the 32 output", "use one of"),
    ),
    "pool off the group": (
        {"method": {"name": "qa-lora", "pool": 48}, **REAL},
        (Q_PROJ, "pool 48", "group 32", "use 32 or 64"),
    ),
    "e": ({"method": {"name": "qa-hira", "repeat": 3}, **REAL}, (Q_PROJ, "repeat 3", "64 output", "use one of")),
    "e of qa-blora": ({"method": {"name": "qa-blora", "repeat": 3}, **REAL}, (Q_PROJ, "repeat 3", "use one of")),
    "p": ({"method": {"name": "qa-hira", "pool": 96}, **REAL}, (Q_PROJ, "pool 96", "64 input", "use one of")),
    "no zero to move": (
        {"method": {"name": "qa-hira"}, **everywhere(bits=4, group=32)},
        (Q_PROJ, "int4 g32 symmetric", "use `zero: real`"),
    ),
    "no grid to round to": ({"rules": [{"match": "*", "grid": "float"}]}, (Q_PROJ, "not float", "in `rules`")),
    "nothing left": ({"rules": [{"match": "*", "grid": None}]}, ("rules", "give a layer a grid")),
    "rank": ({"method": {"name": "lr-qat", "rank": 0}}, (Q_PROJ, "rank 0 is not a positive number")),
    "export": ({"export": ["ggfu"]}, ("export.0", "'ggfu'", "'native'")),
    "steps": ({"train": {"steps": "many"}}, ("train.steps", "'many'", "valid integer")),
    "betas": ({"train": {"betas": [0.9, 1.5]}}, ("train.betas.1", "1.5", "less than 1")),
    "batch": ({"train": {"batch_tokens": 100}}, ("train.batch_tokens", "not a multiple of", "= 64; use 128")),
    "rules no list": ({"rules": {"match": "*", "grid": None}}, ("rules", "is not a list", "write `- {match")),
    "rtn trains": ({"method": {"name": "rtn"}}, ("train.steps", "set it to 0")),
    "baselines without data": (
        {"evaluate": {"baselines": ["float"]}, "data": {"eval_path": None}},
        ("evaluate.baselines", "set data.eval_path"),
    ),
    "logger": ({"train": {"report_to": "wandbx"}}, ("train.report_to", "'wandbx'", "none")),
    "missing data": ({"data": {"path": "/none.jsonl"}}, ("/none.jsonl", "no such file", "check the path")),
    "missing held-out data": ({"data": {"eval_path": "/none.jsonl"}}, ("/none.jsonl", "check the path")),
    "too little held-out data": ({"data": {"eval_tokens": 8}}, ("block_tokens = 32", "shorter blocks")),
}


@pytest.mark.parametrize(("changes", "parts"), RECIPES.values(), ids=RECIPES)
def test_recipes(refused: Refused, changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    holds(refused(**changes), *parts)


@pytest.mark.parametrize("key", ["model", "method", "data"])
def test_missing_keys(refused: Refused, key: str) -> None:
    holds(refused(drop=(key,)), f"recipe.yaml: {key}: missing")


OVERRIDES = {
    "train.steps": ("'train.steps'", "key=value"),
    "train.steps=ten": ("train.steps", "'ten'"),
    "train.stpes=3": ("train.stpes", "did you mean 'steps'?"),
    "rules.0=3": ("rules[0]", "match and grid"),
    "rules.9.grid.bits=3": ("rules.9.grid.bits", "'9' is not an entry of a list of 2"),
    "rules.last.grid=null": ("rules.last.grid", "'last' is not an entry"),
    "rules.1.grid.group=48": (Q_PROJ, "group 48"),
    "train.steps=[1": ("train.steps", "not a YAML value"),
    "method=lr-qta": ("method.name", "did you mean 'lr-qat'?"),
}


@pytest.mark.parametrize(("override", "parts"), OVERRIDES.items())
def test_overrides(refused: Refused, override: str, parts: tuple[str, ...]) -> None:
    holds(refused(override), *parts)


def test_recipe_files(tmp_path: Path, command: Refused) -> None:
    file = tmp_path / "recipe.yaml"
    holds(command("run", file), "recipe.yaml: no such recipe file")
    for content in (b"a: [1", b"name: \xff\xfe", b"a: b: c"):
        file.write_bytes(content)
        holds(command("run", file), "recipe.yaml: not valid YAML", " 1" if b"[" in content else "")
    for written, complaint in ((b"- 1", "a mapping of keys"), (b"", "a mapping of keys"), (b"1: 2", "must be words")):
        file.write_bytes(written)
        holds(command("run", file), "recipe.yaml", complaint)


# ---- models ---------------------------------------------------------------------------------------------------------


def without(*files: str) -> Callable[[Path], None]:
    return lambda path: [(path / file).unlink() for file in files] and None


def written(file: str, content: str) -> Callable[[Path], None]:
    return lambda path: (path / file).write_text(content) and None


def truncated(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def pickled(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        held = load_file(path / "model.safetensors")
        change(held)
        save_file(held, path / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def poisoned(name: str, value: float = float("nan")) -> Callable[[Path], None]:
    return tensors(lambda held: held[name].view(-1)[5:6].fill_(value))


def indexed(text: str) -> Callable[[Path], Any]:
    """Puts an index in place of the one file, which would go before it."""

    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return spoil


MODELS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing": (shutil.rmtree, ("model.path", "no such file or directory", "check the path")),
    "no config": (without("config.json"), ("model.path", "no config.json in it")),
    "config cut off": (
        written("config.json", '{"model_type": "lla'),
        ("config.json", "not valid JSON", "fetch it again"),
    ),
    "config no mapping": (written("config.json", "[]"), ("config.json", "fetch it again")),
    "unknown architecture": (written("config.json", '{"model_type": "nosuch"}'), ("config.json", "nosuch", "upgrade")),
    "no language model": (written("config.json", '{"model_type": "vit"}'), ("model.path", "no language model")),
    "of another library": (
        written("config.json", '{"quantization_config": {"quant_method": "quanto"}}'),
        ("model.path", "quantized by quanto", "start from the float model"),
    ),
    "of another library, without settings": (
        written("config.json", '{"quantization_config": {"quant_method": "gptq"}}'),
        ("model.path", "quantization_config.bits: None is none of 2, 3, 4, 8"),
    ),
    "no weights": (without("model.safetensors"), ("no .safetensors file", "fetch or save it again")),
    "truncated": (truncated, ("model.safetensors: truncated", "fetch it again")),
    "no safetensors": (written("model.safetensors", "{}"), ("model.safetensors: truncated or not", "fetch it again")),
    "pickled": (pickled, ("only pickled weights (pytorch_model.bin)", "`save_pretrained`")),
    "missing tensor": (tensors(lambda t: t.pop(UP_PROJ)), (f"no tensor {UP_PROJ}", "fetch or save it again")),
    "missing float tensor": (tensors(lambda t: t.pop("model.norm.weight")), ("no tensor model.norm.weight",)),
    "shape": (
        tensors(lambda t: t.update({UP_PROJ: t[UP_PROJ][:, :32].clone()})),
        (UP_PROJ, "(128, 32), the config says (128, 64)", "fetch it again"),
    ),
    "missing shard": (
        indexed('{"weight_map": {"a.weight": "model-2.safetensors"}}'),
        ("a.weight", "model-2.safetensors", "fetch it again"),
    ),
    "index cut off": (indexed('{"weig'), ("index.json", "fetch it again")),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), ("no usable tokenizer", "add the model's")),
    "NaN": (poisoned(UP_PROJ), (UP_PROJ, "NaN", "fetch or convert it again")),
    "NaN in the embedding": (poisoned("model.embed_tokens.weight"), ("model.embed_tokens.weight", "NaN")),
    "infinity in a float weight": (poisoned("model.norm.weight", float("inf")), ("model.norm.weight", "infinite")),
}


@pytest.mark.parametrize(("spoil", "parts"), MODELS.values(), ids=MODELS)
def test_models(given: Path, tmp_path: Path, refused: Refused, spoil: Callable[[Path], Any], parts: Any) -> None:
    model = shutil.copytree(given / "model", tmp_path / "model")
    spoil(model)
    holds(refused(start=model), *parts)


@pytest.mark.parametrize(("name", "part"), [("m.gguf", "not a complete GGUF file"), ("m.bin", "or a .gguf file")])
def test_model_files(tmp_path: Path, refused: Refused, name: str, part: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF but not really")
    holds(refused(start=tmp_path / name), name, part)


@pytest.fixture(scope="module")
def saved(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What trimtab saves: folded."""
    model, tokenizer = load(str(given / "model"), LrQat(rank=4), tiny.RULES)
    fold(model)
    path = tmp_path_factory.mktemp("saved") / "model"
    save(model, path, tokenizer)
    return path


SCALE = "model.layers.0.mlp.up_proj.base.scale"
SAVED: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "truncated": (truncated, ("model.safetensors: truncated", "fetch it again")),
    "cut off": (without("model.safetensors"), ("no .safetensors file", "save it again")),
    "missing tensor": (tensors(lambda t: t.pop(SCALE)), (f"no tensor {SCALE}", "save it again")),
    "missing float tensor": (tensors(lambda t: t.pop("model.norm.weight")), ("no tensor model.norm.weight",)),
    "NaN": (poisoned(SCALE), (SCALE, "NaN")),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), ("model.path", "add its tokenizer files")),
}


@pytest.mark.parametrize(("spoil", "parts"), SAVED.values(), ids=SAVED)
def test_saved_models(saved: Path, tmp_path: Path, refused: Refused, spoil: Callable[[Path], Any], parts: Any) -> None:
    model = shutil.copytree(saved, tmp_path / "model")
    spoil(model)
    holds(refused(start=model), str(model), "save, export or copy the model again")
    (model / "manifest.json").unlink()  # as of a copy without it, of which nothing says what was written
    holds(refused(start=model), *parts)


def test_kept_adapters_are_not_trained_over(given: Path, tmp_path: Path, refused: Refused) -> None:
    model, tokenizer = load(str(given / "model"), Qlora(rank=4), None)
    save(model, tmp_path / "kept", tokenizer)
    holds(refused(start=tmp_path / "kept", rules=None), Q_PROJ, "already has an adapter", "fold it first")


# ---- data -----------------------------------------------------------------------------------------------------------


def test_data(given: Path, tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "rows.jsonl"
    for rows, parts in (
        ([], ("rows.jsonl: empty file", "give at least one row")),
        (
            [{"text": "a"}, {"text": "b"}, {"question": "c"}],
            ("rows.jsonl, line 3", "question", 'accepted are {"text"}'),
        ),
        ([{"text": "a"}, '{"text": '], ("rows.jsonl, line 2: invalid JSON", "one JSON object on each line")),
        ([{"text": "a"}], ("not one block of block_tokens = 32", "give more text")),
    ):
        holds(refused(rows=tiny.jsonl(file, *rows)), *parts)
    chat = tiny.jsonl(file, *({"instruction": "say a", "output": "a"} for _ in range(20)))
    held_out = {"eval_path": str(given / "data.jsonl")}
    for template, parts in (
        (None, ("no chat template", "give plain")),
        ("{{ raise_exception('only robots') }}", ("row 1", "only robots", "change the row's roles")),
    ):
        model = tiny.model(tmp_path / "model", template=template)
        holds(refused(start=model, rows=chat, data=held_out), *parts)


# ---- output directories -----------------------------------------------------------------------------------------------


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_outputs_that_hold_something(given: Path, saved: Path, tmp_path: Path, command: Refused) -> None:
    """What is there stays as it is."""
    out = tmp_path / "run"
    file = tiny.write(tmp_path / "recipe.yaml", tiny.recipe(given / "model", given / "data.jsonl", out))
    holds(command("run", file, "--resume"), str(out), "run without it")
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    holds(command("run", file), "output", str(out), "not empty", "--overwrite", "--resume", "set `output`")
    holds(command("run", file, "--overwrite"), "holds thesis.txt, which trimtab did not write", "remove it yourself")
    holds(command("run", file, "--resume"), "--resume", "holds no checkpoint", "run without it")
    holds(command("run", file, f"output={out}/thesis.txt"), "is a file")
    holds(command("run", file, f"output={out}/thesis.txt/run"), "thesis.txt is a file", "name another folder")
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    shutil.copytree(saved, out, dirs_exist_ok=True)
    (out / "recipe.yaml").write_text("")
    (out / "data.jsonl").write_bytes((given / "data.jsonl").read_bytes())
    before = listing(tmp_path)
    holds(command("run", file), "not empty")
    holds(command("run", file, "--overwrite", "--resume"), "--overwrite", "pass one of them")
    holds(command("run", file, "--overwrite", f"model.path={out}"), "model.path", "set `output` to another")
    holds(command("run", file, "--overwrite", f"data.path={out}/data.jsonl"), "data.path", "set `output` to another")
    holds(command("run", file, "--overwrite"), "holds a saved model, which is not replaced by a run", "set `output`")
    assert listing(tmp_path) == before


# ---- the other commands, and the real process -------------------------------------------------------------------------


def test_other_commands(given: Path, saved: Path, tmp_path: Path, command: Refused) -> None:
    model, data = given / "model", given / "data.jsonl"
    file = tiny.write(tmp_path / "recipe.yaml", tiny.recipe(model, data, tmp_path / "run"))
    holds(command("plan", file, "rules.1.grid.group=48"), Q_PROJ, "group 48")
    holds(command("plan", file, "model.path=/none"), "model.path: /none", "check the path")
    for name, more in (("eval", ["--data", data]), ("chat", ["--prompt", "hi"])):
        holds(command(name, "/none", *more), "/none", "check the path")
    holds(command("eval", saved), "no recipe that names held-out data", "pass --data")
    holds(command("eval", saved, "--data", "/none.jsonl"), "/none.jsonl", "check the path")
    bare = shutil.copytree(saved, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "manifest.json"))
    holds(command("chat", bare, "--prompt", "hi"), str(bare), "add its tokenizer files")


def process(*arguments: object) -> str:
    """The one line of a real process that must be refused."""
    done = subprocess.run([*CLI, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.slow
def test_real_processes(given: Path, tmp_path: Path) -> None:
    """The second one diverges at once: there is no model, and no checkpoint of numbers gone wrong."""
    values = tiny.recipe(given / "model", given / "data.jsonl", tmp_path / "out" / "run")
    file = tiny.write(tmp_path / "recipe.yaml", values)
    holds(process("plan", file, "rules.1.grid.group=48"), Q_PROJ, "group 48")
    assert not (tmp_path / "out").exists()
    wild = ["method=qlora", "rules=null", "train.lr=1e30", "train.warmup=0", "train.save_steps=1"]
    line = process("run", file, *wild)
    holds(line, "train: the loss became nan in step 2", "no good checkpoint yet", "Lower train.lr")
    assert not listing(tmp_path / "out")
