"""Architectures: one family, one file. Importing this package registers the families with timm."""

from subquad.backbones import vmamba

__all__ = ["vmamba"]
