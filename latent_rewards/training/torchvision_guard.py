"""Let ``import torchvision`` work beside a CPU build of torch whose torchvision wheel was built for CUDA.

Such a wheel cannot load its compiled operators, and its Python side then fails while it registers shape rules for
``torchvision::nms``. That failure takes diffusers' ``EMAModel``, open_clip and peft down with it although none of them
needs the operator. Declaring the missing operators is enough; calling one still raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

_MISSING_OPERATORS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[torch.library.Library] = []


def mend_torchvision() -> bool:
    """Declare torchvision's missing operators if its import fails for want of them.

    Returns:
        True if something had to be mended; False where torchvision is absent or healthy.

    Raises:
        RuntimeError: torchvision fails to import for another reason.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    else:
        return False
    for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _MISSING_OPERATORS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _libraries.append(library)
    importlib.import_module("torchvision")
    return True
