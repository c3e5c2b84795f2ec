"""Turn the bundled model into a TokenFLEX one and compare it with models trained at one number of tokens.

    python examples/train_tokenflex.py --out DIR [--counts 4 16 36] [--steps 400] [--scenes 150]

As in the paper: one flexible model against a fixed one at each count, each tested at all counts. Trained are the
projector, and the decoder after it has settled. Writes tokenflex.json and the projectors to DIR; a count that is there
already is not trained again.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

import vtok
from vtok import zoo
from vtok.eval.results.statistics import interval
from vtok.modules.tokenflex import TokenSampler
from vtok.modules.tokenflex_training import FlexibleTokens, align, projector_for
from vtok.zoo import evaluate, scenes

NAME = "vtok-tiny-llava-next"


class Questions(Dataset):
    """Scene by scene, up to four questions each; index 0 is the `first`-th training scene."""

    def __init__(self, first: int, count: int):
        self.first, self.count = first, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        scene = scenes.generate("train", 77, self.first + index)  # a seed that the model was not trained with
        return [(scene.image, q) for q in scene.questions[:4]]


class Collate:
    def __init__(self, processor):
        self.processor = processor

    def __call__(self, items):
        pairs = list(itertools.chain(*items))
        chats = [
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]},
                {"role": "assistant", "content": q.answer},
            ]
            for _, q in pairs
        ]
        texts = self.processor.apply_chat_template(chats)
        inputs = self.processor(text=texts, images=[image for image, _ in pairs], padding=True, return_tensors="pt")
        labels = inputs["input_ids"].clone()
        answer = self.processor.tokenizer.convert_tokens_to_ids("ASSISTANT:")
        for row, ids in enumerate(inputs["input_ids"].tolist()):
            labels[row, : len(ids) - ids[::-1].index(answer)] = -100
        return {**inputs, "labels": labels}


def train(counts, shares, steps, aligned, out):
    """The trained model and its projector, for token counts a view drawn with these shares."""
    set_seed(0)
    model, processor = zoo.load(NAME)
    model.requires_grad_(False)
    projector, sampler, collate = projector_for(model), TokenSampler(counts, shares), Collate(processor)
    pictures = Questions(10_000_000, aligned)
    batches = ({**collate([pictures[i][:1]]), "labels": None} for i in range(aligned))
    losses = align(model, projector, batches, sampler, lr=2e-3)
    model.model.language_model.requires_grad_(True)
    flexible = FlexibleTokens(projector, sampler)
    flexible.attach(model)
    settings = TrainingArguments(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=8,
        max_steps=steps,
        learning_rate=4e-4,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.0,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=Questions(0, 8 * steps),
        data_collator=collate,
        callbacks=[flexible],
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model.eval(), processor, projector, {"align": losses[-1], "task": logged[-1]}


def test(model, processor, projector, count, limit):
    """[scenes, 2]: right answers and questions on each held-out scene, at `count` tokens a view."""
    hits = []
    with vtok.patch(model, "tokenflex", keep=count, weights=projector):
        for scene, asked in evaluate.held_out(limit):
            said = evaluate.answer(model, processor, scene.image, [q.text for q in asked])
            hits.append((sum(a == q.answer for a, q in zip(said, asked)), len(asked)))
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
        model, processor, projector, losses = train(counts, shares, args.steps, args.align, args.out)
        row = {"losses": losses, "seconds": time.perf_counter() - began}
        row["tokens_per_view"] = TokenSampler(counts, shares).mean
        for count in args.counts:
            hits = test(model, processor, projector, count, args.scenes)
            row[str(count)] = {
                "accuracy": hits[:, 0].sum() / hits[:, 1].sum(),
                "interval": interval(hits[:, 0], hits[:, 1]),
                "n": int(hits[:, 1].sum()),
            }
            print(f"{name:10} tested at {count:3}: {100 * row[str(count)]['accuracy']:.1f} %", flush=True)
        projector.save(args.out / f"{name.replace(' ', '-')}.safetensors")
        result["rows"][name] = row
        result |= {"counts": args.counts, "shares": args.shares, "steps": args.steps, "align": args.align}
        result |= {"scenes": args.scenes}
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
