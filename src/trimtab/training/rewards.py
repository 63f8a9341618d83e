"""The reward that a recipe names: a function of an installed module, or of one beside the recipe or where we are."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.recipe.recipe import Recipe


def reward(recipe: Recipe) -> Callable[..., Any]:
    """The function that `train.reward` names.

    Raises:
        UserError: if there is none.
    """
    name = recipe.train.reward or ""
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute.isidentifier()):
        raise UserError(f"train.reward: {name!r} is not written module:function, for example rewards:correct")
    beside = [str(Path(recipe.file).parent)] if recipe.file is not None else []
    added = [folder for folder in (*beside, str(Path.cwd())) if folder not in sys.path]
    sys.path[:0] = added
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"train.reward: {name}: {error}; looked in {', '.join(added) or 'sys.path'}, too") from error
    finally:
        sys.path[:] = [folder for folder in sys.path if folder not in added]
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(f"train.reward: {module_name} has no function {attribute!r}")
    return found
