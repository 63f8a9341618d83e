"""The native format: a directory that `AutoModelForCausalLM.from_pretrained` reads after `import trimtab`.

    config.json             the model's own config with our `quantization_config` (see `transformers_bridge`)
    model.safetensors       tensors under the names of the modules that hold them, codes packed
    tokenizer files, generation_config.json, recipe.yaml, manifest.json

It holds everything that a prepared model can: folded or not, any grid, kept adapters.
"""

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from trimtab import processes
from trimtab.formats.declaration import ALL_KINDS, Engine, Format, Writing
from trimtab.formats.directory import replacing, write_processors
from trimtab.formats.file_size import SHARD_BYTES, parse_bytes
from trimtab.models.origin import check_not_read_from
from trimtab.models.prepared import Prepared
from trimtab.models.sharding import gather, is_sharded
from trimtab.outputs import output


class Native(Format):
    """Everything as it is."""

    name = "native"
    summary = "trimtab's own: everything, read by transformers after `import trimtab`"
    forms = ()
    dense = ALL_KINDS
    everything = True
    adapters = "kept"
    engines = (
        Engine(
            name="transformers",
            bits=(1, 2, 3, 4, 5, 6, 7, 8),
            zeros=("symmetric", "integer", "real"),
            kv=("float", "8", "4"),
        ),
    )

    def write(self, folder: Path, writing: Writing) -> None:
        """The model's own tensors."""
        write_into(folder, writing.model, writing.tokenizer, writing.recipe, writing.max_shard_bytes)


def save(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    recipe: str | None = None,
    max_shard_size: str | int = SHARD_BYTES,
) -> None:
    """Save a prepared or folded model as a folder that `trimtab.load` and transformers read.

    Args:
        model: from `load` or `prepare`; of a sharded one (`trimtab.shard`) every process has to call this.
        path: directory; an earlier save in it is replaced as a whole, at the end.
        tokenizer: saved beside the model if given.
        recipe: YAML text of the resolved recipe, written as `recipe.yaml`.
        max_shard_size: largest size of a safetensors file, for example `5GB`.

    Raises:
        UserError: if the directory holds anything but an earlier save, or the model was read from it.

    Examples:
        >>> tt.save(model, "tuned", tokenizer)
        >>> model = AutoModelForCausalLM.from_pretrained("tuned")
    """
    largest, target = parse_bytes(max_shard_size, "max_shard_size"), output(path, "path")
    check_not_read_from(model, target)
    if is_sharded(model):
        whole = gather(model)
        processes.first(lambda: save(whole, path, tokenizer, recipe=recipe, max_shard_size=max_shard_size))  # type: ignore[arg-type]
        return
    with replacing(target, "model", overwrite=True) as folder:
        write_into(folder, model, tokenizer, recipe, largest)


def write_into(
    folder: Path, model: PreTrainedModel, tokenizer: Any, recipe: str | None, largest: int = SHARD_BYTES
) -> None:
    """Write a model's files into a folder that is staged."""
    options: dict[str, Any] = {"whole": True} if isinstance(model, Prepared) else {}
    model.save_pretrained(folder, max_shard_size=largest, **options)
    write_processors(folder, model, tokenizer)
    if recipe is not None:
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")


def disk_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of all files of a saved model; not of exports and checkpoints in it."""
    return sum(f.stat().st_size for f in Path(path).iterdir() if f.is_file())
