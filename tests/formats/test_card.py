"""The card of every folder that holds a model, read by huggingface_hub; and what of a folder is pushed."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

import tiny
import trimtab
from trimtab.errors import UserError
from trimtab.formats import manifest
from trimtab.formats.card import card
from trimtab.formats.native.write import save
from trimtab.methods import LrQat
from trimtab.models.card import hub_id
from trimtab.models.load import load
from trimtab.models.prepare import fold
from trimtab.recipe import recipe


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`saved` with the recipe of a hub model, and its `dense` and `peft` exports."""
    folder = tmp_path_factory.mktemp("given")
    tiny.model(folder / "model")
    model, tokenizer = load(str(folder / "model"), LrQat(rank=4), tiny.RULES)
    fold(model)
    values = tiny.recipe(folder / "model", folder / "data", folder / "run", model={"path": "owner/base@0123abc"})
    values["data"] = {"path": "owner/texts", "block_tokens": 32}
    save(model, folder / "saved", tokenizer, recipe=recipe.from_dict(values).to_yaml())
    trimtab.export(str(folder / "saved"), "dense")
    return folder


def metadata(folder: Path) -> dict[str, Any]:
    return dict(ModelCard.load(folder / "README.md").data.to_dict())


def test_the_card_of_a_saved_model(given: Path) -> None:
    assert metadata(given / "saved") == {
        "base_model": "owner/base",
        "base_model_relation": "quantized",
        "datasets": ["owner/texts"],
        "library_name": "trimtab",
        "pipeline_tag": "text-generation",
        "tags": ["trimtab", "quantized", "native", "lr-qat", "3-bit", "8-bit"],
    }
    text = (given / "saved" / "README.md").read_text()
    for part in (
        "# tiny",
        "[owner/base](https://huggingface.co/owner/base)",
        "import trimtab",
        "6 steps",
        "int3 g32 integer",
    ):
        assert part in text, part
    assert str(given) not in text, "nobody else has the paths of this machine"
    assert "README.md" in manifest.listed(given / "saved")
    manifest.verify(given / "saved")


def test_the_card_of_an_export(given: Path) -> None:
    folder = given / "saved" / "dense"
    found = metadata(folder)
    assert (found["library_name"], found["base_model_relation"]) == ("transformers", "finetune")
    text = (folder / "README.md").read_text()
    assert "# tiny, dense" in text
    assert "vllm serve ." in text
    manifest.verify(folder)


@pytest.mark.parametrize(
    ("files", "library", "relation", "tag", "use"),
    [
        ({"model.gguf": "GGUF"}, "gguf", "quantized", "gguf", "llama-server --model model.gguf"),
        ({"config.json": '{"quantization": {"bits": 4}}'}, "mlx", "quantized", "mlx", "mlx_lm.server --model ."),
        ({"adapter_config.json": '{"r": 4}', "base/config.json": "{}"}, "peft", "adapter", "peft", "--lora-modules"),
    ],
    ids=["gguf", "mlx", "peft"],
)  # fmt: skip
def test_the_card_of_each_format(
    tmp_path: Path, given: Path, files: dict[str, str], library: str, relation: str, tag: str, use: str
) -> None:
    """An adapter is no model in few bits."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    text = card(tmp_path, "x", (given / "saved" / "recipe.yaml").read_text())
    assert text is not None
    found = ModelCard(text).data.to_dict()
    assert (found["library_name"], found["base_model_relation"], found["base_model"]) == (
        library,
        relation,
        "owner/base",
    )
    assert tag in found["tags"]
    assert ("quantized" in found["tags"]) is (relation == "quantized")
    assert use in text
    assert f"# tiny, {tag}" in text


def test_measured(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    metrics = '{"perplexity": {"float": 9.0, "tuned": 9.5}, "max_logit_difference": 0}'
    (tmp_path / "metrics.json").write_text(metrics)
    text = card(tmp_path, "small")
    assert text is not None
    assert "| perplexity, tuned, folded, reloaded | 9.50 |" in text
    assert card(tmp_path / "none", "x") is None


@pytest.mark.parametrize(
    ("path", "name"),
    [("owner/base", "owner/base"), ("owner/base@abc", "owner/base"), ("/a/b", None), ("./b", None), ("file.gguf", None),
     ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"), (None, None), ("tests/formats", None)],
)  # fmt: skip
def test_hub_ids(path: str | None, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of this machine is no hub id, though it looks like one."""
    monkeypatch.chdir(Path(__file__).parents[2])
    assert hub_id(path) == name


# ---- pushing --------------------------------------------------------------------------------------------------------


class Hub:
    """Takes what is pushed."""

    def __init__(self, fails: str = "") -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.branches: list[str] = []
        self.fails = fails

    def create_repo(self, repo: str, **options: Any) -> str:
        if self.fails:
            raise OSError(self.fails)
        self.repos[repo] = options
        return f"https://huggingface.co/{repo}"

    def create_branch(self, repo: str, branch: str, exist_ok: bool) -> None:
        self.branches.append(branch)

    def create_commit(self, repo: str, added: list[Any], **options: Any) -> None:
        files = {a.path_in_repo: Path(a.path_or_fileobj).read_bytes() for a in added}
        self.repos[repo] |= {"files": files, **options}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


def test_push(given: Path, hub: Hub) -> None:
    """What the manifest lists, and nothing that lies beside it: no export, no notes."""
    folder = given / "saved"
    (folder / "notes.txt").write_text("mine")
    said: list[str] = []
    address = trimtab.push(folder, "owner/small", private=True, revision="v1", message="first", say=said.append)
    assert address == "https://huggingface.co/owner/small"
    repo = hub.repos["owner/small"]
    assert (repo["private"], repo["revision"], repo["commit_message"], hub.branches) == (True, "v1", "first", ["v1"])
    assert set(repo["files"]) == set(manifest.listed(folder))
    assert {"README.md", "config.json", "model.safetensors"} <= set(repo["files"])
    assert repo["files"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    (told,) = [line for line in said if "paths of this machine" in line]
    texts = [f for f in folder.iterdir() if f.suffix in (".json", ".yaml", ".md") and f.name != "manifest.json"]
    assert (
        {f.name for f in texts if str(given) in f.read_text()}
        == set(told.partition(":")[0].split(", "))
        == {"recipe.yaml"}
    )
    (folder / "notes.txt").unlink()
    trimtab.push(folder / "dense", "owner/dense")
    assert "export.json" in hub.repos["owner/dense"]["files"]


def test_all_files_that_name_paths_are_said(given: Path, hub: Hub, tmp_path: Path) -> None:
    """Also those that a later version may write, and paths of other folders than these."""
    model, tokenizer = load(str(given / "saved"))
    save(model, tmp_path / "out", tokenizer)
    for name, text in (
        ("report.json", '{"plan": {"path": "/data/x"}}'),
        ("more.json", f'{{"{tmp_path}/a": 1}}'),
        ("fine.json", "{}"),
    ):
        (tmp_path / "out" / name).write_text(text)
    manifest.add(tmp_path / "out", ("report.json", "more.json", "fine.json"))
    said: list[str] = []
    trimtab.push(tmp_path / "out", "owner/small", say=said.append)
    (told,) = [line for line in said if "paths of this machine" in line]
    assert set(told.partition(":")[0].split(", ")) == {"report.json", "more.json"}


def test_a_push_that_is_refused(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="holds no model that trimtab wrote"):
        trimtab.push(given / "model", "owner/small")
    with pytest.raises(UserError, match="write owner/name"):
        trimtab.push(given / "saved", "small")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub("no network\nat all"))
    with pytest.raises(UserError, match=r"did not take it \(no network\).*hf auth login"):
        trimtab.push(given / "saved", "owner/small")
    model, tokenizer = load(str(given / "saved"))
    save(model, tmp_path / "changed", tokenizer)
    torch.save({}, tmp_path / "changed" / "config.json")
    with pytest.raises(UserError, match="is not what was written"):
        trimtab.push(tmp_path / "changed", "owner/small")
    assert issubclass(HfHubHTTPError, OSError), "what the hub answers is caught, too"
