"""What a folder's configuration says of its language model, and what of it is refused by name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_languages import MODELS, SIZES
from tiny_vlm import tiny_config

from pyvlm.models import LanguageConfig, VLMConfig
from pyvlm.models.language import LanguageModel
from pyvlm.models.rope import YarnScaling

pytest.importorskip("transformers")

LLAMA = SIZES | {"model_type": "llama"}


def folder_of(path: Path, given: dict[str, Any]) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(given))
    return str(path)


def read(path: Path, given: dict[str, Any], **options: Any) -> LanguageConfig:
    return LanguageConfig.model_validate({"pretrained": folder_of(path, given)} | options)


def test_the_folder_wins_and_what_is_not_the_architecture_is_kept(tmp_path: Path) -> None:
    moe = {"layers": [0], "num_experts": 2, "intermediate_size": 8}
    given = {"hidden_size": 99, "num_layers": 7, "rope_theta": 5.0, "attention_rule": "prefix", "moe": moe}
    config = read(tmp_path, LLAMA | {"rope_theta": 321.0}, **given)
    assert (config.hidden_size, config.num_layers, config.head_dim) == (16, 3, 4)
    assert (config.rope_theta, config.rms_norm_eps, config.num_kv_heads) == (321.0, 1e-5, 2)
    assert (config.attention_rule, config.tie_embeddings, config.vocab_size) == ("prefix", False, 23)
    assert config.moe is not None
    assert config.moe.layers == [0]
    assert LanguageConfig.model_validate(config.model_dump()) == config


def test_old_configurations_leave_much_out(tmp_path: Path) -> None:
    """Of Vicuna 1.5, as it lies on the hub."""
    config = read(
        tmp_path,
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.31.0",
            "vocab_size": 32000,
        },
    )
    expected = LanguageConfig(
        pretrained=str(tmp_path),
        vocab_size=32000,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        intermediate_size=11008,
        rms_norm_eps=1e-5,
        tie_embeddings=False,
    )
    assert config == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", (None, None)),
        ("mistral", (3, None)),
        ("qwen2", (None, None)),
        ("qwen2, windows", (3, [1, 2])),
        ("gemma2", (3, [0, 2])),
        ("gemma3", (3, [0, 2])),
    ],
)
def test_windows_are_the_folders_unless_given(name: str, expected: tuple[Any, Any], tmp_path: Path) -> None:
    config = read(tmp_path, SIZES | MODELS[name])
    assert (config.window, config.window_layers) == expected
    for given in ({"window": 5}, {"window": 5, "window_layers": [1]}):
        kept = read(tmp_path, SIZES | MODELS[name], **given)
        assert (kept.window, kept.window_layers) == (5, given.get("window_layers"))
    assert kept.local_rope == config.local_rope, "positions are the layers' own, whatever they see"


@pytest.mark.parametrize("given", [{}, {"mscale": 2.0, "mscale_all_dim": 1.0}, {"attention_factor": 1.25}])
def test_yarn_is_that_of_transformers(given: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "truncate": False}
    full = LLAMA | {"head_dim": 64, "rope_parameters": yarn | given | {"rope_theta": 1000.0}}
    scaling = read(tmp_path, full).rope_scaling
    assert isinstance(scaling, YarnScaling)
    expected, magnitude = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.for_model(**full), "cpu")
    frequency = 1000.0 ** -(torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(scaling.scale(frequency, 1000.0), expected)
    assert scaling.magnitude == pytest.approx(magnitude)


def test_a_vocabulary_grows_and_does_not_shrink(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA, vocab_size=24).vocab_size == 24
    with pytest.raises(ValidationError, match="vocab_size 22 is smaller than the 23 tokens of"):
        read(tmp_path, LLAMA, vocab_size=22)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "'bert' is unknown to pyvlm; known are llama, mistral.*FAMILIES"),
        ({"model_type": "no_such"}, "'no_such'.*known are llama"),
        ({"model_type": "llava", "text_config": {"model_type": "gpt2"}}, "'gpt2' is unknown to pyvlm"),
        ({"hidden_act": "mish"}, "llama with hidden_act='mish', which pyvlm's language model does not have"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        (
            {
                "model_type": "phi3",
                "original_max_position_embeddings": 32,
                "rope_scaling": {"type": "longrope", "short_factor": [1, 1], "long_factor": [2, 2]},
            },
            "rope_type='longrope'",
        ),
        ({"model_type": "phi3", "partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ({"model_type": "phi3", "resid_pdrop": 0.1}, r"resid_pdrop=0\.1"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 3, "sliding_window": 3}
         | {"use_sliding_window": True}, r"layer_types=\['chunked_attention'\]"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, r"attn_logit_softcapping=5\.0"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config=.*awq"),
    ],
)  # fmt: skip
def test_what_ours_does_not_have_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=message):
        read(tmp_path, LLAMA | changes)


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"no config.json there; give a local folder"):
        LanguageConfig.model_validate({"pretrained": str(tmp_path)})


def test_code_of_a_checkpoint_never_runs(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    read(tmp_path, LLAMA | {"auto_map": auto_map})
    with pytest.raises(ValidationError, match=r"'own'.*known are llama"):
        read(tmp_path, LLAMA | {"model_type": "own", "auto_map": auto_map})
    assert not (tmp_path / "ran").exists()


def test_models_without_a_folder_are_as_they_were(tmp_path: Path) -> None:
    """The parameters of a saved model keep their names, and its config.json loads."""
    given = tiny_config(moe=None).model_dump()
    new = {
        *("pretrained", "rope_scaling", "local_rope", "norm_placement", "norm_unit_offset", "activation"),
        *("embedding_scale", "qkv_bias", "out_bias", "mlp_bias", "qk_norm", "attention_scale"),
    }
    old = {name: value for name, value in given["language"].items() if name not in new}
    config = VLMConfig.model_validate(given | {"language": old})
    assert config == tiny_config(moe=None)
    assert sorted(name for name in LanguageModel(config.language, "auto").state_dict() if ".1." in name) == [
        "layers.1.attention.o_proj.weight",
        "layers.1.attention.qkv_proj.weight",
        "layers.1.attention_norm.weight",
        "layers.1.mlp.down_proj.weight",
        "layers.1.mlp.gate_up_proj.weight",
        "layers.1.mlp_norm.weight",
    ]


def test_transformers_is_needed_for_a_folder_only() -> None:
    code = (
        "import sys; from pyvlm.models import LanguageConfig as C;"
        "C(vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8);"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
