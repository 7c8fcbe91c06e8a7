"""What the kernels for compute capability 9.0 support: the reasons why one cannot compute a call, fast or not.

Some reasons are those of all these kernels, others those of kernels without dilation, of kernels that compute residue
classes like images, or of those that take a packed batch as one line of tokens.
"""

from math import prod

import torch

from ..host.problem import Layout, Problem, contiguous, strides
from ..host.variant import Option, Question, option_gap
from ..portable import pair_variants
from ..portable.pair_variants import pair_gap
from . import large_tiling, medium_tiling, small_tiling
from .available import gluon_gap

GLUON_GAP = gluon_gap()

# The names of the variants, by which reasons name another one.
LARGE, ROLLING, TILES = "sm90 large window", "sm90 small window, rolling", "sm90 small window"
MEDIUM = "sm90 medium window"
MEDIUM_PAIRS = f"{MEDIUM}, {pair_variants.PAIRS}"
MEDIUM_PAIR_CHANNELS = (32, 64)


def device_gap(p: Problem) -> str | None:
    """Why kernels for compute capability 9.0 cannot compute anything here, or None."""
    if p.card is None and p.device.type != "cuda":
        return f"it is for CUDA devices, the tensors are on {p.device}"
    capability = torch.cuda.get_device_capability(p.device) if p.card is None else p.card.capability
    if capability != (9, 0):
        return f"it is for compute capability 9.0, the device has {capability[0]}.{capability[1]}"
    return GLUON_GAP


def sm90_gap(question: Question, *takes: Option) -> str | None:
    """Why kernels for compute capability 9.0 that take these options cannot compute a call, or None."""
    p = question.problem
    if (reason := device_gap(p)) is not None:
        return reason
    if p.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {p.dtype}"
    head_dim, value_dim = p.query.shape[-1], p.value.shape[-1]
    if max(head_dim, value_dim) > 256:
        return f"it takes heads of up to 256 channels, not {head_dim} and {value_dim}"
    if (reason := option_gap(question, *takes)) is not None:
        return reason
    for name, tensor in _tensors(question):
        if not is_addressable(tensor):
            return f"TMA cannot address {name} with shape {tuple(tensor.shape)} and strides {tuple(tensor.stride)}"
    if not question.aligned:
        return "TMA cannot address a tensor that does not start at a multiple of 16 bytes"
    return None


def undilated_gap(question: Question, *takes: Option) -> str | None:
    """Why kernels without dilation cannot compute a call, or None."""
    reason, dilation = sm90_gap(question, *takes), question.problem.dilation
    return f"it takes no dilation, but dilation is {dilation}" if reason is None and prod(dilation) > 1 else reason


def line_gap(question: Question) -> str | None:
    """Why kernels that take a packed batch as one line of tokens cannot compute a call, or None; None for images."""
    p = question.problem
    if p.packing is not None and p.rank > 1:
        return "it takes packed batches with one axis only"
    if p.packing is not None and p.registers:
        return "it takes no additional keys in packed batches"
    return None


def cut_gap(question: Question) -> str | None:
    """The same for kernels that compute packed texts like one text, and cut its windows where samples begin: windows
    must not reach further than those of one text.
    """
    p = question.problem
    if p.packing is not None and (p.is_causal, p.stride, p.dilation) != ((True,), (1,), (1,)):
        return line_gap(question) or "it takes packed batches only if they are causal, without stride and dilation"
    return line_gap(question)


def images_gap(question: Question) -> str | None:
    """The same for kernels that compute each tile of a packed image from the tokens of that image alone."""
    p = question.problem
    if prod(p.stride) > 1 or prod(p.dilation) > 1:
        return f"it takes packed images without stride and dilation, not with {p.stride} and {p.dilation}"
    longest = max(p.packing.sizes, default=0) if p.packing is not None else 0
    for name, tensor in [*_tensors(question), ("the output", contiguous(p.query.shape))]:
        # Offsets from the first head of a program and the first token of an image have 32 bits.
        if longest * tensor.stride[-3] + small_tiling.most_packed(p) * tensor.stride[-2] >= 2**31:
            return f"a packed image of {longest} tokens takes more than 2**31 elements of {name}"
    if p.query.shape[-1] % 8:  # threads copy 16 bytes at a time
        return f"it takes packed images with heads of a multiple of 8 channels, not {p.query.shape[-1]}"
    return None


def rolling_gap(question: Question) -> str | None:
    """Why the rolling kernel cannot compute a call, or None."""
    reason = cut_gap(question) or undilated_gap(question, "registers", "packing")
    return reason or heads_gap(question.problem, small_tiling.MOST_CHANNELS)


def heads_gap(p: Problem, most: int) -> str | None:
    """Why a kernel for queries and values of one width, up to ``most`` channels, cannot compute a call, or None."""
    dim, value_dim = p.query.shape[-1], p.value.shape[-1]
    if dim != value_dim:
        return f"it takes queries and values of equally many channels, not {dim} and {value_dim}"
    if dim > most:
        return f"it takes heads of up to {most} channels, not {dim}"
    return None


def dilation_gap(p: Problem) -> str | None:
    """Why residue classes of dilation are not images of equal sizes on two axes at most, or None."""
    if prod(p.dilation) == 1:
        return None
    if p.rank == 3:
        return f"it takes no dilation of three axes, but dilation is {p.dilation}"
    spatial = p.query.shape[1:-2]
    if any(n % d for n, d in zip(spatial, p.dilation, strict=True)):
        return f"dilation {p.dilation} does not divide the image of {tuple(spatial)} tokens"
    return None


def classes_gap(question: Question, *takes: Option) -> str | None:
    """Why kernels that compute each residue class of dilation like an image cannot compute a call, or None."""
    p = question.problem
    reason = sm90_gap(question, *takes) or dilation_gap(p)
    if reason is not None or prod(p.dilation) == 1:
        return reason
    for name, tensor in _tensors(question):
        if not _is_contiguous_in_tokens(tensor):
            return f"tokens of {name} with strides {tuple(tensor.stride)} are not at equal distances in memory"
    return None


def tiles_gap(question: Question) -> str | None:
    """Why the kernels that compute one tile of a small window a program cannot compute a call, or None."""
    p = question.problem
    if p.packing is not None and p.key_mask is not None:
        return "it takes no key_mask in packed batches"
    gap = images_gap if p.packs_images else cut_gap
    reason = gap(question) or classes_gap(question, "registers", "packing", "key_mask")
    return reason or heads_gap(p, small_tiling.MOST_CHANNELS)


def register_gap(question: Question) -> str | None:
    """Why TMA cannot load the register tokens or their tangents, or None."""
    p = question.problem
    tensors = {"additional_keys": p.additional_keys, "additional_values": p.additional_values}
    names = (f"the tangent of {name}" for name in list(tensors))
    tensors |= dict(zip(names, question.tangents[3:], strict=False))
    for name, tensor in tensors.items():
        if tensor is not None and not small_tiling.holds_registers(tensor):
            return f"TMA cannot address {name} with shape {tuple(tensor.shape)} and strides {tuple(tensor.stride)}"
    return None


def large_gap(question: Question) -> str | None:
    return register_gap(question) or line_gap(question) or undilated_gap(question, "registers", "packing")


def large_backward_gap(question: Question) -> str | None:
    width = question.problem.lengths[2]
    if width < large_tiling.ALIGNMENT:
        return f"the last axis is shorter than {large_tiling.ALIGNMENT} tokens"
    return large_gap(question)


def medium_gap(question: Question) -> str | None:
    p = question.problem
    reason = register_gap(question) or classes_gap(question, "registers", "key_mask", "periodic", "bias", "other grid")
    return reason or heads_gap(p, medium_tiling.MOST_COLUMNS) or _frames_gap(p)


def medium_bias_gap(question: Question) -> str | None:
    """Why the kernel for the gradient of a bias cannot compute a call, or None. Registers have no bias."""
    reason = classes_gap(question, "registers", "bias")
    return reason or heads_gap(question.problem, medium_tiling.MOST_COLUMNS)


def medium_jvp_gap(question: Question) -> str | None:
    if question.problem.has_bias:
        return option_gap(question, "registers", "packing", "key_mask", "any scale", "periodic", "other grid")
    query, key, value, *registers = question.tangents
    if query is None or key is None or value is None:
        return "it takes tangents of query, key and value, not of some of them"
    if len({x is None for x in registers}) > 1:
        return "it takes tangents of additional keys and additional values, or of neither"
    return medium_gap(question)


def _frames_gap(p: Problem) -> str | None:
    """Why tiles and chunks would reach into the next image, or None."""
    if p.query.shape[0] >= 2**16:
        return f"it takes fewer than {2**16} images, not {p.query.shape[0]}"
    if (p.periodic_axes[0] or (p.rank == 3 and p.key_lengths)) and p.query.shape[0] > 1:
        # Behind the last frame of a video TMA finds the next one.
        videos = p.query.shape[0]
        return f"it takes a periodic first axis of three, or another grid, for one video at a time, not for {videos}"
    return None


def medium_pairs_gap(question: Question) -> str | None:
    """Why these kernels cannot compute a call, or None. Registers matter to all but gradients of keys and values."""
    return option_gap(question, "periodic") or medium_pair_keys_gap(question)


def medium_pair_keys_gap(question: Question) -> str | None:
    p = question.problem
    if (reason := device_gap(p) or pair_gap(question) or dilation_gap(p)) is not None:
        return reason
    dim, value_dim = p.query.shape[-1], p.value.shape[-1]
    if dim != value_dim or dim not in MEDIUM_PAIR_CHANNELS:
        return f"it takes queries and values of {MEDIUM_PAIR_CHANNELS} channels, not of {dim} and {value_dim}"
    return _frames_gap(p)


def fused_prep_gap(question: Question) -> str | None:
    """Why the fused kernel cannot prepare the heads, or None.

    A thread must hold both elements of each pair that RoPE rotates. Its layout allows that if half of a head is
    rotated, or all of it, or nothing.
    """
    assert question.prep is not None
    dim, pairs, split = question.problem.query.shape[-1], question.prep.pairs, question.prep.split
    if dim not in (64, 128):
        return f"it prepares heads of 64 and of 128 channels, not of {dim}"
    if question.prep.interleaved:
        return "RoPE rotates pairs of neighboring elements; it rotates those of one half with those of the other"
    if question.prep.by_axis:
        return "coordinates have frequencies of their own; it takes the same ones for all"
    if pairs not in (0, dim // 4, dim // 2) or len(set(split)) > 1:
        return (
            f"RoPE rotates {split} pairs in heads of {dim} elements; it rotates half of a head, all or nothing, with "
            "equally many pairs for each coordinate"
        )
    return undilated_gap(question, "registers")


def _tensors(question: Question) -> list[tuple[str, Layout]]:
    """The tensors with tokens, by name."""
    p = question.problem
    tensors = {"query": p.query, "key": p.key, "value": p.value, "the gradient of the output": question.grad_out}
    names = (f"the tangent of {name}" for name in ("query", "key", "value"))
    tensors |= dict(zip(names, question.tangents, strict=False))
    return [(name, tensor) for name, tensor in tensors.items() if tensor is not None]


def _is_contiguous_in_tokens(tensor: Layout) -> bool:
    """Whether the tokens of all images lie at equal distances, in the order of their axes."""
    axes = tensor.shape[:-2], tensor.stride[:-2]
    expected = contiguous((*tensor.shape[:-2], 1)).stride[:-1]
    return all(n == 1 or step == count * tensor.stride[-3] for n, step, count in zip(*axes, expected, strict=True))


def is_addressable(tensor: Layout) -> bool:
    """Whether TMA can address a tensor: at most five axes, and strides that are positive multiples of 16 bytes.

    Batch and first spatial axis are folded into one where there would be six axes.
    """
    batch, t, *_ = strides(tensor)
    foldable = tensor.shape[0] == 1 or len(tensor.shape) < 6 or tensor.shape[1] == 1 or batch == tensor.shape[1] * t
    axes = zip(tensor.shape[:-1], tensor.stride[:-1], strict=True)
    return foldable and all(size == 1 or (step > 0 and step % 8 == 0) for size, step in axes)
