"""What depends on sizes alone is kept where that is safe; a crop to the whole map is the map."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from subquad.ops.maps import Kept, crop


def _count(x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    numbers = torch.arange(rows * columns, dtype=x.dtype, device=x.device)
    return numbers, numbers + 1


def test_kept_by_size_dtype_and_function() -> None:
    kept, x = Kept(most=2), torch.zeros(3)
    first = kept.get(_count, x, 2, 3)
    assert kept.get(_count, torch.ones(5, 7), 2, 3) is first
    assert kept.get(_count, x.double(), 2, 3)[0].dtype == torch.float64
    assert len(kept.get(_count, x, 3, 3)[0]) == 9
    again = kept.get(_count, x, 2, 3)  # made way for the others
    assert again is not first and all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_what_inference_made_serves_training() -> None:
    kept, x = Kept(), torch.ones(6, requires_grad=True)
    with torch.inference_mode():
        kept.get(_count, torch.zeros(1), 2, 3)
    (x * kept.get(_count, torch.zeros(1), 2, 3)[0]).sum().backward()
    assert torch.equal(x.grad, torch.arange(6.0))


def test_nothing_traced_is_kept() -> None:
    kept, x = Kept(), torch.zeros(1)
    with FakeTensorMode():
        kept.get(_count, torch.zeros(1), 2, 3)
    torch.compile(lambda x: kept.get(_count, x, 2, 3)[0].sin(), fullgraph=True, backend="eager")(x)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: x + kept.get(_count, x, 2, 3)[0])(x).graph
    assert any("arange" in str(node.target) for node in graph.nodes)
    assert kept.get(_count, x, 2, 3)[0].tolist() == [0, 1, 2, 3, 4, 5]
    with FakeTensorMode():
        assert kept.get(_count, torch.zeros(1), 2, 3)[0].__class__.__name__ == "FakeTensor"


def test_crop_to_the_whole_is_the_map() -> None:
    x = torch.randn(1, 3, 4, 2)
    assert crop(x, [3, 4]) is x
    assert torch.equal(crop(x, [3, 2]), x[:, :, :2])
    scripted = torch.jit.script(crop)
    assert torch.equal(scripted(x, [2, 4]), x[:, :2])
