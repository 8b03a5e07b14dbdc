"""The model: its configuration, its parts, its files on disk, and the processor of its inputs."""

from pyvlm.models.config import (
    ConvConfig,
    FusionConfig,
    ImageConfig,
    LanguageConfig,
    MoEConfig,
    TransformersConfig,
    ViTConfig,
    VLMConfig,
)
from pyvlm.models.images import load_image
from pyvlm.models.processor import Processor, ProcessorConfig, word_level_tokenizer
from pyvlm.models.tiling import TilingConfig
from pyvlm.models.vlm import VLM, VLMOutput

__all__ = [
    "VLM",
    "ConvConfig",
    "FusionConfig",
    "ImageConfig",
    "LanguageConfig",
    "MoEConfig",
    "Processor",
    "ProcessorConfig",
    "TilingConfig",
    "TransformersConfig",
    "VLMConfig",
    "VLMOutput",
    "ViTConfig",
    "load_image",
    "word_level_tokenizer",
]
