"""Makes "pyvlm" known to transformers as soon as both are imported, without importing transformers here.

`from_pretrained(..., attn_implementation="pyvlm")` must find the name after no more than `import pyvlm`, and
`import pyvlm` must stay light. transformers has no entry points for this, so the import of its
`modeling_utils`, which every model needs, is followed by that of pyvlm's integration.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

WATCHED = "transformers.modeling_utils"


def install() -> None:
    """Registers now where transformers is there already, else when it comes."""
    if WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    import pyvlm.integrations.transformers  # noqa: F401  importing it registers


class _Watch(MetaPathFinder):
    """Finds one module, once, through all other finders, and has its loader tell when it is executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Telling(spec.loader)
        return spec


class _Telling(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:  # the module's own loader, as if nothing had been in between
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()
