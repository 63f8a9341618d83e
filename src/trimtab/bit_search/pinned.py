"""Which device each worker of a search computes on: numbers of GPUs, as this machine counts them.

A worker is told its device by name, as a recipe is, rather than by hiding the others from it (`CUDA_VISIBLE_DEVICES`):
everything below takes the device that it is given, and messages name the device that the user named.
"""

from trimtab.devices import resolve
from trimtab.errors import UserError
from trimtab.recipe.recipe import Recipe


def pinned(recipe: Recipe) -> list[str | None]:
    """Where each worker measures: on a device of `search.devices`, or (None) where the recipe says.

    Raises:
        UserError: for a device that is not here.
    """
    block = recipe.search
    assert block is not None
    if block.devices is None:
        return [None] * (block.workers or 1)
    kind = recipe.device.type
    if kind not in ("cuda", "xpu"):
        raise UserError(
            f"search.devices: {list(block.devices)} are numbers of GPUs, and there is none here for "
            f"model.device={recipe.model.device}; leave search.devices out"
        )
    return [str(resolve(f"{kind}:{number}", "search.devices")) for number in block.devices]
