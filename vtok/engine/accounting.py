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
# whose experts `Experts.of` counts
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe_text", "qwen3_5_moe_text", "glm4v_moe_text")
DELTA = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")  # whose linear layers are gated delta nets
STEP = 7  # operations a number of a delta net's state and token: decay, two readings, the difference written
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # what configs call how many there are


@dataclass(frozen=True)
class Experts:
    """The layers of a decoder in which a router chooses among several FFNs.

    width: neurons that one token goes through, those of its routed experts and of shared ones together.
    router: columns of the matrices that choose. layers: the layers that are so.
    """

    width: int
    router: int
    layers: frozenset[int]

    @staticmethod
    def of(text: Any) -> Experts | None:
        """From a decoder's config; None where its kind of mixture is not known."""
        if text.model_type not in MIXTURES:
            return None
        total = next(n for name in EXPERTS if (n := getattr(text, name, None)))
        gated = getattr(text, "shared_expert_intermediate_size", None) or 0  # beside them, behind a gate of its own
        each = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
        used = text.num_experts_per_tok + (getattr(text, "n_shared_experts", None) or 0)  # GLM's shared ones have none
        dense, step = getattr(text, "mlp_only_layers", None) or (), getattr(text, "decoder_sparse_step", 1)
        first = getattr(text, "first_k_dense_replace", None) or 0
        layers = frozenset(i for i in range(first, text.num_hidden_layers) if i not in dense and (i + 1) % step == 0)
        return Experts(used * each + gated, total + bool(gated), layers)


@dataclass(frozen=True)
class Linear:
    """The layers of a decoder that hold a state of fixed size in place of a cache: gated delta nets (arXiv 2412.06464)
    behind a short convolution.

    key_width, value_width: heads * width of a head. heads: of the values. key: width of one key. kernel: of the
    convolution. layers: the layers that are so.
    """

    key_width: int
    value_width: int
    heads: int
    key: int
    kernel: int
    layers: frozenset[int]

    @staticmethod
    def of(text: Any) -> Linear | None:
        """From a decoder's config; None where all layers hold a cache. Raises `Unsupported` for other kinds."""
        layers = _of_kind(text, "linear_attention")
        if not layers:
            return None
        if text.model_type not in DELTA:
            raise Unsupported(
                f"FLOPs and cache of {text.model_type!r} cannot be counted: its linear layers are unknown."
            )
        heads, key = text.linear_num_value_heads, text.linear_key_head_dim
        keys, values = text.linear_num_key_heads * key, heads * text.linear_value_head_dim
        return Linear(keys, values, heads, key, text.linear_conv_kernel_dim, layers)

    def flops(self, n: int, hidden: int) -> int:
        """Of the mixing of `n` tokens in one layer, without its MLP."""
        mixed = 2 * self.key_width + self.value_width
        matrices = 2 * n * hidden * (mixed + 2 * self.value_width + 2 * self.heads)
        return matrices + 2 * n * self.kernel * mixed + STEP * n * self.value_width * self.key


@dataclass(frozen=True)
class TextShape:
    """The sizes of a decoder that its cost depends on.

    layers: decoder layers. hidden: d, width of the residual stream.
    ffn: f, width of the gated MLP; None where it is of an unknown kind, so that only the cache can be counted.
    query_width: heads * head_dim (d, in most families). kv_width: g, key-value heads * head_dim.
    heads: query heads. vocab: V, rows of the output head. experts: of a mixture, in whose other layers f holds.
    linear: layers without a cache. window: columns that a token sees in the layers `sliding`, its own among them.
    gated: whether attention's output is multiplied by a gate as wide as the query.
    """

    layers: int
    hidden: int
    ffn: int | None
    query_width: int
    kv_width: int
    heads: int
    vocab: int
    experts: Experts | None = None
    linear: Linear | None = None
    window: int = 0
    sliding: frozenset[int] = frozenset()
    gated: bool = False

    @staticmethod
    def of(config: Any) -> TextShape:
        """The shape of a Llama-like decoder (Llama, Mistral, Qwen2, and mixtures in `MIXTURES`), from its or the
        model's config.

        Raises `Unsupported` for a decoder whose attention this formula does not describe.
        """
        text = config.get_text_config()
        if getattr(text, "kv_lora_rank", None):
            raise Unsupported(f"FLOPs and cache of {text.model_type!r} cannot be counted: its attention is latent.")
        mixed = any(getattr(text, name, None) for name in EXPERTS)
        experts = Experts.of(text) if mixed else None
        try:
            heads = text.num_attention_heads
            head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
            kv_heads = getattr(text, "num_key_value_heads", None) or heads
            return TextShape(
                layers=text.num_hidden_layers,
                hidden=text.hidden_size,
                ffn=getattr(text, "intermediate_size", None) if experts or not mixed else None,
                query_width=heads * head_dim,
                kv_width=kv_heads * head_dim,
                heads=heads,
                vocab=text.vocab_size,
                experts=experts,
                linear=Linear.of(text),
                window=getattr(text, "sliding_window", None) or 0,
                sliding=_of_kind(text, "sliding_attention"),
                gated=text.model_type in DELTA,
            )
        except AttributeError as error:
            raise Unsupported(f"FLOPs of {text.model_type!r} cannot be counted: {error}.") from error


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a vision tower and its projector that their cost depends on. `vtok.tower.Tower.shape` gives it.

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
    def plain(config: Any, cls_tokens: int = 0, merge: int = 1, levels: int = 1) -> VisionShape:
        """Of a ViT whose config has transformers' usual names, before an MLP of two matrices as in LLaVA.

        config: the whole model's. levels: how many layers' features lie side by side before the projector."""
        vision, text_hidden = config.vision_config, config.get_text_config().hidden_size
        patch = vision.patch_size
        return VisionShape(
            layers=vision.num_hidden_layers,
            hidden=vision.hidden_size,
            ffn=vision.intermediate_size,
            heads=vision.num_attention_heads,
            ffn_matrices=2,
            patch_values=vision.num_channels * (patch**2 if isinstance(patch, int) else patch[0] * patch[1]),
            cls_tokens=cls_tokens,
            merge=merge,
            projector=(levels * vision.hidden_size * merge**2, text_hidden, text_hidden),
            full_layers=vision.num_hidden_layers,
            window=0,
        )


def layer_flops(shape: TextShape, n: int, causal: bool = False, layer: int = 0) -> int:
    """Operations of a decoder layer in a prefill of `n` tokens: all n^2 scores counted, as published tables do, or
    where `causal` those alone that a token sees, which is what causal kernels compute. `layer` tells layers of one kind
    from those of another. Raises `Unsupported`, as all that count FLOPs, where the FFN's kind is not known."""
    near = min(n, shape.window) if layer in shape.sliding else n  # columns that the last token sees
    return _layer(shape, n, near * (near + 1) // 2 + (n - near) * near if causal else n * near, layer)


def prefill_flops(shape: TextShape, counts: Sequence[int], causal: bool = False) -> int:
    """Operations of one sample's prefill. `counts`: tokens that enter each of the decoder's layers. `causal`: see
    `layer_flops`."""
    layers = enumerate(_checked(shape, counts))
    return sum(layer_flops(shape, n, causal, i) for i, n in layers) + shape.hidden * shape.vocab


def decode_flops(shape: TextShape, cached_counts: Sequence[float], neurons: Mapping[int, int] | None = None) -> int:
    """Operations of one decoding step. `cached_counts`: tokens in each layer's cache before the step. `neurons`: layer
    -> how many neurons of the MLP are computed, all where it does not say."""
    layers, computed = enumerate(_checked(shape, cached_counts)), neurons or {}
    near = lambda i, n: min(n, shape.window) if i in shape.sliding else n
    return sum(_layer(shape, 1, near(i, n + 1), i, computed.get(i)) for i, n in layers) + shape.hidden * shape.vocab


def kv_bytes(shape: TextShape, counts: Sequence[float], bytes_per_value: int) -> int:
    """Bytes of one sample's key-value cache. `counts`: tokens in each layer's cache; `bytes_per_value`: 2 in
    half precision. The state of linear layers, whose size does not depend on the tokens, is not counted."""
    without = shape.linear.layers if shape.linear is not None else ()
    kept = lambda i, n: min(n, shape.window - 1) if i in shape.sliding else n
    held = sum(kept(i, n) for i, n in enumerate(_checked(shape, counts)) if i not in without)
    return round(2 * shape.kv_width * held * bytes_per_value)


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


def _layer(shape: TextShape, n: int, pairs: int, layer: int, neurons: int | None = None) -> int:
    """One decoder layer: `n` tokens pass, and `pairs` scores are computed a head; `neurons` of the MLP are computed."""
    if shape.ffn is None:
        raise Unsupported("FLOPs of this decoder cannot be counted: its FFN is of a kind that vtok does not know.")
    d, q, g, f, router = shape.hidden, shape.query_width, shape.kv_width, shape.ffn, 0
    if shape.experts is not None and layer in shape.experts.layers:
        f, router = shape.experts.width, shape.experts.router
    mlp = 2 * n * (3 * d * (f if neurons is None else neurons) + d * router) + SMALL * n * d
    if shape.linear is not None and layer in shape.linear.layers:
        return mlp + shape.linear.flops(n, d)
    return mlp + 2 * n * ((2 + shape.gated) * d * q + 2 * d * g) + 4 * pairs * q + SOFTMAX * shape.heads * pairs


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


def _of_kind(text: Any, kind: str) -> frozenset[int]:
    """The layers of a decoder whose type that is."""
    return frozenset(i for i, own in enumerate(getattr(text, "layer_types", None) or ()) if own == kind)


def _checked(shape: TextShape, counts: Sequence[int]) -> Sequence[int]:
    if len(counts) != shape.layers:
        raise InvalidValue(f"The decoder has {shape.layers} layers, but {len(counts)} counts were given.")
    if any(n < 0 for n in counts):
        raise InvalidValue(f"Token counts must be at least 0, got {list(counts)}.")
    return counts
