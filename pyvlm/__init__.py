"""pyvlm: fast, exact ops for vision-language models, and a thin model and trainer on top of them."""

from pyvlm import ops
from pyvlm._build_info import build_info
from pyvlm.layout import AttentionSpans, TokenLayout

__version__ = "0.1.0"
__all__ = ["AttentionSpans", "TokenLayout", "__version__", "build_info", "ops"]
