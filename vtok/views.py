"""The tokens of a picture as the vision encoder saw them: view by view, with what it showed of each view's patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.errors import Unsupported
from vtok.tower import Layer
from vtok.types import Layout, VisualTokens


@dataclass(frozen=True)
class Views:
    """Where the N tokens of a layout lie in its V views of T tokens. A mosaic of crops has a view for each crop, and
    places without a token where padding was cut away or features were resampled.

    place: [N] long, among the V * T.
    valid: [V, T] bool, the places with a token.
    sizes: how many tokens each view has.
    """

    place: Tensor
    valid: Tensor
    sizes: tuple[int, ...]

    @staticmethod
    def of(layout: Layout, device: torch.device | None = None) -> Views:
        """Made on the device, without waiting for it. Raises `Unsupported` where the views are of different sizes."""
        if len({plane.view_shape for plane in layout.planes}) > 1:
            shapes = ", ".join(str(plane.view_shape) for plane in layout.planes)
            raise Unsupported(f"The views of this {layout.modality} have different sizes: {shapes}.")
        place, sizes, start = [], [], 0
        for plane in layout.planes:
            (high, wide), (grid_rows, grid_cols) = plane.view_shape, plane.crop_grid
            y, x = plane.mosaic_rows(device)[:, None], plane.mosaic_cols(device)
            crop, inside = y // high * grid_cols + x // wide, y % high * wide + x % wide
            place.append((start + crop * high * wide + inside).flatten())
            start += plane.views * high * wide
            tall = torch.bincount(plane.mosaic_rows() // high, minlength=grid_rows).tolist()  # on the CPU
            broad = torch.bincount(plane.mosaic_cols() // wide, minlength=grid_cols).tolist()
            sizes += [rows * cols for rows in tall for cols in broad]
        place = torch.cat(place)
        valid = torch.zeros(start, dtype=torch.bool, device=device).index_fill(0, place, True)
        return Views(place, valid.view(len(sizes), -1), tuple(sizes))

    def spread(self, x: Tensor) -> Tensor:
        """[B, N, ...] of the tokens -> [B, V, T, ...], zero where there is none."""
        full = x.new_zeros(x.shape[0], self.valid.numel(), *x.shape[2:]).index_copy(1, self.place, x)
        return full.unflatten(1, self.valid.shape)

    def collect(self, x: Tensor) -> Tensor:
        """[B, V, T, ...] -> [B, N, ...]."""
        return x.flatten(1, 2).index_select(1, self.place)

    def patches(self, x: Tensor) -> Tensor:
        """What the encoder showed, [B, V, P, ...] -> [B, V, T, G, ...], the G patches of each token."""
        v, t = self.valid.shape
        if x.shape[1] != v or x.shape[2] % t:
            raise Unsupported(
                f"The vision encoder showed {x.shape[2]} patches of {x.shape[1]} views, where {v} views of {t} tokens "
                f"were expected."
            )
        return x.unflatten(2, (t, -1))


def clip_shape(layout: Layout) -> tuple[int, int]:
    """(T, P) of a clip: its frames, and the tokens of each. A picture of one view is a clip of one frame.

    Raises `Unsupported` where a picture has several views, or frames have different sizes."""
    shapes = dict.fromkeys((plane.rows, plane.cols) for plane in layout.planes)
    if any(plane.kind in ("thumbnail", "crops") for plane in layout.planes):
        raise Unsupported(
            "A picture of a thumbnail and crops has no frames to compare: methods for clips take clips. Choose one for "
            "pictures, such as divprune."
        )
    if len(shapes) > 1:
        raise Unsupported(f"The frames of this {layout.modality} have different sizes: {', '.join(map(str, shapes))}.")
    return len(layout.planes), layout.planes[0].size


def attention_by_frame(tokens: VisualTokens, layer: Layer) -> Tensor:
    """[B, T, P] what each token of a clip gets of the encoder's attention at a layer, of several patches the sum. For
    compressors that need "encoder_attention". Raises as `clip_shape` does."""
    shape = clip_shape(tokens.layout)
    views = Views.of(tokens.layout, tokens.features.device)
    seen = views.patches(tokens.read("encoder_attention", layer)).float().sum(3)  # [B, V, P]
    return views.collect(seen).nan_to_num(0.0, 0.0, 0.0).unflatten(1, shape)


def finite(x: Tensor) -> Tensor:
    """x [..., C] in fp32; rows that are not finite become zero."""
    x = x.float()
    return torch.where(x.isfinite().all(-1, keepdim=True), x, 0.0)


def unit(x: Tensor) -> Tensor:
    """x [..., C] in fp32 at length 1; zero stays zero, and what is not finite becomes zero."""
    x = finite(x)
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
