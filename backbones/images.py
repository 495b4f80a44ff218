"""What is done with images in front of a model, in a form that TorchScript compiles and FX keeps as one node."""

# Annotations are not postponed here: TorchScript reads those of the functions.

import torch
from timm.models import register_notrace_function
from torch import nn

from subquad.backbones.norms import autocast_dtype


@register_notrace_function
def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) in the memory format of the maps (B, H, W, C) that a stem makes of them.

    Convolutions and batch norms keep it; in the other one they are slow on GPUs, and every change of format is a copy.
    """
    # contiguous(memory_format=...) would leave images of one channel as they are: to it they are in both formats.
    return x.to(memory_format=torch.channels_last)


@register_notrace_function
def check_images(x: torch.Tensor, in_chans: int, weight: torch.Tensor | None = None) -> None:
    """Refuse what is no batch of images (B, ``in_chans``, H, W) in the dtype and on the device of the model.

    Args:
        x: images.
        in_chans: channels that they are to have.
        weight: see ``first_weight``.

    Raises:
        ValueError: naming the given and the expected shape or device.
        TypeError: for no tensor, and naming the given and the expected dtype. Autocast takes any in floating point, but
            for float64.
    """
    if not torch.jit.is_scripting():
        _check_tensor(x)
    if x.dim() != 4 or x.shape[1] != in_chans or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError("expected images of shape (B, {}, H, W), got {}".format(in_chans, list(x.shape)))  # noqa: UP032
    if not torch.jit.is_scripting() and weight is not None:
        _check_placement(x, weight)
    if not x.is_floating_point():
        raise TypeError("expected images in floating point, got {}".format(x.dtype))  # noqa: UP032


def first_weight(stem: nn.Module) -> torch.Tensor | None:
    """What the first layer multiplies images by, None where that is not yet known.

    It is not where images or weights are moved or cast on their way to the layer, by hooks (accelerate's included), by
    FSDP or by somebody's own module, nor in a replica of ``DataParallel``.
    """
    for module in stem.modules():
        ours = type(module).__module__.partition(".")[0] in ("subquad", "timm", "torch")
        if not ours or module._forward_pre_hooks or "forward" in vars(module):
            return None
        if "_fsdp_wrapped_module" in module._modules:
            return None
        for weight in module._parameters.values():
            return weight if type(weight) is nn.Parameter and weight.dim() == 4 else None
    return None


def _check_tensor(x: object) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"expected a tensor of images (B, C, H, W), got {type(x).__name__}")


def _check_placement(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.device != weight.device:
        raise ValueError(f"expected images on {weight.device}, where the model is, got {x.device}")
    # Autocast casts neither float64 nor integers.
    if x.dtype != weight.dtype and (
        not x.is_floating_point() or weight.dtype == torch.float64 or autocast_dtype(x) is None
    ):
        raise TypeError(f"expected images in {weight.dtype}, the dtype of the model, got {x.dtype}")


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
