"""The model: its configuration, its parts, its files on disk, and the processor of its inputs."""

from pyvlm.models.adapters import merge_lora, with_adapters
from pyvlm.models.config import (
    ConvConfig,
    FusionConfig,
    ImageConfig,
    LanguageConfig,
    LoRAConfig,
    MoEConfig,
    PartialLoRAConfig,
    TransformersConfig,
    ViTConfig,
    VLMConfig,
)
from pyvlm.models.connector_config import QFormerConnectorConfig, ResamplerConfig, SVAConfig
from pyvlm.models.images import load_image
from pyvlm.models.parts import hash_parts
from pyvlm.models.processor import Processor, ProcessorConfig, word_level_tokenizer
from pyvlm.models.resolution import change_image_size
from pyvlm.models.tiling import TilingConfig
from pyvlm.models.upcycling import upcycle
from pyvlm.models.vlm import VLM, VLMOutput

__all__ = [
    "VLM",
    "ConvConfig",
    "FusionConfig",
    "ImageConfig",
    "LanguageConfig",
    "LoRAConfig",
    "MoEConfig",
    "PartialLoRAConfig",
    "Processor",
    "ProcessorConfig",
    "QFormerConnectorConfig",
    "ResamplerConfig",
    "SVAConfig",
    "TilingConfig",
    "TransformersConfig",
    "VLMConfig",
    "VLMOutput",
    "ViTConfig",
    "change_image_size",
    "hash_parts",
    "load_image",
    "merge_lora",
    "upcycle",
    "with_adapters",
    "word_level_tokenizer",
]
