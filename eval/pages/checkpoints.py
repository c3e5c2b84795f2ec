"""The public checkpoints that have a page in `model_cards/`: how many visual tokens a picture is, and what that costs.
Their sizes, tasks and published numbers are in checkpoints.toml. `vtok zoo pages` writes the pages from both.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtok import adapter as adapters
from vtok.engine.accounting import TextShape, encoder_flops, kv_bytes, prefill_flops
from vtok.types import Layout, keep_count

TEXT = 40  # text tokens of a prompt, as in AIM's table

DATA = tomllib.loads(Path(__file__).with_name("checkpoints.toml").read_text(encoding="utf-8"))
TASKS: dict[str, str] = DATA["tasks"]  # benchmark -> task of lmms-eval
REMARKS: dict[str, str] = DATA["remarks"]  # such a task -> what to know of it
VIDEO = ("VideoMME", "MLVU")


@dataclass(frozen=True)
class Media:
    """A picture of so many pixels, or a clip of such `frames`. seen_in: benchmarks whose media are about like that."""

    name: str
    width: int
    height: int
    seen_in: str
    frames: int = 0


MEDIA = (
    Media("photo", 640, 480, "COCO: POPE, GQA, RefCOCO"),
    Media("large photo", 1024, 768, "Open Images: TextVQA"),
    Media("page", 1700, 2200, "scans: DocVQA"),
    Media("clip", 640, 360, "32 frames: VideoMME, MLVU", frames=32),
)


@dataclass(frozen=True)
class Table:
    """Published numbers. where: the table in the paper; setting: what was run, and how scores are given; read: how the
    numbers came here; rows: cells as printed, the method first."""

    paper: str
    arxiv: str
    where: str
    setting: str
    read: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Checkpoint:
    """hub: repository that transformers loads. family: adapter. config: sizes, as in config.json. limits: pixels of a
    picture, least and most, where the processor has such limits; video_limits: the same for a clip, of a frame or, in
    Qwen3-VL and GLM, of all its frames. tiles: most tiles of a picture (InternVL), or of its longer side (SmolVLM).
    benchmarks: keys of `TASKS`. max_frames: of clips. methods: run at 25 % beside the family's default. repeats: row of
    a published table -> arguments of vtok's model that repeat it. workload: name of `vtok bench` with this decoder's
    proportions. notes: what to know.
    """

    hub: str
    family: str
    config: Mapping[str, Any]
    benchmarks: tuple[str, ...]
    methods: tuple[str, ...] = ()
    repeats: Mapping[str, str] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    limits: tuple[int, int] = (0, 0)
    video_limits: tuple[int, int] = (0, 0)
    tiles: int = 0
    max_frames: int = 32
    workload: str = ""

    @property
    def name(self) -> str:
        """The repository without its owner; the page's name."""
        return self.hub.rpartition("/")[2]

    def build(self) -> Any:
        """transformers' config of these sizes."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.family, **self.config)

    def hollow(self) -> Any:
        """The model in full size, without memory for its weights."""
        import torch
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(self.build()).eval()

    @property
    def images(self) -> tuple[str, ...]:
        """Tasks that show pictures."""
        return tuple(TASKS[name] for name in self.benchmarks if name not in VIDEO)

    @property
    def videos(self) -> tuple[str, ...]:
        """Tasks that show clips."""
        return tuple(TASKS[name] for name in self.benchmarks if name in VIDEO)


# ---- how many tokens -------------------------------------------------------------------------------------------------
def media(checkpoint: Checkpoint) -> Iterator[Media]:
    """Those of `MEDIA` that its benchmarks show."""
    return (m for m in MEDIA if checkpoint.videos or not m.frames)


def layouts(checkpoint: Checkpoint, shown: Media) -> list[Layout]:
    """One a picture: of a clip one, or one a frame where the family reads clips as pictures."""
    config = checkpoint.build()
    adapter = adapters.of(config)
    if shown.frames and "video" not in adapter.encoders:
        return [_GRIDS[checkpoint.family](checkpoint, adapter, config, shown)] * checkpoint.max_frames
    return [_GRIDS[checkpoint.family](checkpoint, adapter, config, shown)]


def _one_view(checkpoint: Checkpoint, adapter: Any, config: Any, shown: Media) -> Layout:
    return adapter.layouts(config, "image", {"pixel_values": (None,)})[0]


def _anyres(checkpoint: Checkpoint, adapter: Any, config: Any, shown: Media) -> Layout:
    import torch

    if shown.frames:
        clip = torch.empty(1, shown.frames, device="meta")
        return adapter.layouts(config, "video", {"pixel_values_videos": clip})[0]
    return adapter.layouts(config, "image", {"image_sizes": torch.tensor([[shown.height, shown.width]])})[0]


def _tiles(checkpoint: Checkpoint, adapter: Any, config: Any, shown: Media) -> Layout:
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    from vtok.adapters.internvl import tiled
    from vtok.types import Plane

    size = config.vision_config.image_size[0]
    cols, rows = get_optimal_tiled_canvas((shown.height, shown.width), (size, size), 1, checkpoint.tiles)
    side = size // adapter.unit(config)
    return tiled(side, (rows, cols)) if rows * cols > 1 else Layout((Plane(side, side),))


def _spread(checkpoint: Checkpoint, adapter: Any, config: Any, shown: Media) -> Layout:
    import torch

    from vtok.adapters.internvl import tiled

    size, longer = config.vision_config.image_size, max(shown.width, shown.height)
    tiles = [math.ceil(checkpoint.tiles * side / longer) for side in (shown.height, shown.width)]
    tile = adapter.layouts(config, "image", {"pixel_values": torch.ones(1, 1, 3, size, size)})[0]
    return tiled(tile.planes[0].rows, tuple(tiles))


def _native(checkpoint: Checkpoint, adapter: Any, config: Any, shown: Media) -> Layout:
    import torch
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resize_clip

    vision, size = config.vision_config, (shown.height, shown.width)
    factor, step = vision.patch_size * vision.spatial_merge_size, vision.temporal_patch_size
    least, most = checkpoint.video_limits if shown.frames else checkpoint.limits
    if shown.frames and checkpoint.family.startswith(("qwen3", "glm")):
        height, width = resize_clip(shown.frames, *size, step, factor, least, most)
    else:
        height, width = smart_resize(*size, factor, least, most)
    kind = "video" if shown.frames else "image"
    grid = [[max(1, shown.frames // step), height // vision.patch_size, width // vision.patch_size]]
    return adapter.layouts(config, kind, {f"{kind}_grid_thw": torch.tensor(grid)})[0]


_GRIDS = {
    "llava": _one_view,
    "llava_next": _anyres,
    "llava_onevision": _anyres,
    "internvl": _tiles,
    "smolvlm": _spread,
    "glm4v": _native,
    "gemma3": _one_view,
    "qwen3_5": _native,
    "qwen2_vl": _native,
    "qwen2_5_vl": _native,
    "qwen3_vl": _native,
    "qwen3_vl_moe": _native,
}


# ---- what they cost --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cost:
    """Of one prompt of `TEXT` text tokens. kept: visual tokens, floor(n * share) a picture, at every decoder layer.
    flops: of the prefill; bytes: of the KV cache in half precision, after it."""

    share: float
    kept: int
    flops: int
    bytes: int


def costs(checkpoint: Checkpoint, shown: Media, shares: tuple[float, ...]) -> list[Cost]:
    """At each share of the visual tokens that a compressor before the language model keeps. Separators stay."""
    shape, pictures = TextShape.of(checkpoint.build()), layouts(checkpoint, shown)
    separators = sum(picture.n_rows - picture.n for picture in pictures)
    made = []
    for share in shares:
        kept = sum(keep_count(picture.n, share) for picture in pictures)
        counts = [kept + separators + TEXT] * shape.layers
        made.append(Cost(share, kept, prefill_flops(shape, counts), kv_bytes(shape, counts, 2)))
    return made


def encoder(checkpoint: Checkpoint, shown: Media) -> int:
    """FLOPs of the vision tower and the projector, which a compressor behind them does not save."""
    config = checkpoint.build()
    shape = adapters.of(config).tower(config).shape()
    planes = [plane for picture in layouts(checkpoint, shown) for plane in picture.planes]
    views = [tuple(shape.merge * side for side in plane.view_shape) for plane in planes for _ in range(plane.views)]
    return encoder_flops(shape, views)


# ---- the checkpoints -------------------------------------------------------------------------------------------------
def _checkpoint(hub: str, family: str, sizes: dict[str, str], tables: Any = (), **facts: Any) -> Checkpoint:
    """Of an entry of checkpoints.toml. sizes: "text_config" or "vision_config" -> its name there; what the entry's
    own config says comes on top."""
    config = dict(facts.pop("config", {}))
    config |= {key: DATA["sizes"][name] | config.get(key, {}) for key, name in sizes.items()}
    facts = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    return Checkpoint(hub, family, config, tables=tuple(_table(**table) for table in tables), **facts)


def _table(paper: str, columns: list[str], rows: list[list[str]], **facts: str) -> Table:
    title, arxiv = DATA["papers"][paper]
    return Table(title, arxiv, columns=tuple(columns), rows=tuple(map(tuple, rows)), **facts)


CHECKPOINTS = tuple(_checkpoint(**entry) for entry in DATA["checkpoints"])
