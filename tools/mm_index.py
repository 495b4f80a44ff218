"""Writes the table of detection and segmentation configs, ``configs/README.md``: ``python -m subquad.tools.mm_index``.

Published results come from the configs, parameters and multiplications from the models that they build, on the meta
device: nothing is computed, no weights are needed.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from subquad import configs

INDEX = Path(configs.__file__).with_name("README.md")
SIZES = {"mmdet": (800, 1280), "mmseg": (512, 2048)}
"""Height and width at which the operations of a detector and of a segmentor are counted."""
_PROPOSALS, _MASKS = 1000, 100  # regions in the heads of a two-stage detector, as mmdet counts

_HEAD = """# Configs for MMDetection and MMSegmentation

Made by `python -m subquad.tools.mm_index`; a test compares it with the configs.

* AP and mIoU (single scale / multi-scale) are what the authors report for training with the config, in the source
  that it names; they were not measured again here. Examples without a result have none.
* There are none for FLatten, InLine, NaLaFormer, PolaFormer and ViG, whose authors released no settings for detection
  and segmentation, and not yet for MAViT and SLAB, of whose settings no result is confirmed.
* Parameters are those of the whole detector or segmentor, auxiliary heads included.
* GFLOPs count a multiplication with its addition as one, as papers do, in inference on an image of {sizes},
  with {proposals:,} proposals and {masks} masks in a two-stage detector.
"""


def build(cfg: Any) -> nn.Module:
    """The model of a config on the meta device, in evaluation mode."""
    import_module("subquad.heads.openmmlab")  # names the extra if mmengine is not there
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(cfg.default_scope)
    import_module(f"{cfg.default_scope}.models")
    with torch.device("meta"):
        return MODELS.build(cfg.model).eval()


def parameters(model: nn.Module) -> str:
    """The cell of the table."""
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M"


def gflops(model: Any, size: tuple[int, int]) -> float:
    """Multiplications with their additions, in units of 10^9, of inference on one image of ``size`` (height, width)."""
    image = torch.empty(1, 3, *size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        maps = model.extract_feat(image)
        for name in ("decode_head", "bbox_head", "rpn_head"):
            if getattr(model, name, None) is not None:
                getattr(model, name)(maps)
        if getattr(model, "roi_head", None) is not None:
            _run_roi_heads(model.roi_head)
    return counter.get_total_flops() / 2e9


def _run_roi_heads(roi_head: Any) -> None:
    """The heads on pooled regions: which level a region is pooled from depends on values that meta tensors lack."""

    def regions(extractor: Any, number: int) -> Tensor:
        side = extractor.roi_layers[0].output_size
        return torch.empty(number, extractor.out_channels, *side, device="meta")

    for head, extractor in zip(*map(_as_list, (roi_head.bbox_head, roi_head.bbox_roi_extractor)), strict=True):
        head(regions(extractor, _PROPOSALS))
    if roi_head.with_mask:
        for head, extractor in zip(*map(_as_list, (roi_head.mask_head, roi_head.mask_roi_extractor)), strict=True):
            head(regions(extractor, _MASKS))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, nn.ModuleList) else [value]


def link_and_results(name: str, published: dict[str, float]) -> tuple[str, ...]:
    """The first cells of the table for one config."""
    library = name.split("/")[0]
    if library == "mmdet":
        results = [str(published.get(key, "")) for key in ("box_ap", "mask_ap")]
    else:
        results = [" / ".join(str(published[key]) for key in ("miou", "miou_multi_scale") if key in published)]
    return f"[`{name}`]({name})", *results


def row(name: str, counted: dict[str, tuple[str, str]]) -> tuple[str, ...]:
    """Cells of the table for one config: link, result, parameters, GFLOPs; the last two are kept in ``counted``."""
    from mmengine.config import Config

    cfg = Config.fromfile(configs.path(name))
    plain = cfg.model.to_dict()
    plain["backbone"].pop("drop_path_rate")
    key = repr(plain)  # the same for all schedules
    if key not in counted:
        model = build(cfg)
        counted[key] = parameters(model), f"{gflops(model, SIZES[name.split('/')[0]]):.0f}"
    return *link_and_results(name, cfg.published), *counted[key]


def table() -> str:
    """The whole page."""
    sizes = " and ".join(f"{width} x {height} ({library})" for library, (height, width) in SIZES.items())
    parts = [_HEAD.format(sizes=sizes, proposals=_PROPOSALS, masks=_MASKS)]
    counted: dict[str, tuple[str, str]] = {}
    columns = {"mmdet": ("box AP", "mask AP"), "mmseg": ("mIoU",)}
    for library, results in columns.items():
        header = ("config", *results, "parameters", "GFLOPs")
        rows = [header, ("---",) * len(header)]
        found = [row(name, counted) for name in configs.names() if name.startswith(f"{library}/")]
        rows += sorted(found, key=lambda cells: float(cells[-2].removesuffix(" M")))
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n")
    return "\n".join(parts)


def main() -> None:
    """Write the page."""
    INDEX.write_text(table(), encoding="utf-8")
    print(INDEX)


if __name__ == "__main__":
    main()
