"""QueCC (arXiv 2411.03312): a projector that condenses windows of patches into one token each, knowing the question.

Each window of kernel x kernel patches becomes one token, which attends to the patches of its own window in several
layers of the encoder. What it looks for is a convolution of the patches, to which the question was added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.errors import InvalidValue, Unsupported

# The released weights' names, after "mm_projector.0.", and ours.
RELEASED = {
    "clip_attn": "attention",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "q_downsample": "downsample",
    "text_projection": "text",
}
LAYERS = (12, 16, 22, 23)  # of CLIP-L's 25 hidden states, the first going in: where the paper takes keys and values
HEADS = 8


def _normed(in_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.LayerNorm(dim, eps=1e-6))


class QueCC(nn.Module):
    """Patches [B, H, W, dim], the same in several layers [B, H, W, deep_dim] and a question [B, text_dim] -> tokens
    [B, H / kernel, W / kernel, dim].

    dim, deep_dim: widths of the features that queries, and keys and values, are made of; the paper's are CLIP-L's 1024
        and, of four layers side by side, 4096.
    kernel: side of a window. On the paper's 24 x 24 patches 24, 12, 6, 4 and 3 make 1, 4, 16, 36 and 64 tokens.
    partial: whether windows at the right and lower edge may be cut; else grids that kernel does not divide are refused.
    """

    def __init__(
        self,
        dim: int,
        text_dim: int,
        kernel: int,
        deep_dim: int | None = None,
        heads: int = HEADS,
        partial: bool = False,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise InvalidValue(f"The width of the patches, {dim}, must be a multiple of the number of heads, {heads}.")
        if isinstance(kernel, bool) or not isinstance(kernel, int) or kernel < 1:
            raise InvalidValue(f"kernel must be an int >= 1, got {kernel!r}")
        deep_dim = len(LAYERS) * dim if deep_dim is None else deep_dim
        self.kernel, self.partial = kernel, partial
        self.text = nn.Sequential(nn.Linear(text_dim, dim), nn.LayerNorm(dim, eps=1e-6))
        self.q, self.k, self.v = _normed(dim, dim), _normed(deep_dim, dim), _normed(deep_dim, dim)
        self.downsample = nn.Conv2d(dim, dim, kernel, stride=kernel, groups=dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor, deep: Tensor, text: Tensor) -> Tensor:
        b, high, wide, _ = x.shape
        kernel = self.kernel
        q = self.q(x + self.text(text)[:, None, None])  # [B, H, W, dim]
        k, v = self.k(deep), self.v(deep)
        missing = None
        if high % kernel or wide % kernel:
            if not self.partial:
                raise InvalidValue(
                    f"Windows of {kernel} x {kernel} do not divide {high} x {wide} patches. Use another kernel or "
                    f"pictures of another size, or a projector with partial=True, which cuts the windows at the edge."
                )
            edge = (0, 0, 0, -wide % kernel, 0, -high % kernel)
            q, k, v = (F.pad(y, edge) for y in (q, k, v))
            missing = F.pad(x.new_zeros(1, high, wide, 1, dtype=torch.bool), edge, value=True)
            missing = windows(missing, kernel).expand(b, -1, -1, -1, -1).flatten(0, 2).squeeze(2)  # [B * h * w, k * k]
        q = self.downsample(q.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [B, h, w, dim]
        grid = q.shape[1:3]
        q, k, v = q.reshape(-1, 1, q.shape[3]), *(windows(y, kernel).flatten(0, 2) for y in (k, v))
        out, _ = self.attention(q, k, v, key_padding_mask=missing, need_weights=False)  # [B * h * w, 1, dim]
        return out.view(b, *grid, -1)


def windows(x: Tensor, kernel: int) -> Tensor:
    """[B, H, W, C] -> [B, H / kernel, W / kernel, kernel * kernel, C], each window in raster order."""
    x = x.unflatten(2, (-1, kernel)).unflatten(1, (-1, kernel))  # [B, h, kernel, w, kernel, C]
    return x.transpose(2, 3).flatten(3, 4)


def question_end(ids: Tensor | None, valid: Tensor, stop: Sequence[int] = ()) -> Tensor:
    """[B] the index of a question's last token, -1 where it has none.

    ids, valid: [B, T], padded on the right. stop: token ids; the question ends before the first place where they follow
    each other, such as the beginning of the answer's header, or with the text where they nowhere do."""
    length = valid.sum(1)
    if not stop or valid.shape[1] < len(stop):
        return length - 1
    stop = torch.tensor(stop, device=ids.device)
    here = ids.unfold(1, len(stop), 1) == stop  # [B, T - s + 1, s]
    here = here.all(2) & valid[:, len(stop) - 1 :]
    return torch.where(here.any(1), here.to(torch.uint8).argmax(1), length) - 1


class QueCCProjector(nn.Module):
    """`QueCC`, and behind it the MLP into the language model: what stands in place of a LLaVA's projector.

    out_dim: width of the language model, whose hidden states also are the question, unless text_dim says otherwise.
    layers: the hidden states, as transformers counts them (the first going in), that keys and values see side by side;
        a float is a fraction of the depth. The query sees the one that the model's own projector reads.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel: int,
        *,
        text_dim: int | None = None,
        layers: Sequence[int | float] = LAYERS,
        heads: int = HEADS,
        partial: bool = False,
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.quecc = QueCC(dim, text_dim or out_dim, kernel, len(self.layers) * dim, heads, partial)
        mlp: list[nn.Module] = [nn.Linear(dim, out_dim)]
        for _ in range(1, depth):
            mlp += [nn.GELU(), nn.Linear(out_dim, out_dim)]
        self.mlp = nn.Sequential(*mlp)

    def forward(self, x: Tensor, deep: Tensor, text: Tensor) -> Tensor:
        """As `QueCC.forward`, but -> [B, h, w, out_dim]. Inputs are brought to the weights' dtype."""
        x, deep, text = (y.to(self.mlp[0].weight.dtype) for y in (x, deep, text))
        return self.mlp(self.quecc(x, deep, text))

    def check(self, dim: int, text_dim: int, out_dim: int) -> None:
        """Raise `Unsupported` unless the weights are for a model of these widths."""
        own = self.quecc.q[0].in_features, self.quecc.text[0].in_features, self.mlp[-1].out_features
        if own != (dim, text_dim, out_dim):
            raise Unsupported(
                f"These QueCC weights are for patches of width {own[0]}, questions of {own[1]} and tokens of {own[2]}; "
                f"this model's are {dim}, {text_dim} and {out_dim}."
            )

    @classmethod
    def load(cls, path: str | Path, layers: Sequence[int | float] | None = None) -> QueCCProjector:
        """From a file that `save` wrote, or from the released code's names (`mm_projector.0.clip_attn...`) in a
        safetensors or .bin file or in a folder of them, whatever else is in there.

        Sizes are read from the weights. layers: see above; by default what the file says, else the paper's."""
        state, said = {}, {}
        for name, value in _tensors(Path(path), said):
            if (ours := _our_name(name)) is not None:
                state[ours] = value
        first = state.get("quecc.q.0.weight")
        mlp = sorted(int(name.split(".")[1]) for name in state if re.fullmatch(r"mlp\.\d+\.weight", name))
        if first is None or "quecc.k.0.weight" not in state or "quecc.text.0.weight" not in state or not mlp:
            raise InvalidValue(
                f"{str(path)!r} holds no QueCC projector: neither mm_projector.0.q_proj.0.weight (released names) nor "
                f"quecc.q.0.weight, with an MLP behind it, was found."
            )
        dim, n_layers = first.shape[0], state["quecc.k.0.weight"].shape[1] // first.shape[0]
        layers = tuple(json.loads(said["layers"])) if layers is None and "layers" in said else layers or LAYERS
        if len(layers) != n_layers:
            raise InvalidValue(f"These weights read {n_layers} layers of the encoder; name as many in layers=.")
        module = cls(
            dim,
            state[f"mlp.{mlp[-1]}.weight"].shape[0],
            state["quecc.downsample.weight"].shape[-1],
            text_dim=state["quecc.text.0.weight"].shape[1],
            layers=layers,
            heads=int(said.get("heads", HEADS)),
            partial=said.get("partial") == "true",
            depth=len(mlp),
        )
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise InvalidValue(f"The QueCC projector in {str(path)!r} is not whole: {error}") from None
        return module.to(first.dtype)

    def save(self, file: str | Path) -> None:
        """Write a safetensors file that `load` reads."""
        from safetensors.torch import save_file

        state = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        said = {"layers": self.layers, "heads": self.quecc.attention.num_heads, "partial": self.quecc.partial}
        save_file(state, str(file), metadata={key: json.dumps(value) for key, value in said.items()})


def _our_name(name: str) -> str | None:
    """The name in `QueCCProjector` of a tensor of a checkpoint, ours or released; None for all else."""
    if name.startswith(("quecc.", "mlp.")):
        return name
    found = re.search(r"(?:^|\.)mm_projector\.(\d+)\.(.+)$", name)
    if found is None:
        return None
    place, rest = int(found[1]), found[2]
    if place:
        return f"mlp.{place - 1}.{rest}"
    module, _, rest = rest.partition(".")
    return f"quecc.{RELEASED[module]}.{rest}" if module in RELEASED else None


def _tensors(path: Path, metadata: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the weights in a file or folder; fills `metadata`."""
    if not path.exists():
        raise InvalidValue(f"There is no file or folder {str(path)!r}.")
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    for file in files:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(file), "pt") as weights:
                metadata.update(weights.metadata() or {})
                for name in weights.keys():  # noqa: SIM118 - no mapping
                    if _our_name(name) is not None:
                        yield name, weights.get_tensor(name)
        else:
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
