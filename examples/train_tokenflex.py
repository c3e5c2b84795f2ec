"""Turn the bundled model into a TokenFLEX one and compare it with models trained at one number of tokens.

    python examples/train_tokenflex.py --out DIR [--counts 4 16 36] [--steps 400] [--scenes 150]

As in the paper: one flexible model against a fixed one at each count, each tested at all counts. Trained are the
projector, and the decoder after it has settled. Writes tokenflex.json and the projectors to DIR; a count that is there
already is not trained again.
"""

import argparse
import json
import time
from itertools import count
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed

import vtok
from vtok import zoo
from vtok.eval.results.statistics import interval
from vtok.eval.tasks.answers import answer
from vtok.eval.tasks.scenes import TASK
from vtok.modules.tokenflex import TokenSampler
from vtok.modules.training import align, tokenflex_for, train

NAME, SEED = "vtok-tiny-llava-next", 77  # a seed that the model was not trained with
TOGETHER = 8  # scenes a step


def batches(processor, first, scenes, questions):
    """Batches of training scenes from the `first` on, so many a batch, with up to `questions` of each."""
    answered = processor.tokenizer.convert_tokens_to_ids("ASSISTANT:")
    for start in count(first, scenes):
        drawn = [TASK.item("train", SEED, index) for index in range(start, start + scenes)]
        pairs = [(item.images[0], q) for item in drawn for q in item.questions[:questions]]
        asked = lambda q: {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]}
        chats = [[asked(q), {"role": "assistant", "content": q.answer}] for _, q in pairs]
        texts = processor.apply_chat_template(chats)
        inputs = processor(text=texts, images=[image for image, _ in pairs], padding=True, return_tensors="pt")
        labels = inputs["input_ids"].clone()
        for row, ids in enumerate(inputs["input_ids"].tolist()):
            labels[row, : len(ids) - ids[::-1].index(answered)] = -100
        yield {**inputs, "labels": labels}


def trained(counts, shares, steps, aligned):
    """The trained model and its projector, for token counts a view drawn with these shares."""
    set_seed(0)
    model, processor = zoo.load(NAME)
    projector, sampler = tokenflex_for(model), TokenSampler(counts, shares)
    first = align(model, projector, sampler, batches(processor, 10_000_000, 1, 1), aligned, lr=2e-3)
    method = lambda step: vtok.TokenFLEX(keep=sampler.at(step), weights=projector)
    tasks = batches(processor, 0, TOGETHER, 4)
    then = train(model, projector, method, tasks, steps, lr=4e-4, decoder=True, warmup_steps=20, logging_steps=10)
    return model, processor, projector, {"align": first[-1], "task": then[-1]}


def tested(model, processor, projector, tokens, limit):
    """[scenes, 2]: right answers and questions on each held-out scene, at so many tokens a view."""
    hits = []
    with vtok.patch(model, "tokenflex", keep=tokens, weights=projector):
        for scene in TASK.held_out(limit):
            said = answer(model, processor, scene)
            hits.append((sum(a == q.answer for a, q in zip(said, scene.questions)), len(said)))
    return np.array(hits)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 16, 36])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--align", type=int, default=300)
    parser.add_argument("--scenes", type=int, default=150)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "tokenflex.json"
    result = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    plans = {"flexible": (args.counts, args.shares), **{f"fixed {n}": ([n], [1.0]) for n in args.counts}}
    for name, (counts, shares) in plans.items():
        if name in result["rows"]:
            continue
        began = time.perf_counter()
        model, processor, projector, losses = trained(counts, shares, args.steps, args.align)
        row = {"losses": losses, "seconds": time.perf_counter() - began}
        row["tokens_per_view"] = TokenSampler(counts, shares).mean
        for n in args.counts:
            right, asked = tested(model, processor, projector, n, args.scenes).T
            row[str(n)] = {"accuracy": right.sum() / asked.sum(), "interval": interval(right, asked)}
            row[str(n)]["n"] = int(asked.sum())
            print(f"{name:10} tested at {n:3}: {100 * row[str(n)]['accuracy']:.1f} %", flush=True)
        projector.save(args.out / f"{name.replace(' ', '-')}.safetensors")
        result["rows"][name] = row
        result |= {key: getattr(args, key) for key in ("counts", "shares", "steps", "align", "scenes")}
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
