"""Backbones of this library, and of timm, in MMDetection and MMSegmentation by config.

Importing this module is all that a config needs:

    custom_imports = dict(imports=["subquad.heads.openmmlab"], allow_failed_imports=False)
    model = dict(backbone=dict(_delete_=True, type="SubquadBackbone", model_name="vmamba_tiny", out_norm=True))

It registers in mmengine's root registries, which both libraries search: the backbone ``SubquadBackbone``, the neck
``SimpleFeaturePyramid``, the optimizer constructors ``SubquadLayerDecay`` and ``SubquadParamGroups``, the hook
``SubquadChecks``, the strategy ``SubquadFSDPStrategy`` and the policy of FSDP ``subquad_blocks``. Where mmcv came
without its compiled operators, those of torchvision take their place. It imports neither mmdet nor mmseg, and may be
imported before or after them.
"""

try:
    import mmengine  # noqa: F401
except ImportError as error:
    raise ImportError('detection and segmentation need the extra mm: pip install "subquad[mm]"') from error

from mmengine.config.utils import MODULE2PACKAGE

from subquad.heads.openmmlab import standin
from subquad.heads.openmmlab.backbone import SubquadBackbone, subquad_blocks
from subquad.heads.openmmlab.checks import SubquadChecks
from subquad.heads.openmmlab.neck import SimpleFeaturePyramid
from subquad.heads.openmmlab.param_groups import SubquadLayerDecay, SubquadParamGroups
from subquad.heads.openmmlab.strategy import SubquadFSDPStrategy

__all__ = [
    "SimpleFeaturePyramid",
    "SubquadBackbone",
    "SubquadChecks",
    "SubquadFSDPStrategy",
    "SubquadLayerDecay",
    "SubquadParamGroups",
    "subquad_blocks",
]

standin.install()
# mmengine looks for configs of "mmseg::" in the distribution mmsegmentation, whose maintained one has another name.
MODULE2PACKAGE["mmseg"] = "mmseg"
