"""The folder of a search: which files in it are the search's own, so that nothing else is ever removed with them."""

from pathlib import Path

from trimtab.errors import UserError
from trimtab.formats import manifest
from trimtab.outputs import output, resolved
from trimtab.words import and_more

_FILES = (
    *("journal.log", "journal.log.lock", "journal.log.open.lock", "recipe.yaml", "trials.csv", "front.csv"),
    *("front.png", "bits.png", "search.json", "report.html"),
)


def own(folder: Path, url: str) -> None:
    """Make the folder a search's, or see that it is one: by its manifest, which comes before its first file.

    Args:
        folder: `<output>/search`.
        url: of the study; a journal in the folder belongs to it.

    Raises:
        UserError: if it holds anything else, or cannot be made.
    """
    resolved(folder.parent)
    output(folder)
    found = list(manifest.entries(folder)) if folder.is_dir() else []
    kind = manifest.kind_of(folder)
    if kind != "search" and (found or kind is not None):
        raise UserError(f"output: {folder} holds {and_more(found)}, which no search wrote; move it, or set `output`")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if kind is None:
            manifest.write_manifest(folder, "search", _FILES)
    except OSError as error:
        raise UserError(f"output: {folder} cannot be written ({error.strerror or error}); set `output`") from error
    journal = Path(url)
    if journal.resolve().parent == folder.resolve() and journal.name not in _FILES:
        manifest.add(folder, (journal.name, f"{journal.name}.lock", f"{journal.name}.open.lock"))
