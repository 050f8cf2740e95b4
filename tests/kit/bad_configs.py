"""Configs that cannot run, and what is said."""

from __future__ import annotations

from typing import Any

TOPOLOGY = "peers.topology"


# keys of a config that runs -> their mistaken values; what is said
CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no-model": ({"model": None}, ["model", "None"]),
    "unknown-key": ({"peers.topologie": "ring"},
        ["peers.topologie is not a key", "did you mean topology?"]),
    "unknown-section": ({"trian": {"rounds": 3}}, ["trian is not a key", "did you mean train?"]),
    "unknown-and-unlike": ({"peers.zzz": 1},
        ["peers.zzz is not a key", "known here: count, topology"]),
    "unset-variable": (
        {"data.train": "${DLORA_TEST_UNSET}/train.tsv"},
        ["data.train", "${DLORA_TEST_UNSET}", "not set", "export DLORA_TEST_UNSET="],
    ),
    "a-word-for-a-number": ({"train.rounds": "many"}, ["train.rounds", "integer", "'many'"]),
    "no-rounds": ({"train.rounds": 0}, ["train.rounds", "1", "got 0"]),
    "rank-zero": ({"lora.r": 0}, ["lora.r", "greater than or equal to 1", "got 0"]),
    "negative-learning-rate": ({"train.learning_rate": -1.0},
        ["train.learning_rate", "greater than 0", "-1.0"]),
    "learning-rate-not-a-number": ({"train.learning_rate": float("nan")},
        ["train.learning_rate", "finite", "nan"]),
    "unknown-optimiser": ({"train.optimizer": "lion"},
        ["train.optimizer", "'adamw' or 'sgd'", "'lion'"]),
    "steps-and-epochs": ({"train.local_epochs": 1}, ["local_steps and local_epochs", "keep one"]),
    "unknown-baseline": ({"compare": ["poold"]},
        ["compare.0", "'pooled', 'local' or 'fedavg'", "'poold'"]),
    "a-baseline-twice": ({"compare": ["local", "local"]}, ["compare names a baseline twice"]),
    "a-baseline-without-list": ({"compare": "local"}, ["compare", "list", "'local'"]),
    "three-texts": ({"data.text": ["a", "b", "c"]},
        ["data.text", "one column, or two for pairs", "['a', 'b', 'c']"]),
    "a-word-for-a-block": ({"peers.topology": "ring"},
        ["peers.topology", "a block of keys", "'ring'"]),
    "a-key-of-another-tool": ({"train.max_steps": 9},
        ["train.max_steps is not a key", "`train.rounds` times `train.local"]),
    "members-that-climb": (  # field case 35
        {"peers": {"members": ["../../../X", "b"]}},
        ["members: '../../../X' cannot name a folder"],
    ),
    # the frozen model elsewhere
    "split-a-word": ({"split": "hub"}, ["split", "a block of keys", "'hub'"]),
    "split-without-cloud": ({"split": {"wire": "int8"}}, ["split.cloud is missing"]),
    "split-typo": ({"split": {"cloud": "hub", "wires": "int8"}},
        ["split.wires is not a key", "did you mean wire?"]),
    "split-wire": (
        {"split": {"cloud": "hub", "wire": "float16"}},
        ["split.wire", "'float32', 'bfloat16' or 'int8'", "'float16'"],
    ),
    "split-pipeline": ({"split": {"cloud": "hub", "pipeline": 0}},
        ["split.pipeline", "1", "got 0"]),
    "split-checkpointing": (
        {"split": {"cloud": "hub"}, "train.gradient_checkpointing": True},
        ["split", "the cloud runs the body", "remove train.gradient_checkpointing"],
    ),
    "split-quantised": (
        {"split": {"cloud": "hub"}, "quantization": "int8"},
        ["split", "quantise it in the cloud's own config"],
    ),
    "split-groups": (
        {"split": {"cloud": "hub"}, "peers.group_size": 2},
        ["split", "travel by themselves", "remove peers.group_size, which is 2"],
    ),
    # Kill and Revive
    "schedule-a-word": ({"schedule": "kr"}, ["schedule", "a block of keys", "'kr'"]),
    "schedule-unknown": ({"schedule": {"kind": "dynamic"}},
        ["schedule.kind", "'probe' or 'kr'", "'dynamic'"]),
    "schedule-nothing-active": (
        {"schedule": {"kind": "kr", "active_fraction": 0}},
        ["schedule.active_fraction", "greater than 0", "got 0"],
    ),
    "schedule-static-which": ({"schedule": {"kind": "static"}},
        ["schedule", "static needs units", "such as"]),
    "schedule-units-of-kr": (
        {"schedule": {"kind": "kr", "units": ["query"]}},
        ["schedule", "units belongs to kind static, not to kr", "remove it"],
    ),
    # the core
    "core-ffa": ({"lora.placement": "core", "peers.rule": "ffa"},
        ["peers.rule ffa", "freezes both", "take rule factor"]),
    "core-alternate": ({"lora.placement": "core", "peers.rule": "alternate"},
        ["peers.rule alternate", "take rule factor"]),
    "frame-of-pairs": ({"lora.frame": "frame.safetensors"},
        ["lora", "frame belongs to placement core", "remove it"]),
    "frame-nowhere": (
        {"lora.placement": "core", "lora.frame": "nowhere/frame.safetensors"},
        ["lora.frame", "nowhere is no folder", "make it"],
    ),
    "core-too-wide": ({"lora.placement": "core", "lora.r": 65},
        ["lora.r 65", "has 64 singular directions", "lower lora.r"]),
    # data files
    "missing-file": ({"data.train": "trian.jsonl"},
        ["trian.jsonl does not exist", "did you mean train.jsonl"]),
    "missing-folder": ({"data.eval": "there/eval.jsonl"},
        ["there/eval.jsonl does not exist", "nor does its folder"]),
    "a-folder-for-a-file": ({"data.train": "model"}, ["model is a folder", ".jsonl", ".parquet"]),
    "unknown-form": ({"data.train": "run.yaml"}, ["run.yaml is a .yaml file", ".jsonl", ".csv"]),
    "missing-column": ({"data.text": "txet"},
        ["train.jsonl has no column txet", "text, label", "did you mean text?"]),
    "missing-label-column": ({"data.label": "lable"}, ["no column lable", "did you mean label?"]),
    "missing-second-text": ({"data.text": ["text", "premise"]},
        ["train.jsonl has no column premise"]),
    "label-not-in-labels": ({"data.labels": ["0", "2"]},
        ["train.jsonl row 2", "label '1'", "0, 2"]),
    "no-room-for-text": ({"data.max_length": 2}, ["data.max_length 2", "adds 2 tokens"]),
    "more-tokens-than-positions": ({"data.max_length": 1000},
        ["data.max_length 1000", "512 tokens at most"]),
    # partitions
    "more-peers-than-rows": ({"peers.count": 65}, ["65 peers", "64 rows", "peers.count"]),
    "more-peers-than-limit": ({"data.limit": 3}, ["4 peers", "3 rows", "peers.count"]),
    "no-count": ({"peers.count": None}, ["iid does not say how many peers", "set peers.count"]),
    "empty-peer-by-size": ({"data.partition": {"sizes": [1, 1, 1, 1e9]}},
        ["leaves peer-0 without rows", "sizes"]),
    "size-zero": ({"data.partition": {"sizes": [1, 1, 1, 0]}},
        ["data.partition", "sizes must all be above 0, got 0"]),
    "three-sizes": ({"data.partition": {"sizes": [1, 1, 1]}},
        ["4 by peers.count", "3 by sizes", "make them equal"]),
    "dirichlet-without": ({"data.partition": {"kind": "dirichlet"}},
        ["data.partition", "dirichlet needs concentration"]),
    "dirichlet-zero": (
        {"data.partition": {"kind": "dirichlet", "concentration": 0}},
        ["data.partition.concentration", "greater than 0", "got 0"],
    ),
    "dirichlet-too-few-rows": (
        {"data.partition": {"kind": "dirichlet", "concentration": 1, "min_rows": 17}},
        ["4 peers with min_rows 17 need 68 rows, there are 64", "lower peers.count or min_rows"],
    ),
    "dirichlet-too-skewed": (
        {"data.partition": {"kind": "dirichlet", "concentration": 0.01, "min_rows": 16}},
        ["concentration 0.01", "some peer of 4", "min_rows 16", "raise concentration"],
    ),
    "concentration-elsewhere": (
        {"data.partition": {"kind": "iid", "concentration": 1}},
        ["concentration belongs to kind dirichlet, not to iid", "remove it"],
    ),
    "shares-missing": ({"data.partition": {"kind": "label-shares"}}, ["label-shares needs shares"]),
    "shares-too-wide": (
        {"data.partition": {"kind": "label-shares", "shares": [[1, 0, 0]] * 4}},
        ["shares: row 0 has 3 entries", "2 labels"],
    ),
    "shares-for-others": (
        {"data.partition": {"kind": "label-shares", "shares": [[1, 0], [0, 1]]}},
        ["4 by peers.count", "2 by shares", "make them equal"],
    ),
    "shares-negative": (
        {"data.partition": {"kind": "label-shares", "shares": [[1, 1], [1, -1], [1, 1], [1, 1]]}},
        ["row 1 is [1.0, -1.0]", "no negatives"],
    ),
    "shares-of-nothing": (
        {"data.partition": {"kind": "label-shares", "shares": [[0, 0], [1, 1], [1, 1], [1, 1]]}},
        ["row 0 is [0.0, 0.0]", "a sum above 0"],
    ),
    "shares-leave-none": (
        {"data.partition": {"kind": "label-shares", "shares": [[1, 0]] * 4,
            "sizes": [1, 1, 1, 1e9]}},
        ["[32, 32] rows a label", "leave a peer without rows"],
    ),
    "no-such-client-column": (
        {"data.partition": {"kind": "by-column", "column": "who"}},
        ["train.jsonl has no column who", "text, label"],
    ),
    "fewer-clients-than-peers": (
        {"data.partition": {"kind": "by-column", "column": "label"}},
        ["4 peers asked for", "label has 2 values"],
    ),
    "files-without-names": ({"data.partition": {"kind": "files"}}, ["{peer: file}", "kind: files"]),
    "names-without-files": ({"data.train": {"a": "train.jsonl"}}, ["{peer: file}", "kind: files"]),
    "no-files": ({"data.train": {}, "data.partition": {"kind": "files"}}, ["train names no peer"]),
    "a-peer-that-is-no-folder": (
        {"data.train": {"a": "train.jsonl", "b/c": "eval.jsonl"}, "data.partition.kind": "files",
            "peers.count": 2},
        ["peer 'b/c' cannot name a folder"],
    ),
    "more-peers-than-files": (
        {"data.train": {"a": "train.jsonl", "b": "eval.jsonl"}, "data.partition.kind": "files"},
        ["peers.count is 4", "2 files"],
    ),
    "labels-of-causal-lm": (
        {"task": "causal-lm", "data.partition": {"kind": "dirichlet", "concentration": 1}},
        ["dirichlet needs labels", "causal-lm has none"],
    ),
    # topologies
    "disconnected": (
        {TOPOLOGY: {"kind": "edges", "edges": [[0, 1], [2, 3]]}},
        ["not connected", "{peer-0, peer-1} | {peer-2, peer-3}"],
    ),
    "no-edges": ({TOPOLOGY: {"kind": "edges", "edges": []}},
        ["not connected", "{peer-0} | {peer-1}"]),
    "edge-to-nobody-by-index": (
        {TOPOLOGY: {"kind": "edges", "edges": [[0, 1], [1, 9]]}},
        ["topology.edges[1] is [1, 9]", "no peer has index 9", "4 peers"],
    ),
    "edge-to-nobody-by-name": (
        {TOPOLOGY: {"kind": "edges", "edges": [["peer-0", "pear-1"]]}},
        ["topology.edges[0] is [peer-0, pear-1]", "no peer is named pear-1",
            "did you mean peer-1?"],
    ),
    "edge-to-itself": ({TOPOLOGY: {"kind": "edges", "edges": [[2, 2]]}},
        ["[2, 2]", "not its own neighbour"]),
    "edge-of-three": ({TOPOLOGY: {"kind": "edges", "edges": [[0, 1, 2]]}},
        ["edges.0", "at most 2", "[0, 1, 2]"]),
    "no-such-topology": ({TOPOLOGY: {"kind": "rign"}},
        ["peers.topology.kind", "'ring'", "'base-k'", "'rign'"]),
    "erdos-renyi-without-p": ({TOPOLOGY: {"kind": "erdos-renyi"}}, ["erdos-renyi needs p"]),
    "p-of-a-ring": ({TOPOLOGY: {"kind": "ring", "p": 0.5}},
        ["p belongs to kind erdos-renyi, not to ring"]),
    "erdos-renyi-too-thin": ({TOPOLOGY: {"kind": "erdos-renyi", "p": 0.001}},
        ["p 0.001", "4 peers", "take p well above"]),
    "hypercube-of-six": (
        {TOPOLOGY: {"kind": "hypercube"}, "peers.count": 6},
        ["power of two", "6 peers", "take 4, 8", "base-k"],
    ),
    "weights-of-base-k": (
        {TOPOLOGY: {"kind": "base-k"}, "peers.weights": "metropolis"},
        ["weights metropolis", "base-k fixes its weights", "remove"],
    ),
    "unknown-weights": ({"peers.weights": "laplace"},
        ["peers.weights", "'metropolis' or 'laplacian'", "'laplace'"]),
    # models and their modules
    "no-such-model": ({"model": "./modle"}, ["model ./modle: no such folder", "pkg://"]),
    "a-file-for-a-model": ({"model": "run.yaml"}, ["model run.yaml", "config.json"]),
    "no-such-package": ({"model": "pkg://no_such_package/model"},
        ["no_such_package is not installed", "pip install"]),
    "no-such-parent-package": ({"model": "pkg://no_such.package/model"},
        ["no_such.package is not installed"]),
    "no-such-folder-in-package": ({"model": "pkg://yaml/model"},
        ["package yaml has no folder model", "it holds"]),
    "target-matches-nothing": (
        {"lora.target_modules": ["query", "q_proj"]},
        ["lora.target_modules", "q_proj matches no module", "dense, key, query, value"],
    ),
    "regex-matches-nothing": ({"lora.target_modules": ".*q_proj"},
        [".*q_proj matches no module", "dense, key"]),
    "no-regex": ({"lora.target_modules": "*query"}, ["*query is no regex", "nothing to repeat"]),
    "no-targets": ({"lora.target_modules": []}, ["lora.target_modules", "matches no module"]),
    "target-is-no-linear": ({"lora.target_modules": ["word_embeddings"]},
        ["word_embeddings is no linear but Embedding"]),
    "no-such-device": ({"device": "warp"}, ["device warp", "take auto or cpu"]),
    # where it goes
    "output-dir-is-a-file": ({"output_dir": "train.jsonl"},
        ["output_dir train.jsonl is a file", "--set output_dir="]),
    "output-dir-in-a-file": ({"output_dir": "train.jsonl/run"},
        ["train.jsonl/run cannot be made", "Not a directory"]),
    # field case 11
    "output-dir-of-300-letters": ({"output_dir": "x" * 300},
        ["cannot be made (File name too long)"]),
    "output-dir-with-a-zero": ({"output_dir": "a\0b"}, ["output_dir: a text with a zero byte"]),
    "train-of-300-letters": ({"data.train": "x" * 300 + ".csv"},
        ["cannot be read", "File name too long"]),
    "model-of-300-letters": ({"model": "x" * 300}, ["model xxx"]),
    "model-with-a-zero": ({"model": "a\0b"}, ["model: a text with a zero byte"]),
    "output-dir-of-others": ({"output_dir": "model"},
        ["output_dir model holds files that are no run"]),
}  # fmt: skip


# keys of a cloud's config beside `model` -> their mistaken values; what is said
CLOUDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no-model": ({"model": None}, ["model", "None"]),
    "keys-of-a-run": ({"schedule": {"kind": "kr"}},
        ["schedule is not a key", "known here: model, quantization"]),
    "quantization": ({"quantization": "int4"},
        ["quantization", "'none', 'int8' or 'nf4'", "'int4'"]),
    "dtype": ({"dtype": "float16"}, ["dtype", "'float32' or 'bfloat16'", "'float16'"]),
    "two-places": ({"device": "cpu", "device_map": "auto"}, ["device and device_map", "keep one"]),
    "device-map": ({"device_map": ["cpu"]}, ["device_map", "{module: device}", "['cpu']"]),
    "no-devices": ({"limits": {"max_devices": 0}}, ["limits.max_devices", "1", "got 0"]),
    "no-tokens": ({"limits": {"max_tokens": 0}}, ["limits.max_tokens", "1", "got 0"]),
    "no-parts": ({"limits": {"max_parts": 0}}, ["limits.max_parts", "1", "got 0"]),
    "half-a-byte": ({"limits": {"memory_bytes": 0.5}}, ["limits.memory_bytes", "integer", "0.5"]),
    "no-patience": ({"limits": {"idle_s": 0}}, ["limits.idle_s", "greater than 0", "got 0"]),
    "typo-in-limits": ({"limits": {"max_token": 9}},
        ["limits.max_token is not a key", "did you mean max_tokens?"]),
}  # fmt: skip
