"""The model that has the last word: its prefill as in `generate`, its forward over a tree, its cache."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicLayer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from vtok.engine import probe
from vtok.engine.cache import CompressedCache, cache_in, settle, tree_mask
from vtok.engine.probe import TREE
from vtok.errors import Unsupported
from vtok.patching import patches_on
from vtok.text.decoding.attention import TreeAttention
from vtok.text.decoding.products import QuickProducts
from vtok.text.decoding.tree import Tree, Verdict

MASKED = ("sdpa", "eager")  # attention implementations that take a 4-D mask
PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
CHUNK = 64  # rows of the prompt whose logits are there at a time


class Target:
    """A sequence that a model is generating.

    ids: [1, T] the text so far, with the prompt. Its last token is not in the cache yet, once there was a prefill.
    kwargs: what `generate` prepared for the model's forward. given: what `generate` itself was given, with the pixels.
    placeholders: ids that stand for pictures and the like, which no draft should have. processors: of logits.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Tensor,
        config: GenerationConfig,
        kwargs: dict[str, Any],
        given: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.ids, self.config, self.kwargs, self.given = model, ids, config, kwargs, given or {}
        self.placeholders, self.processors = placeholders(model.config), LogitsProcessorList()
        self.prompt: Tensor | None = None  # [R, D] hidden states of the last tokens of the prompt
        self.prompt_length = ids.shape[1]
        self._outputs: Any = None
        self._products: AbstractContextManager = nullcontext()  # of a check
        parameters = inspect.signature(model.forward).parameters.values()
        self.hands_down = any(p.kind is p.VAR_KEYWORD for p in parameters)  # keywords that it does not know
        refuse_model(model)
        refuse_cache(cache_in(kwargs), model.config)
        self.rotated_alike = rotated_alike(model.config)

    @property
    def cache(self) -> DynamicCache:
        return cache_in(self.kwargs)

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Within, trees are checked with an attention and with products of their own where these are quicker."""
        implementation = self.model.config.get_text_config(decoder=True)._attn_implementation
        probe.acquire(implementation)
        self._products = QuickProducts(self.model)
        try:
            yield
        finally:
            self._products = nullcontext()
            probe.release(implementation)

    def prefill(self, rows: int = 0) -> Tensor:
        """The prompt, as plain `generate` runs it. Returns the logits [1, V] behind it.

        rows: keep the hidden states of so many of its last tokens, for `prompt_logits`."""
        base, seen = self.model.base_model, []
        hook = None
        if rows and base is not self.model:
            hook = base.register_forward_hook(lambda module, args, output: seen.append(output[0][0, -rows:]))
        try:
            self._outputs = self.model._prefill(self.ids, self.config, self.kwargs)
        finally:
            if hook is not None:
                hook.remove()
        self.prompt = seen[-1] if seen else None
        return self._outputs.logits[:, -1]

    def prompt_logits(self) -> Iterator[tuple[list[int], Tensor]]:
        """(tokens, logits [R, V]) of the prompt's last tokens, some at a time; up to a scale and what bends all alike.
        Pictures are left out."""
        if self.prompt is None:
            return
        head, length = self.model.get_output_embeddings(), min(len(self.prompt), self.prompt_length)
        tokens = self.ids[0, self.prompt_length - length : self.prompt_length].tolist()
        rows = [i for i, token in enumerate(tokens) if token not in self.placeholders]
        for start in range(0, len(rows), CHUNK):
            some = rows[start : start + CHUNK]
            yield [tokens[i] for i in some], head(self.prompt[torch.tensor(some, device=self.prompt.device) - length])

    def check(self, tree: Tree) -> Tensor:
        """The logits [N, V] behind each node of a tree whose root is the last token of `ids`."""
        n, kwargs, device = len(tree), dict(self.kwargs), self.ids.device
        tokens = torch.tensor(tree.tokens, device=device)
        ids = torch.cat([self.ids[:, :-1], tokens[None].clamp(min=0)], 1)
        if n > 1:
            for name in PER_TOKEN:
                if (types := kwargs.get(name)) is not None:
                    more = types[:, -1:] if name == "token_type_ids" else torch.zeros_like(types[:, -1:])
                    kwargs[name] = torch.cat([types, more.expand(-1, n - 1)], 1)
            positions = kwargs["position_ids"]  # of M-RoPE all rows go on alike, as in `generate`
            depths = torch.tensor(tree.shape.depths, device=positions.device)
            kwargs["position_ids"] = torch.cat([positions[..., :-1], positions[..., -1:] + depths], -1)
        inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=n, **kwargs)
        if n > 1:
            inputs["attention_mask"] = self._mask(tree)
            if self.hands_down:
                padded = isinstance(self.cache, CompressedCache) or self.kwargs.get("attention_mask") is not None
                inputs[TREE] = TreeAttention(tree.shape.ancestors.to(self.model.device), padded)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = n
        if tree.embeds is not None:
            embeds = self.model.get_input_embeddings()(inputs["input_ids"])
            embeds[0, tokens < 0] = tree.embeds.to(embeds.dtype)
            inputs |= {"input_ids": None, "inputs_embeds": embeds}
        with self._products if n > 1 else nullcontext():
            self._outputs = self.model(**inputs, return_dict=True)
        return self._outputs.logits[0, -n:]

    def _mask(self, tree: Tree) -> Tensor:
        """[1, 1, N, L + N]; of a compressed cache [1, 1, N, N], since its engine knows what it holds."""
        ancestors = tree.shape.ancestors.to(self.model.device)
        past = 0 if isinstance(self.cache, CompressedCache) else self.cache.get_seq_length()
        valid = torch.ones(1, past + len(tree), dtype=torch.bool, device=ancestors.device)
        if past and (given := self.kwargs.get("attention_mask")) is not None:
            valid[:, :past] = given[:, :past].bool()
        return tree_mask(ancestors, valid, self.model.dtype)

    @property
    def room(self) -> float:
        """How deep drafts may hang: tokens of one forward are all rotated alike, and where rotary frequencies follow
        from the length, plain `generate` rotates them otherwise."""
        if self.rotated_alike is None:
            return math.inf
        length, goes_on = self.rotated_alike
        positions = int(self.kwargs["position_ids"][..., -1].max()) + 1  # with the last token
        return length - positions if positions <= length else math.inf if goes_on else 0

    def drop(self, tree: Tree) -> None:
        """Take the drafts of a tree that was checked out of the cache."""
        if len(tree) > 1:
            settle(self.cache, len(tree), [0])

    def accept(self, tree: Tree, verdict: Verdict) -> None:
        """Go on behind the accepted route: its columns stay in the cache, and its tokens are text."""
        if len(tree) > 1:
            settle(self.cache, len(tree), list(verdict.route))
        emitted = verdict.tokens(tree)
        self.kwargs = self.model._update_model_kwargs_for_generation(
            self._outputs, self.kwargs, num_new_tokens=len(emitted)
        )
        self._outputs = None
        self.ids = torch.cat([self.ids, torch.tensor([emitted], device=self.ids.device)], 1)


def placeholders(config: Any) -> frozenset[int]:
    """The ids that stand for pictures, clips and sounds in a model's text."""
    names = (f"{kind}_token_{word}" for kind in ("image", "video", "audio") for word in ("id", "index"))
    return frozenset(x for name in names if isinstance(x := getattr(config, name, None), int))


def rotated_alike(config: Any) -> tuple[int, bool] | None:
    """(positions up to which a decoder rotates all alike, whether it does so behind them, too); None where it always
    does. RoPE scaled by "dynamic" has other frequencies for each greater length, "longrope" has two sets."""
    text = config.get_text_config(decoder=True)
    given = getattr(text, "rope_parameters", None) or {}
    for rope in (given, *(value for value in given.values() if isinstance(value, dict))):  # one, or one a kind of layer
        if "dynamic" in rope.get("rope_type", ""):
            return text.max_position_embeddings, False
        if rope.get("rope_type") == "longrope":
            return rope["original_max_position_embeddings"], True
    return None


def refuse_model(model: nn.Module) -> None:
    """Raise `Unsupported` for a model that cannot be given a tree."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise Unsupported("Drafts are for decoder-only models; this one has an encoder for its text.")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise Unsupported(f"{type(model).__name__} takes no position_ids, so drafts of one depth cannot share one.")
    if getattr(config, "alibi", False):
        raise Unsupported(f"{type(model).__name__} tells positions by its mask (ALiBi), and a tree brings its own.")
    if config._attn_implementation not in MASKED:
        raise Unsupported(
            f"Drafts need a mask that {config._attn_implementation} does not take: load the model with "
            f"attn_implementation='sdpa'."
        )
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    if compiled or any(getattr(handle, "_compiled", False) for handle in patches_on(model)):
        raise Unsupported(
            "This model is compiled, and would be so anew for each shape of a tree: decode without drafts."
        )
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    if several and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)):
        raise Unsupported("The weights are spread over processes, which would take different numbers of steps.")


def refuse_cache(cache: Any, config: Any) -> None:
    """Raise `Unsupported` for a cache from which rejected drafts cannot be taken, and for a model (config) that would
    not fill a plain one: where the caller gives it one, its layers see a window of that all the same."""
    if cache is None:
        raise Unsupported("Drafts are checked on a cache: leave use_cache on.")
    plain = isinstance(cache, DynamicCache) and not getattr(cache, "offloading", False)
    own = DynamicCache(config=config.get_text_config(decoder=True)).layers
    layers = {type(layer) for layer in (*getattr(cache, "layers", ()), *own)}
    if not plain or layers != {DynamicLayer}:
        kinds = ", ".join(sorted(kind.__name__ for kind in layers - {DynamicLayer} or layers)) or "no"
        raise Unsupported(
            f"Rejected drafts are taken out of a plain DynamicCache, not a {type(cache).__name__} with {kinds} layers "
            f"(static, quantized, offloaded, sliding windows, recurrent layers): leave cache_implementation unset, or "
            f"decode without drafts."
        )
