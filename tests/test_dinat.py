"""DiNAT and NAT in transformers, whose code cannot be imported beside NATTEN 0.20 and newer."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from helpers import raises_naming, randomize
from safetensors.torch import load_file
from torch import Tensor, nn

from natten_layers.eager import dense_attention_state
from natten_layers.geometry import make_window

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("natten_layers.integrations.transformers")


@pytest.fixture
def config() -> Any:
    """Of two stages, 10 x 8 and 5 x 4 tokens; the second one pads its 4 columns to the window of 6."""
    integration.register_dinat()
    return transformers.DinatConfig(
        embed_dim=16, depths=[2, 1], num_heads=[2, 4], kernel_size=3, dilations=[[1, 2], [2]], num_labels=5,
        drop_path_rate=0.0, layer_scale_init_value=0.5, out_features=["stage1", "stage2"],
    )  # fmt: skip


def literal(self: Any, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor]:
    """The attention of a layer as the paper defines it, with a mask of all pairs of tokens."""
    query, key, value = (
        layer(hidden_states).unflatten(-1, (self.num_attention_heads, self.attention_head_size))
        for layer in (self.query, self.key, self.value)
    )
    window = make_window(hidden_states.shape[1:3], self.kernel_size, dilation=self.dilation)
    scale = self.attention_head_size**-0.5
    return (dense_attention_state(query, key, value, None, None, None, window, scale, self.rpb)[0].flatten(-2),)


def outputs(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """The last stage or all of them, and the gradients of all parameters."""
    result = model(pixels)
    maps = list(result.feature_maps) if "feature_maps" in result else [result.logits]
    grads = torch.autograd.grad(sum((m.square().sum() for m in maps), torch.zeros(())), list(model.parameters()))
    return [*maps, *grads]


@pytest.mark.parametrize("name", ["DinatForImageClassification", "DinatBackbone"])
def test_models_equal_their_definition(config: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).double()
    randomize(model)
    pixels = torch.randn(2, 3, 40, 32, dtype=torch.float64)
    actual = outputs(model, pixels)
    monkeypatch.setattr("transformers.models.dinat.modeling_dinat.NeighborhoodAttention.forward", literal)
    for found, expected in zip(actual, outputs(model, pixels), strict=True):
        # Not relative alone: the gradient of a key's bias is zero.
        assert (found - expected).norm() <= 1e-12 * expected.norm() + 1e-13


def test_state_dicts_come_back(config: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = transformers.DinatForImageClassification(config).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    integration.register_dinat()  # twice is once
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again(pixels).logits, model(pixels).logits)


def test_what_is_not_supported_says_so(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randn(1, 3, 32, 32)
    with raises_naming("output_attentions"):
        transformers.DinatModel(config)(pixels, output_attentions=True)
    config.attention_probs_dropout_prob = 0.1
    with raises_naming("attention_probs_dropout_prob", "0.1"):
        transformers.DinatModel(config).train()(pixels)
    modeling = inspect.getmodule(transformers.DinatModel)
    assert modeling is not None
    monkeypatch.setattr(modeling.NeighborhoodAttention, "forward", lambda self, hidden_states, mask: hidden_states)
    with raises_naming(transformers.__version__, "DiNAT", error=ImportError):
        integration.register_dinat()


@pytest.fixture
def nat_files(tmp_path: Any) -> Any:
    """A directory as NAT's checkpoints have it, of transformers 4: names, and a configuration without dilations."""
    integration.register_dinat()
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "kernel_size": 3, "drop_path_rate": 0.0,
        "layer_scale_init_value": 0.5, "layer_norm_eps": 1e-5, "mlp_ratio": 3.0, "qkv_bias": True, "hidden_act": "gelu",
    }  # fmt: skip
    labels = {"id2label": {str(i): f"class {i}" for i in range(5)}, "label2id": {f"class {i}": i for i in range(5)}}
    config = transformers.DinatConfig(**fields, dilations=[[1, 1], [1]], num_labels=5)
    model = transformers.DinatForImageClassification(config).eval()
    randomize(model)
    torch.save({n.replace("dinat.", "nat."): t for n, t in model.state_dict().items()}, tmp_path / "pytorch_model.bin")
    written = {
        **fields, **labels, "architectures": ["NatForImageClassification"], "model_type": "nat", "num_layers": 2,
        "hidden_size": 32, "path_norm": True, "patch_size": 4, "torch_dtype": "float32",
        "transformers_version": "4.24.0",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(written))
    return tmp_path, model


def test_checkpoints_of_nat_are_those_of_dinat_without_dilation(nat_files: Any, tmp_path: Any) -> None:
    path, expected = nat_files
    integration.register_nat()
    integration.register_nat()  # twice is once
    model = transformers.AutoModelForImageClassification.from_pretrained(path)
    assert type(model) is transformers.NatForImageClassification
    assert model.config.dilations == [[1, 1], [1]]
    pixels = torch.randn(2, 3, 40, 8)  # the second stage has one column, and pads to the window
    torch.testing.assert_close(model(pixels).logits, expected(pixels).logits)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == torch.load(path / "pytorch_model.bin").keys()
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(pixels).logits, expected(pixels).logits)
    backbone = transformers.NatBackbone.from_pretrained(path, out_features=["stage2"])
    hidden = transformers.AutoModel.from_pretrained(path)(pixels, output_hidden_states=True)
    assert backbone(pixels).feature_maps[0].shape == hidden.reshaped_hidden_states[-1].shape


def test_a_program_that_begins_with_the_call_imports_nat_s_names() -> None:
    program = """
        from natten_layers.integrations.transformers import register_nat

        register_nat()
        from transformers import AutoConfig, NatConfig, NatForImageClassification

        register_nat()
        assert type(AutoConfig.for_model("nat")) is NatConfig is NatForImageClassification.config_class
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
