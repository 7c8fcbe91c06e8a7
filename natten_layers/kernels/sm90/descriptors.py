"""What the host says of tensors to TMA, the boxes that kernels for compute capability 9.0 load and store.

And how these kernels are launched: with descriptors behind their pointers.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..host.launcher import Launcher, launcher
from ..host.problem import Layout, Problem, strides, three_axes
from ..host.tiling import Box, head_width

Boxes = dict[str, Any]
"""All fields of a ``TensorDescriptor`` except ``base``, the tensor: they are the same for every call of a problem."""


def boxes_of(shape: list[int], strides: list[int], block_shape: list[int]) -> Boxes:
    swizzle = min(128, 2 * block_shape[-1])
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=16, rank=len(shape))
    return {"shape": shape, "strides": strides, "block_shape": block_shape, "layout": layout, "padding": "zero"}


def axes_of(tensor: Layout, dilation: Box = (1, 1, 1)) -> tuple[list[int], list[int]]:
    """Sizes and strides of the axes ``batch and t, h, w, head`` of a tensor.

    A TMA descriptor has five axes, of which channels take one, so batch and t share one. With dilation, h and w are
    those of a residue class, and the first axis counts tokens, of which the first of an image and class is chosen.
    """
    batch, t, h, w, head = strides(tensor)
    size_t, size_h, size_w = three_axes(tensor.shape[1:-2], 1)
    if prod(dilation) > 1:
        _, by_h, by_w = dilation
        sizes = [tensor.shape[0] * size_h * size_w, size_h // by_h, size_w // by_w, tensor.shape[-2]]
        steps = [w, h * by_h, w * by_w, head]
    else:
        sizes = [tensor.shape[0] * size_t, size_h, size_w, tensor.shape[-2]]
        steps = [batch if size_t == 1 else t, h, w, head]
    # The stride of an axis of size one has no effect, but may be one that TMA refuses.
    return sizes, [8 if size == 1 else step for size, step in zip(sizes, steps, strict=True)]


def query_boxes(query: Layout, tile: Box, pack: int, dilation: Box = (1, 1, 1)) -> Boxes:
    """The descriptor of queries: boxes of positions times heads."""
    sizes, steps = axes_of(query, dilation)
    dim = query.shape[-1]
    return boxes_of([*sizes, dim], [*steps, 1], [*tile, pack, head_width(dim)])


def key_boxes(tensor: Layout, box: Box, dilation: Box = (1, 1, 1)) -> Boxes:
    """The descriptor of keys or values: boxes of positions of one head."""
    (*sizes, heads), (*steps, head) = axes_of(tensor, dilation)
    dim = tensor.shape[-1]
    return boxes_of([heads, *sizes, dim], [head, *steps, 1], [1, *box, head_width(dim)])


def chunk_boxes(tensor: Layout, chunk: Box, pack: int, dilation: Box = (1, 1, 1)) -> Boxes:
    """The descriptor of chunks of one head, or of several query heads."""
    return key_boxes(tensor, chunk, dilation) if pack == 1 else query_boxes(tensor, chunk, pack, dilation)


def register_boxes(registers: Layout, rows: int) -> Boxes:
    """The descriptor of register tokens: boxes of one head. Tokens that all images share are stored once."""
    batch, *counts, dim = registers.shape
    steps = [step if size > 1 else 8 for size, step in zip(registers.shape, registers.stride, strict=True)][:3]
    if registers.stride[0] == 0:
        batch, steps[0] = 1, 8
    return boxes_of([batch, *counts, dim], [*steps, 1], [1, rows, 1, head_width(dim)])


def boxes_of_registers(problem: Problem, rows: int) -> list[Boxes | None]:
    """The descriptors of the register tokens' keys and values; None without any."""
    registers = problem.additional_keys, problem.additional_values
    return [None if x is None else register_boxes(x, rows) for x in registers]


def frames_of(p: Problem) -> int:
    """Size of an image on the first axis of descriptors: its frames, or with dilation its tokens."""
    return prod(p.lengths) if prod(p.dilation) > 1 else p.lengths[0]


def descriptor(tensor: Tensor, boxes: Boxes) -> TensorDescriptor:
    """A ``TensorDescriptor`` made without the checks of its constructor.

    The checks take the host longer than a launch does, and every problem is checked once (``support.is_addressable``).
    """
    made = object.__new__(TensorDescriptor)
    made.__dict__ = {**boxes, "base": tensor}
    return made


class Call(NamedTuple):
    """What all calls of a problem share."""

    launch: Launcher
    boxes: tuple[Boxes | None, ...]
    """descriptors of the tensors that have one, in the order of the kernel's arguments"""

    def __call__(
        self, tensors: Sequence[Tensor | None], described: Sequence[Tensor | None], floats: Sequence[float | None]
    ) -> None:
        """Launch with pointers to ``tensors``, and behind them the descriptors of ``described``."""
        descriptors = [
            None if tensor is None or boxes is None else descriptor(tensor, boxes)
            for tensor, boxes in zip(described, self.boxes, strict=True)
        ]
        self.launch((*tensors, *descriptors), floats)


def call_of(
    kernel: Any, grid: Sequence[int], sizes: Sequence[Any], boxes: Iterable[Boxes | None], **options: Any
) -> Call:
    """Arguments as ``launcher`` takes them."""
    boxes = tuple(boxes)
    blocks = tuple(() if x is None else tuple(x["block_shape"]) for x in boxes)
    return Call(launcher(kernel, grid, sizes, blocks, **options), boxes)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
