"""Architectures: one family, one file. Importing this package registers the families with timm."""

from subquad.backbones import msvmamba, vim, vmamba

__all__ = ["msvmamba", "vim", "vmamba"]
