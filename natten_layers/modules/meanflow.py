"""The loss of a generator that needs one step: average velocities of a flow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel

from ..checks import check_tensors
from ..kernels.ops.transforms import is_forward_mode, is_mapped
from .base import at_least_fp32, check_probability, reset_children
from .denoiser import per_image, sigma_data_of

__all__ = ["MeanFlow"]

FLOOR = 1e-3  # of the mean squared error that the loss is divided by


class MeanFlow(nn.Module):
    """A generator of images in one or a few steps (MeanFlow, Geng et al. 2025, https://arxiv.org/abs/2505.13447).

    A path ``z_t = (1 - t) x / sigma_data + t noise`` leads from an image (t = 0) to noise (t = 1) with the velocity
    ``v = noise - x / sigma_data``. The network estimates the *average* velocity over the times from r to t,
    ``u(z_t, r, t) = (1 / (t - r)) * integral of v from r to t``, so one step leads from t to any earlier r:
    ``z_r = z_t - (t - r) u(z_t, r, t)``. It learns from ``u = v - (t - r) d/dt u`` (the paper's equation 6), whose
    derivative along the path is a forward-mode one of the network and passes no gradient on.

    Times are not compared, as that would wait for the GPU. The equations hold for an r later than t, too, whose
    negative interval leads the other way, from an image towards noise. A network knows such steps only if it was
    trained on some, and does not say so otherwise: take care not to exchange t and r.

    Args:
        model: called as ``model(z, t, interval=t - r, **conditions)``: an ``HDiT`` whose config says
            ``objective="meanflow"``, or any network that forward-mode derivatives pass through. PyTorch's fused
            kernels of ``scaled_dot_product_attention`` have none; ``NeighborhoodGQA`` has, also as global attention.
        sigma_data: standard deviation of the data, default ``model.config.sigma_data``.
        power: exponent p of the loss's weight ``1 / (error + 1e-3) ** p`` (equation 22). 0 is the squared error; at 1
            the loss says nothing about progress any more, as it is about 1 for every error.

    Raises:
        ValueError: ``power`` is not from 0 to 1, or no ``sigma_data`` is given and the model has no config with one.
    """

    def __init__(self, model: nn.Module, *, sigma_data: float | None = None, power: float = 0.75) -> None:
        super().__init__()
        self.model, self.sigma_data = model, sigma_data_of(model, sigma_data)
        self.power = check_probability("power", power)

    def reset_parameters(self) -> None:
        """Initialise the network's parameters again."""
        reset_children(self)

    def extra_repr(self) -> str:
        return f"sigma_data={self.sigma_data}, power={self.power}"

    def forward(self, z: Tensor, t: Tensor, r: Tensor, **conditions: Tensor | None) -> Tensor:
        """Estimate the average velocity from ``r`` to ``t``.

        Args:
            z: ``[B, C, H, W]``, points of the path at the times ``t``.
            t: ``[B]`` in [0, 1], in fp32 or better.
            r: ``[B]``, as in training in [0, t]; where it equals ``t``, the velocity there is meant.
            conditions: passed to the network.

        Returns:
            ``[B, C, H, W]``.
        """
        return self.model(z, t, interval=t - r, **conditions)

    __call__: Callable[..., Tensor]

    def target(self, z: Tensor, velocity: Tensor, t: Tensor, r: Tensor, **conditions: Tensor | None) -> Tensor:
        """What the network should say: ``velocity - (t - r) d/dt u``, with the derivative of its own estimate.

        One forward-mode pass, without a graph. A compiled network runs uncompiled here: Dynamo knows no dual numbers.

        Args:
            z: ``[B, C, H, W]``, points of the path.
            velocity: of the path, in ``z``'s shape.
            t: ``[B]``.
            r: ``[B]``, fixed while ``t`` moves.
            conditions: passed to the network.

        Returns:
            ``[B, C, H, W]`` in ``z``'s dtype.

        Raises:
            NotImplementedError: in forward mode, which torch does not nest, or mapped by ``torch.func.vmap``.
        """
        return self._target(z, velocity, t, r, conditions, z.dtype).to(z.dtype)

    def _target(
        self,
        z: Tensor,
        velocity: Tensor,
        t: Tensor,
        r: Tensor,
        conditions: Mapping[str, Tensor | None],
        dtype: torch.dtype,
    ) -> Tensor:
        """:meth:`target` of a network that takes images of ``dtype``."""
        model = _without_ddp(self.model)

        def average_velocity(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return model(z.to(dtype), t, interval=t - r, **conditions)

        derivative = cast(Callable[..., Tensor], torch.compiler.disable(_derivative))
        slope = derivative(average_velocity, (z, t, r), (velocity, torch.ones_like(t), torch.zeros_like(r)))
        return velocity - per_image(t - r, z) * slope.to(z.dtype)

    def loss(self, x: Tensor, noise: Tensor, t: Tensor, r: Tensor, **conditions: Tensor | None) -> Tensor:
        """Weighted squared error of the network's output for each image.

        The first A images learn average velocities, the others the velocity at ``t``, which costs no forward-mode pass.
        The paper has a quarter of the batch learn averages.

        Args:
            x: clean images ``[B, C, H, W]``.
            noise: standard normal noise of the same shape.
            t: times ``[B]`` in [0, 1].
            r: earlier times ``[A]``, A from 0 to B, of the first A images: in [0, t], which is not checked.
            conditions: passed to the network; tensors of batch size B.

        Returns:
            One loss per image, ``[B]``, in fp32 or better.

        Raises:
            ValueError: ``noise`` or ``t`` does not fit ``x``, ``r`` is not ``[A]`` or longer than ``t``, or a condition
                is no tensor.
            NotImplementedError: as for :meth:`target`, if A is above 0.
        """
        check_tensors(x=x, noise=noise, t=t, r=r)
        if noise.shape != x.shape or t.shape != x.shape[:1]:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)} and t {tuple(t.shape)}, but x has {tuple(x.shape)}; "
                "expected noise for every pixel and a time for every image"
            )
        if r.ndim != 1:
            raise ValueError(f"r has shape {tuple(r.shape)}; expected [A], a time for each image that learns averages")
        averaged = len(r)
        if averaged > len(t):
            raise ValueError(f"r has {averaged} times, more than the {len(t)} of t")
        for name, condition in conditions.items():
            if condition is not None:
                check_tensors(**{name: condition})
        dtype, wide = x.dtype, at_least_fp32(x.dtype)
        x, noise, t, r = x.to(wide) / self.sigma_data, noise.to(wide), t.to(wide), r.to(wide)
        z, velocity = torch.lerp(x, noise, per_image(t, x)), noise - x
        target = velocity
        if averaged:
            points = z[:averaged], velocity[:averaged], t[:averaged], r
            first = self._target(*points, _first(conditions, averaged), dtype)
            target = torch.cat([first, velocity[averaged:]])
        error = (self(z.to(dtype), t, torch.cat([r, t[averaged:]]), **conditions) - target).square().flatten(1).mean(1)
        return error / (error.detach() + FLOOR) ** self.power

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the network, with the arguments of ``torch.compile``; :meth:`target` goes on without."""
        self.model.compile(*args, **kwargs)


def _without_ddp(model: nn.Module) -> nn.Module:
    """The network inside of ``DistributedDataParallel``, be that compiled or not.

    DDP's own forward copies buffers between processes, which a derivative does not allow. Nor need all processes have
    images that learn averages: those that have some would wait for the others.
    """
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    return inner.module if isinstance(inner, DistributedDataParallel) else model


def _derivative(function: Callable[..., Tensor], point: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """Of ``function`` at ``point`` along ``tangents``."""
    if is_forward_mode():
        raise NotImplementedError(
            "MeanFlow takes a derivative in forward mode, which torch does not nest: call it outside of torch.func.jvp "
            "and jacfwd and of forward_ad.dual_level, those in other threads too"
        )
    _check_not_mapped(*point, *tangents)
    # Without the stance, Dynamo would fail to compile the derivative, and give up the network for good.
    # FSDP2 knows dual numbers in every release of torch, but `torch.func.jvp` from 2.13 on only. They have no tangents
    # in inference mode, nor where an `autograd.Function` such as a reentrant checkpoint computes its results: torch
    # switches forward mode off there. Leaving inference mode switches it on, whichever of the two it was.
    stance = torch.compiler.set_stance("force_eager")
    with torch.inference_mode(False), torch.no_grad(), stance, forward_ad.dual_level():
        # Copies, as what was expanded, such as one time for all images, takes no tangent.
        duals = [forward_ad.make_dual(x.clone(), tangent) for x, tangent in zip(point, tangents, strict=True)]
        result = function(*duals)
        _check_not_mapped(result)  # by parameters of the network
        tangent = forward_ad.unpack_dual(result).tangent
    if tangent is None:
        raise ValueError("model's output has no derivative in forward mode: it depends on none of z, t and interval")
    return tangent


def _check_not_mapped(*tensors: Tensor) -> None:
    if any(map(is_mapped, tensors)):
        raise NotImplementedError(
            "MeanFlow takes a derivative by dual numbers, for which torch.func.vmap has no rule: make the mapped axis "
            "a part of the batch, or map torch.func.grad of the loss"
        )


def _first(conditions: Mapping[str, Tensor | None], count: int) -> dict[str, Tensor | None]:
    return {name: None if value is None else value[:count] for name, value in conditions.items()}
