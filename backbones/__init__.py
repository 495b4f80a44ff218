"""Architectures: one family, one file. Importing this package registers the families with timm."""

from subquad.backbones import mavit, mlla, nalaformer, ravlt, vmamba

__all__ = ["mavit", "mlla", "nalaformer", "ravlt", "vmamba"]
