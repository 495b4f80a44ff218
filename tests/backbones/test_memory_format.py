"""Every model convolves and normalises maps channels last, in both directions: libraries convert what is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from subquad.backbones.layers import pad_to
from subquad.backbones.registry import model_names

# The toy's maps are slices, which lie between prefix tokens.
SMALL = [name for name in model_names() if name.startswith("test_") and name != "test_isotropic"]
MAPS_AND_WEIGHT = {"convolution": 1, "convolution_backward": 2}
"""How many arguments, before the weight, are maps: the gradient and the input."""


class Formats(TorchDispatchMode):
    """Collects the maps that convolutions and batch norms get in another memory format than channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.wrong: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if "batch_norm" in name or name in MAPS_AND_WEIGHT:
            self.seen.add(name)
            for position, x in enumerate(args[: MAPS_AND_WEIGHT.get(name, 2)]):
                if isinstance(x, Tensor) and x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last):
                    self.wrong.append(f"{name} argument {position}: {list(x.shape)}, strides {x.stride()}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_maps_are_channels_last(name: str, in_chans: int, autocast: bool) -> None:
    model = timm.create_model(name, in_chans=in_chans).train()
    x = torch.randn(2, in_chans, 66, 98)  # with something to pad
    with Formats() as formats:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(x)
        logits.float().square().mean().backward()
    expected = {"convolution", "convolution_backward"}
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        expected |= {"native_batch_norm", "native_batch_norm_backward"}
    assert expected <= formats.seen
    assert not formats.wrong, "\n".join(formats.wrong)


@pytest.mark.parametrize("name", SMALL)
def test_so_they_are_on_the_way_to_a_detector(name: str) -> None:
    model = timm.create_model(name).train()
    with Formats() as formats:
        model.forward_intermediates(torch.randn(2, 3, 66, 98), intermediates_only=True)
    assert "convolution" in formats.seen and not formats.wrong, "\n".join(formats.wrong)


def test_padding_copies_only_what_it_pads() -> None:
    x = torch.randn(2, 3, 5, 4)
    assert pad_to(x, 3, 5) is x
    padded = pad_to(x, 4, 6)
    assert torch.equal(padded[:, :3, :5], x)
    assert padded.shape == (2, 4, 6, 4) and padded.count_nonzero() == x.count_nonzero()
