"""FLOPs and KV-cache bytes by formula, from a Hugging Face config and token counts. Plain integers.

The decoder's formula is the one with which AIM's published table was made (LLM-Viewer's, arXiv 2402.16363): a
multiply-add is two operations, softmax is five a score, norms, residuals, rotations and activations 17 a
token and channel. The head is counted once, as d * V, whatever the prompt's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import sub
from typing import Any

from vtok.errors import InvalidValue, Unsupported

SOFTMAX = 5  # operations an attention score
SMALL = 17  # operations a token and channel in a layer: norms, residuals, rotation, activation, gate
CLS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # of the plain towers, by model_type
QWEN_TOWERS = {"qwen2_vl_vision": 2, "qwen2_5_vl_vision": 3, "qwen3_vl_vision": 2}  # -> matrices of their MLPs


@dataclass(frozen=True)
class TextShape:
    """The sizes of a decoder that its cost depends on.

    layers: decoder layers. hidden: d, width of the residual stream. ffn: f, width of the gated MLP.
    query_width: heads * head_dim (d, in most families). kv_width: g, key-value heads * head_dim.
    heads: query heads. vocab: V, rows of the output head.
    """

    layers: int
    hidden: int
    ffn: int
    query_width: int
    kv_width: int
    heads: int
    vocab: int

    @staticmethod
    def of(config: Any) -> TextShape:
        """The shape of a Llama-like decoder (Llama, Mistral, Qwen2), from its or the model's config.

        Raises `Unsupported` for a decoder that this formula does not describe.
        """
        text = config.get_text_config()
        try:
            heads = text.num_attention_heads
            head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
            kv_heads = getattr(text, "num_key_value_heads", None) or heads
            shape = TextShape(
                layers=text.num_hidden_layers,
                hidden=text.hidden_size,
                ffn=text.intermediate_size,
                query_width=heads * head_dim,
                kv_width=kv_heads * head_dim,
                heads=heads,
                vocab=text.vocab_size,
            )
        except AttributeError as error:
            raise Unsupported(f"FLOPs of {text.model_type!r} cannot be counted: {error}.") from error
        if getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None):
            raise Unsupported(f"FLOPs of {text.model_type!r} cannot be counted: it is a mixture of experts.")
        return shape


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a vision tower and its projector that their cost depends on.

    layers, hidden, ffn, heads: of the tower. ffn_matrices: 2, or 3 where the MLP is gated.
    patch_values: pixel values of one patch. cls_tokens: tokens that each view has beside its patches.
    merge: side, in patches, of the square that becomes one visual token (1: each patch is a token).
    projector: widths of the MLP that makes visual tokens, from its input on. projectors: how many such MLPs run, 1 or
        more where features of several layers are taken (DeepStack).
    full_layers: how many of the layers attend over the whole view. window: side, in patches, of the squares
        within which the others attend (0 where there are none).
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    ffn_matrices: int
    patch_values: int
    cls_tokens: int
    merge: int
    projector: tuple[int, ...]
    full_layers: int
    window: int
    projectors: int = 1

    @staticmethod
    def of(config: Any) -> VisionShape:
        """The shape of a CLIP or SigLIP tower with LLaVA's projector, of InternVL, or of a Qwen-VL with its merger.

        config: the whole model's. Raises `Unsupported` for any other tower.
        """
        vision, text_hidden = getattr(config, "vision_config", None), config.get_text_config().hidden_size
        kind = getattr(vision, "model_type", None)
        if kind in CLS_TOKENS:
            taken = getattr(config, "vision_feature_layer", -1)
            levels = 1 if isinstance(taken, int) else len(taken)  # several layers' features lie side by side
            return VisionShape(
                layers=vision.num_hidden_layers,
                hidden=vision.hidden_size,
                ffn=vision.intermediate_size,
                heads=vision.num_attention_heads,
                ffn_matrices=2,
                patch_values=vision.num_channels * vision.patch_size**2,
                cls_tokens=CLS_TOKENS[kind],
                merge=1,
                projector=(levels * vision.hidden_size, text_hidden, text_hidden),
                full_layers=vision.num_hidden_layers,
                window=0,
            )
        if kind == "internvl_vision":
            merge = round(1 / config.downsample_ratio)
            return VisionShape(
                layers=vision.num_hidden_layers,
                hidden=vision.hidden_size,
                ffn=vision.intermediate_size,
                heads=vision.num_attention_heads,
                ffn_matrices=2,
                patch_values=vision.num_channels * vision.patch_size[0] * vision.patch_size[1],
                cls_tokens=1,
                merge=merge,
                projector=(vision.hidden_size * merge**2, text_hidden, text_hidden),
                full_layers=vision.num_hidden_layers,
                window=0,
            )
        if kind in QWEN_TOWERS:
            hidden = getattr(vision, "embed_dim", vision.hidden_size)  # Qwen2-VL's hidden_size is the decoder's
            wide = hidden * vision.spatial_merge_size**2
            windowed = hasattr(vision, "fullatt_block_indexes")
            return VisionShape(
                layers=vision.depth,
                hidden=hidden,
                ffn=vision.intermediate_size if hasattr(vision, "intermediate_size") else hidden * vision.mlp_ratio,
                heads=vision.num_heads,
                ffn_matrices=QWEN_TOWERS[kind],
                patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
                cls_tokens=0,
                merge=vision.spatial_merge_size,
                projector=(wide, wide, text_hidden),
                projectors=1 + len(getattr(vision, "deepstack_visual_indexes", ())),
                full_layers=len(set(vision.fullatt_block_indexes)) if windowed else vision.depth,
                window=vision.window_size // vision.patch_size if windowed else 0,
            )
        raise Unsupported(f"FLOPs of the vision tower {kind!r} cannot be counted.")


def layer_flops(shape: TextShape, n: int, causal: bool = False) -> int:
    """Operations of one decoder layer in a prefill of `n` tokens: all n^2 scores counted, as published tables do, or
    where `causal` those alone that a token sees, which is what causal kernels compute."""
    return _layer(shape, n, n * (n + 1) // 2 if causal else n * n)


def prefill_flops(shape: TextShape, counts: Sequence[int], causal: bool = False) -> int:
    """Operations of one sample's prefill. `counts`: tokens that enter each of the decoder's layers. `causal`: see
    `layer_flops`."""
    return sum(layer_flops(shape, n, causal) for n in _checked(shape, counts)) + shape.hidden * shape.vocab


def decode_flops(shape: TextShape, cached_counts: Sequence[int], neurons: Mapping[int, int] | None = None) -> int:
    """Operations of one decoding step. `cached_counts`: tokens in each layer's cache before the step. `neurons`: layer
    -> how many neurons of the MLP are computed, all where it does not say."""
    widths = [(neurons or {}).get(layer) for layer in range(shape.layers)]
    counts = _checked(shape, cached_counts)
    return sum(_layer(shape, 1, n + 1, f) for n, f in zip(counts, widths)) + shape.hidden * shape.vocab


def kv_bytes(shape: TextShape, counts: Sequence[int], bytes_per_value: int) -> int:
    """Bytes of one sample's key-value cache. `counts`: tokens in each layer's cache; `bytes_per_value`: 2 in
    half precision. A sliding-window cache that drops tokens holds less."""
    return sum(2 * shape.kv_width * n * bytes_per_value for n in _checked(shape, counts))


def encoder_flops(
    shape: VisionShape,
    views: Iterable[tuple[int, int]],
    merged_at: Callable[[int], Sequence[int]] | None = None,
) -> int:
    """Operations of the tower and the projector.

    views: (rows, cols) in patches of each picture that the tower sees, padding included: for LLaVA-NeXT the
    thumbnail and every crop, for Qwen2.5-VL each picture's grid, a clip's once for each temporal patch.
    merged_at: for a view of so many patches, how many rows each of the first layers merges away between its attention
        and its MLP; only for towers without windows.
    """
    return sum(_view(shape, rows, cols, merged_at(rows * cols) if merged_at else ()) for rows, cols in views)


def copied_bytes(shape: TextShape, neurons: Mapping[int, int], bytes_per_value: int) -> int:
    """Bytes of copies of three MLP matrices' rows, `neurons` of them in each layer it names."""
    return sum(3 * shape.hidden * n * bytes_per_value for n in neurons.values())


def _layer(shape: TextShape, n: int, pairs: int, neurons: int | None = None) -> int:
    """One decoder layer: `n` tokens pass, and `pairs` scores are computed a head; `neurons` of the MLP are computed."""
    d, q, g, f = shape.hidden, shape.query_width, shape.kv_width, shape.ffn if neurons is None else neurons
    matrices = 2 * n * (2 * d * q + 2 * d * g + 3 * d * f)
    return matrices + 4 * pairs * q + SOFTMAX * shape.heads * pairs + SMALL * n * d


def _view(shape: VisionShape, rows: int, cols: int, merged: Sequence[int] = ()) -> int:
    patches, d = rows * cols, shape.hidden
    n = patches + shape.cls_tokens
    windowed = shape.layers - shape.full_layers
    left = list(accumulate((*merged, *[0] * (shape.layers - len(merged))), sub, initial=n))  # rows behind each layer
    attended, treated = sum(left[:-1]), sum(left[1:])  # by attention, by the MLP, over all layers
    pairs = sum(m * m for m in left[: shape.full_layers])
    if windowed:
        # The windows tile the grid, smaller at its edges: the sum of their squared areas factorises.
        pairs += windowed * _squares(rows, shape.window) * _squares(cols, shape.window)
    matrices = 2 * (attended * 4 * d * d + treated * shape.ffn_matrices * d * shape.ffn)
    small = SMALL * attended * d
    embedding = 2 * patches * shape.patch_values * d
    widths = shape.projector
    projector = shape.projectors * 2 * (patches // shape.merge**2) * sum(a * b for a, b in pairwise(widths))
    return embedding + matrices + (4 * d + SOFTMAX * shape.heads) * pairs + small + projector


def _squares(length: int, window: int) -> int:
    """Sum of the squared lengths of the pieces into which windows cut `length`."""
    whole, rest = divmod(length, window)
    return whole * window**2 + rest**2


def _checked(shape: TextShape, counts: Sequence[int]) -> Sequence[int]:
    if len(counts) != shape.layers:
        raise InvalidValue(f"The decoder has {shape.layers} layers, but {len(counts)} counts were given.")
    if any(n < 0 for n in counts):
        raise InvalidValue(f"Token counts must be at least 0, got {list(counts)}.")
    return counts
