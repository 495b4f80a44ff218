"""Well-known transformers with a token mixer of ``subquad.backbones.mixers`` in place of their attention."""

from subquad.backbones.hosts import deit, pvt, swin

__all__ = ["deit", "pvt", "swin"]
