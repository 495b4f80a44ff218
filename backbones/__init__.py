"""Architectures: one family, one file. Importing this package registers the families with timm."""

from subquad.backbones import vim, vmamba

__all__ = ["vim", "vmamba"]
