"""Lets torchvision from PyPI, built for CUDA, be imported beside PyTorch for CPUs: its operators, which it cannot load,
are declared, so that it can say what shapes they have."""

import importlib.abc
import sys


class Declare(importlib.abc.MetaPathFinder):
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            Declare.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, Declare())
