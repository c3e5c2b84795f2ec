"""The public checkpoints that have a page in `model_cards/`: their sizes, how many visual tokens a picture is, the
tasks they are judged on, and what papers published about them. `vtok zoo pages` writes the pages from this.

Sizes are those of the checkpoint's config.json, pixel limits those of its preprocessor_config.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vtok import adapter as adapters
from vtok.engine.accounting import TextShape, encoder_flops, kv_bytes, prefill_flops
from vtok.types import Layout, keep_count

TEXT = 40  # text tokens of a prompt, as in AIM's table

# benchmark -> task of lmms-eval 0.7.3
TASKS = {
    "MME": "mme",
    "POPE": "pope",
    "TextVQA": "textvqa_val",
    "GQA": "gqa",
    "MMBench": "mmbench_en_dev_static",
    "ChartQA": "chartqa",
    "DocVQA": "docvqa_val",
    "RefCOCO": "refcoco_bbox_rec_val",
    "RefCOCO (grounding)": "refcoco_grounding_testA",
    "VideoMME": "videomme",
    "MLVU": "mlvu_dev",
}
REMARKS = {
    "mmbench_en_dev_static": "compares the answer's letter; `mmbench_en_dev` asks a judge model of OpenAI instead.",
    "refcoco_bbox_rec_val": "asks for a box in [0, 1], as the LLaVAs were taught.",
    "refcoco_grounding_testA": "takes boxes in pixels or in thousandths, whichever fits better, as other families say "
    "them.",
}
GENERAL = ("MME", "POPE", "TextVQA", "GQA", "MMBench")
DOCUMENTS = ("ChartQA", "DocVQA")
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


IMAGE = "read off the published image of the table"
SUMMARIES = "from summaries of the paper that agree; not checked against its own table"
SUMMARY = "from one summary of the paper; not checked against its own table"


@dataclass(frozen=True)
class Checkpoint:
    """hub: repository that transformers loads. family: adapter. config: sizes, as in config.json. limits: pixels of a
    picture, least and most, where the processor has such limits; video_limits: the same for a clip, of a frame or, in
    Qwen3-VL, of all its frames. tiles: most tiles of a picture (InternVL). benchmarks: keys of `TASKS`. max_frames: of
    clips. methods: run at 25 % beside the family's default. repeats: row of a published table -> arguments of vtok's
    model that repeat it. workload: name of `vtok bench` with this decoder's proportions. notes: what to know.
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


def _native(checkpoint: Checkpoint, adapter: Any, config: Any, shown: Media) -> Layout:
    import torch
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resize_clip

    vision, size = config.vision_config, (shown.height, shown.width)
    factor, step = vision.patch_size * vision.spatial_merge_size, vision.temporal_patch_size
    least, most = checkpoint.video_limits if shown.frames else checkpoint.limits
    if shown.frames and checkpoint.family.startswith("qwen3"):
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
VICUNA_7B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
}
QWEN2_7B = {
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}
QWEN2_5_3B = {
    "num_hidden_layers": 36,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 128000,
}
QWEN3_8B = {
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
}
QWEN3_30B_A3B = {
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
}
CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
SIGLIP_SO_384 = {
    "model_type": "siglip_vision_model",
    "num_hidden_layers": 26,  # the last of 27 is not used
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
INTERNVIT_300M = {
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": [448, 448],
    "patch_size": [14, 14],
}
QWEN2_VIT = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "mlp_ratio": 4,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN2_5_VIT = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
QWEN3_VIT = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "out_hidden_size": 4096,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "deepstack_visual_indexes": [8, 16, 24],
}

QWEN_PIXELS = (3136, 12845056)
QWEN_FRAMES = (128 * 28 * 28, 768 * 28 * 28)  # those of transformers' video processor; our clip is within both
SIDES = (384, 768, 1152, 1536, 1920, 2304)
DEEPSTACK = (
    "DeepStack adds features of three encoder layers behind the first three decoder layers, at the tokens that were "
    "kept; the counts below are not changed by it."
)
CORE_QWEN = (
    "CoreMatching's paper (arXiv 2505.19235) has this checkpoint on DocVQA, InfoVQA, ChartQA, OCRBench and AI2D; its "
    "numbers could not be confirmed and are left out. `compressor=corematching` runs the method."
)
LARGE_PAGES = (
    "Pages are cut into many thousands of tokens. On a small card give `max_pixels=1003520`, to the dense run too."
)

AIM_PAPER = ("AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning", "2412.03248")
SEARCH_PAPER = ("Searching Optimal Vision Token Reduction (G-Search, P-Sigmoid)", "2412.00556")
GLOBALCOM2_PAPER = ("Global Compression Commander (GlobalCom2)", "2501.05179")
QUECC_PAPER = ("Inference Optimal VLMs Need Only One Visual Token but Larger Models (QueCC)", "2411.03312")
CORE_PAPER = ("CoreMatching: A Co-adaptive Sparse Inference Framework for VLMs", "2505.19235")
TIMEMASTER_PAPER = (
    "TimeMaster: Training Time-Series Multimodal LLMs to Reason via Reinforcement Learning",
    "2506.13705",
)

SEARCH_COLUMNS = (
    "method",
    "TFLOPs",
    "mean",
    "MME",
    "MMB",
    "GQA",
    "MMMU",
    "MathVista",
    "AI2D",
    "TextVQA",
    "ChartQA",
    "DocVQA",
    "POPE",
    "RealWorldQA",
    "HallusionBench",
)
SEARCH_SETTING = "mean of 12 benchmarks, then each; MME is perception and cognition together"
GSEARCH_COLUMNS = ("method", "mean of 12 benchmarks", "mean keep over layers", "TFLOPs", "seconds")
GSEARCH_SETTING = "no training; scores, KV-cache share, prefill TFLOPs and time as printed"

LLAVA_TABLES = (
    Table(
        *AIM_PAPER,
        "its table of image benchmarks",
        "LLaVA-1.5-7B, no training; TFLOPs of the prefill, which `vtok.engine.accounting` reproduces for the dense "
        "model and for AIM at 43.75 % with l1=13, l2=21",
        SUMMARY,
        ("method", "TFLOPs", "VQAv2", "GQA", "MME (perception)", "POPE"),
        (
            ("dense", "8.18", "78.5", "62.0", "1510.7", "85.9"),
            ("FastV", "2.58", "74.1", "56.6", "1438.5", "73.6"),
            ("PruMerge+", "2.41", "74.6", "57.4", "1391.9", "82.2"),
            ("AIM", "2.22", "75.4", "58.6", "1443.5", "85.7"),
        ),
    ),
    Table(
        *SEARCH_PAPER,
        "Table 1",
        GSEARCH_SETTING,
        IMAGE,
        GSEARCH_COLUMNS,
        (
            ("dense", "48.97", "1", "9.18", "0.625"),
            ("VTW", "44.32", "0.5", "5.19", "0.385"),
            ("PyramidDrop", "48.70", "0.469", "5.47", "0.381"),
            ("FastV, 50 % dropped", "48.70", "0.531", "5.49", "0.387"),
            ("G-Search", "48.77", "0.340", "3.95", "0.301"),
        ),
    ),
    Table(
        *SEARCH_PAPER,
        "Table 3",
        SEARCH_SETTING,
        IMAGE,
        SEARCH_COLUMNS,
        (
            (
                *("FastV, 87.5 % dropped", "2.74", "43.14", "1644.5", "60.2", "54.0", "37.3", "21.8", "52.1"),
                *("38.7", "14.4", "18.1", "66.3", "49.3", "46.7"),
            ),
            (
                *("P-Sigmoid, 87.5 % dropped", "2.66", "46.52", "1700.4", "63.7", "58.3", "37.1", "22.0", "54.5"),
                *("44.1", "15.7", "23.3", "78.0", "53.6", "47.1"),
            ),
        ),
    ),
    Table(
        *QUECC_PAPER,
        "Table 1",
        "trained projectors on the recipe of LLaVA-1.5-7B, so other weights than this checkpoint's, which is the first "
        "row; tokens a picture",
        "transcribed",
        ("method", "tokens", "GQA", "MMB", "MME (perception)", "POPE", "SQA", "TextVQA", "VizWiz", "VQAv2"),
        (
            ("LLaVA-1.5", "576", "62.0", "64.3", "1510.7", "85.9", "66.8", "58.2", "50.0", "78.5"),
            ("QueCC", "36", "60.5", "62.5", "1442.0", "84.5", "70.6", "53.3", "50.1", "75.8"),
            ("QueCC", "16", "59.0", "62.2", "1408.0", "83.4", "70.7", "51.3", "47.7", "74.5"),
            ("QueCC", "4", "56.5", "62.1", "1390.3", "81.8", "68.6", "48.7", "45.0", "70.6"),
            ("QueCC", "1", "53.5", "59.4", "1269.1", "81.3", "69.9", "46.8", "44.1", "67.3"),
        ),
    ),
    Table(
        *CORE_PAPER,
        "its main results",
        "LLaVA-1.5-7B, core tokens and core neurons together, no training",
        SUMMARY,
        ("method", "TextVQA"),
        (("dense", "58.2"), ("CoreMatching", "54.5")),
    ),
)

CHECKPOINTS = (
    Checkpoint(
        hub="llava-hf/llava-1.5-7b-hf",
        family="llava",
        config={"text_config": VICUNA_7B, "vision_config": CLIP_L_336},
        benchmarks=(*GENERAL, *DOCUMENTS, "RefCOCO"),
        methods=("visionzip",),
        repeats={
            "AIM": "compressor=aim,keep=0.4375,start=13,end=21",
            "FastV, 50 % dropped": "compressor=fastv,keep=0.5",
            "FastV, 87.5 % dropped": "compressor=fastv,keep=0.125",
            "PyramidDrop": "compressor=pyramiddrop,keep=0.5",
            "P-Sigmoid, 87.5 % dropped": "compressor=schedule,keep=0.1797",
            "CoreMatching": "compressor=corematching",
        },
        tables=LLAVA_TABLES,
        notes=(
            "The checkpoint's processor cuts the middle square out of a picture; the original code pads it instead. "
            "So the dense run here, not the published dense score, is what to compare with.",
            "ChartQA and DocVQA are beyond one view of 336 pixels; they are there because G-Search's tables have them.",
        ),
    ),
    Checkpoint(
        hub="llava-hf/llava-v1.6-vicuna-7b-hf",
        family="llava_next",
        config={
            "text_config": VICUNA_7B,
            "vision_config": CLIP_L_336,
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        },
        benchmarks=(*GENERAL, *DOCUMENTS, "RefCOCO"),
        methods=("globalcom2",),
        repeats={
            "GlobalCom2, 50 %": "compressor=globalcom2,keep=0.5",
            "GlobalCom2, 25 %": "compressor=globalcom2,keep=0.25",
            "GlobalCom2, 10 %": "compressor=globalcom2,keep=0.1",
        },
        tables=(
            Table(
                *GLOBALCOM2_PAPER,
                "its main table",
                "LLaVA-NeXT-7B (Vicuna), no training; share of the patch tokens kept, newline tokens not counted; the "
                "last column is the mean over 10 image benchmarks relative to dense",
                SUMMARY,
                ("method", "GQA", "TextVQA", "POPE", "MME", "MM-Vet", "mean %"),
                (
                    ("dense", "64.2", "64.9", "86.5", "1519.0", "43.9", "100"),
                    ("GlobalCom2, 50 %", "63.9", "62.3", "88.1", "1552.9", "40.4", "98.5"),
                    ("GlobalCom2, 25 %", "61.5", "60.9", "87.6", "1493.5", "40.7", "96.7"),
                    ("GlobalCom2, 10 %", "57.1", "58.4", "83.8", "1365.5", "36.4", "91.6"),
                ),
            ),
            Table(
                *GLOBALCOM2_PAPER,
                "its table of efficiency",
                "LLaVA-NeXT-7B at 10 %; of these, 9.1 % of the FLOPs and 60 % of the peak memory are in the abstract",
                SUMMARY,
                ("method", "TFLOPs", "peak memory, GB", "samples a second"),
                (("dense", "41.7", "23.0", "3.8"), ("GlobalCom2, 10 %", "3.8", "13.9", "6.7")),
            ),
        ),
        workload="llava-next-7b",
    ),
    Checkpoint(
        hub="llava-hf/llava-onevision-qwen2-7b-ov-hf",
        family="llava_onevision",
        config={
            "text_config": {"model_type": "qwen2", **QWEN2_7B},
            "vision_config": SIGLIP_SO_384,
            "image_grid_pinpoints": [[height, width] for height in SIDES for width in SIDES],
            "vision_aspect_ratio": "anyres_max_9",
        },
        benchmarks=(*GENERAL, *DOCUMENTS, "RefCOCO", *VIDEO),
        methods=("aim",),
        repeats={
            "AIM, 32 frames": "compressor=aim,keep=0.25,start=14,end=22",
            "AIM, 192 frames": "max_frames=192,compressor=aim,keep=0.25,start=14,end=22",
            "GlobalCom2, 10 %": "compressor=globalcom2,keep=0.1,score_source=neg_cos_mean",
        },
        tables=(
            Table(
                *AIM_PAPER,
                "its table of video benchmarks",
                "LLaVA-OneVision-7B, 32 frames where no other number is given, no training; TFLOPs of the prefill at "
                "100 text tokens, which `vtok.engine.accounting` reproduces for the dense model and for AIM; its 14.76 "
                "counts each layer's tokens one layer early, a run does 15.53",
                SUMMARIES,
                ("method", "TFLOPs", "VideoMME", "MVBench", "MLVU", "EgoSchema"),
                (
                    ("dense", "99.63", "58.2", "56.7", "64.7", "60.1"),
                    ("FastV", "21.24", "55.9", "55.9", "61.1", "57.5"),
                    ("PruMerge", "23.65", "57.0", "56.5", "60.6", "61.0"),
                    ("AIM, 32 frames", "14.76", "58.2", "57.1", "63.7", "59.6"),
                    ("AIM, 192 frames", "99.27", "59.2", "-", "69.3", "60.8"),
                ),
            ),
            Table(
                *GLOBALCOM2_PAPER,
                "its results on LLaVA-OneVision",
                "at 10 %, scores by the negative cosine with the view's mean, no training; relative to dense",
                SUMMARY,
                ("method", "mean score, %", "memory, %"),
                (("GlobalCom2, 10 %", "90.5", "35.4"),),
            ),
        ),
    ),
    Checkpoint(
        hub="OpenGVLab/InternVL3-8B-hf",
        family="internvl",
        config={
            "text_config": {"model_type": "qwen2", **QWEN2_7B, "vocab_size": 151674},
            "vision_config": INTERNVIT_300M,
            "downsample_ratio": 0.5,
            "tie_word_embeddings": False,
        },
        benchmarks=(*GENERAL, *DOCUMENTS, "RefCOCO (grounding)", *VIDEO),
        methods=("globalcom2",),
        repeats={
            "FastV, 50 % dropped": "compressor=fastv,keep=0.5",
            "FastV, 87.5 % dropped": "compressor=fastv,keep=0.125",
            "P-Sigmoid, 87.5 % dropped": "compressor=schedule,keep=0.1797",
        },
        tables=(
            Table(
                *SEARCH_PAPER,
                "Table 1",
                f"InternVL2-8B, an older model of the family, so for the differences alone; {GSEARCH_SETTING}",
                IMAGE,
                GSEARCH_COLUMNS,
                (
                    ("dense", "70.83", "1", "24.10", "1.518"),
                    ("VTW", "52.51", "0.5", "13.71", "0.927"),
                    ("PyramidDrop", "69.19", "0.469", "13.13", "0.915"),
                    ("FastV, 50 % dropped", "69.42", "0.531", "14.58", "0.998"),
                    ("G-Search", "70.10", "0.424", "12.24", "0.860"),
                ),
            ),
            Table(
                *SEARCH_PAPER,
                "Table 3",
                f"InternVL2-8B, as above; {SEARCH_SETTING}",
                IMAGE,
                SEARCH_COLUMNS,
                (
                    (
                        *("FastV, 87.5 % dropped", "7.71", "55.17", "2066.2", "74.3", "55.4", "44.7", "25.6", "72.6"),
                        *("60.3", "35.0", "39.6", "78.9", "54.5", "47.3"),
                    ),
                    (
                        *(
                            "P-Sigmoid, 87.5 % dropped",
                            "7.46",
                            "62.86",
                            "2176.6",
                            "79.3",
                            "59.7",
                            "45.8",
                            "33.0",
                            "76.3",
                        ),
                        *("70.5", "61.8", "59.9", "84.1", "59.5", "46.7"),
                    ),
                ),
            ),
        ),
        notes=(
            "Clips are frames as pictures here, each cut into tiles as a picture is, so that few fit: the commands "
            "show 8. InternVL's own evaluation gives a frame one tile.",
        ),
        tiles=12,
        max_frames=8,
    ),
    Checkpoint(
        hub="Qwen/Qwen2-VL-7B-Instruct",
        family="qwen2_vl",
        config={"text_config": QWEN2_7B, "vision_config": QWEN2_VIT},
        benchmarks=(*GENERAL, *DOCUMENTS, "RefCOCO (grounding)", *VIDEO),
        methods=("aim",),
        notes=(
            "AIM's authors published code for clips on this model, with l1=14, l2=22 of 28 layers "
            "(`compressor=aim,keep=0.25,start=14,end=22`), and no numbers that could be confirmed.",
            LARGE_PAGES,
        ),
        limits=QWEN_PIXELS,
        video_limits=QWEN_FRAMES,
    ),
    Checkpoint(
        hub="Qwen/Qwen2.5-VL-3B-Instruct",
        family="qwen2_5_vl",
        config={
            "text_config": QWEN2_5_3B,
            "vision_config": {**QWEN2_5_VIT, "out_hidden_size": 2048},
            "tie_word_embeddings": True,
        },
        benchmarks=(*GENERAL, *DOCUMENTS, "RefCOCO (grounding)", *VIDEO),
        methods=("dart",),
        tables=(
            Table(
                *TIMEMASTER_PAPER,
                "bar chart of its repository's README",
                "this checkpoint trained on plots of time series (SFT, then RL), not compressed; accuracy in percent, "
                "within 0.5",
                "read off the published chart",
                ("method", "RCW", "TEE", "ECG", "EMG", "CTU", "HAR"),
                (("TimeMaster", "75.5", "68.5", "60.0", "100", "84.4", "63.3"),),
            ),
        ),
        notes=(
            CORE_QWEN,
            LARGE_PAGES,
        ),
        limits=QWEN_PIXELS,
        video_limits=QWEN_FRAMES,
        workload="qwen2.5-vl-3b",
    ),
    Checkpoint(
        hub="Qwen/Qwen2.5-VL-7B-Instruct",
        family="qwen2_5_vl",
        config={"text_config": QWEN2_7B, "vision_config": {**QWEN2_5_VIT, "out_hidden_size": 3584}},
        benchmarks=(*GENERAL, *DOCUMENTS, "RefCOCO (grounding)", *VIDEO),
        methods=("dart",),
        notes=(
            CORE_QWEN,
            LARGE_PAGES,
        ),
        limits=QWEN_PIXELS,
        video_limits=QWEN_FRAMES,
    ),
    Checkpoint(
        hub="Qwen/Qwen3-VL-8B-Instruct",
        family="qwen3_vl",
        config={"text_config": QWEN3_8B, "vision_config": QWEN3_VIT},
        benchmarks=(*GENERAL, *DOCUMENTS, "RefCOCO (grounding)", *VIDEO),
        methods=("dart",),
        notes=(
            DEEPSTACK,
            LARGE_PAGES,
        ),
        limits=(65536, 16777216),
        video_limits=(4096, 25165824),
    ),
    Checkpoint(
        hub="Qwen/Qwen3-VL-30B-A3B-Instruct",
        family="qwen3_vl_moe",
        config={"text_config": QWEN3_30B_A3B, "vision_config": {**QWEN3_VIT, "out_hidden_size": 2048}},
        benchmarks=(*GENERAL, *DOCUMENTS, "RefCOCO (grounding)", *VIDEO),
        methods=("dart",),
        notes=(
            DEEPSTACK,
            LARGE_PAGES,
        ),
        limits=(65536, 16777216),
        video_limits=(4096, 25165824),
    ),
)
