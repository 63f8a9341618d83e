"""What a folder holds, from its files alone, and the command that serves it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trimtab import cli
from trimtab.errors import UserError
from trimtab.models.held import held, serving


def folder(path: Path, config: dict[str, Any] | None = None, *names: str, export: bool = False) -> Path:
    path.mkdir(parents=True)
    for name, values in (("config.json", config), ("export.json", {} if export else None)):
        if values is not None:
            (path / name).write_text(json.dumps(values))
    for name in names:
        (path / name).write_text("x" * 100)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with every kind of export."""
    made = folder(tmp_path / "run", {"quantization_config": {"quant_method": "trimtab"}}, "model.safetensors")
    for name in ("compressed-tensors", "gptq", "awq"):
        folder(made / name, {"quantization_config": {"quant_method": name}}, export=True)
    folder(made / "mlx", {"quantization": {"bits": 4}}, export=True)
    folder(made / "dense", {}, export=True)
    folder(made / "gguf", None, "model.gguf", export=True)
    adapter = folder(made / "peft", None, "adapter_model.safetensors", export=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 8, "rank_pattern": {"a": 24}}))
    folder(adapter / "base", {}, "model.safetensors")
    folder(made / "checkpoints", {})
    return made


COMMANDS = {
    "compressed-tensors": "vllm serve {}/compressed-tensors --port 8000",
    "gptq": "vllm serve {}/gptq --port 8000",
    "awq": "vllm serve {}/awq --port 8000",
    "dense": "vllm serve {}/dense --port 8000",
    "peft": "vllm serve {0}/peft/base --enable-lora --lora-modules peft={0}/peft --max-lora-rank 32 --port 8000",
    "gguf": "llama-server --model {}/gguf/model.gguf --port 8000",
    "mlx": "mlx_lm.server --model {}/mlx --port 8000",
}


def test_commands(run: Path) -> None:
    found = held(run)
    assert [h.format for h in found] == ["native", *sorted(COMMANDS)]
    assert {h.format: h.line(8000) for h in found[1:]} == {k: v.format(run) for k, v in COMMANDS.items()}
    assert [h.format for h in serving(run)] == ["compressed-tensors", "gptq", "awq", "dense", "peft", "gguf", "mlx"]
    assert [h.format for h in serving(run, "llama.cpp")] == ["gguf"]
    assert [h.format for h in held(run / "gguf" / "model.gguf")] == ["gguf"]
    sizes = {h.format: h.bytes for h in found}
    assert sizes["gguf"] == 100
    assert sizes["peft"] > 200, "an adapter is nothing without its base"


def test_a_run_with_stages(tmp_path: Path) -> None:
    folder(tmp_path / "run" / "model", {})
    assert [h.path for h in held(tmp_path / "run")] == [tmp_path / "run" / "model"]


@pytest.mark.parametrize(
    ("path", "engine", "words"),
    [("native", None, "no engine serves.*--format compressed-tensors"), ("native", "mlx-lm", "--format mlx"),
     ("native", "ollama", "none of vllm"), ("empty", None, "holds no model"), ("missing", None, "no such directory")],
)  # fmt: skip
def test_refused(tmp_path: Path, path: str, engine: str | None, words: str) -> None:
    folder(tmp_path / "native", {"quantization_config": {"quant_method": "trimtab"}})
    folder(tmp_path / "empty")
    with pytest.raises(UserError, match=words):
        serving(tmp_path / path, engine)


def test_the_command(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["trimtab", "serve", str(run), "--engine", "llama.cpp"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out == f"llama-server --model {run}/gguf/model.gguf\n"
    started: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["trimtab", "serve", str(run), "--run", "--port", "81"])
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")

    def execv(program: str, command: list[str]) -> None:
        started.append((program, command))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit):
        cli.main()
    assert started == [("/bin/vllm", ["vllm", "serve", f"{run}/compressed-tensors", "--port", "81"])]
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit):
        cli.main()
    assert "vllm: is not installed here; vllm: pip install vllm" in capsys.readouterr().err


def test_it_is_quick() -> None:
    """`trimtab serve` reads a few small files: torch has nothing to do with it."""
    probe = "import sys; from trimtab.models import held; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout == "set()\n"
