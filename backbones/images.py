"""What is done with images in front of a model, in a form that TorchScript compiles and FX keeps as one node."""

from __future__ import annotations

import torch
from timm.models import register_notrace_function


@register_notrace_function
def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) in the memory format of the maps (B, H, W, C) that a stem makes of them.

    Convolutions and batch norms keep it; in the other one they are slow on GPUs, and every change of format is a copy.
    """
    # contiguous(memory_format=...) would leave images of one channel as they are: to it they are in both formats.
    return x.to(memory_format=torch.channels_last)


@register_notrace_function
def check_images(x: torch.Tensor, in_chans: int) -> None:
    """Refuse what is no batch of images (B, ``in_chans``, H, W) in floating point.

    Raises:
        ValueError: naming the given and the expected shape.
        TypeError: for integers, which a convolution would refuse with a message of its own.
    """
    if x.dim() != 4 or x.shape[1] != in_chans or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError("expected images of shape (B, {}, H, W), got {}".format(in_chans, list(x.shape)))  # noqa: UP032
    if not x.is_floating_point():
        raise TypeError("expected images in floating point, got {}".format(x.dtype))  # noqa: UP032


@register_notrace_function
def check_image_size(x: torch.Tensor, smallest: int) -> None:
    """Refuse images (B, C, H, W) that a stem without padding has no pixel for.

    Raises:
        ValueError: naming the given and the smallest height and width.
    """
    if x.shape[2] < smallest or x.shape[3] < smallest:
        raise ValueError(
            "expected images of at least {} x {} pixels, got {} x {}".format(  # noqa: UP032
                smallest, smallest, x.shape[2], x.shape[3]
            )
        )


@register_notrace_function
def check_map_size(x: torch.Tensor, smallest: int) -> None:
    """Refuse maps (B, H, W, C) that a downsampling without padding has no pixel for.

    Raises:
        ValueError: naming the given and the smallest height and width.
    """
    if x.shape[1] < smallest or x.shape[2] < smallest:
        raise ValueError(
            "the images are too small: a map of {} x {} pixels is left, expected at least {} x {}".format(  # noqa: UP032
                x.shape[1], x.shape[2], smallest, smallest
            )
        )
