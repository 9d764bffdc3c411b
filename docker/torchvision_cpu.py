"""Let PyPI's CUDA build of torchvision import under a CPU build of torch.

torchvision registers fake kernels for `torchvision::nms` and `torchvision::qnms`, operators that
only its compiled library defines; under a CPU torch that library does not load and the import
fails. Defining the two schemas first is enough: nothing that a vision-language model needs calls
them. Every interpreter of the environment needs this (vLLM starts fresh ones), so the installer
puts this file and a one-line `.pth` into site-packages. A CPU build of torchvision does not need
it, and is left alone.
"""

import sys
from importlib.abc import MetaPathFinder


class _DefineSchemasFirst(MetaPathFinder):
    """Defines the schemas when torchvision is about to be imported, then steps aside."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            # Kept alive on the module: a Library's definitions go when it is collected.
            library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in (
                "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            ):
                library.define(schema)
            sys.modules[__name__].library = library
        return None


sys.meta_path.insert(0, _DefineSchemasFirst())
