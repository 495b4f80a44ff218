"""Architectures: one family, one file. Importing this package registers the families with timm."""

from subquad.backbones import msvmamba, vig, vim, vmamba

__all__ = ["msvmamba", "vig", "vim", "vmamba"]
