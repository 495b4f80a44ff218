"""Architectures: one family, one file. Importing this package registers the families with timm."""

from subquad.backbones import mlla, ravlt, vmamba

__all__ = ["mlla", "ravlt", "vmamba"]
