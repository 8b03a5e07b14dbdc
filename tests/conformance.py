"""Stored outputs of the original authors' code, kept outside of version control: one safetensors file a case.

    @pytest.mark.parametrize("case", conformance.cases("attention/mmca_released"))
    def test_it(case: conformance.Case) -> None:
        q, settings = case["input.q"], case.settings

Where the folder is missing, just the tests that need it are skipped, with the reason.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# Beside the repository, or in it where only its folder was copied to a machine.
_REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = [parent / "shared" / "conformance" for parent in (_REPOSITORY.parent, _REPOSITORY)]
FOLDER = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])


def missing() -> str | None:
    """Why there are no cases, or None where there are."""
    if find_spec("safetensors") is None:
        return "safetensors, which reads the stored outputs, is not installed"
    if FOLDER.is_dir():
        return None
    return "the conformance vectors are missing: no folder shared/conformance beside the repository or in it"


def _opened(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, "pt")


@dataclass(frozen=True)
class Case:
    path: Path

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The producer's record: item, case, source, seed, settings, note."""
        with _opened(self.path) as file:
            return json.loads(file.metadata()["meta"])

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        with _opened(self.path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)

    @property
    def settings(self) -> dict[str, Any]:
        return self.meta["settings"]

    def to(self, device: torch.device) -> "Case":
        """The same case with its tensors on another device."""
        moved = Case(self.path)
        vars(moved)["tensors"] = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return moved

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors


def cases(item: str, where: Callable[[dict[str, Any]], bool] | None = None) -> list[Any]:
    """Pytest parameters: a `Case` for each file of an item such as "moe/soft_moe", or one that is skipped.

    `where` chooses among the item's files by their settings.
    """
    reason = missing()
    if reason is not None:
        return [pytest.param(None, id="missing", marks=pytest.mark.skip(reason=reason))]
    folder, name = item.split("/")
    paths = sorted(
        (FOLDER / folder).glob(f"{name}_[0-9]*.safetensors"), key=lambda p: int(p.stem.split("_")[-1])
    )
    if not paths:
        raise FileNotFoundError(f"no conformance files {folder}/{name}_*.safetensors in {FOLDER}")
    chosen = [case for case in map(Case, paths) if where is None or where(case.settings)]
    return [pytest.param(case, id=case.path.stem) for case in chosen]
