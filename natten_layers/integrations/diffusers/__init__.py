"""Neighborhood attention inside Hugging Face diffusers (0.42 and later).

from natten_layers.integrations.diffusers import neighborhood, patch, unpatch

patch(pipeline)  # LTX-2's diffusion decoder of videos: the same result, on this library's kernels
neighborhood(pipeline.transformer, kernel_size=(5, 25, 25))  # an image or video transformer gets windows
unpatch(pipeline)  # as it was
"""

from .ltx_decoder import patch
from .replacement import unpatch
from .transformers import neighborhood

__all__ = ["neighborhood", "patch", "unpatch"]
