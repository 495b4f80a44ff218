"""subquad: sub-quadratic vision backbones with exact weights.

Importing the package registers its models with timm: ``timm.create_model("vmamba_tiny")`` works after that.
"""

from subquad import backbones, ops
from subquad._version import __version__

__all__ = ["__version__", "backbones", "ops"]
