"""Architectures: one family, one file. Importing this package registers the families with timm."""

from subquad.backbones import mlla, vmamba

__all__ = ["mlla", "vmamba"]
