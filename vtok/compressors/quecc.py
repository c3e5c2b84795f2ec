"""QueCC: a trained projector that condenses windows of patches into one token each, knowing the question."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from vtok.compressor import Compressor
from vtok.errors import InvalidValue, Unsupported
from vtok.modules.quecc import QueCCProjector, question_end
from vtok.stages.pre_llm import PreLLM
from vtok.types import Layout, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class QueCC(PreLLM):
    """Visual tokens by a `QueCCProjector`, from several layers of the encoder and the question (Section 4).

    weights: the trained module, or a file or folder that `QueCCProjector.load` reads: one's own, or of the released
        code. They fix how many tokens a view becomes, so there is no `keep`.
    stop: token ids. The question ends before the first place where they follow each other, such as the tokens between
        it and the answer, else with the prompt.
    The question is the text behind the last visual token, up to the prompt's end also in training; its embedding is the
    language model's last hidden state at its last token. That is one more pass over the text alone.
    A token stands in the middle of the dense tokens of its window; windows of padding alone are dropped.
    Differs from the paper: pictures of several views, in which each view is condensed alone, several pictures a sample,
    which share the question, and text without a known end of the question, all of which the official code refuses or
    cuts wrongly; the question's tokens are those of the prompt and are not tokenised anew without its line breaks;
    places and newlines of the dense grid stay.
    """

    name = "quecc"
    needs = frozenset({"encoder_states", "question"})
    paper = "Inference Optimal VLMs Need Only One Visual Token but Larger Models, arXiv 2411.03312"
    by_grid = True
    text_guided = True
    merges = True
    trained = True
    several_turns = False

    keep: float = field(default=1.0, init=False, repr=False)  # the weights say it
    weights: QueCCProjector | str | Path | None = field(default=None, repr=False)
    stop: Annotated[tuple[int, ...], "token ids"] = ()

    is_identity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.weights is None:
            raise InvalidValue(
                "quecc needs trained weights: vtok.patch(model, 'quecc', weights=PATH), or a QueCCProjector. "
                "`vtok.modules.training` trains one for a model at hand."
            )
        if isinstance(self.weights, str | Path):
            object.__setattr__(self, "weights", QueCCProjector.load(self.weights))
        if not isinstance(self.stop, str):
            object.__setattr__(self, "stop", tuple(self.stop))
        super().__post_init__()

    @classmethod
    def small_weights(cls, model: nn.Module) -> dict[str, Any]:
        from vtok.modules.training import quecc_for

        return {"weights": quecc_for(model, 2, layers=(0, 1, -1, 1.0), heads=4, partial=True).eval()}

    @property
    def encoder_layers(self) -> dict[str, tuple[int | float | None, ...]]:
        return {"encoder_states": (None, *self.weights.layers)}

    def with_budget(self, budget: float, n_layers: int) -> Compressor:
        raise InvalidValue("quecc keeps what its weights were trained for; choose weights of another kernel.")

    def count(self, layout: Layout) -> int:
        return len(places(layout, self.weights.quecc.kernel)[1])

    @property
    def replays(self) -> bool:
        return False  # what enters is made of the whole picture

    def select(self, tokens: VisualTokens) -> Selection:
        layout, features, asked = tokens.layout, tokens.features, tokens.question
        projector = self.weights.to(features.device)
        if self.stop and asked.ids is None:
            raise Unsupported("quecc with stop=... needs input_ids; this model got inputs_embeds alone.")
        end = question_end(asked.ids, asked.valid, self.stop)
        row = torch.arange(len(end), device=end.device)
        text = asked.states[row, end.clamp(min=0)].masked_fill((end < 0)[:, None], 0.0)  # [B, E]
        x = tokens.read("encoder_states", None)  # [B, V, P, C]
        deep = torch.cat([tokens.read("encoder_states", layer) for layer in projector.layers], -1)
        merged = x.shape[2] // math.prod(layout.planes[0].view_shape)  # patches a token
        projector.check(x.shape[3] * merged, text.shape[1], features.shape[2])
        made, view = [], 0
        for plane in layout.planes:
            views = slice(view, view + plane.views)
            view += plane.views
            own = (_on_grid(states[:, views], plane.view_shape).flatten(0, 1) for states in (x, deep))
            out = projector(*own, text.to(features.device).repeat_interleave(plane.views, 0))  # [B * v, h, w, D]
            made.append(out.reshape(len(x), -1, features.shape[2]))
        source, place, into = (index.to(features.device) for index in places(layout, projector.quecc.kernel))
        made = torch.cat(made, 1)[:, source].to(features.dtype)
        return Selection.of_indices(
            place.expand(len(x), -1),
            layout.n,
            features=features.index_copy(1, place, made),
            merged_into=into.expand(len(x), -1),
        )


def _on_grid(states: Tensor, shape: tuple[int, int]) -> Tensor:
    """[B, v, P, C] -> [B, v, rows, cols, C * m], the m patches of a token side by side."""
    return states.unflatten(2, (*shape, -1)).flatten(4)


@functools.lru_cache(maxsize=64)
def places(layout: Layout, kernel: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where windows of kernel x kernel tokens of each view stand among the N dense tokens.

    Returns source [K], which of all windows (by plane, view, row, column) have a dense token; place [K], the one in the
    middle of those they have; into [N], the place of each token's window."""
    source, place, into, done = [], [], [], 0
    for plane, start in zip(layout.planes, layout.starts):
        (high, wide), across = plane.view_shape, plane.crop_grid[1]
        h, w = -(-high // kernel), -(-wide // kernel)
        crop_y, cell_y, middle_y, run_y = _runs(plane.mosaic_rows(), high, kernel)
        crop_x, cell_x, middle_x, run_x = _runs(plane.mosaic_cols(), wide, kernel)
        view = crop_y[:, None] * across + crop_x
        source.append(done + ((view * h + cell_y[:, None]) * w + cell_x).flatten())
        middle = start + middle_y[:, None] * plane.cols + middle_x
        place.append(middle.flatten())
        into.append(middle[run_y][:, run_x].flatten())
        done += plane.views * h * w
    return torch.cat(source), torch.cat(place), torch.cat(into)


def _runs(at: Tensor, size: int, kernel: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Along one axis: the crop and the cell in it of each run of places in one window, and the run's middle place, each
    [runs]; and the run of each place. at: [n] ascending on the mosaic; size: of a crop."""
    crop, cell = at // size, at % size // kernel
    each, run, count = torch.unique_consecutive(crop * size + cell, return_inverse=True, return_counts=True)
    first = count.cumsum(0) - count
    return each // size, each % size, first + (count - 1) // 2, run
