"""What users get wrong, as tables: what they write, and what the one line they get must say."""

from __future__ import annotations

from typing import Any

from kit.rows_text import ROWS, rows_with

# keys; the files they name; what is said
DATA: dict[str, tuple[dict[str, Any], dict[str, str | bytes], list[str]]] = {
    "row-is-not-json": (
        {"data.train": "bad.jsonl"},
        {"bad.jsonl": rows_with(3, '{"text": oops')},
        ["bad.jsonl row 3 is not JSON", "one object a line"],
    ),
    "row-without-text": (
        {"data.train": "bad.jsonl"},
        {"bad.jsonl": rows_with(4, '{"label": 1}')},
        ["bad.jsonl row 4 has no value for text"],
    ),
    "row-with-empty-text": (
        {"data.train": "bad.jsonl"},
        {"bad.jsonl": rows_with(5, '{"text": " ", "label": 1}')},
        ["bad.jsonl row 5: text is empty"],
    ),
    "row-in-evaluation": (
        {"data.eval": "bad.jsonl"},
        {"bad.jsonl": rows_with(6, "[1, 2]")},
        ["bad.jsonl row 6 is a list", "expected an object"],
    ),
    "row-too-long": (
        {"data.train": "bad.csv"},
        {"bad.csv": "text,label\ngood,1\nbad,0,7\n"},
        ["bad.csv row 2 has 3 columns, expected 2"],
    ),
    "not-utf8": (
        {"data.train": "bad.tsv"},
        {"bad.tsv": b"text\tlabel\ngood\t1\nb\xe9d\t0\n"},
        ["bad.tsv line 3 is not UTF-8"],
    ),
    "not-gzip": (
        {"data.train": "bad.jsonl.gz"},
        {"bad.jsonl.gz": "hello"},
        ["bad.jsonl.gz cannot be read"],
    ),
    "not-parquet": (
        {"data.train": "bad.parquet"},
        {"bad.parquet": "hello"},
        ["bad.parquet is not parquet"],
    ),
    "no-rows": (
        {"data.train": "bad.jsonl"},
        {"bad.jsonl": ""},
        ["bad.jsonl is empty", "expected rows"],
    ),
    "a-header-only": (
        {"data.train": "bad.csv"},
        {"bad.csv": "text,label\n"},
        ["bad.csv holds no rows"],
    ),
    "unseen-label": (
        {"data.eval": "bad.jsonl"},
        {"bad.jsonl": rows_with(7, '{"text": "good", "label": 7}')},
        ["bad.jsonl row 7", "label '7' is not among those of training", "0, 1"],
    ),
    "half-a-label": (
        {"data.train": "bad.jsonl"},
        {"bad.jsonl": rows_with(2, '{"text": "good", "label": 0.5}')},
        ["bad.jsonl row 2", "label is 0.5"],
    ),
    "one-class": (
        {"data.train": "bad.jsonl"},
        {"bad.jsonl": "\n".join(ROWS[::2])},
        ["every training row has the label '0'", "at least two"],
    ),
    "an-empty-file-for-a-peer": (
        {
            "data.train": {"a": "train.jsonl", "b": "bad.jsonl"},
            "data.partition.kind": "files",
            "peers.count": None,
        },
        {"bad.jsonl": "\n"},
        ["bad.jsonl is empty"],
    ),
}
# the arguments after `dlora`; what is said
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "no-such-config": (
        ["simulate", "rnu.yaml"],
        ["config rnu.yaml cannot be read", "No such file", "YAML"],
    ),
    "config-is-a-folder": (["simulate", "model"], ["config model cannot be read", "directory"]),
    "config-is-no-yaml": (
        ["simulate", "bad.yaml"],
        ["config bad.yaml is not YAML: line 2, column 1"],
    ),
    "config-is-a-list": (
        ["simulate", "list.yaml"],
        ["config list.yaml holds a list", "keys such as model"],
    ),
    "config-is-empty": (["simulate", "empty.yaml"], ["config empty.yaml holds nothing"]),
    "config-is-binary": (
        ["simulate", "latin.yaml"],
        ["config latin.yaml cannot be read", "not UTF-8"],
    ),
    "set-without-value": (
        ["simulate", "run.yaml", "--set", "train.rounds"],
        ["--set train.rounds", "key=value"],
    ),
    "set-a-typo": (
        ["simulate", "run.yaml", "--set", "trian.rounds=3"],
        ["trian is not a key", "did you mean train?"],
    ),
    "set-below-a-value": (
        ["simulate", "run.yaml", "--set", "model.x=3"],
        ["--set model.x=3", "model is a value"],
    ),
    "set-half-a-list": (
        ["simulate", "run.yaml", "--set", "compare=[local"],
        ["compare=[local", "not YAML"],
    ),
    "resume-nothing": (
        ["simulate", "run.yaml", "--resume"],
        ["run holds no run", "without --resume"],
    ),
    "dry-resume": (
        ["simulate", "run.yaml", "--resume", "--dry-run"],
        ["--dry-run and --resume", "one of them"],
    ),
    "eval-nothing": (["eval", "rnu"], ["rnu holds no run", "give the folder of a run"]),
    "eval-no-run": (["eval", "model"], ["model holds no run"]),
    "report-nothing": (["report", "rnu"], ["rnu", "cannot be read", "give the folder of a run"]),
    "no-such-command": (["simulat", "run.yaml"], ["No such command 'simulat'", "'simulate'"]),
    "no-such-option": (
        ["simulate", "run.yaml", "--resum"],
        ["No such option: --resum", "--resume"],
    ),
    "no-config": (["simulate"], ["Missing argument 'CONFIG'"]),
    "topology-typo": (["topology", "rign"], ["'ring'", "'base-k'", "'rign'"]),
    "topology-hypercube-of-six": (
        ["topology", "hypercube", "-n", "6"],
        ["power of two", "6 peers", "base-k"],
    ),
    "topology-of-nobody": (["topology", "ring", "-n", "0"], ["--peers", "1"]),
    "topology-weights-of-base-k": (
        ["topology", "base-k", "--weights", "laplacian"],
        ["base-k fixes its weights"],
    ),
    "topology-no-such-weights": (
        ["topology", "ring", "--weights", "x"],
        ["weights x", "metropolis, laplacian"],
    ),
    "topology-p-of-a-ring": (
        ["topology", "ring", "--p", "0.5"],
        ["p belongs to kind erdos-renyi, not to ring"],
    ),
    "topology-drawn-nowhere": (
        ["topology", "ring", "-o", "there/ring.svg"],
        ["there/ring.svg cannot be written"],
    ),
    "topology-drawn-over-a-folder": (
        ["topology", "ring", "-o", "model"],
        ["model cannot be written", "directory"],
    ),
}
