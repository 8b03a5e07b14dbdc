"""Models of transformers, on the kernels of pyvlm."""

from typing import Any, TypeVar

ModelType = TypeVar("ModelType")


def accelerate(model: ModelType, **options: Any) -> ModelType:
    """The model as it is."""
    return model
