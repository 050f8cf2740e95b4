"""Split tinyshakespeare by speaker into train.jsonl and test.jsonl (one speech in ten), columns
speaker and text.

DLORA_ASSETS=... python examples/shakespeare.py runs/shakespeare-data
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Read the play, write both files into ``folder``."""
    play = Path(os.environ["DLORA_ASSETS"], "data/text/tinyshakespeare/input.txt.gz")
    speeches = []
    for speech in gzip.decompress(play.read_bytes()).decode().strip().split("\n\n"):
        speaker, _, text = speech.partition(":\n")
        if text:  # a stage direction has none
            speeches.append({"speaker": speaker, "text": text})
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in {
        "test": speeches[9::10],
        "train": [s for i, s in enumerate(speeches) if i % 10 != 9],
    }.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(speech) + "\n" for speech in chosen)
        )
        print(
            f"{name}: {len(chosen)} speeches of {len({speech['speaker'] for speech in chosen})}"
            " speakers"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
