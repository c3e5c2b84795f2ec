"""Self-speculation on pictures: how many forwards an answer takes when the model drafts on fewer visual tokens.

    python examples/self_speculation.py [MODEL] [TASK] [ITEMS]

Each question of an offline task is asked alone. Texts are those of plain greedy search, or this stops. Forwards are
those behind the prefill; with perfect drafts they would be one an answer of up to five tokens.
"""

import sys
import time
from dataclasses import replace

import vtok
from vtok import zoo
from vtok.eval.tasks import task
from vtok.eval.tasks.answers import read

name, work, count = (*sys.argv[1:], *("vtok-tiny-qwen2.5-vl", "scenes", "4")[len(sys.argv) - 1 :])
model, processor = zoo.load(name)
DECODERS = {
    f"{100 * keep:g} % of the visual tokens": vtok.SelfSpeculation(
        draft=[vtok.DivPrune(keep=keep)], length=4, adapt=False, ngram=False
    )
    for keep in (0.5, 0.25, 0.1)
}
DECODERS["as many as pay"] = vtok.SelfSpeculation(draft=[vtok.DivPrune(keep=0.25)])

answers = [replace(item, questions=(q,)) for item in task.get(work).held_out(int(count)) for q in item.questions]
forwards, seconds = dict.fromkeys(["plain", *DECODERS], 0), dict.fromkeys(["plain", *DECODERS], 0.0)


def answer(label, inputs, **how):
    began = time.process_time()
    told = model.generate(**inputs, max_new_tokens=16, do_sample=False, **how)
    seconds[label] += time.process_time() - began
    return told


for item in answers:
    inputs = read(processor, item).to(model.device)
    plain = answer("plain", inputs)
    forwards["plain"] += plain.shape[1] - inputs["input_ids"].shape[1] - 1
    for label, decoder in DECODERS.items():
        told = answer(label, inputs, custom_generate=decoder)
        assert told.equal(plain), f"{label} says something else: {processor.batch_decode(told)}"
        forwards[label] += decoder.stats.steps - 1

print(f"{name}, {len(answers)} questions of {work}\n\n| drafts on | forwards | time |\n| --- | ---: | ---: |")
for label in forwards:
    print(f"| {label} | {forwards[label]} | {seconds[label] / seconds['plain']:.2f} |")
