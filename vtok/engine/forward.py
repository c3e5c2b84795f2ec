"""The engine: what happens at each seam of a patched model. `vtok/patching.py` installs it and takes it away.

outer model       labels noted                                         (the prompt ends before the first of them)
core model        what is visual, which pictures
encoder method    layouts, what compressors read of the encoder; an encoder-stage compressor acts
language model    a pre-LLM compressor acts; sequence, positions and mask are compacted; the output is restored
decoder layers    an in-LLM compressor acts
their FFNs        activations are shown to compressors; behind the prompt a decode-stage compressor acts
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import find_packed_sequence_indices

from vtok.adapter import Adapter, Encoded, bind, shrink
from vtok.compressor import Compressor
from vtok.engine import ffn
from vtok.engine.cache import OTHER_PATCH, CompressedCache, Rows, gather
from vtok.engine.probe import KEYWORD
from vtok.engine.stream import Stopwatch, Stream
from vtok.engine.trace import Picture, Shapes, Trace
from vtok.errors import PatchStateError, Unsupported
from vtok.kernels.compact_sequence import compact_sequence
from vtok.tower import Layer
from vtok.types import Question, Selection, VisualTokens, mean_of_members
from vtok.vit import Blocks, leaders


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
        self.decode: Compressor | None = active.get("decode")
        self.needs = frozenset().union(*(part.needs_now for part in active.values()))
        n_layers = shapes.layers
        self.sparse_layers = frozenset(self.decode.sparse_layers(n_layers) if self.decode is not None else ())
        asked = self.llm.schedule(n_layers) if self.llm is not None and "ffn" in self.llm.needs_now else ()
        self.ffn_layers = self.sparse_layers | frozenset(asked)  # where `feed_forward` stands in
        self.passing: Stream | None = None  # from a layer's attention to its FFN
        self.labels: Tensor | None = None
        self.call: Call | None = None
        self.trace: Trace | None = None
        self.reads = sorted(  # (need, layer) of the vision encoder
            {(need, x) for part in active.values() for need, layers in part.encoder_layers.items() for x in layers},
            key=str,
        )
        self.seen: dict[tuple[str, Layer], list[Tensor]] | None = None  # what was read during one call of the encoder
        self.encoding = False  # within `encode`
        self.blocks: Blocks | None = None  # where the encoder-stage compressor acts in the encoder's blocks

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
            self.call.encoded[modality] = encoded.pick(self._order(modality, encoded, output.pooler_output))
            self.call.outputs[modality] = output

    def _order(self, modality: str, encoded: Encoded, features: Any) -> list[int]:
        """Which picture each of the features is of: beam search repeats a sample's pictures, in turn."""
        if not isinstance(features, Tensor):  # a list, of which the entries are still the same tensors
            seen: dict[int, int] = {}
            return [seen.setdefault(id(rows), len(seen)) for rows in features]
        sizes = [layout.n_rows for layout in encoded.layouts]
        copies = len(features) // max(1, len(sizes))
        if copies == 1:
            return list(range(len(sizes)))
        order: list[int] = []
        for total in self._places(self.call, modality)[::copies].sum(1).tolist():  # placeholders of a sample
            first = end = order[-1] + 1 if order else 0
            while total > 0:
                total, end = total - sizes[end], end + 1
            order += list(range(first, end)) * copies
        return order

    def _places(self, call: Call, modality: str) -> Tensor:
        """[B, S] bool: the placeholders of a modality."""
        return call.placeholders[modality] if call.input_ids is None else call.input_ids == self.token_ids[modality]

    def after_core(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.call = self.passing = None

    # ---- encoder -----------------------------------------------------------------------------------------------
    def encode(self, core: nn.Module, modality: str, method: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Stands in for the core model's `get_image_features` or `get_video_features`."""
        if self.encoding:  # a family's video method may call its image method: the outer call has done all this
            return method(*args, **kwargs)
        arguments = bind(method, args, kwargs)
        layouts = tuple(self.adapter.layouts(core.config, modality, arguments))
        small = sources = probed = into = None
        self.seen = {key: [] for key in self.reads}
        self.encoding = True
        try:
            if self.encoder is not None and self.blocks is None:
                output, views = self.adapter.encode_small(core, modality, method, arguments, self.encoder.scale())
                small, sources = zip(*(shrink(layout, view) for layout, view in zip(layouts, views)))
            elif self.encoder is not None and self.encoder.scatters:
                with self.blocks.noted() as rows:
                    output = method(*args, **kwargs)
                grouped = self.adapter.tower(core.config).arrange(torch.cat(rows), layouts)
                small, sources, into = zip(*(leaders(*each, self.blocks.rows) for each in zip(layouts, grouped)))
            else:
                output = method(*args, **kwargs)
            if seen := {key: torch.cat(parts) for key, parts in self.seen.items() if parts}:
                tower = self.adapter.tower(core.config)
                split = [tower.arrange(x, small or layouts) for x in seen.values()]
                probed = tuple(dict(zip(seen, of_picture)) for of_picture in zip(*split))
        finally:
            self.seen, self.encoding = None, False
        if not hasattr(output, "pooler_output"):
            return output  # somebody asked for a plain tuple: features for their own use
        for rows, layout in zip(output.pooler_output, layouts):
            if len(rows) != layout.n_rows:
                raise Unsupported(
                    f"The encoder gave {len(rows)} tokens for a picture where {layout.n_rows} were expected. "
                    f"vision_feature_layer and vision_feature_select_strategy must be those of the config."
                )
        previews = self.adapter.previews(arguments)
        output._vtok_encoded = Encoded(modality, layouts, small, sources, probed, previews, into)
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
        length = stream.length
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
        if layer in stream.schedule and "attention" in self.needs:
            kwargs[KEYWORD] = stream  # travels on to the attention function
        if layer in self.ffn_layers:
            kwargs[ffn.KEYWORD] = stream
        return args, kwargs

    def before_attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """On the layers of `ffn_layers`, whose FFN is not handed any keywords."""
        self.passing = kwargs.get(ffn.KEYWORD)
        return args, {k: v for k, v in kwargs.items() if k != ffn.KEYWORD}

    def feed_forward(self, layer: int, mlp: nn.Module, x: Tensor, dense: Any) -> Tensor:
        """Stands in for the forward of a layer's FFN, `dense`."""
        stream, self.passing = self.passing, None
        return dense(x) if stream is None else stream.feed_forward(layer, mlp, x, dense)

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
        self._check_core(cache)
        new = None
        if length > 1 and mask is not None and not bool(mask[:, -length:].all()):
            new = mask[:, -length:].bool()
        valid = cache.extend(0, new, batch, length, hidden.device)
        kwargs["attention_mask"] = None if valid is None else valid.long()
        kwargs["position_ids"] = self._shifted(kwargs.get("position_ids"), cache, batch, length, hidden.device)
        cache.seen += length
        stream = Stream(module.config, cache, batch, length, core=cache.core)
        if new is not None:
            positions = torch.arange(length, device=hidden.device).expand(batch, -1)
            stream.rows = {start: Rows(positions, new, padded=True) for start in cache.valid}
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
        prompt_end, completed = self._prompt_end(call, valid, cache, module.training)
        protected = torch.zeros_like(valid).scatter_(1, prompt_end[:, None], True)  # predicts the first answer token
        keep = valid & (~visual | protected)

        flat, flat_keep = embeds.reshape(batch * length, width), keep.view(-1)
        selections: list[tuple[list[int], Selection]] = []
        groups: dict[Any, list[int]] = {}
        for i, picture in enumerate(pictures):
            groups.setdefault((picture.modality, picture.dense, picture.layout), []).append(i)
        countable = torch.zeros_like(flat_keep)
        late = self.adapter.late_features(kwargs) if self.active else {}
        late_row = (visual.view(-1).cumsum(0) - 1).masked_fill(~visual.view(-1), -1)  # [B * S]
        question = None
        if "question" in self.needs:
            with stopwatch:
                question = self._question(module, call, embeds, visual, valid, prompt_end)
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
                asked = None if question is None else _rows_of(question, tokens[:, 0] // length)
                cls = encoder.get(("cls_attention", -1))
                visual_tokens = VisualTokens(flat[tokens], first.layout, cls, encoder, asked)
                with stopwatch, torch.set_grad_enabled(torch.is_grad_enabled() and self.pre_llm.merges):
                    selection = self.pre_llm.select(visual_tokens)
                flat_keep[tokens.flatten()] |= selection.keep.flatten()
                if selection.features is not None:
                    flat = flat.index_copy(0, tokens.flatten(), selection.features.flatten(0, 1).to(flat.dtype))
                    if selection.merged_into is not None:
                        for layer, features in late.items():
                            rows = late_row[tokens].to(features.device)
                            means = mean_of_members(features[rows], selection.merged_into.to(features.device))
                            late[layer] = features.index_copy(0, rows.flatten(), means.flatten(0, 1))
            countable[tokens.flatten()] = selection.keep.flatten()
            selections.append((members, selection))
        keep = flat_keep.view(batch, length) & valid
        droppable = countable.view(batch, length) & ~protected

        # the one wait for the device: how long the compacted rows are
        anchor = self._anchor(prompt_end, visual)
        instruction = _instruction(anchor, visual, valid)
        owners = torch.stack([picture.tokens[0] for picture in pictures]) // length
        n_prompt = (keep & (torch.arange(length, device=device) <= prompt_end[:, None])).sum(1)
        counts = torch.cat([keep.sum(1), droppable.sum(1), instruction.sum(1), n_prompt, owners]).tolist()
        lengths, n_visual, n_instruction, n_prompt = (counts[i * batch : (i + 1) * batch] for i in range(4))
        owners = counts[4 * batch :]

        if self.active and (kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False)):
            raise Unsupported("output_attentions is not available while tokens are dropped: its shape would change.")
        present: dict[int, Rows] = {}  # grows as decoder layers prune
        merged = {
            i: selection.merged_into[g]
            for members, selection in selections
            if selection.merged_into is not None
            for g, i in enumerate(members)
        }
        self.trace = Trace(
            self.shapes, tuple(pictures), tuple(owners), batch, length, merged, stopwatch, self.encoder, present
        )
        if self.blocks is not None:
            self.trace = replace(self.trace, _encoder_stage=None, _merged_at=self.blocks.merged_at)
        if not self.active:
            present[0] = Rows.of(keep, lengths)
            return kwargs

        stream = Stream(module.config, cache, batch, length, present, stopwatch=stopwatch)
        stream.anchor, stream.instruction, stream.instruction_counts = anchor, instruction, n_instruction
        stream.late, stream.late_row = late, late_row.view(batch, length)
        call.stream = stream
        positions = self._shifted(kwargs.get("position_ids"), cache, batch, length, device)
        if getattr(self.pre_llm, "renumber", False):
            dropped = (valid & ~keep).long()
            positions = positions - dropped.cumsum(1)
            if cache is not None:
                shift = dropped.sum(1)
                cache.shift = shift if cache.shift is None else cache.shift + shift
        index, there, kwargs["inputs_embeds"], kwargs["position_ids"], may_go = compact_sequence(
            keep, max(lengths), flat.view(batch, length, width), positions, droppable
        )
        present[0] = rows = Rows(index, there, min(lengths) < max(lengths), may_go)
        if self.llm is not None:
            stream.compressor = self.llm
            n_layers = len(self.adapter.layers(module))
            stream.text_counts = [n - v for n, v in zip(lengths, n_visual)]
            images = [owners.count(b) for b in range(batch)]
            for layer, share in sorted(self.llm.schedule(n_layers).items()):
                if layer < n_layers - 1:
                    fixed = share is not None
                    left = [self.llm.remaining(n, share, i) for n, i in zip(n_visual, images)] if fixed else None
                    stream.schedule[layer] = left
            before = [n_visual, *stream.schedule.values()]
            stream.idle = {layer for (layer, n), m in zip(stream.schedule.items(), before) if n == m}
        if cache is not None:
            self._check_core(cache)
        if self.ffn_layers:
            self._watch_ffn(stream, pictures, owners, n_prompt, prompt_end, completed)
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
        hands_all_on = self.blocks is not None and not self.encoder.scatters
        encoder = None if hands_all_on else self.encoder
        return any(part is not None for part in (encoder, self.pre_llm, self.llm, self.decode))

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

    def _check_core(self, cache: CompressedCache) -> None:
        if cache.core is not None and cache.core.index.keys() != self.sparse_layers:
            raise PatchStateError(OTHER_PATCH)

    def _watch_ffn(
        self,
        stream: Stream,
        pictures: list[Picture],
        owners: list[int],
        n_prompt: list[int],
        prompt_end: Tensor,
        completed: bool,
    ) -> None:
        """Tell a prefill what its FFNs need, and begin the core of its sequences.

        n_prompt: per sample, the tokens of its prompt that enter the first layer. completed: whether a completion may
        follow it in this forward."""
        device, cache = prompt_end.device, stream.cache
        order = [owners[:i].count(owner) for i, owner in enumerate(owners)]  # of each picture in its sample
        picture = torch.full((stream.batch * stream.length,), -1, device=device)
        picture[torch.cat([p.tokens for p in pictures])] = torch.cat(
            [torch.full_like(p.tokens, i) for p, i in zip(pictures, order)]
        )
        stream.picture, stream.pictures = picture.view(stream.batch, stream.length), max(order) + 1
        stream.prompt_end, stream.completed = prompt_end, completed
        if self.decode is None:
            return
        old = cache.core if cache is not None else None
        brings = [b in owners for b in range(stream.batch)]
        flags = [yes and n >= self.decode.min_tokens for yes, n in zip(brings, n_prompt)]
        rows, fresh = (torch.tensor(values, device=device) for values in (flags, brings))
        core = ffn.Core(rows, all(flags))
        if old is not None:  # a sample without a new picture goes on with what it has: all its tokens are behind
            whole = all(flag or (old.whole and not new) for flag, new in zip(flags, brings))
            core = ffn.Core(torch.where(fresh, rows, old.rows.to(device)), whole, dict(old.index))
            stream.prompt_end, stream.completed = torch.where(fresh, prompt_end, -1), completed or not all(brings)
            stream.fresh = fresh
        stream.core, stream.decode, stream.sparse_layers = core, self.decode, self.sparse_layers
        self.trace = replace(self.trace, core=core)
        if cache is not None:
            cache.core, cache.copies = core, None

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
            here = self._places(call, modality)
            visual |= here
            sizes = [layout.n_rows for layout in encoded.layouts]
            where = torch.nonzero_static(here.view(-1), size=sum(sizes)).squeeze(1)
            if encoded.previews is not None:  # a wait for the device: only the prompt knows which views are a picture
                encoded = call.encoded[modality] = self.adapter.join(encoded, _unbroken(where, sizes, length))
                sizes = [layout.n_rows for layout in encoded.layouts]
            for i, rows in enumerate(where.split(sizes)):
                dense = encoded.layouts[i]
                place = dense.place.to(rows.device)
                separators = dense.separator_place
                layout, source = dense, None
                if encoded.small is not None:
                    layout, source = encoded.small[i], encoded.sources[i]
                    if dense.separators:
                        separators = separators[dense.separators_of(source.cpu())]
                    source = source.to(rows.device)
                    place = place[source]
                separators = rows[separators.to(rows.device)]
                into = encoded.merged_into[i] if encoded.merged_into is not None else None
                pictures.append(Picture(modality, dense, layout, rows, rows[place], separators, source, into))
        return visual, pictures

    def _prompt_end(self, call: Call, valid: Tensor, cache: Any, training: bool) -> tuple[Tensor, bool]:
        """[B] the position of the prompt's last token, the same in a rollout and in the training forward; and whether
        a completion may lie behind it."""
        length = valid.shape[1]
        last = length - 1 - valid.flip(1).to(torch.uint8).argmax(1)  # [B]
        labels = self.labels
        if labels is not None and labels.shape == valid.shape:
            supervised = (labels != -100).to(valid.device)
            first = supervised.to(torch.uint8).argmax(1)
            return torch.where(supervised.any(1), (first - 1).clamp(min=0), last), True
        for part in (self.pre_llm, self.llm, self.decode) if training and torch.is_grad_enabled() else ():
            if getattr(part, "anchor", None) != "prompt_end":
                continue
            movable = any(f.name == "anchor" for f in fields(part))
            hint = f", or use {part.name} with anchor='after_visual'" if movable else ""
            raise Unsupported(
                f"{part.name} reads the text at the prompt's end, and a training forward without labels does not "
                f"say where that is. Pass labels (-100 on the prompt){hint}."
            )
        if cache is None:  # generate(use_cache=False) runs the grown sequence again: its prompt ends where it did
            for output in call.outputs.values():
                ids, end = getattr(output, "_vtok_prompt", (None, None))
                if ids is not None and call.input_ids is not None and _is_prefix(ids, call.input_ids):
                    return end, True
                output._vtok_prompt = (call.input_ids, last)
        return last, False

    def _question(
        self, module: nn.Module, call: Call, embeds: Tensor, visual: Tensor, valid: Tensor, prompt_end: Tensor
    ) -> Question:
        """What each row of the batch asks. Waits for the device: only the prompt says how long that is."""
        place = torch.arange(visual.shape[1], device=visual.device)
        text = valid & ~visual & (place <= prompt_end[:, None])
        behind = text & (visual.flip(1).cumsum(1).flip(1) == 0)
        text = torch.where(behind.any(1, keepdim=True), behind, text)
        index = (~text).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(1, int(text.sum(1).max()))]
        # no hooks: this is not the forward that was called. Padding is on the right, where no token sees it
        with torch.no_grad():
            read = module.forward(inputs_embeds=gather(embeds, index), use_cache=False, return_dict=True)
        ids = None if call.input_ids is None else call.input_ids.gather(1, index)
        return Question(text.gather(1, index), read.last_hidden_state, ids)

    def _anchor(self, prompt_end: Tensor, visual: Tensor) -> Tensor:
        """[B] the position whose attention counts for a text-guided compressor."""
        if getattr(self.llm, "anchor", "prompt_end") == "prompt_end":
            return prompt_end
        after = visual.shape[1] - visual.flip(1).to(torch.uint8).argmax(1)  # first place behind the last visual one
        return torch.where(visual.any(1), torch.minimum(after, prompt_end), prompt_end)


def _rows_of(question: Question, rows: Tensor) -> Question:
    """Some rows of the batch, [G] indices."""
    valid, states, ids = question.valid, question.states, question.ids
    rows = rows.to(valid.device)
    return Question(valid[rows], states[rows.to(states.device)], None if ids is None else ids[rows])


def _unbroken(where: Tensor, sizes: list[int], length: int) -> list[list[int]]:
    """Views grouped into pictures: those whose placeholders follow each other in one row of the batch.

    where: [sum(sizes)] the placeholders of all views, in the batch flattened from rows of `length`."""
    starts = torch.tensor(sizes).cumsum(0)[:-1].to(where.device)  # of the second view on
    follows = (where[starts] == where[starts - 1] + 1) & (where[starts] % length != 0)
    groups = [[0]]
    for view, joined in enumerate(follows.tolist(), start=1):
        if joined:
            groups[-1].append(view)
        else:
            groups.append([view])
    return groups


def _check_mask(mask: Any) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise Unsupported(
            "A prepared attention mask (4-D or a dict, as static caches and packing make it) cannot be compacted. "
            "Pass a [batch, length] mask or none, and use the default dynamic cache."
        )


def _instruction(anchor: Tensor, visual: Tensor, valid: Tensor) -> Tensor:
    """[B, S] bool: the text between a row's first visual token and its anchor, and the anchor whatever it is."""
    place = torch.arange(visual.shape[1], device=visual.device)
    between = (visual.cumsum(1) > 0) & (place <= anchor[:, None])
    return (between & ~visual & valid).scatter(1, anchor[:, None], True)


def _is_prefix(prompt: Tensor, ids: Tensor) -> bool:
    same_rows = prompt.shape[0] == ids.shape[0] and prompt.shape[1] <= ids.shape[1]
    return same_rows and torch.equal(prompt, ids[:, : prompt.shape[1]])
