"""pyvlm: fast, exact ops for vision-language models, and a thin model and trainer on top of them."""

from typing import TYPE_CHECKING, Any

from pyvlm import _transformers_hook, ops
from pyvlm._build_info import build_info
from pyvlm.layout import AttentionSpans, TokenLayout

if TYPE_CHECKING:
    from pyvlm.integrations.transformers import accelerate, restore

__version__ = "0.1.0"
__all__ = [
    "AttentionSpans",
    "TokenLayout",
    "__version__",
    "accelerate",
    "build_info",
    "ops",
    "restore",
]

_transformers_hook.install()


def __getattr__(name: str) -> Any:
    """`accelerate` and `restore` import transformers, which takes seconds: not before they are asked for."""
    if name in ("accelerate", "restore"):
        from pyvlm.integrations import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
