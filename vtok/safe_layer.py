"""`layer="auto"`: methods act where `vtok probe` found that their scores find what answers need."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vtok.errors import InvalidValue
from vtok.files import read_json
from vtok.options import AtLeast1, Depth, DepthFraction
from vtok.stages.llm import InLLM

Auto = Literal["auto"]
FullLayers = AtLeast1 | Auto  # how many layers see all tokens
FullDepth = DepthFraction | FullLayers  # the same, or a fraction of the depth
LastFull = Depth | Auto  # the last of them


def read(file: str | os.PathLike[str]) -> dict[str, Any]:
    """What `vtok probe` wrote. Raises `InvalidValue` where the file holds nothing of that kind."""
    content = read_json(file, "probe")
    if not isinstance(content, dict) or not {"layers", "safe", "methods"} <= content.keys():
        raise InvalidValue(f"{str(file)!r} was not written by `vtok probe`.")
    return content


@dataclass(frozen=True, kw_only=True)
class AtSafeLayer(InLLM):
    """A method with an option that says at which layer it first acts, and that may be "auto".

    probe: the JSON file that `vtok probe` wrote of this model; with the layer "auto", that file says it.
    """

    acts: ClassVar[str] = "layer"  # the option that may be "auto"
    before: ClassVar[bool] = True  # whether it counts the layers that see all tokens, not the index of the last one
    probed: ClassVar[str]  # under which name the file knows the method's score

    probe: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if getattr(self, self.acts) == "auto":
            object.__setattr__(self, self.acts, self._found())
        super().__post_init__()

    def _found(self) -> int:
        call = f"vtok.patch(model, {self.name!r}, {self.acts}='auto', probe='probe/probe.json')"
        if self.probe is None:
            raise InvalidValue(
                f"{self.acts}='auto' needs the file of a probe: run `vtok probe MODEL --out probe`, then {call}."
            )
        content = read(self.probe)
        known = content["methods"].get(self.probed)
        if known is None:
            raise InvalidValue(f"{str(self.probe)!r} does not know {self.probed}: probe the model again.")
        if known["safe"] is None:
            raise InvalidValue(
                f"By {str(self.probe)!r} no layer is safe for {self.name}: its score reaches an AUC of "
                f"{max(known['auc']):.2f} at best, and {content['safe']:g} was asked for. Name a layer, or take a "
                f"method that acts before the language model."
            )
        return known["safe"] + self.before

    def check_depth(self, n_layers: int) -> None:
        if self.probe is not None and (probed := read(self.probe)["layers"]) != n_layers:
            raise InvalidValue(
                f"{str(self.probe)!r} is of a model with {probed} decoder layers, and this one has {n_layers}."
            )
