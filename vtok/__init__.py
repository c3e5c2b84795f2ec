"""vtok: visual-token compression for vision-language models.

`vtok.patch(model, "globalcom2", keep=0.25)` makes a Hugging Face model run on fewer visual tokens. Importing this
package imports neither torch nor transformers; the names below do so when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AWRS": "vtok.text.decoding.awrs",
    "Compressor": "vtok.compressor",
    "DySpec": "vtok.text.decoding.dyspec",
    "NGram": "vtok.text.decoding.ngram",
    "PPD": "vtok.text.decoding.ppd",
    "Patch": "vtok.patching",
    "R2R": "vtok.text.decoding.r2r",
    "Selection": "vtok.types",
    "SelfSpeculation": "vtok.text.decoding.self_speculation",
    "SkipDecode": "vtok.text.decoding.skipdecode",
    "SpecTr": "vtok.text.decoding.spectr",
    "TokenRecycling": "vtok.text.decoding.token_recycling",
    "Trace": "vtok.engine.trace",
    "VisualTokens": "vtok.types",
    "VtokError": "vtok.errors",
    "available": "vtok.methods",
    "load": "vtok.config",
    "patch": "vtok.patching",
    "unpatch": "vtok.patching",
}
_ROOMS = {"optim": "vtok.text.optim", "rl": "vtok.rl", "scaling": "vtok.scaling"}  # modules of the public face


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(_ROOMS[name])
    if name[:1].isupper():  # compressor classes, such as vtok.GlobalCom2, found wherever their file is
        from vtok.compressor import load_all

        for cls in load_all().values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'vtok' has no attribute {name!r}")


def __dir__() -> list[str]:
    from vtok.compressor import load_all

    return sorted([*_HOMES, *_ROOMS, "__version__", *(cls.__name__ for cls in load_all().values())])
