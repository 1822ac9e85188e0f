"""For the processes that tests of hosts start, where torchvision's own library cannot be loaded: see hosts.py."""

from torch import library

for name in ("nms", "qnms"):
    library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
