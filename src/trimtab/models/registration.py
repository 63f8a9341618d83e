"""Register our quantizer with transformers when, and only when, transformers comes to need quantizers.

`import trimtab` must be quick, and transformers' quantizers take over a second to import. So nothing is imported here:
a hook waits for `transformers.quantizers.auto`, which `from_pretrained` imports before it reads any model, and imports
`trimtab.models.transformers_bridge` right after it. If it is there already, that is done at once.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_AWAITED = "transformers.quantizers.auto"


class _Hook(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module("trimtab.models.transformers_bridge")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


_READERS: dict[str, str] = {}


def readers(named: dict[str, str]) -> None:
    """Say who reads which kind of model: `module:class` by kind. Nothing is imported until a path asks for it."""
    _READERS.update(named)


def reader_of(kind: str) -> str:
    """The `module:class` that reads this kind of model."""
    return _READERS[kind]


def known_readers() -> frozenset[str]:
    """The kinds of models that somebody reads."""
    return frozenset(_READERS)


def install() -> None:
    """Arrange for `trimtab.models.transformers_bridge` to be imported as soon as transformers' quantizers are."""
    if _AWAITED in sys.modules:
        importlib.import_module("trimtab.models.transformers_bridge")
    elif not any(isinstance(hook, _Hook) for hook in sys.meta_path):
        sys.meta_path.insert(0, _Hook())
