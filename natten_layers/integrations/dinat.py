"""DiNAT in Hugging Face transformers, whose code imports functions that NATTEN has not had since 0.20."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from unittest.mock import patch

import transformers
from torch import Tensor, nn

from ..operations import neighborhood_attention

__all__ = ["register_dinat"]

MODELING = "transformers.models.dinat.modeling_dinat"
PARTS = ("query", "key", "value", "rpb", "kernel_size", "dilation", "dropout", "attention_head_size")
"""What the attention of a DiNAT layer is made of"""


def register_dinat() -> None:
    """Make the DiNAT models of transformers importable, and run their attention here. Calling it again changes nothing.

        from natten_layers.integrations.transformers import register_dinat

        register_dinat()
        model = AutoModelForImageClassification.from_pretrained("shi-labs/dinat-mini-in1k-224")

    Attention with the bias on relative positions of these checkpoints, forward and backward, with or without NATTEN
    installed. transformers 5 also mixes up the axes of heads and height there, which this undoes. Attention weights are
    not returned, and dropout of them is an error.

    Raises:
        ImportError: a release of transformers with another DiNAT, or without it.
    """
    modeling = _import_modeling()
    attention = getattr(modeling, "NeighborhoodAttention", None)
    if attention is None or not hasattr(modeling, "requires_backends") or not _is_known(attention):
        raise ImportError(f"transformers {transformers.__version__} has a DiNAT that natten_layers does not know")
    attention.forward = _forward
    # All that this module requires is NATTEN.
    modeling.requires_backends = _require_nothing  # pyright: ignore[reportAttributeAccessIssue]


def _import_modeling() -> ModuleType:
    # It imports from NATTEN what is no longer there if NATTEN is installed, so it must not see it.
    with patch("transformers.utils.is_natten_available", lambda: False):
        try:
            return importlib.import_module(MODELING)
        except ModuleNotFoundError as error:
            raise ImportError(f"transformers {transformers.__version__} has no DiNAT") from error


def _is_known(attention: type[nn.Module]) -> bool:
    source = inspect.getsource(attention.__init__)
    parameters = list(inspect.signature(attention.forward).parameters)
    return parameters == ["self", "hidden_states", "output_attentions"] and all(f"self.{p} =" in source for p in PARTS)


def _require_nothing(obj: object, backends: object) -> None:
    pass


def _forward(self: nn.Module, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor]:
    """The attention of one layer up to the output projection: ``[B, H, W, C]`` in and out."""
    if output_attentions:
        raise ValueError("output_attentions=True is not supported: attention weights are not formed")
    assert isinstance(self.dropout, nn.Dropout)
    if self.training and self.dropout.p > 0:
        raise ValueError(
            f"dropout of attention weights is not supported in training, got {self.dropout.p}; set the config's "
            "attention_probs_dropout_prob to 0"
        )
    query, key, value = (
        getattr(self, name)(hidden_states).unflatten(-1, (-1, self.attention_head_size))
        for name in ("query", "key", "value")
    )
    assert isinstance(self.rpb, Tensor)
    assert isinstance(self.kernel_size, int)
    assert isinstance(self.dilation, int)
    out = neighborhood_attention(query, key, value, self.kernel_size, dilation=self.dilation, rpb=self.rpb)
    return (out.flatten(-2),)
