"""Architectures: one family, one file. Importing this package registers the families with timm."""

from subquad.backbones import hosts, mavit, mlla, nalaformer, ravlt, vmamba

__all__ = ["hosts", "mavit", "mlla", "nalaformer", "ravlt", "vmamba"]
