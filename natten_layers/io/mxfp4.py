"""MXFP4, the format of gpt-oss's experts: blocks of 32 numbers of 4 bits that share a power of two.

Source: OCP Microscaling Formats 1.0 (https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dequantize"]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""values of the three low bits of a number; the fourth is the sign"""
BIAS = 127
"""of the exponents"""


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """The numbers that blocks stand for, in bf16, which holds all of them exactly.

    Args:
        blocks: uint8 ``[..., G, 16]``: two numbers a byte, the first of them in the low bits.
        scales: uint8 ``[..., G]``, the exponents of the blocks.

    Returns:
        bf16 ``[..., 32 * G]``.
    """
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.bfloat16, device=blocks.device)
    numbers = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    exponents = scales.to(torch.int32)[..., None] - BIAS
    return torch.ldexp(values[numbers.int()].float(), exponents).to(torch.bfloat16).flatten(-2)
