"""NAT in Hugging Face transformers, which left it out with release 5: a DiNAT whose dilations are all 1."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import transformers

from .dinat import register_dinat

__all__ = ["register_nat"]


def register_nat() -> None:
    """Make NAT's checkpoints load in transformers, under the names that it had there. Calling it again changes nothing.

        from natten_layers.integrations.transformers import register_nat

        register_nat()
        model = AutoModelForImageClassification.from_pretrained("shi-labs/nat-mini-in1k-224")

    ``NatConfig``, ``NatModel``, ``NatForImageClassification`` and ``NatBackbone`` can then be imported from
    transformers. They are those of DiNAT with ``dilations`` of 1, on which :func:`register_dinat` is called. State
    dicts have NAT's names, both ways. A transformers that has a NAT of its own is left as it is.

    Raises:
        ImportError: a release of transformers with another DiNAT than those that are known, or without it.
    """
    register_dinat()
    # Importing DiNAT puts another module object in the place of transformers, which is what later imports find.
    imported = sys.modules["transformers"]
    if not hasattr(imported, "NatConfig"):
        config, model, classifier, backbone = _classes()
        for package in (transformers, imported):
            for made in (config, model, classifier, backbone):
                setattr(package, made.__name__, made)
        transformers.AutoConfig.register("nat", config)
        transformers.AutoModel.register(config, model)
        transformers.AutoModelForImageClassification.register(config, classifier)
        transformers.AutoBackbone.register(config, backbone)


@cache
def _classes() -> tuple[type[Any], ...]:
    """Made when they are needed, as DiNAT's module can be imported only then."""

    class NatConfig(transformers.DinatConfig):
        model_type = "nat"

        def __post_init__(self, **kwargs: Any) -> None:
            self.dilations = [[1] * depth for depth in self.depths]
            super().__post_init__(**kwargs)

    class NatModel(transformers.DinatModel):
        config_class = NatConfig
        base_model_prefix = "nat"

    class NatForImageClassification(transformers.DinatForImageClassification):
        config_class = NatConfig
        base_model_prefix = "nat"

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__("nat" if name == "dinat" else name, value)

        @property
        def dinat(self) -> Any:
            """The model, by the name that DiNAT's code has for it."""
            return self.nat

    class NatBackbone(transformers.DinatBackbone):
        config_class = NatConfig
        base_model_prefix = "nat"

    return NatConfig, NatModel, NatForImageClassification, NatBackbone
