"""The inputs of golden numbers: 16 tokens in 4 x 4 of full rank 8, their saliency, and three words."""

import torch

from vtok.types import Layout, Plane

_i, _j, _k = (torch.arange(n, dtype=torch.double) for n in (16, 8, 3))
X = torch.sin(0.7 * _i[:, None] + 1.3 * _j + 0.19 * _i[:, None] * _j).float()  # [16, 8]
SALIENCY = ((1.5 + torch.cos(0.9 * _i)) / (1.5 + torch.cos(0.9 * _i)).sum()).float()  # [16]
WORDS = torch.cos(0.5 * _k[:, None] + 0.8 * _j + 0.23 * _k[:, None] * _j).float()  # [3, 8]
LAYOUT = Layout((Plane(4, 4),))
