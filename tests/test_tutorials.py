"""The tutorials, run: the cells of each page's notebook, one after another, on tiny models and in a few steps.

A cell is run as a notebook runs it: Python in one namespace, `%%writefile` writes its file, `!trimtab ...` is the command.
What is put in place of what a page says stands in `QUICK`: a tiny model for the hub's, few steps, short sequences.
"""

import json
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest

import docs_notebooks
import gguf_models
import tiny
from trimtab import cli
from trimtab.formats.export import Options, export

ROOT = Path(__file__).parents[1]
PAGES = sorted(page for page in (ROOT / "docs" / "tutorials").glob("*.md") if page.stem != "index")
QUICK = {
    r"HuggingFaceTB/SmolLM2-135M-Instruct": "model",
    r"steps: [1-9]\d*": "steps: 2",
    r"epochs: \d+": "steps: 2",
    r"batch_tokens: \d+": "batch_tokens: 512",
    r"block_tokens: \d+": "block_tokens: 64",
    r"micro_batch: \d+": "micro_batch: 1",
    r"budget: 80MiB": "budget: 200KiB",
    r"trials: \d+": "trials: 1",
    r"bits: \[2, 3, 4, 8\]": "bits: [3, 4]",
    r"\btokens: \d+": "tokens: 64",
    r"sensitivity_tokens: \d+": "sensitivity_tokens: 64",
    r"eval_tokens: \d+": "eval_tokens: 64",
    r"pydoc-topics, eval_path: pydoc-topics, eval_split: heldout": "text.jsonl, eval_path: text.jsonl",
    r"pydoc-topics": "text.jsonl",
    r"range\((20|30|40)\)|steps = 20": lambda found: found[0].replace("20", "2").replace("30", "2"),
}
"""What makes a page quick, pattern by pattern."""


def quick(source: str) -> str:
    """A cell with tiny things in place of real ones."""
    for pattern, instead in QUICK.items():
        source = re.sub(pattern, instead, source)  # type: ignore[arg-type]
    return source


def command(line: str) -> None:
    """A command, in this process."""
    arguments = shlex.split(line)
    assert arguments[0] == "trimtab"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", arguments)
        status: object = 0
        try:
            cli.main()
        except SystemExit as left:
            status = left.code
    assert not status, line


def play(page: str, folder: Path) -> None:
    """Run every cell."""
    names: dict[str, Any] = {}
    for cell in json.loads(docs_notebooks.notebook(page))["cells"]:
        source = quick("".join(cell["source"]))
        if cell["cell_type"] != "code":
            continue
        if source.startswith("%%writefile "):
            first, _, body = source.partition("\n")
            (folder / first.split()[1]).write_text(body, encoding="utf-8")
        elif re.match(r"[!#]", source):
            for line in source.splitlines():
                if line.startswith("!"):
                    command(line[1:])
        else:
            exec(compile(source, "cell", "exec"), names)


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a text and a GGUF file, which is the current one."""
    model = gguf_models.random_model(gguf_models.FAMILIES["llama"])
    model.save_pretrained(tmp_path / "model")
    gguf_models.byte_level_tokenizer().save_pretrained(tmp_path / "model")
    tiny.text(tmp_path / "text.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_cell_runs(page: Path, given: Path) -> None:
    if page.stem == "gguf":
        import trimtab as tt

        rules = [{"match": "*", "grid": {"bits": 4, "group": 32, "scale_dtype": "float16"}}]
        base, tokenizer = tt.load("model", rules=rules)
        tt.save(base, "base", tokenizer)
        made = export("base", "gguf", Path("base-gguf"), Options())
        assert made
        next(Path("base-gguf").glob("*.gguf")).rename("model.gguf")
    play(page.read_text(encoding="utf-8"), given)


# ---- how pages become notebooks -------------------------------------------------------------------------------------

PAGE = """# Title

Text.

```yaml
# a.yaml
train: {steps: 1}
```

```
trimtab run a.yaml      # now
```

<!-- not run -->
```
trimtab run b.yaml
```

```python
x = 1
```

```
y = 2
```
"""


def test_blocks_become_cells() -> None:
    kinds = [(cell.kind, cell.source) for cell in docs_notebooks.cells(PAGE)]
    assert kinds == [
        ("markdown", "# Title\n\nText."),
        ("code", "%%writefile a.yaml\ntrain: {steps: 1}"),
        ("code", "!trimtab run a.yaml"),
        ("markdown", "```\ntrimtab run b.yaml\n```"),
        ("code", "x = 1"),
        ("markdown", "```\ny = 2\n```"),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_have_cells_to_run(page: Path) -> None:
    cells = docs_notebooks.cells(page.read_text(encoding="utf-8"))
    assert [cell.kind for cell in cells].count("code") >= 2
    notebook = json.loads(docs_notebooks.notebook(page.read_text(encoding="utf-8")))
    assert notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(cells)


def test_a_failing_cell_is_noticed(given: Path) -> None:
    with pytest.raises(AssertionError), warnings.catch_warnings():
        play("```\ntrimtab run no.yaml\n```\n", given)
    with pytest.raises(ZeroDivisionError):
        play("```python\n1 / 0\n```\n", given)
