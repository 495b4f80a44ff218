"""Architectures: one family, one file. Importing this package registers the families with timm."""

from subquad.backbones import (
    biformer,
    hosts,
    mavit,
    mlla,
    msvmamba,
    nalaformer,
    nat,
    nat_isotropic,
    ravlt,
    vig,
    vim,
    vmamba,
)

__all__ = [
    "biformer",
    "hosts",
    "mavit",
    "mlla",
    "msvmamba",
    "nalaformer",
    "nat",
    "nat_isotropic",
    "ravlt",
    "vig",
    "vim",
    "vmamba",
]
