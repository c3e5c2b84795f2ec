"""SmolLM2 that sees words: a LLaVA with its 30 real layers, whose pictures bear one word a patch, written in bytes.

No weight of it was trained for this. A patch's pixels are the bytes of a word, the tower looks its token up, and the
word's embedding stands in the picture's row of the prompt, as if it were text. So a picture says what an experiment
wants it to say, and methods for visual tokens meet a decoder whose depth and attention are real.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as T
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vtok.engine.accounting import VisionShape
from vtok.errors import InvalidValue, Unsupported
from vtok.tower import Tower

SIDE, PATCH = 10, 16  # words along a side of a picture; pixels along a side of a word's patch
PLACEHOLDER = "<file_sep>"  # a token of SmolLM2's that no prompt here has
STOPS = (".", "\n", ",")  # behind the first word an answer is over
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + PLACEHOLDER + "' }}{% else %}{{ '\n\n' + part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def picture(words: Sequence[str]) -> Image.Image:
    """A picture of up to SIDE * SIDE words, row by row, each with the space that stands before it. Each row of a
    patch's pixels is the word's UTF-8, a byte a pixel, and zeros. Patches behind the last word are empty.

    Raises `InvalidValue` for too many words, or one of more than PATCH bytes."""
    written = [word.encode() for word in words]
    if len(written) > SIDE * SIDE or max(map(len, written)) > PATCH:
        raise InvalidValue(f"A picture has up to {SIDE * SIDE} words of up to {PATCH} bytes.")
    cells = b"".join(word.ljust(PATCH, b"\0") for word in written).ljust(SIDE * SIDE * PATCH, b"\0")
    rows = [cells[start : start + SIDE * PATCH] * PATCH for start in range(0, len(cells), SIDE * PATCH)]
    return Image.frombytes("L", (SIDE * PATCH, SIDE * PATCH), b"".join(rows)).convert("RGB")


class Reader(Tower):
    """A tower that computes nothing."""

    kind = "towers that look words up"

    def shape(self) -> VisionShape:
        return VisionShape(0, 0, 0, 0, 0, 0, 0, 1, (), 0, 0)


class WordsConfig(T.PreTrainedConfig):
    model_type = "vtok_words"
    tower = Reader
    image_size: int = SIDE * PATCH
    patch_size: int = PATCH
    hidden_size: int = 576


class WordsTower(T.PreTrainedModel):
    """Pixels, [B, 3, H, W] in 0 .. 255 -> embeddings of the words, [B, SIDE * SIDE, D]."""

    config_class = WordsConfig
    main_input_name = "pixel_values"

    def knows(self, ids: dict[bytes, int], blank: int, embedding: nn.Embedding) -> WordsTower:
        """ids: of words in UTF-8. blank: the token of an empty patch. embedding: the decoder's, which is not copied."""
        self.ids, self.blank, self.embedding = ids, blank, (embedding,)  # in a tuple: no second name for its weight
        return self

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        rows = pixel_values[:, 0, ::PATCH].round().byte().cpu()  # [B, SIDE, SIDE * PATCH]
        words = rows.unflatten(2, (SIDE, PATCH)).flatten(0, 2).numpy()
        ids = torch.tensor([self._id(word.tobytes().rstrip(b"\0")) for word in words]).view(len(rows), -1)
        (embedding,) = self.embedding
        found = embedding(ids.to(embedding.weight.device))
        return BaseModelOutputWithPooling(last_hidden_state=found, hidden_states=(found,))

    def _id(self, word: bytes) -> int:
        if word and word not in self.ids:
            raise Unsupported(f"{word!r} is no token of SmolLM2's: this model sees pictures of `vtok.words.picture`.")
        return self.ids[word] if word else self.blank


class WordsProcessor(T.LlavaProcessor):
    media = ("words",)  # what pictures show, see `vtok.eval.tasks.task.Task.media`


T.AutoConfig.register(WordsConfig.model_type, WordsConfig, exist_ok=True)
T.AutoModel.register(WordsConfig, WordsTower, exist_ok=True)


def build(decoder: nn.Module, tokenizer: Any) -> tuple[nn.Module, Any]:
    """The model and its processor around a causal language model, whose modules it takes over, and its tokenizer."""
    text = decoder.config
    token = tokenizer.convert_tokens_to_ids
    config = T.LlavaConfig(
        vision_config=WordsConfig(hidden_size=text.hidden_size),
        text_config=text,
        image_token_index=token(PLACEHOLDER),
        image_seq_length=SIDE * SIDE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with torch.device("meta"):
        model = T.LlavaForConditionalGeneration(config)
    model.model.language_model, model.lm_head = decoder.model, decoder.lm_head
    model.model.multi_modal_projector = nn.Identity()
    spelt = tokenizer.convert_tokens_to_string
    ids = {spelt([word]).encode(): i for word, i in tokenizer.get_vocab().items()}
    tower = model.model.vision_tower = WordsTower(config.vision_config)
    tower.knows(ids, tokenizer.encode(" ", add_special_tokens=False)[0], decoder.get_input_embeddings())
    stops = [tokenizer.encode(stop, add_special_tokens=False)[0] for stop in STOPS]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *stops]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    whole = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
    processor = WordsProcessor(
        T.CLIPImageProcessor(**whole, crop_size={"height": SIDE * PATCH, "width": SIDE * PATCH}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        image_token=PLACEHOLDER,
    )
    return model.eval(), processor
