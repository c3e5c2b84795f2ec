"""Clips for tests of methods that compare frames, and DPC-kNN written slowly."""

import math

import torch

from vtok.types import Layout, Plane, VisualTokens


def frames_of(t, rows=4, cols=4):
    return Layout((Plane(rows, cols, "frame"),) * t, modality="video")


def golden():
    """[8, 16, 8]: a cut between frames 3 and 4, and one token that changes in each frame."""
    t, p, j = torch.meshgrid(*(torch.arange(n).double() for n in (8, 16, 8)), indexing="ij")
    return torch.sin(0.7 * p + 1.3 * j + 0.19 * p * j + 0.05 * t + 2 * (t >= 4) + 1.5 * (p == t)).float()


def noise(t, p, d=6, seed=0):
    return torch.randn(t, p, d, generator=torch.Generator().manual_seed(seed))


def seen(*clips, layout=None, **fields):
    """Clips [T, P, D] of one size, as a method sees them."""
    t, p, _ = clips[0].shape
    return VisualTokens(torch.stack(clips).flatten(1, 2), layout or frames_of(t, 1, p), **fields)


def kept(method, x, **fields):
    """The places that stay, frame by frame, of one clip [T, P, D]."""
    keep = method.select(seen(x, **fields)).keep.view(x.shape[:2])
    return [row.nonzero().flatten().tolist() for row in keep]


def attention():
    """[1, 8, 16]: what each token of `golden` gets in the encoder."""
    t, p = torch.meshgrid(torch.arange(8.0).double(), torch.arange(16.0).double(), indexing="ij")
    gets = 1.5 + torch.cos(0.9 * p + 0.3 * t)
    return (gets / gets.sum(1, keepdim=True)).float()[None]


def shown_to(method, t, p, seed=0):
    """What a method reads of the encoder, at random."""
    layers = method.encoder_layers.items()
    return {(need, at[0]): noise(t, p, 1, seed).abs().squeeze(2)[None] for need, at in layers}


def slow_clusters(x, n, k=None):
    """The centres of points x [N, D], ascending, and of each point its centre. k: neighbours that tell of density."""
    apart = [[((u - v) ** 2).sum().item() ** 0.5 / x.shape[1] ** 0.5 for v in x] for u in x]
    k = min(min(7, n) if k is None else k, len(x))
    dense = [math.exp(-sum(d * d for d in sorted(row)[:k]) / k) for row in apart]
    far, every = max(map(max, apart)), range(len(x))
    score = [dense[i] * min([far, *(apart[i][j] for j in every if (dense[j], -j) > (dense[i], -i))]) for i in every]
    centres = sorted(sorted(every, key=lambda i: -score[i])[:n])
    return centres, [i if i in centres else min(centres, key=lambda c: apart[i][c]) for i in every]
