"""A loop of your own with an adapter of your own: bottlenecks by hand, plain torch, four sites.

The folder of data and models comes from DLORA_ASSETS. For example:

    dlora local --peers 4 --rounds 4 examples/any-loop/loop.py
"""

import gzip
import os
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import dlora

STEPS, EVERY, LENGTH, ROWS = 40, 10, 128, 8


class Bottleneck(nn.Module):
    """A frozen layer, and beside its output a small network that trains (Houlsby, 1902.00751)."""

    def __init__(self, frozen: nn.Module, width: int, inner: int) -> None:
        super().__init__()
        self.frozen, self.down, self.up = frozen, nn.Linear(width, inner), nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)  # at first the adapter changes nothing
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output and what the adapter adds to it."""
        inner = self.frozen(x)
        out: Tensor = inner + self.up(torch.relu(self.down(inner)))
        return out


assets = Path(os.environ["DLORA_ASSETS"])
index, count = int(os.environ.get("DLORA_INDEX", "0")), int(os.environ.get("DLORA_COUNT", "1"))

folder = assets / "models/stories260K/hf"
model = transformers.AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
torch.manual_seed(0)  # the adapters begin with the same values at every site
for layer in model.model.layers:
    layer.mlp = Bottleneck(layer.mlp, model.config.hidden_size, 16)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=3e-3)

# Each site has its own part of the play.
play = gzip.decompress((assets / "data/text/tinyshakespeare/input.txt.gz").read_bytes()).decode()
part = len(play) // count
tokens = torch.tensor(tokenizer(play[index * part : (index + 1) * part][:200_000]).input_ids)
draw = torch.Generator().manual_seed(index)

peer = dlora.Peer(agree={"length": LENGTH})
with peer.joined(model):
    for step in range(1, STEPS + 1):
        starts = torch.randint(len(tokens) - LENGTH, (ROWS,), generator=draw)
        rows = torch.stack([tokens[start : start + LENGTH] for start in starts])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            print(f"step {step}: loss {loss.item():.3f}, {peer.mix()}")
    average = peer.average()
    with peer.holding(average):
        loss = model(input_ids=rows, labels=rows).loss
        print(f"loss of the average: {loss.item():.3f}")
