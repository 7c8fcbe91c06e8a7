"""HDiT, the hourglass diffusion transformer (Crowson et al. 2024, https://arxiv.org/abs/2401.11605).

The cost of this pixel-space diffusion model is linear in the number of pixels: fine levels attend in neighborhoods,
only the coarsest one globally. With this library's own options at their defaults, it is k-diffusion's
``image_transformer_v2`` with the same parameters; :mod:`natten_layers.io.checkpoints` reads and writes that format.

Inside, images are channels-last and heads come last: ``x [B, h, w, C]``, ``pos [h, w, 2]``,
``cond [B, mapping_width]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from os import PathLike
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checks import check_dense, check_flags
from ..io import checkpoints
from ..io.files import naming
from ..io.tensors import make_on_meta
from ..kernels.ops.transforms import is_transformed
from ..varlen import Shapes, packed_shapes
from ..wording import listed, with_type
from .attention import NeighborhoodGQA
from .axial_rope import make_axial_pos
from .base import Embedding, at_least_fp32, reset_children
from .feed_forward import GEGLU
from .hdit_config import IMAGE_AXES, HDiTConfig, check_axis
from .hdit_layers import (
    MERGED,
    FourierFeatures,
    MappingNetwork,
    PatchOut,
    TokenMerge,
    TokenSplit,
    check_rings,
    make_level,
)
from .norm import RMSNorm
from .packed_images import PackedImages, join_blocks
from .rope import Positions

__all__ = ["HDiT"]

AUG_FEATURES = 9  # parameters of k-diffusion's augmentation pipeline


class HDiT(nn.Module):
    """The hourglass diffusion transformer, without preconditioning (Crowson et al. 2024).

    :class:`natten_layers.Denoiser` wraps it for training and sampling. :meth:`from_pretrained` and
    :meth:`save_pretrained` read and write k-diffusion's files. Source: https://arxiv.org/abs/2401.11605.

    Args:
        config: sizes and options.
        checkpointing: recompute each layer in the backward pass instead of keeping its activations.

    Raises:
        ValueError: a level's sizes do not fit together; the message names the level; or ``checkpointing`` is no bool.
    """

    def __init__(self, config: HDiTConfig, *, checkpointing: bool = False) -> None:
        super().__init__()
        _check_config(config)
        check_flags(checkpointing=checkpointing)
        self.config, self.checkpointing = config, checkpointing
        levels, width, cond_dim = config.levels, config.levels[0].width, config.mapping_width
        assert config.mapping_d_ff is not None

        self.patch_in = TokenMerge(config.input_channels, width, config.patch_size)
        self.time_emb = FourierFeatures(1, cond_dim)
        self.time_in_proj = nn.Linear(cond_dim, cond_dim, bias=False)
        self.aug_emb = FourierFeatures(AUG_FEATURES, cond_dim)
        self.aug_in_proj = nn.Linear(cond_dim, cond_dim, bias=False)
        self.class_emb = Embedding(config.num_classes + 1, cond_dim) if config.num_classes else None
        self.mapping_cond_in_proj = (
            nn.Linear(config.mapping_cond_dim, cond_dim, bias=False) if config.mapping_cond_dim else None
        )
        averages = config.objective == "meanflow"
        self.interval_emb = FourierFeatures(1, cond_dim) if averages else None
        self.interval_in_proj = nn.Linear(cond_dim, cond_dim, bias=False) if averages else None
        self.mapping = MappingNetwork(cond_dim, config.mapping_depth, config.mapping_d_ff, config.mapping_dropout_rate)

        outer = range(len(levels) - 1)
        self.down_levels = nn.ModuleList(make_level(config, i) for i in outer)
        self.mid_level = make_level(config, len(levels) - 1)
        self.up_levels = nn.ModuleList(make_level(config, i, up=True) for i in outer)
        pairs = list(pairwise(levels))
        self.merges = nn.ModuleList(TokenMerge(fine.width, coarse.width) for fine, coarse in pairs)
        self.splits = nn.ModuleList(TokenSplit(coarse.width, fine.width) for fine, coarse in pairs)

        self.out_norm = RMSNorm(width)
        self.patch_out = PatchOut(width, config.input_channels, config.patch_size)
        self._zero_outputs()

    def reset_parameters(self) -> None:
        """Initialise all parameters and constants as the constructor does, for example after ``to_empty``.

        Call it on the model, not on its modules one by one: only the model sets the last weight of each residual branch
        to zero.
        """
        reset_children(self)
        self._zero_outputs()

    def _zero_outputs(self) -> None:
        """Zero the last weight of the model and of every residual branch, so that their outputs start as zero."""
        nn.init.zeros_(self.patch_out.proj.weight)
        for module in self.modules():
            if isinstance(module, NeighborhoodGQA):
                nn.init.zeros_(module.proj.weight)
            elif isinstance(module, GEGLU):
                nn.init.zeros_(module.down_proj.weight)

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike[str], *, config: HDiTConfig | None = None, dtype: torch.dtype | None = torch.float32
    ) -> HDiT:
        """Build the model that a file describes and load its weights, on the CPU and in eval mode.

        Args:
            path: a safetensors file as k-diffusion's ``convert_for_inference.py`` or :meth:`save_pretrained` write it,
                a k-diffusion training checkpoint (``.pth``; its EMA weights are loaded, and no code in it is executed),
                or a directory with a ``model.safetensors``.
            config: used instead of the file's config, and needed for a file without one.
            dtype: dtype of the parameters; None keeps the file's. Buffers stay in fp32 or better.

        Returns:
            The model, with all weights of the file: a tensor that is missing or unknown is an error.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, of another format, or does not fit its config; the message names the file,
                the keys and the shapes.
        """
        described, tensors = checkpoints.read_hdit(path)
        if config is None:
            if described is None:
                raise ValueError(
                    f"{path} holds no config; give the JSON config of this HDiT's training, as config= or by --config"
                )
            with naming(path):
                config = HDiTConfig.from_json(described)
        _check_config(config)
        model = make_on_meta(lambda: cls(config), path, layers=config.num_layers, tensors=len(tensors))
        checkpoints.load_tensors(model, tensors, path, dtype)
        return model.eval()

    def save_pretrained(self, path: str | PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Write a safetensors file in k-diffusion's format, with the config in its metadata.

        k-diffusion can run models that use none of this library's own options. If writing fails, an earlier file of
        that name stays unchanged.

        Args:
            path: the file, or a directory in which ``model.safetensors`` is written.
            dtype: dtype of the parameters in the file; None keeps the model's. Buffers keep theirs.

        Raises:
            OSError: the file cannot be written; the message names it.
            ValueError: ``path`` ends like a file of another format, such as .pth; the model is sharded (the message
                says how to gather it) or on the meta device; or ``dtype`` is none that weights may have.
        """
        checkpoints.write_hdit(path, self, self.config.to_json(), dtype)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        *,
        aug_cond: Tensor | None = None,
        class_cond: Tensor | None = None,
        mapping_cond: Tensor | None = None,
        interval: Tensor | None = None,
        shapes: Shapes | None = None,
    ) -> Tensor:
        """Evaluate the network on a batch of noisy images.

        Args:
            x: ``[B, input_channels, H, W]``, scaled by the preconditioner. Height and width must be multiples of the
                patch size times ``2 ** (levels - 1)``; they may differ from the size that the model was trained at.
                With ``shapes``, the pixels ``[N, input_channels]`` of image after image, each in raster order.
            sigma: noise levels ``[B]``, positive, in fp32 or better: rounding to half precision changes the embedding.
                To a model with ``objective="meanflow"``, whose times reach from 0 to 1, give those.
            aug_cond: parameters of the augmentation, ``[B, 9]``; None means no augmentation.
            class_cond: ``[B]`` int64, 0 to ``num_classes``, where ``num_classes`` means unconditional. Required by
                models with classes and refused by others. On a GPU, an index out of range is torch's device-side
                assertion instead of a ValueError, because a check would have to wait for the GPU.
            mapping_cond: ``[B, mapping_cond_dim]``. Required by models with a ``mapping_cond_dim`` and refused by
                others.
            interval: ``[B]``, the times that velocities are averaged over. Required by models with
                ``objective="meanflow"`` and refused by others.
            shapes: heights and widths of B images of many shapes, which are packed and computed in one pass, each as
                if it were alone: a list of pairs, or an integer tensor ``[B, 2]``. Not with shifted windows. The
                gradients of norms' gains are then summed in any order on a GPU, unless
                ``torch.use_deterministic_algorithms`` asks for one.

        Returns:
            ``[B, input_channels, H, W]``, or ``[N, input_channels]`` with ``shapes``.

        Raises:
            ValueError: an argument does not fit; the message names it and the values.
        """
        if shapes is not None and torch.compiler.is_exporting():
            raise ValueError(
                "shapes: torch.export has no graph for packed images, as their sizes are read on the host; export the "
                "model with images x [B, C, H, W]"
            )
        sizes = None if shapes is None else packed_shapes(shapes, None, rank=2)
        self._check(x, sigma, sizes)
        cond = self._condition(x, sigma, aug_cond, class_cond, mapping_cond, interval)
        pixels = None if sizes is None else PackedImages(sizes, x.device)
        x = self.patch_in(rearrange(x, "b c h w -> b h w c") if pixels is None else x, pixels)
        images = None if pixels is None else pixels.coarser(self.config.patch_size)
        pos = _positions(x, images)

        skips = []
        for level, merge in zip(self.down_levels, self.merges, strict=True):
            x = self._run(level, x, pos, cond, images)
            skips.append((x, pos, images))
            x, pos = merge(x, images), _coarsen(pos, images)
            images = None if images is None else images.coarser(MERGED)
        x = self._run(self.mid_level, x, pos, cond, images)
        for level, split, (skip, pos, images) in zip(
            reversed(self.up_levels), reversed(self.splits), reversed(skips), strict=True
        ):
            x = self._run(level, split(x, skip, images), pos, cond, images)
        x = self.patch_out(self.out_norm(x), pixels)
        return rearrange(x, "b h w c -> b c h w") if pixels is None else x

    __call__: Callable[..., Tensor]

    def _run(self, level: nn.Module, x: Tensor, pos: Tensor, cond: Tensor, images: PackedImages | None) -> Tensor:
        assert isinstance(level, nn.ModuleList)
        positions = Positions(pos)  # FSDP's mixed precision casts tensor arguments of a sharded level, but not these
        # Without gradients there is nothing to recompute, and checkpoints have tangents from torch 2.13 on only.
        saves = self.checkpointing and self.training and torch.is_grad_enabled()
        for layer in level:
            run = partial(checkpoint, layer, use_reentrant=False) if saves else layer
            x = run(x, positions, cond, images)
        return x

    def _condition(
        self,
        x: Tensor,
        sigma: Tensor,
        aug_cond: Tensor | None,
        class_cond: Tensor | None,
        mapping_cond: Tensor | None,
        interval: Tensor | None,
    ) -> Tensor:
        c_noise = sigma.to(at_least_fp32(x.dtype))
        if self.interval_emb is None:
            c_noise = c_noise.log() / 4
        cond = self.time_in_proj(self.time_emb(c_noise[:, None]).to(x.dtype))
        count = sigma.shape[0]  # `len` would make a graph for each batch size
        if aug_cond is None:
            aug_cond = x.new_zeros(count, AUG_FEATURES)
        _check_condition("aug_cond", aug_cond, (count, AUG_FEATURES))
        cond = cond + self.aug_in_proj(self.aug_emb(aug_cond).to(x.dtype))
        for name, given, module, key in (
            ("class_cond", class_cond, self.class_emb, "num_classes"),
            ("mapping_cond", mapping_cond, self.mapping_cond_in_proj, "mapping_cond_dim"),
            ("interval", interval, self.interval_emb, "objective"),
        ):
            if (given is None) != (module is None):
                verb, value = "needs" if given is None else "has no use for", getattr(self.config, key)
                raise ValueError(f"this model {verb} {name}, as its config has {key}={value!r}")
        if self.class_emb is not None and class_cond is not None:
            _check_condition("class_cond", class_cond, (count,))
            if class_cond.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"class_cond has dtype {class_cond.dtype}; expected int64 or int32")
            cond = cond + self._embed_classes(self.class_emb, class_cond)
        if self.mapping_cond_in_proj is not None and mapping_cond is not None:
            _check_condition("mapping_cond", mapping_cond, (count, self.config.mapping_cond_dim))
            cond = cond + self.mapping_cond_in_proj(mapping_cond.to(x.dtype))
        if self.interval_emb is not None and self.interval_in_proj is not None and interval is not None:
            _check_condition("interval", interval, (count,))
            cond = cond + self.interval_in_proj(self.interval_emb(interval[:, None]).to(x.dtype))
        return self.mapping(cond)

    def _embed_classes(self, class_emb: nn.Module, class_cond: Tensor) -> Tensor:
        try:
            return class_emb(class_cond)
        except IndexError as error:  # the CPU's embedding checks the indices, so valid calls need no check of their own
            last = self.config.num_classes
            wrong = (class_cond < 0) | (class_cond > last)
            outside = "" if is_transformed() else f" {listed(class_cond[wrong].tolist())}"
            raise ValueError(
                f"class_cond holds{outside}; classes are 0 to {last - 1}, and {last} is unconditional"
            ) from error

    def _check(self, x: Tensor, sigma: Tensor, shapes: Tensor | None) -> None:
        check_dense("x", x)
        check_dense("sigma", sigma)
        channels, packed = self.config.input_channels, shapes is not None
        if x.ndim != (2 if packed else 4) or x.shape[1] != channels:
            expected = f"[pixels, {channels}] beside shapes" if packed else f"[B, {channels}, height, width]"
            raise ValueError(f"x has shape {tuple(x.shape)}; expected {expected}")
        if not x.is_floating_point():
            raise ValueError(f"x has dtype {x.dtype}; expected a floating point dtype, with pixels scaled to [-1, 1]")
        count, sizes = x.shape[0], [tuple(x.shape[2:])]
        if shapes is not None:
            count, sizes = len(shapes), list(map(tuple, shapes.tolist()))
            if shapes.shape[1] != 2 or sum(map(math.prod, sizes)) != x.shape[0]:
                given = repr(shapes.tolist())
                raise ValueError(
                    f"shapes must be heights and widths of {x.shape[0]} pixels in all, as x has, got {given:.200}"
                )
        if tuple(sigma.shape) != (count,):
            raise ValueError(f"sigma has shape {tuple(sigma.shape)}; expected [{count}], one per image")
        for shape in dict.fromkeys(sizes):
            for axis, size, patch in zip(IMAGE_AXES, shape, self.config.patch_size, strict=True):
                check_axis(axis, size, patch, self.config.levels)
            check_rings(shape, self.config)

    def param_groups(self, lr: float, weight_decay: float, *, mapping_lr_scale: float = 1 / 3) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, as in k-diffusion's training script.

        Args:
            lr: learning rate of all parameters but those of the mapping network and of the projections from its
                output to the norms' gains.
            weight_decay: applied to the matrices of Linear layers, except those that embed a condition.
            mapping_lr_scale: factor on the learning rate of the mapping network and those projections.

        Returns:
            Dictionaries with ``params``, ``lr`` and ``weight_decay``, as optimizers of ``torch.optim`` take them.
        """
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for module_name, module in self.named_modules():
            mapping = module_name.startswith("mapping.") or module_name.endswith(".norm.linear")
            decays = isinstance(module, nn.Linear) and not module_name.endswith("in_proj")
            for parameter in module.parameters(recurse=False):
                groups.setdefault((mapping, decays), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": lr * mapping_lr_scale if mapping else lr,
                "weight_decay": weight_decay if decays else 0.0,
            }
            for (mapping, decays), parameters in groups.items()
        ]


def _positions(x: Tensor, images: PackedImages | None) -> Tensor:
    """Of tokens ``[B, h, w, C]``, the same in all images, ``[h, w, 2]``; ``[N, 2]`` of packed ones."""
    dtype = at_least_fp32(x.dtype)
    if images is not None:
        return images.positions(dtype)
    return make_axial_pos(x.shape[1], x.shape[2], dtype=dtype, device=x.device)


def _coarsen(pos: Tensor, images: PackedImages | None) -> Tensor:
    """Mean position of each 2 x 2 block: ``[h, w, 2]`` to ``[h / 2, w / 2, 2]``, or ``[N, 2]`` to ``[N / 4, 2]``."""
    joined = join_blocks(pos[None], MERGED)[0] if images is None else join_blocks(pos, MERGED, images)
    return joined.unflatten(-1, (-1, 2)).mean(-2)


def _check_condition(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    check_dense(name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {list(shape)}")


def _check_config(config: object) -> None:
    if not isinstance(config, HDiTConfig):
        way_out = "; HDiTConfig.from_json makes one of a dict or a file"
        raise ValueError(f"config must be an HDiTConfig, got {with_type(config)}{way_out}")
