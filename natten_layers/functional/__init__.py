"""The operations of this library and NATTEN's, under the name that NATTEN gives them: ``natten.functional``."""

from ..natten.dense import attention, merge_attentions
from ..natten.neighborhood import na1d, na2d, na3d, neighborhood_attention_generic
from ..operations import AttentionState, attention_state, merge_attention, neighborhood_attention

__all__ = [
    "AttentionState",
    "attention",
    "attention_state",
    "merge_attention",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
    "neighborhood_attention_generic",
]
