"""Compress a vision-language model in one line, ask a question, and see what was kept.

    python examples/one_line.py [MODEL] [IMAGE] [QUESTION]

MODEL is a hub repository or a local folder of a supported family; left out, the bundled model and picture are used.
"""

import sys

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtok
from vtok import zoo

path = sys.argv[1] if len(sys.argv) > 1 else zoo.path("vtok-tiny-llava-next")
image = Image.open(sys.argv[2] if len(sys.argv) > 2 else zoo.DEMO_IMAGE)
question = sys.argv[3] if len(sys.argv) > 3 else zoo.DEMO_QUESTION

processor = AutoProcessor.from_pretrained(path)
model = AutoModelForImageTextToText.from_pretrained(path, dtype="float32").eval()

patch = vtok.patch(model)  # the family's default method; or vtok.patch(model, "globalcom2", keep=0.25)

messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]

print(patch)
print("answer:", processor.tokenizer.decode(answer, skip_special_tokens=True))
print(patch.trace)
