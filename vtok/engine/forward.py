"""The engine: what happens at each seam of a patched model. `vtok/engine/install.py` puts it there and takes it away.

generate            its prompt's length is noted
outer model         labels noted: a prompt ends before an answer's first
core model          what is visual, which pictures
encoder method      layouts, what compressors read of the encoder; stages in the encoder act
language model      stages before it act; sequence, positions and mask are compacted; the output is restored
decoder layers      stages in it act; their attention and FFNs are shown
"""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vtok.adapter import Adapter, Encoded
from vtok.engine import encode, ffn
from vtok.engine.cache import OTHER_PATCH, CompressedCache, Rows, cache_in, causal_mask, with_cache
from vtok.engine.decoder import Carried, Pass
from vtok.engine.prefill import check_mask, prefill
from vtok.engine.probe import KEYWORD
from vtok.engine.prompt import IGNORE, Told
from vtok.engine.replay import Recorded
from vtok.engine.trace import Shapes, Trace
from vtok.errors import PatchStateError, Unsupported
from vtok.kernels.compact_sequence import compact_sequence

if TYPE_CHECKING:
    from vtok.stages.stage import Stage

LOG = logging.getLogger(__name__)
PIXELS = ("pixel_values", "pixel_values_videos")  # keywords that bring pictures
UNFILLED = (
    "The prompt has placeholders of pictures or clips that nothing fills: pass the processor's whole output "
    "(pixel_values, pixel_values_videos and what belongs to them). generate_batch cannot carry any."
)
UNSTEADY = (
    "%s chooses by scores, and in %s those of a training forward are rounded otherwise than those of its rollout: now "
    "and then other tokens are kept. vtok.rl.prepare(trainer) lets a training forward keep what its rollout kept."
)
ALONE = (
    "{} was called on its own, past the model that is patched, where the patch cannot act. Call the model itself; for "
    "the decoder alone, uncompressed, `with patch.paused():`."
)
UNKNOWN_PROMPT = (
    "{name} keeps what the prompt's end attends to, and this forward does not say where {what}. Call generate; or pass "
    "labels with -100 on the prompt (TRL: completion_only_loss=True); or use_cache=True, where all of the input is "
    "prompt; or say how long prompts are, `with patch.prompt(length):`{hint}."
)


@dataclass
class Call:
    """One forward of the core model."""

    token_ids: dict[str, int]  # modality -> placeholder
    input_ids: Tensor | None
    told: Told
    placeholders: dict[str, Tensor] = field(default_factory=dict)  # modality -> [B, S] bool, where there are no ids
    encoded: dict[str, Encoded] = field(default_factory=dict)
    mask: Any = None  # as the core model is given it
    blocks: Tensor | None = None  # see `Adapter.blocks`
    passing: Pass | None = None  # of a forward that brings a prompt
    running: Pass | None = None  # of any, while the language model runs

    def places(self, modality: str) -> Tensor:
        """[B, S] bool: the placeholders of a modality."""
        return self.placeholders[modality] if self.input_ids is None else self.input_ids == self.token_ids[modality]

    def mask_in(self, kwargs: dict[str, Any]) -> Any:
        """The mask in the language model's keywords; where the core model made a dict, what it made that of."""
        mask = kwargs.get("attention_mask")
        return self.mask if isinstance(mask, dict) else mask


@dataclass
class Generating:
    """One call of `generate`. length: columns of its prompt. encoded: what it encoded before its first forward."""

    length: int | None = None
    encoded: dict[str, Encoded] = field(default_factory=dict)


class Local(threading.local):
    """What one thread is doing with a patched model."""

    generating: Generating | None = None
    stages: list[Stage] | None = None  # in place of the patch's
    told: Told | None = None  # by the call of the outer model
    prompt: Any = None  # what `Patch.prompt` says
    recorded: Recorded | None = None  # within `Patch.replaying`
    call: Call | None = None
    encoding: encode.Encoding | None = None  # while the encoder runs
    passing: Pass | None = None  # from a layer's attention to its FFN
    trace: Trace | None = None


class Engine:
    """One patched model's engine. Holds no reference to the model, so that the two can be freed together."""

    def __init__(
        self,
        adapter: Adapter,
        stages: list[Stage],
        token_ids: dict[str, int],
        shapes: Shapes,
        reads: list[encode.Read],
    ) -> None:
        self.adapter, self.token_ids, self.shapes, self.reads = adapter, token_ids, shapes, reads
        self.installed = stages
        self.watches_layers = False  # whether `before_layer` is installed on the decoder layers
        self.ffn_layers = frozenset(layer for stage in stages for layer in stage.ffn_layers())
        self.lock = threading.Lock() if any(stage.alone for stage in stages) else nullcontext()
        self.local = Local()
        self.last: Trace | None = None  # of any thread
        self.rolled_out = self.warned = False  # whether `generate` ran, whether `UNSTEADY` was said

    @property
    def stages(self) -> list[Stage]:
        """Those that act: the patch's, unless this thread paused them or gave them other knobs."""
        return self.installed if self.local.stages is None else self.local.stages

    @property
    def active(self) -> bool:
        """Whether anything can be missing behind a stage."""
        return any(stage.drops for stage in self.stages)

    @contextmanager
    def acting(self, stages: list[Stage]):
        """Other stages within, in this thread."""
        before, self.local.stages = self.local.stages, stages
        try:
            yield
        finally:
            self.local.stages = before

    @property
    def trace(self) -> Trace | None:
        """That of this thread's last prefill, or, where it has run none, of the last at all."""
        return self.local.trace or self.last

    def note(self, trace: Trace) -> None:
        self.local.trace = self.last = trace

    def check_seams(self, stages: list[Stage], reads: list[encode.Read]) -> None:
        """Raise `Unsupported` where stages need seams that the patch did not put on the model."""
        layers = {layer for stage in stages for layer in stage.ffn_layers()}
        acts = any(stage.in_layers for stage in stages)
        hooked = all(stage in self.installed for stage in stages if stage.in_encoder)
        shown = layers <= self.ffn_layers and set(reads) <= set(self.reads)
        if not (hooked and shown and (self.watches_layers or not acts)):
            raise Unsupported("This change needs other seams in the model than the patch has: call swap() with it.")

    # ---- outer model -------------------------------------------------------------------------------------------
    @contextmanager
    def generating(self, length: int | None, lock: Any):
        """Within a call of `generate` whose prompt has so many columns. lock: for families that keep a prompt's state
        on the model, so that two threads do not mix theirs; or None."""
        with nullcontext() if lock is None else lock:
            self.rolled_out = True
            before, self.local.generating = self.local.generating, Generating(length)
            try:
                yield
            finally:
                self.local.generating = before

    def before_outer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        labels, ids = kwargs.get("labels"), kwargs.get("input_ids", args[0] if args else None)
        wanted = kwargs.get("logits_to_keep")  # the next token alone: what comes before it is the prompt
        asked = kwargs.get("use_cache") is True or (isinstance(wanted, int) and wanted == 1)
        self.local.told = Told(whole=asked)
        if labels is None or not self.active:
            return None
        on_pictures = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        if ids is not None and ids.shape == labels.shape:
            visual = torch.zeros_like(ids, dtype=torch.bool)
            for token in self.token_ids.values():
                visual |= ids == token
            visual = visual.to(labels.device)
            on_pictures = (visual & (labels != IGNORE)).any(1)
            labels = labels.masked_fill(visual, IGNORE)  # a placeholder is never an answer, and its row may be gone
        self.local.told = Told(labels, on_pictures=on_pictures)
        return args, {**kwargs, "labels": labels}

    def after_outer(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.local.told = None

    # ---- core model --------------------------------------------------------------------------------------------
    def before_core(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        call = self.local.call = Call(self.token_ids, ids, self._told(kwargs, embeds if ids is None else ids))
        call.mask, call.blocks = kwargs.get("attention_mask"), self.adapter.blocks(kwargs)
        if ids is None and embeds is not None:
            for modality, token in self.token_ids.items():
                row = module.get_input_embeddings()(torch.tensor(token, device=embeds.device))
                call.placeholders[modality] = (embeds == row).all(-1)
        if any(kwargs.get(name) is not None for name in PIXELS) or kwargs.get("mm_encoder_outputs"):
            check_mask(kwargs.get("attention_mask"))  # before the family makes positions of it
        elif ids is not None and ids.shape[1] > 1:
            self._refuse_unfilled(call, kwargs)
        for modality, output in (kwargs.get("mm_encoder_outputs") or {}).items():
            if output is not None and getattr(output, "pooler_output", None) is not None:
                generating = self.local.generating
                noted = generating.encoded.get(modality) if generating is not None else None
                call.encoded[modality] = encode.passed_on(modality, output, noted, lambda m=modality: call.places(m))

    def _told(self, kwargs: dict[str, Any], inputs: Tensor | None) -> Told:
        """What this forward of the core model is told about its prompts."""
        local, told = self.local, self.local.told or Told()
        if told.labels is not None and inputs is not None and told.labels.shape == inputs.shape[:2]:
            return told
        if local.generating is not None:
            return Told(length=local.generating.length, generating=True)
        if local.prompt is not None:
            return local.prompt
        return Told(whole=told.whole or kwargs.get("use_cache") is True or cache_in(kwargs) is not None)

    def _refuse_unfilled(self, call: Call, kwargs: dict[str, Any]) -> None:
        """Placeholders that no picture fills. Waits for the device."""
        cache = cache_in(kwargs)
        if cache is not None and cache.get_seq_length():
            return  # a sampled token may look like one
        if any(bool(call.places(modality).any()) for modality in self.token_ids):
            raise Unsupported(UNFILLED)

    def after_core(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.local.call = self.local.passing = None

    # ---- encoder -----------------------------------------------------------------------------------------------
    def encode(self, core: nn.Module, modality: str, method: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Stands in for the core model's `get_image_features` or `get_video_features`."""
        local = self.local
        if local.encoding is not None:  # a family's video method may call its image method: the outer call does it all
            return method(*args, **kwargs)
        call = encode.begin(self.adapter, core, modality, method, args, kwargs)
        with self.lock:
            local.encoding = encode.Encoding(self.reads)
            try:
                output, encoded = encode.run(call, args, kwargs, self.stages, local.encoding)
            finally:
                local.encoding = None
        if encoded is not None:
            if local.call is not None:
                local.call.encoded[modality] = encoded
            elif local.generating is not None:
                local.generating.encoded[modality] = encoded
        return output

    def in_encoder(self, key: Any, read: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """After a module of the vision encoder that shows what `key` names."""
        if self.local.encoding is not None:
            self.local.encoding.seen[key].append(read(module, args, kwargs, out))

    # ---- language model ----------------------------------------------------------------------------------------
    def before_language_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        call, cache = self.local.call, cache_in(kwargs)
        begins = cache is None or (type(cache) in (DynamicCache, CompressedCache) and not cache.get_seq_length())
        on_text = any(stage.on_text for stage in self.stages)
        if call is None and begins and on_text:
            raise Unsupported(ALONE.format(type(module).__name__))
        brings = call is not None and any(encoded.layouts for encoded in call.encoded.values())
        brings = brings or (begins and on_text)
        if not brings and not on_text and not isinstance(cache, CompressedCache):
            if begins and call is not None:
                self._note_text({**kwargs, "attention_mask": call.mask_in(kwargs)})
            return None
        kwargs = embedded(module, args, kwargs)
        cache = self._cache(module, kwargs)
        run = prefill(self, module, call, kwargs, cache) if brings else self._continue(module, kwargs, cache)
        return (), self._opened(cache, run)

    def _opened(self, cache: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if isinstance(cache, CompressedCache):
            cache.open = True
        return kwargs

    def after_language_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if isinstance(cache := cache_in(kwargs), CompressedCache):
            cache.open = False
        call = self.local.call
        if call is None or output is None:
            return None
        running, call.running = call.running, None
        if running is not None:
            for stage in running.stages:
                stage.finished(self, module, running)
        return None if call.passing is None else call.passing.restore(output)

    def before_layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        carried: Carried | None = kwargs.get(KEYWORD)
        if carried is None:
            return None
        p = carried.running
        kwargs = {k: v for k, v in kwargs.items() if k != KEYWORD}
        if args:
            args = (p.enter(layer, args[0], kwargs), *args[1:])
        else:
            kwargs["hidden_states"] = p.enter(layer, kwargs["hidden_states"], kwargs)
        if any(stage.watches(p, layer) for stage in p.stages):
            kwargs[KEYWORD] = carried  # travels on to the attention function
        if layer in self.ffn_layers:
            kwargs[ffn.KEYWORD] = carried
        return args, kwargs

    def before_attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """On the layers of `ffn_layers`, whose FFN is not handed any keywords."""
        carried: Carried | None = kwargs.get(ffn.KEYWORD)
        self.local.passing = None if carried is None else carried.running
        return args, {k: v for k, v in kwargs.items() if k != ffn.KEYWORD}

    def feed_forward(self, layer: int, mlp: nn.Module, x: Tensor, dense: Any) -> Tensor:
        """Stands in for the forward of a layer's FFN, `dense`."""
        p, self.local.passing = self.local.passing, None
        if p is None:
            return dense(x)
        visit = ffn.Visit(layer, mlp, x, dense)
        for stage in p.stages:
            stage.feed_forward(p, visit)
        return visit.result()

    def positions(self, given: Tensor | None, cache: Any, length: int, device: torch.device) -> Tensor:
        """Position ids of a chunk, made as the model would where they are not given."""
        if given is not None:
            return given
        return torch.arange(length, device=device)[None] + (cache.seen if cache is not None else 0)

    def _continue(self, module: nn.Module, kwargs: dict[str, Any], cache: CompressedCache) -> dict[str, Any]:
        """Text on a cache that holds a prompt: decoding, or another turn. Drafts in a tree bring a mask of themselves
        alone, [1, 1, Q, Q]: what they see of the cache, the cache knows."""
        hidden, call = kwargs["inputs_embeds"], self.local.call
        mask = kwargs.get("attention_mask") if call is None else call.mask_in(kwargs)
        batch, length, _ = hidden.shape
        tree = None
        if isinstance(mask, Tensor) and mask.shape == (1, 1, length, length):
            tree, mask = mask[0, 0] == 0, None
        check_mask(mask)
        new = None
        if length > 1 and mask is not None and not bool(mask[:, -length:].all()):
            new = mask[:, -length:].bool()
        p = Pass(module.config, self.stages or self.installed, cache, batch, length, tree=tree)
        p.told = call.told if call is not None else Told()
        positions = self.positions(kwargs.get("position_ids"), cache, length, hidden.device)
        if new is not None and call is None:  # nobody would put the output back
            p.rows[0] = Rows(torch.arange(length, device=hidden.device).expand(batch, -1), new, padded=True)
        elif new is not None:  # padding goes left
            most = int(new.sum(1).max())
            index, there, hidden, positions, _ = compact_sequence(new, most, hidden, positions, new)
            p.rows[0], call.passing = Rows(index, there, padded=True), p
            kwargs = {**kwargs, "inputs_embeds": hidden}
        for stage in p.stages:
            positions = stage.resume(p, positions)
        self.check_cache(p)
        return self.run_on(p, {**kwargs, "position_ids": positions})

    def run_on(self, p: Pass, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords of a pass that is about to run: its mask, its cache, and the pass itself."""
        cache, embeds = p.cache, kwargs["inputs_embeds"]
        p.embeds, p.positions = embeds, kwargs["position_ids"]
        rows = p.rows_at(0)
        if cache is None:  # without a mask and a cache, gaps in the positions would be read as packed sequences
            valid = rows.valid
            kwargs["attention_mask"] = valid.long()
        else:
            new = rows.valid if rows is not None and rows.padded else None
            valid = cache.extend(0, new, p.batch, embeds.shape[1], embeds.device)
            if p.tree is not None or (valid is not None and valid.ndim == 3):
                kwargs["attention_mask"] = causal_mask(p.config, embeds, valid, cache, 0, p.tree)
            else:
                kwargs["attention_mask"] = None if valid is None else valid.long()
            cache.seen += p.length
            kwargs = with_cache(kwargs, cache)
        if p.blocks is not None:
            kwargs["attention_mask"] = self.adapter.masks(p.config, embeds, valid, cache, p.blocks)
        if self.local.call is not None:
            self.local.call.running = p
        if self.watches_layers:  # leave the pass in the keywords only where layer hooks will take it out again
            kwargs[KEYWORD] = Carried(p)
        return kwargs

    def check_cache(self, p: Pass) -> None:
        """The cache's layers are this patch's, and have a record each where they hold columns of their own."""
        cache = p.cache
        p.groups |= cache.valid.keys() if p.prompts is None else set()
        names = {stage.name for stage in p.stages}
        if not p.groups >= cache.valid.keys() or not names >= cache.states.keys():
            raise PatchStateError(OTHER_PATCH)
        if len(p.groups) > 1 and not self.watches_layers:
            raise PatchStateError(OTHER_PATCH)
        for first in sorted(p.groups):
            cache.split(first)

    def _cache(self, module: nn.Module, kwargs: dict[str, Any]) -> CompressedCache | None:
        """The cache in which a prefill leaves less than it was given, or None where it leaves nothing."""
        cache, call = cache_in(kwargs), self.local.call
        mask = kwargs.get("attention_mask") if call is None else call.mask_in(kwargs)
        if not self.active and not isinstance(cache, CompressedCache):
            return None
        if cache is None:
            use_cache = kwargs.get("use_cache")
            if use_cache is None:
                use_cache = getattr(module.config, "use_cache", False)
            if not use_cache or (module.training and getattr(module, "gradient_checkpointing", False)):
                return None
            return CompressedCache.adopt(DynamicCache(config=module.config), None)
        if not isinstance(cache, CompressedCache):
            check_mask(mask)
        held = 0 if isinstance(cache, CompressedCache) or mask is None else cache.get_seq_length()
        past = mask[:, :held] if held else None
        if past is not None and bool(past.all()):
            past = None
        return CompressedCache.adopt(cache, past)

    def check_prompts(self, told: dict[str, Any], replayed: bool) -> None:
        """Raise `Unsupported` where nothing fills a placeholder, or a prompt's end is read that nobody knows."""
        if any(told["unfilled"]):
            raise Unsupported(UNFILLED)
        for stage in self.stages:
            part = stage.compressor
            if replayed and part.replays and not stage.behind_prompt:
                continue
            if any(told["unclear"]) and part.reads_prompt_end:
                labelled = self.local.told is not None and self.local.told.labels is not None
                what = "the prompt ends, since its labels begin before the picture" if labelled else "that is"
                hint = f"; or use {part.name} with anchor='after_visual'" if part.movable else ""
                raise Unsupported(UNKNOWN_PROMPT.format(name=part.name, what=what, hint=hint))
            if max(told["turns"]) > 1 and part.reads_prompt_end and not part.several_turns:
                raise Unsupported(
                    f"{part.name} cannot tell several answers of one row apart, each to pictures of its own: put each "
                    f"answer into a row of its own, with the conversation before it as the prompt."
                )

    def warn_of_rounding(self, dtype: torch.dtype) -> None:
        """Say once where a training forward behind rollouts chooses anew, by scores that are rounded."""
        labelled = self.local.told is not None and self.local.told.labels is not None
        if self.warned or dtype.itemsize > 2 or not (self.rolled_out and labelled and torch.is_grad_enabled()):
            return
        for part in (stage.compressor for stage in self.stages):
            if not part.by_grid:
                LOG.warning(UNSTEADY, part.name, str(dtype).removeprefix("torch."))
                self.warned = True

    def _note_text(self, kwargs: dict[str, Any]) -> None:
        """A prompt without pictures is a prefill too: its trace says that there was nothing to keep."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            return
        batch, length, _ = embeds.shape
        if self.local.recorded is not None:
            self.local.recorded.next(batch)
        index = torch.arange(length, device=embeds.device).expand(batch, -1)
        mask = kwargs.get("attention_mask")
        whole = torch.ones(batch, length, dtype=torch.bool, device=embeds.device)
        valid = mask[:, -length:].bool() if isinstance(mask, Tensor) and mask.ndim == 2 else whole
        rows = {0: Rows(index, valid, padded=True)}
        self.note(Trace(self.shapes, (), (), batch, length, valid.sum(1), rows, embeds.itemsize, None, {}))


def embedded(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a language model's call, with embeddings in place of ids."""
    kwargs = dict(kwargs)
    ids = kwargs.pop("input_ids", args[0] if args else None)
    if kwargs.get("inputs_embeds") is None:
        kwargs["inputs_embeds"] = module.get_input_embeddings()(ids)
    return kwargs
