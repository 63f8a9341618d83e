"""Equal runs give equal bytes, in processes that order sets and Rust's maps otherwise; but for what tells of time."""

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

import exported
import tiny
import trimtab as tt
from elsewhere import called, value
from gguf_models import byte_level_tokenizer
from trimtab.methods import Qlora, Rtn

TIMES = {"metrics.json", "report.json", "report.html", "pruning.json"}
RULES = [exported.EMBEDDING, exported.everywhere(bits=4, group=32)]


def write(given: Path, out: Path) -> None:
    """Every format, an adapter, a pruned model, and a whole run."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tt.save(*_swapped(str(given / "model"), out / "saved"), max_shard_size=30_000)
    for name in ("dense", "gguf", "compressed-tensors", "gptq", "awq", "mlx"):
        tt.export(str(out / "saved"), name)
    model, tokenizer = tt.load(str(given / "model"), Qlora(rank=2))
    tt.save(model, out / "adapted", tokenizer)
    tt.export(str(out / "adapted"), "peft")
    model.save_pretrained(out / "people")
    tt.prune(str(given / "model"), out / "pruned", ratio=0.3, importance="magnitude", multiple_of=32)
    changes = {"train": {"steps": 2, "save_steps": 1}, "evaluate": {"parity": False}, "export": ["native", "gguf"]}
    tt.run(tiny.recipe(given / "model", given / "data.jsonl", out / "run", **changes))


def _swapped(path: str, out: Path) -> tuple[object, Path, object]:
    model, tokenizer = tt.load(path, Rtn(), RULES)
    return model, out, tokenizer


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same by two processes, under the same name: it is in recipes."""
    folder = tmp_path_factory.mktemp("twice")
    tiny.model(folder / "model", template=None)
    byte_level_tokenizer().save_pretrained(folder / "model")
    tiny.text(folder / "data.jsonl")
    for seed in ("1", "2"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONHASHSEED", seed)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                value(*pool.submit(called, write, folder, folder / "out").result())
        shutil.move(folder / "out", folder / seed)
    return folder / "1", folder / "2"


@pytest.mark.slow
def test_equal_runs_give_equal_bytes(twice: tuple[Path, Path]) -> None:
    found = [{f.relative_to(at).as_posix(): f for f in at.rglob("*") if f.is_file()} for at in twice]
    assert found[0].keys() == found[1].keys()
    other = {name for name, file in found[0].items() if file.read_bytes() != found[1][name].read_bytes()}
    timed = {name for name in found[0] if Path(name).name in TIMES}
    assert {name for name in timed if name.startswith(("run/m", "pruned"))} <= other, "nothing here tells the two apart"
    assert other <= timed | {f"{Path(name).parent}/manifest.json" for name in timed}
    assert len([name for name in found[0] if name.endswith(("safetensors", "gguf"))]) > 15
