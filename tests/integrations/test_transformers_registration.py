"""When pyvlm becomes known to transformers, and what importing it costs."""

import subprocess
import sys
import warnings

import pytest

pytest.importorskip("transformers", reason="transformers, an optional package, is not installed")

LIGHT = "import sys, pyvlm; assert not {'transformers', 'triton'} & set(sys.modules), 'heavy'"
NAMES = """
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
assert "pyvlm" in AttentionInterface() and "pyvlm" in AttentionMaskInterface()
import transformers.modeling_utils as m
assert type(m.__spec__.loader).__name__ == "SourceFileLoader" and m.__loader__ is m.__spec__.loader
"""


@pytest.mark.parametrize(
    "program",
    [
        LIGHT,
        "import pyvlm" + NAMES,
        "import transformers, pyvlm" + NAMES,
        "from transformers import LlamaForCausalLM; import pyvlm" + NAMES,
        "import pyvlm; from transformers import LlamaForCausalLM" + NAMES,
    ],
    ids=["pyvlm alone is light", "before", "after the package", "after a model", "before a model"],
)
def test_names_are_registered_in_any_order_of_imports(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_version_outside_the_tested_range_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyvlm.integrations import transformers as integration

    for version, warned in (
        ("5.17.0", False),
        ("5.23.9", False),
        ("5.16.3", True),
        ("5.24.0", True),
        ("6.0", True),
    ):
        monkeypatch.setattr(integration.transformers, "__version__", version)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            integration._warn_outside_tested_range()
        assert bool(caught) == warned, version
        if warned:
            assert "5.17" in str(caught[0].message)
            assert version in str(caught[0].message)


def test_unknown_attributes_of_the_package_are_still_errors() -> None:
    import pyvlm

    with pytest.raises(AttributeError, match="has no attribute 'accelerat'"):
        pyvlm.accelerat  # noqa: B018
