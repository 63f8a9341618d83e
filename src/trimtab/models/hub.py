"""What is written to the hub. Reading from it is in `sources`; both import huggingface_hub only when they are asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import UserError


def upload(
    folder: Path,
    repo: str,
    files: Sequence[str],
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload by trimtab",
) -> str:
    """Upload files of a folder into a model repository, which is made if there is none; its address.

    Args:
        folder: that holds the files.
        repo: owner/name.
        files: relative names.
        private: of a repository that is made.
        revision: branch; None for the main one.
        message: of the commit.

    Raises:
        UserError: for a name that is none, or with what the hub said.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api: Any = HfApi()
    try:
        made = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in files]
        api.create_commit(repo, added, commit_message=message, revision=revision)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"push: {repo}: the hub did not take it ({said}); `hf auth login`, and check the name and the network"
        ) from error
    return str(getattr(made, "url", made))
