"""Well-known transformers with a token mixer of ``subquad.backbones.mixers`` in place of their attention."""

from subquad.backbones.hosts import cswin, deit, pvt, pvt_v2, swin

__all__ = ["cswin", "deit", "pvt", "pvt_v2", "swin"]
