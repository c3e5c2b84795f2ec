"""What the tests share: tiny models, awkward batches, the oracle "pruning is masking", and what an error is."""

from __future__ import annotations

import copy
import functools
import sys
import zlib
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from mould import Mould
from PIL import Image
from torch import nn

import vtok
from vtok import adapter as adapters
from vtok import compressor as compressors
from vtok.engine.cache import NAME, cache_in, with_cache

ADAPTERS = adapters.load_all()
FAMILIES = list(ADAPTERS)
INSIDE = [family for family in FAMILIES if "attention" in ADAPTERS[family].provides]  # methods act inside the decoder


@functools.cache
def _built(family: str, attention: str, layers: int) -> tuple[Mould, Any]:
    torch.manual_seed(7)
    model, processor = ADAPTERS[family].tiny(layers=layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("q_norm.weight", "k_norm.weight")):  # nine times the logits would magnify rounding
                parameter.mul_(3.0)  # random weights are so small that logits would hardly depend on the context
    model.set_attn_implementation(attention)
    model.eval()
    generation = model.generation_config
    token = processor.tokenizer.convert_tokens_to_ids
    generation.eos_token_id, generation.pad_token_id = None, token("<|endoftext|>")
    generation.suppress_tokens = [i for i in range(len(processor.tokenizer)) if i in placeholder_ids(model)]
    return Mould(model), processor


def tiny(family: str, attention: str = "sdpa", layers: int = 4):
    """A fresh tiny model (always the same weights) and its processor. layers: of the decoder."""
    mould, processor = _built(family, attention, layers)
    return mould.cast(), processor


def apart(model):
    """The model, its decoder moved a little, so that it is not its reference."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def language_model(
    vocabulary: int,
    layers: int = 2,
    hidden: int = 32,
    ffn: int = 48,
    seed: int = 0,
    scale: float = 4.0,
    norms: bool = True,
    eos: int | None = None,
    kind: str = "Llama",
) -> nn.Module:
    """A small random language model. scale: of its weights: as they are, logits hardly depend on the context. norms:
    also of those of normalisations. eos: the token that ends a text."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = getattr(transformers, f"{kind}Config")(vocab_size=vocabulary, **sizes, **heads)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if norms or "norm" not in name:
                parameter.mul_(scale)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, 0
    return model


# ---- the matrix: each method's `examples`, on the families --------------------------------------------------------
STACKS = {
    "all stages": lambda: [vtok.Downsample(keep=0.5), vtok.Uniform(keep=0.5), vtok.FastV(keep=0.5, layer=2)],
    "downsampled globalcom2": lambda: [vtok.Downsample(keep=0.5), vtok.GlobalCom2(keep=0.5)],
}


# a family gives all that the method needs, and yet it is refused when pictures come
REFUSED = {("llava_onevision", "tokenflex"): "resizes its features"}


def example(model: nn.Module, label: str) -> list:
    """The compressors of a cell of the matrix, for this model: "fastv", its first example, "fastv-2", its second."""
    if label in STACKS:
        return STACKS[label]()
    name, _, number = label.partition("-")
    cls = compressors.find(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same weights each time
        return [cls(**cls.examples[int(number or 1) - 1], **cls.small_weights(model))]


@functools.cache
def matrix() -> dict[tuple[str, str], tuple]:
    """(family, label) -> the single-stage parts of the example (its class where it is trained and has no weights yet):
    all whose needs the family meets."""
    examples = {label: tuple(part for method in make() for part in method.parts()) for label, make in STACKS.items()}
    for name, cls in compressors.load_all().items():
        for i, options in enumerate(cls.examples, 1):
            examples[f"{name}-{i}" if i > 1 else name] = (cls,) if cls.trained else cls(**options).parts()
    needs = lambda part: part.needs if isinstance(part, type) else part.needs_now
    return {
        (family, label): parts
        for family, adapter in ADAPTERS.items()
        for label, parts in examples.items()
        if (family, label) not in REFUSED and all(needs(part) <= adapter.provides for part in parts)
    }


def seam(family: str) -> tuple:
    """What the engine does otherwise for this family: two of the same kind meet the same code of it."""
    adapter = ADAPTERS[family]
    previews = type(adapter).previews is not adapters.Adapter.previews
    return adapter.late, previews, adapter.projector.startswith(adapter.encoder), "attention" in adapter.provides


def run(model: nn.Module, inputs, **extra):
    """A prefill, without gradient."""
    with torch.no_grad():
        return model(**inputs, **{"use_cache": True, **extra})


BEHIND = ("kv", "attend", "decode")  # stages that leave the prompt's own forward as it is


def trains(parts: tuple) -> bool:
    """Whether a forward may hold an answer behind its prompt."""
    return not any(part.stage in ("kv", "attend") for part in parts)


def masks(parts: tuple) -> bool:
    """Whether a cell is dense masking throughout; text behind the prompt is not where its neurons are dropped."""
    return all(part.stage not in BEHIND for part in parts)


def drops(parts: tuple) -> bool:
    """Whether fewer tokens enter the language model's last layer."""
    return not all(part.stage in BEHIND or (part.stage == "blocks" and not part.scatters) for part in parts)


def cells(scope: str = "all", only=lambda parts: True) -> list:
    """For `parametrize(("family", "label"), ...)`.

    scope: "all" families; "kinds", of each kind of seam the first family that fits; "each", for slow checks: each
    example on one family, the kinds taking turns; "some": and the first example of each stage on all kinds."""
    fit = {cell: parts for cell, parts in matrix().items() if only(parts)}
    if scope != "all":
        first = {}
        plain = lambda cell: len(type(ADAPTERS[cell[0]]).__mro__)  # a family before those that are described by it
        for family, label in sorted(fit, key=plain):
            first.setdefault((label, seam(family)), (family, label))
        fit = {cell: fit[cell] for cell in fit if cell in first.values()}
    if scope in ("each", "some"):
        of, leading = {}, {}
        for (family, label), parts in fit.items():
            of.setdefault(label, []).append(family)
            leading.setdefault("+".join(part.stage for part in parts), label)
        turn = {label: families[zlib.crc32(label.encode()) % len(families)] for label, families in of.items()}
        fit = {
            (family, label): parts
            for (family, label), parts in fit.items()
            if turn[label] == family or (scope == "some" and label in leading.values())
        }
    return [pytest.param(family, label, id=f"{family}-{label}") for family, label in fit]


def double(model, inputs):
    """In float64 rounding cannot hide a mistake."""
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def placeholder_ids(model: nn.Module) -> list[int]:
    """Ids that a random model might sample and that would then be read as pictures."""
    config = model.config
    return [
        value
        for name in ("image_token_id", "video_token_id", "vision_start_token_id")
        if (value := getattr(config, name, None)) is not None
    ]


def encoder(model: nn.Module) -> nn.Module:
    return model.model.get_submodule(adapters.of(model.config).encoder)


def decoder(model: nn.Module) -> nn.Module:
    return adapters.of(model.config).language_model(model.model)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3)).astype("uint8"))


def mark(processor, modality: str = "image") -> str:
    """What stands for a picture in a prompt string."""
    token = getattr(processor, f"{modality}_token")
    if token == f"<|{modality}|>":  # GLM's
        return f"<|begin_of_{modality}|>{token}<|end_of_{modality}|>"
    return f"<|vision_start|>{token}<|vision_end|>" if "pad" in token else token


def clip(height: int, width: int, seed: int = 0, frames: int = 6) -> np.ndarray:
    """[frames, height, width, 3] of noise, each frame with a part of the one before."""
    made = np.random.default_rng(seed).integers(0, 255, (frames, height, width, 3)).astype("uint8")
    for frame in range(1, frames):
        made[frame, :, : width // 2] = made[frame - 1, :, : width // 2]
    return made


def page(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture in the upper left corner of a white page of twice its sides."""
    made = np.full((2 * height, 2 * width, 3), 255, "uint8")
    made[:height, :width] = np.asarray(picture(height, width, seed))
    return Image.fromarray(made)


def maker(label: str) -> Any:
    """What makes pictures that the method of a cell acts on: noise; clips, where it compares frames; or pages, where it
    compares pixels."""
    needs = getattr(compressors.load_all().get(label.partition("-")[0]), "needs", ())
    return clip if "frames" in needs else page if "patch_list" in needs else picture


def shown(label: str, height: int, width: int, seed: int = 0) -> Image.Image | np.ndarray:
    """A picture that the method of a cell acts on."""
    return maker(label)(height, width, seed)


def batch(processor, prompts: list[str], pictures: list[Image.Image | np.ndarray], side: str = "left", **extra):
    """Model inputs for prompts in which "#" stands for the next picture, or the next clip."""
    processor.tokenizer.padding_side = side
    texts = lambda modality: [prompt.replace("#", mark(processor, modality)) for prompt in prompts]
    if pictures and isinstance(pictures[0], np.ndarray):
        facts = [{"fps": 2.0, "total_num_frames": len(x), "frames_indices": list(range(len(x)))} for x in pictures]
        given = {"videos": pictures, "video_metadata": facts, "do_sample_frames": False}
        return processor(text=texts("video"), **given, return_tensors="pt", padding=True, **extra)
    images: list = pictures
    if hasattr(processor, "boi_token"):  # Gemma's wants to know whose a picture is
        rest = iter(pictures)
        images = [[next(rest) for _ in range(prompt.count("#"))] for prompt in prompts]
    return processor(
        text=texts("image"), images=images if pictures else None, return_tensors="pt", padding=True, **extra
    )


PROMPTS = ["a # What colour is it?", "two # and # yes", "no picture at all", "# first", "last 0 1 2 #"]
SIZES = [(70, 112), (56, 56), (112, 70), (84, 84), (56, 140)]


def mixed(processor, side: str = "left", label: str = ""):
    """One, two, no picture; picture first; picture last; ragged counts. label: of the method, see `maker`."""
    return noise(processor, PROMPTS, SIZES, side, label)


def noise(processor, prompts: list[str], sizes: list[tuple[int, int]], side: str = "left", label: str = ""):
    """Model inputs for prompts about noise of these heights and widths."""
    processor.tokenizer.padding_side = side
    return copy.deepcopy(_noise(processor, tuple(prompts), tuple(sizes), side, maker(label)))


@functools.cache  # a processor takes as long as a model
def _noise(processor, prompts, sizes, side, make):
    return batch(processor, list(prompts), [make(h, w, i) for i, (h, w) in enumerate(sizes)], side)


def dense(family: str, side: str = "left", label: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """What the unpatched model makes of `mixed`: logits, and the prompts with four greedy tokens."""
    return _dense(family, side, maker(label))


@functools.cache
def _dense(family, side, make):
    model, processor = tiny(family)
    inputs = copy.deepcopy(_noise(processor, tuple(PROMPTS), tuple(SIZES), side, make))
    return run(model, inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)


class Masked:
    """The unpatched model with columns masked instead of dropped: in every decoder layer a query sees the earlier
    columns of its row except those that `trace` says are gone at that layer. Where tokens were merged, `embeds` are
    what the language model got for the kept ones; what was merged between layers, the trace says."""

    def __init__(self, model: nn.Module, trace, embeds: torch.Tensor | None = None) -> None:
        self.model, self.trace, self.embeds = model, trace, embeds
        self.present = [trace.present_at(i) for i in range(trace.shapes.layers)]
        self.joined = [trace.joined_at(i) for i in range(trace.shapes.layers)]

    def __enter__(self) -> None:
        lm = decoder(self.model)
        self.hooks = [
            layer.register_forward_pre_hook(functools.partial(self._mask, i), with_kwargs=True)
            for i, layer in enumerate(lm.layers)
        ]
        if self.embeds is not None:
            self.hooks.append(lm.register_forward_pre_hook(self._replace, with_kwargs=True))

    def __exit__(self, *exc) -> None:
        for hook in self.hooks:
            hook.remove()

    def _mask(self, i, module, args, kwargs):
        hidden, *args = args or [kwargs.pop("hidden_states")]
        into, cache = self.joined[i], cache_in(kwargs)
        if into is not None and hidden.shape[1] == into.shape[1]:
            hidden = self._join(hidden, into)
        past = cache.get_seq_length(i) if cache is not None else 0
        present = self.present[i]
        b, q, total = hidden.shape[0], hidden.shape[1], past + hidden.shape[1]
        columns = torch.ones(b, total, dtype=torch.bool)
        columns[:, : present.shape[1]] = present[:, :total]
        causal = torch.arange(total)[None, :] <= past + torch.arange(q)[:, None]
        allowed = causal[None] & columns[:, None]
        bias = torch.zeros(b, 1, q, total).masked_fill(~allowed[:, None], torch.finfo(torch.float32).min)
        return (hidden, *args), {**kwargs, "attention_mask": bias.to(hidden.dtype)}

    def _join(self, hidden, into):
        """Hidden states [B, S, D], those into which others were merged as the mean of all that were."""
        joined = hidden.clone()
        for b, row in enumerate(into):
            for target in set(row.tolist()) - {-1}:
                joined[b, target] = hidden[b, row == target].mean(0)
        return joined

    def _replace(self, module, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] == self.embeds.shape[1]:
            kwargs = {**kwargs, "inputs_embeds": self.embeds}
            if self.embeds.levels:
                kwargs["deepstack_visual_embeds"] = self._merged(self.embeds.levels, kwargs["visual_pos_masks"])
        return args, kwargs

    def _merged(self, given, visual):
        """DeepStack features [V, D], where a kept token has the mean of those of the tokens merged into it."""
        row = {place: i for i, place in enumerate(visual.flatten().nonzero().flatten().tolist())}
        levels = [level.clone() for level in given]
        for picture, into in zip(self.trace.pictures, self.trace.merged_into):
            rows = [row[place] for place in picture.rows.tolist()]
            for target in set(into.tolist()) - {-1} if into is not None else ():
                members = [rows[i] for i, to in enumerate(into.tolist()) if to == target]
                for new, level in zip(levels, given):
                    new[rows[target]] = level[members].mean(0)
        return levels


class Apart(transformers.DynamicCache):
    """The cache that a caller sees of samples that each have their own, `samples`."""

    def get_seq_length(self, layer_idx=0):
        return self.seen

    def reorder_cache(self, beam_idx):
        self.samples = [copy.deepcopy(self.samples[i]) for i in beam_idx.tolist()]


class Shortened:
    """The unpatched model on each sample alone, on the tokens that `trace` says are there and no others, at their own
    positions. The oracle for decoders in which a masked token is not an absent one: linear attention goes a step on,
    and a window counts it."""

    def __init__(self, model: nn.Module, trace, embeds: torch.Tensor | None = None) -> None:
        self.lm, self.embeds, self.core = decoder(model), embeds, model.model
        self.present = [trace.present_at(0)]
        self.kinds = None  # [B, S], 1 for tokens of pictures that see each other

    def __enter__(self) -> None:
        self.forward, self.lm.forward = self.lm.forward, self._forward
        self.hook = self.core.register_forward_pre_hook(self._note, with_kwargs=True)

    def __exit__(self, *exc) -> None:
        del self.lm.forward
        self.hook.remove()

    def _note(self, module, args, kwargs):
        self.kinds = kwargs.get("token_type_ids")

    def _mask(self, i, places, embeds, cache):
        """What the core model would make of a sample that has these tokens alone."""
        if self.kinds is None:
            return None
        own = sys.modules[type(self.core).__module__]
        past = 0 if cache is None else cache.get_seq_length()
        kinds = torch.cat([torch.zeros(1, past, dtype=torch.long), self.kinds[i : i + 1, -self.length :][:, places]], 1)
        blocks, rest = own.get_block_sequence_ids_for_mask(kinds), {"attention_mask": None, "position_ids": None}
        return own.create_masks_for_vision_model(
            self.lm.config, inputs_embeds=embeds, block_sequence_ids=blocks, **rest, **{NAME: cache}
        )

    def _forward(self, inputs_embeds, position_ids, attention_mask=None, input_ids=None, **kwargs):
        cache, (batch, length, _) = cache_in(kwargs), inputs_embeds.shape
        self.length = length
        if self.embeds is not None and length == self.embeds.shape[1]:
            inputs_embeds = self.embeds
        if cache is None and kwargs.get("use_cache"):
            cache = transformers.DynamicCache(config=self.lm.config)
        if cache is not None and not isinstance(cache, Apart):
            cache.__class__, cache.seen = Apart, 0
            cache.samples = [transformers.DynamicCache(config=self.lm.config) for _ in range(batch)]
        past = 0 if cache is None else cache.seen
        here = torch.ones(batch, past + length, dtype=torch.bool)
        here[:, : self.present[0].shape[1]] = self.present[0][:, : past + length]
        if position_ids is None:
            position_ids = torch.arange(past, past + length)[None]
        positions = position_ids[-3:] if position_ids.ndim == 3 else position_ids  # the first of four is for packing
        positions = positions.expand(*positions.shape[:-2], batch, -1)
        outs = []
        for i, places in enumerate(row.nonzero().flatten() for row in here[:, past:]):
            embeds, own = inputs_embeds[i : i + 1, places], None if cache is None else cache.samples[i]
            given = {"inputs_embeds": embeds, "position_ids": positions[..., i : i + 1, places]}
            mask = self._mask(i, places, embeds, own)
            out = self.forward(**given, attention_mask=mask, **with_cache(kwargs, own))
            spread = lambda x, places=places: x.new_zeros(1, length, x.shape[2]).index_copy(1, places, x)
            outs.append([spread(x) for x in (out.last_hidden_state, *(out.hidden_states or ()))])
        if cache is not None:
            cache.seen += length
        out.last_hidden_state, *states = (torch.cat(rows) for rows in zip(*outs))
        out.hidden_states = tuple(states) if out.hidden_states is not None else None
        out[NAME] = cache
        return out


def oracle(model: nn.Module, trace, embeds: torch.Tensor | None = None) -> Masked | Shortened:
    """What a patched model is to agree with: masking, where that is the same as leaving out."""
    kinds = getattr(decoder(model).config, "layer_types", None) or ()
    return (Masked if set(kinds) <= {"full_attention"} else Shortened)(model, trace, embeds)


def able(family: str, *parts) -> list:
    """Those of the compressors whose needs the family meets."""
    return [part for part in parts if part.needs_now <= ADAPTERS[family].provides]


class Entered:
    """Notes what a patched language model gets, put back at its places; and as `embeds.levels` the DeepStack features,
    as they come from the encoder."""

    def __init__(self, model: nn.Module, patch) -> None:
        self.patch = patch
        self.lm = decoder(model)

    def __enter__(self):
        self.handles = [
            self.lm.register_forward_pre_hook(self._note_levels, with_kwargs=True, prepend=True),
            self.lm.register_forward_pre_hook(self._note, with_kwargs=True),
        ]
        self.embeds = None
        return self

    def __exit__(self, *exc) -> None:
        for handle in self.handles:
            handle.remove()

    def _note_levels(self, module, args, kwargs):
        if self.embeds is None:
            self.levels = [level.detach() for level in kwargs.get("deepstack_visual_embeds") or ()]

    def _note(self, module, args, kwargs):
        if self.embeds is None:
            trace, embeds = self.patch.trace, kwargs["inputs_embeds"].detach()
            compacted = drops(self.patch.compressors)  # else the language model's input is left as it is
            self.embeds = trace.rows_at(0).restore(embeds, trace.length) if compacted else embeds.clone()
            self.embeds.levels = self.levels


def one_line_error(code, output, complaint):
    """Of the command line: bad input ends with exit code 2 and one sentence that has `complaint`, behind nothing but
    the word on what is loaded."""
    lines = [line for line in output.strip().split("\n") if not line.startswith("loading ")]
    assert code == 2, output
    assert len(lines) == 1 and lines[0].startswith("vtok: "), output
    assert complaint in lines[0]
