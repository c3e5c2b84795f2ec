"""The engine: what happens at each seam of a patched model. `vtok/patching.py` installs it and takes it away.

    outer model       labels noted                                         (the prompt ends before the first of them)
    core model        what is visual, which pictures
    encoder method    layouts, what compressors read of the encoder; an encoder-stage compressor acts
    language model    a pre-LLM compressor acts; sequence, positions and mask are compacted; the output is restored
    decoder layers    an in-LLM compressor acts
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import find_packed_sequence_indices

from vtok.adapter import Adapter, Encoded, bind, shrink
from vtok.compressor import Compressor
from vtok.errors import PatchStateError, Unsupported
from vtok.probe import KEYWORD
from vtok.selection import Selection, VisualTokens
from vtok.sequence import CompressedCache, Rows, gather, gather_positions
from vtok.stream import Stopwatch, Stream
from vtok.tower import Layer
from vtok.trace import Picture, Shapes, Trace

OTHER_PATCH = "This cache was made under another patch, whose layers hold different tokens. Start a new conversation."


@dataclass
class Call:
    """One forward of the core model."""

    input_ids: Tensor | None
    placeholders: dict[str, Tensor] = field(default_factory=dict)  # modality -> [B, S] bool, where there are no ids
    encoded: dict[str, Encoded] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)  # what `generate` encoded up front and passes again
    stream: Stream | None = None


class Engine:
    """One patched model's engine. Holds no reference to the model, so that the two can be freed together."""

    def __init__(
        self,
        adapter: Adapter,
        parts: tuple[Compressor, ...],
        token_ids: dict[str, int],
        shapes: Shapes,
        watches_layers: bool,
    ) -> None:
        self.adapter = adapter
        self.token_ids = token_ids  # modality -> placeholder
        self.shapes = shapes
        self.watches_layers = watches_layers  # whether `before_layer` is installed on the decoder layers
        active = {part.stage: part for part in parts if not part.is_identity}
        self.encoder: Compressor | None = active.get("encoder")
        self.pre_llm: Compressor | None = active.get("pre_llm")
        self.llm: Compressor | None = active.get("llm")
        self.needs = frozenset().union(*(part.needs_now for part in active.values()))
        self.labels: Tensor | None = None
        self.call: Call | None = None
        self.trace: Trace | None = None
        self.reads = sorted(  # (need, layer) of the vision encoder
            {(need, x) for part in active.values() for need, layers in part.encoder_layers.items() for x in layers},
            key=str,
        )
        self.seen: dict[tuple[str, Layer], list[Tensor]] | None = None  # what was read during one call of the encoder

    # ---- outer model -------------------------------------------------------------------------------------------
    def before_outer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.labels = kwargs.get("labels")

    def after_outer(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.labels = None

    # ---- core model --------------------------------------------------------------------------------------------
    def before_core(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.call = Call(kwargs.get("input_ids", args[0] if args else None))
        if self.call.input_ids is None and (embeds := kwargs.get("inputs_embeds")) is not None:
            for modality, token in self.token_ids.items():
                row = module.get_input_embeddings()(torch.tensor(token, device=embeds.device))
                self.call.placeholders[modality] = (embeds == row).all(-1)
        if any(kwargs.get(name) is not None for name in ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")):
            _check_mask(kwargs.get("attention_mask"))  # before the family makes positions of it
        for modality, output in (kwargs.get("mm_encoder_outputs") or {}).items():
            if output is None or getattr(output, "pooler_output", None) is None:
                continue
            encoded: Encoded | None = getattr(output, "_vtok_encoded", None)
            if encoded is None:
                raise Unsupported(
                    f"The {modality} features in mm_encoder_outputs were not made by this patched model, or were cut "
                    f"into chunks. Encode after patching, and leave generation_config.prefill_chunk_size unset."
                )
            # beam search repeats a sample's pictures; the features are still the same tensors
            seen: dict[int, int] = {}
            order = [seen.setdefault(id(rows), len(seen)) for rows in output.pooler_output]
            self.call.encoded[modality] = encoded.pick(order)
            self.call.outputs[modality] = output

    def after_core(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.call = None

    # ---- encoder -----------------------------------------------------------------------------------------------
    def encode(self, core: nn.Module, modality: str, method: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Stands in for the core model's `get_image_features` or `get_video_features`."""
        arguments = bind(method, args, kwargs)
        layouts = tuple(self.adapter.layouts(core, modality, arguments))
        small = sources = probed = None
        self.seen = {key: [] for key in self.reads}
        try:
            if self.encoder is not None:
                output, views = self.adapter.encode_small(core, modality, method, arguments, self.encoder.scale())
                small, sources = zip(*(shrink(layout, view) for layout, view in zip(layouts, views)))
            else:
                output = method(*args, **kwargs)
            if seen := {key: torch.cat(parts) for key, parts in self.seen.items() if parts}:
                tower = self.adapter.tower(core)
                split = [tower.arrange(x, small or layouts) for x in seen.values()]
                probed = tuple(dict(zip(seen, of_picture)) for of_picture in zip(*split))
        finally:
            self.seen = None
        if not hasattr(output, "pooler_output"):
            return output  # somebody asked for a plain tuple: features for their own use
        for rows, layout in zip(output.pooler_output, layouts):
            if len(rows) != layout.n_rows:
                raise Unsupported(
                    f"The encoder gave {len(rows)} tokens for a picture where {layout.n_rows} were expected. "
                    f"vision_feature_layer and vision_feature_select_strategy must be those of the config."
                )
        output._vtok_encoded = Encoded(modality, layouts, small, sources, probed)
        if self.call is not None:
            self.call.encoded[modality] = output._vtok_encoded
        return output

    def in_encoder(self, key: Any, read: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """After a module of the vision encoder that shows what `key` names."""
        if self.seen is not None:
            self.seen[key].append(read(module, args, kwargs, out))

    # ---- language model ----------------------------------------------------------------------------------------
    def before_language_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        call, cache = self.call, kwargs.get("past_key_values")
        if call is not None and any(encoded.layouts for encoded in call.encoded.values()):
            return args, self._prefill(module, call, dict(kwargs))
        if isinstance(cache, CompressedCache):
            return args, self._continue(module, dict(kwargs), cache)
        return None

    def after_language_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        stream = self.call.stream if self.call is not None else None
        if stream is None or not stream.rows:
            return None
        length = stream.visual.shape[1]
        output.last_hidden_state = stream.rows[max(stream.rows)].restore(output.last_hidden_state, length)
        if output.hidden_states is not None:  # the i-th is what layer i-1 gave; the last is normalised
            states = [
                None if h is None else stream.rows[stream.first(max(0, i - 1))].restore(h, length)
                for i, h in enumerate(output.hidden_states[:-1])
            ]
            output.hidden_states = (*states, output.last_hidden_state)
        return output

    def before_layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        stream: Stream | None = kwargs.get(KEYWORD)
        if stream is None:
            return None
        kwargs = {k: v for k, v in kwargs.items() if k != KEYWORD}
        if args:
            args = (stream.enter(layer, args[0], kwargs), *args[1:])
        else:
            kwargs["hidden_states"] = stream.enter(layer, kwargs["hidden_states"], kwargs)
        if layer in stream.schedule:
            kwargs[KEYWORD] = stream  # travels on to the attention function
        return args, kwargs

    def _continue(self, module: nn.Module, kwargs: dict[str, Any], cache: CompressedCache) -> dict[str, Any]:
        """Text on a cache that holds a compressed prompt: decoding, or another turn."""
        hidden, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        if hidden is None:
            hidden = module.get_input_embeddings()(kwargs.pop("input_ids"))
            kwargs["inputs_embeds"] = hidden
        batch, length, _ = hidden.shape
        _check_mask(mask)
        if len(cache.valid) > 1 and self.llm is None:
            raise PatchStateError(OTHER_PATCH)
        new = None
        if length > 1 and mask is not None and not bool(mask[:, -length:].all()):
            new = mask[:, -length:].bool()
        valid = cache.extend(0, new, batch, length, hidden.device)
        kwargs["attention_mask"] = None if valid is None else valid.long()
        kwargs["position_ids"] = self._shifted(kwargs.get("position_ids"), cache, batch, length, hidden.device)
        cache.seen += length
        stream = Stream(module.config, cache, batch)
        if new is not None:
            positions = torch.arange(length, device=hidden.device).expand(batch, -1)
            stream.rows = {start: Rows(positions, new, padded=True) for start in cache.valid}
            stream.visual = torch.zeros_like(new)
        kwargs[KEYWORD] = stream
        return self._hand_down(kwargs)

    def _hand_down(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Leave the pass in the keywords only where layer hooks will take it out again."""
        if not self.watches_layers:
            kwargs.pop(KEYWORD)
        return kwargs

    def _shifted(
        self, positions: Tensor | None, cache: CompressedCache | None, batch: int, length: int, device: torch.device
    ) -> Tensor:
        """Position ids of a chunk, made as the model would where they are not given, less what renumbering took."""
        if positions is None:
            positions = torch.arange(length, device=device)[None] + (cache.seen if cache is not None else 0)
        if cache is not None and cache.shift is not None:
            positions = positions - cache.shift[:, None]
        return positions

    def _prefill(self, module: nn.Module, call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A forward that brings visual tokens."""
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        batch, length, width = embeds.shape
        device = embeds.device
        stopwatch = Stopwatch(device)
        cache = self._cache(module, kwargs, mask, length)
        self._refuse_packed(kwargs, mask, cache)
        valid = torch.ones(batch, length, dtype=torch.bool, device=device)
        if mask is not None:
            valid = mask[:, -length:].bool()

        visual, pictures = self._locate(call, embeds)
        # beside the pictures, not in them: a trace is kept, and must not hold the encoder's states
        probed = [x for encoded in call.encoded.values() for x in encoded.probed or [{}] * len(encoded.layouts)]
        prompt_end = self._prompt_end(call, valid, cache, module.training)
        protected = torch.zeros_like(valid).scatter_(1, prompt_end[:, None], True)  # predicts the first answer token
        keep = valid & (~visual | protected)

        flat, flat_keep = embeds.reshape(batch * length, width), keep.view(-1)
        selections: list[tuple[list[int], Selection]] = []
        groups: dict[Any, list[int]] = {}
        for i, picture in enumerate(pictures):
            groups.setdefault((picture.modality, picture.dense, picture.layout), []).append(i)
        countable = torch.zeros_like(flat_keep)
        for members in groups.values():
            first = pictures[members[0]]
            tokens = torch.stack([pictures[i].tokens for i in members])  # [G, n] flat positions
            separators = torch.stack([pictures[i].separators for i in members])
            flat_keep[separators.flatten()] = True
            if self.pre_llm is None:
                flat_keep[tokens.flatten()] = True
                selection = Selection(torch.ones_like(tokens, dtype=torch.bool), n_kept=tokens.shape[1])
            else:
                encoder = {key: torch.stack([probed[i][key] for i in members]) for key in probed[members[0]]}
                visual_tokens = VisualTokens(flat[tokens], first.layout, encoder.get(("cls_attention", -1)), encoder)
                with stopwatch, torch.set_grad_enabled(torch.is_grad_enabled() and self.pre_llm.merges):
                    selection = self.pre_llm.select(visual_tokens)
                flat_keep[tokens.flatten()] |= selection.keep.flatten()
                if selection.features is not None:
                    flat = flat.index_copy(0, tokens.flatten(), selection.features.flatten(0, 1).to(flat.dtype))
            countable[tokens.flatten()] = selection.keep.flatten()
            selections.append((members, selection))
        keep = flat_keep.view(batch, length) & valid
        droppable = countable.view(batch, length) & ~protected

        # the one wait for the device: how long the compacted rows are
        owners = torch.stack([picture.tokens[0] for picture in pictures]) // length
        counts = torch.cat([keep.sum(1), droppable.sum(1), owners]).tolist()
        lengths, n_visual, owners = counts[:batch], counts[batch : 2 * batch], counts[2 * batch :]

        rows = Rows.of(keep, lengths)
        present = {0: rows}  # grows as decoder layers prune
        merged = {
            i: selection.merged_into[g]
            for members, selection in selections
            if selection.merged_into is not None
            for g, i in enumerate(members)
        }
        self.trace = Trace(
            self.shapes, tuple(pictures), tuple(owners), batch, length, merged, stopwatch, self.encoder, present
        )
        if not self.active:
            return kwargs
        if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
            raise Unsupported("output_attentions is not available while tokens are dropped: its shape would change.")

        stream = Stream(module.config, cache, batch, present, visual=droppable, stopwatch=stopwatch)
        stream.anchor = self._anchor(prompt_end, visual)
        call.stream = stream
        positions = self._shifted(kwargs.get("position_ids"), cache, batch, length, device)
        if getattr(self.pre_llm, "renumber", False):
            dropped = (valid & ~keep).long()
            positions = positions - dropped.cumsum(1)
            if cache is not None:
                shift = dropped.sum(1)
                cache.shift = shift if cache.shift is None else cache.shift + shift
        kwargs["position_ids"] = gather_positions(positions, rows.index)
        kwargs["inputs_embeds"] = gather(flat.view(batch, length, width), rows.index)
        if self.llm is not None:
            stream.compressor = self.llm
            n_layers = len(self.adapter.layers(module))
            stream.schedule = {i: k for i, k in self.llm.schedule(n_layers).items() if i < n_layers - 1}
            stream.visual_counts = n_visual
            stream.text_counts = [n - v for n, v in zip(lengths, n_visual)]
            stream.image_counts = [owners.count(b) for b in range(batch)]
        if cache is not None:
            groups_now = {0, *(layer + 1 for layer in stream.schedule)}
            if not groups_now >= cache.valid.keys():
                raise PatchStateError(OTHER_PATCH)
            for first in groups_now:
                cache.split(first)
        new = rows.valid if rows.padded else None
        if cache is not None:
            full = cache.extend(0, new, batch, rows.index.shape[1], device)
            kwargs["attention_mask"] = None if full is None else full.long()
            kwargs["past_key_values"] = cache
            cache.seen += length
        else:  # without a mask and a cache, gaps in the positions would be read as packed sequences
            kwargs["attention_mask"] = rows.valid.long()
        kwargs[KEYWORD] = stream
        return self._hand_down(kwargs)

    @property
    def active(self) -> bool:
        """Whether any stage can drop something."""
        return any(part is not None for part in (self.encoder, self.pre_llm, self.llm))

    def _cache(self, module: nn.Module, kwargs: dict[str, Any], mask: Tensor | None, length: int) -> Any:
        cache = kwargs.get("past_key_values")
        if not self.active:
            return None
        if cache is None:
            use_cache = kwargs.get("use_cache")
            if use_cache is None:
                use_cache = getattr(module.config, "use_cache", False)
            if not use_cache or (module.training and getattr(module, "gradient_checkpointing", False)):
                return None
            return CompressedCache.adopt(DynamicCache(config=module.config), None)
        past = mask[:, :-length] if mask is not None and mask.shape[1] > length else None
        if isinstance(cache, CompressedCache) or past is None or bool(past.all()):
            past = None
        return CompressedCache.adopt(cache, past)

    def _refuse_packed(self, kwargs: dict[str, Any], mask: Tensor | None, cache: Any) -> None:
        positions = kwargs.get("position_ids")
        if positions is None or mask is not None or cache is not None or (positions.ndim == 3 and len(positions) == 3):
            return
        if find_packed_sequence_indices(positions[0] if positions.ndim == 3 else positions) is not None:
            raise Unsupported("Packed sequences cannot be compressed: pass padded rows with an attention_mask.")

    def _locate(self, call: Call, embeds: Tensor) -> tuple[Tensor, list[Picture]]:
        """Which places are visual, [B, S] bool, and for each picture where its tokens are in the flattened batch."""
        batch, length, _ = embeds.shape
        visual = torch.zeros(batch, length, dtype=torch.bool, device=embeds.device)
        pictures: list[Picture] = []
        for modality, encoded in call.encoded.items():
            if call.input_ids is not None:
                here = call.input_ids == self.token_ids[modality]
            else:
                here = call.placeholders[modality]
            visual |= here
            sizes = [layout.n_rows for layout in encoded.layouts]
            where = torch.nonzero_static(here.view(-1), size=sum(sizes)).squeeze(1)
            for i, rows in enumerate(where.split(sizes)):
                dense = encoded.layouts[i]
                place = dense.place.to(rows.device)
                separators = dense.separator_place
                layout, source = dense, None
                if encoded.small is not None:
                    layout, source = encoded.small[i], encoded.sources[i]
                    separators = separators[dense.separators_of(source)]
                    source = source.to(rows.device)
                    place = place[source]
                separators = rows[separators.to(rows.device)]
                pictures.append(Picture(modality, dense, layout, rows, rows[place], separators, source))
        return visual, pictures

    def _prompt_end(self, call: Call, valid: Tensor, cache: Any, training: bool) -> Tensor:
        """[B] the position of the prompt's last token, the same in a rollout and in the training forward."""
        length = valid.shape[1]
        last = length - 1 - valid.flip(1).to(torch.uint8).argmax(1)  # [B]
        labels = self.labels
        if labels is not None and labels.shape == valid.shape:
            supervised = (labels != -100).to(valid.device)
            return torch.where(supervised.any(1), (supervised.to(torch.uint8).argmax(1) - 1).clamp(min=0), last)
        if training and torch.is_grad_enabled() and getattr(self.llm, "anchor", None) == "prompt_end":
            raise Unsupported(
                f"{self.llm.name} reads the text at the prompt's end, and a training forward without labels does not "
                f"say where that is. Pass labels (-100 on the prompt), or use {self.llm.name} with "
                f"anchor='after_visual'."
            )
        if cache is None:  # generate(use_cache=False) runs the grown sequence again: its prompt ends where it did
            for output in call.outputs.values():
                ids, end = getattr(output, "_vtok_prompt", (None, None))
                if ids is not None and call.input_ids is not None and _is_prefix(ids, call.input_ids):
                    return end
                output._vtok_prompt = (call.input_ids, last)
        return last

    def _anchor(self, prompt_end: Tensor, visual: Tensor) -> Tensor:
        """[B] the position whose attention counts for a text-guided compressor."""
        if getattr(self.llm, "anchor", "prompt_end") == "prompt_end":
            return prompt_end
        after = visual.shape[1] - visual.flip(1).to(torch.uint8).argmax(1)  # first place behind the last visual one
        return torch.where(visual.any(1), torch.minimum(after, prompt_end), prompt_end)


def _check_mask(mask: Any) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise Unsupported(
            "A prepared attention mask (4-D or a dict, as static caches and packing make it) cannot be compacted. "
            "Pass a [batch, length] mask or none, and use the default dynamic cache."
        )


def _is_prefix(prompt: Tensor, ids: Tensor) -> bool:
    same_rows = prompt.shape[0] == ids.shape[0] and prompt.shape[1] <= ids.shape[1]
    return same_rows and torch.equal(prompt, ids[:, : prompt.shape[1]])
