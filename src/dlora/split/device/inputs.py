"""Which inputs a forward through the cloud accepts, which go to the body, and which are refused."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlora.errors import ConfigError

# inputs that go to the body in the cloud; ids are sent as embedded tokens
SENT = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
# inputs that stay on the device, for the head and the loss
HERE = (
    "labels",
    "shift_labels",
    "num_items_in_batch",
    "logits_to_keep",
    "return_dict",
    "loss_positions",
)
# inputs that repeat what position_ids say, and must agree with them
SAID_AGAIN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_NO_CACHE = (
    "the body in the cloud keeps no key-value cache; call generate(input_ids, ..., use_cache=False)"
)
REFUSED = {  # name -> what to do if its value is not None and not False
    "past_key_values": _NO_CACHE,
    "use_cache": _NO_CACHE,
    "cache_position": _NO_CACHE,
    "output_hidden_states": "the last hidden states alone come back from the cloud; remove it",
    "output_attentions": "attention weights stay in the cloud; remove it",
    "output_router_logits": (
        "router logits stay in the cloud, and with them the loss that balances experts; remove it"
    ),
    "is_causal": "the body in the cloud attends as its own config says; remove it",
    "head_mask": "transformers 5 reads none, and neither does the cloud; remove it",
}
# a model's config can ask for these outputs too
_IN_CONFIG = ("output_hidden_states", "output_attentions", "output_router_logits")


def by_name(forward: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the method ``forward`` by their names, without those that are None.

    Raises ConfigError if there are too many, or if one is given twice.
    """
    names = _names(forward)
    if len(args) > len(names) or kwargs.keys() & names[: len(args)]:
        raise ConfigError(f"a forward takes {', '.join(names)}; give each once, by its name")
    return {
        name: value
        for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items()
        if value is not None
    }


@functools.cache
def _names(forward: Any) -> tuple[str, ...]:
    """The names of the method's parameters in order, without self."""
    return tuple(inspect.signature(forward).parameters)[1:]


def check_names(given: Mapping[str, Any], config: Any) -> None:
    """Raise ConfigError for an input that a split model would not treat as transformers does."""
    for name, value in given.items():
        if name in REFUSED and value is not False:
            raise ConfigError(f"{name}: {REFUSED[name]}")
        if name not in (*SENT, *HERE, *SAID_AGAIN, *REFUSED):
            raise ConfigError(
                f"{name}: a split model takes {', '.join((*SENT, 'labels'))}; remove it"
            )
    for name in _IN_CONFIG:
        if getattr(config, name, False) and name not in given:
            raise ConfigError(
                f"{name} in the model's config:"
                f" {REFUSED[name].replace('remove it', 'set it to False there')}"
            )


def real_tokens(attention_mask: Any, shape: torch.Size) -> Tensor:
    """Where real tokens are: (B, L) bool on the CPU.

    ``shape`` is (B, L); without a mask all tokens are real. Raises ConfigError for a mask of
    another shape, or a row without any token.
    """
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != shape:
        came = (
            tuple(attention_mask.shape)
            if isinstance(attention_mask, Tensor)
            else type(attention_mask).__name__
        )
        raise ConfigError(f"attention_mask has shape {came}; expected {tuple(shape)}: rows, tokens")
    mask = attention_mask.cpu() != 0
    if not mask.any(dim=1).all():
        raise ConfigError("attention_mask leaves a row without any token; remove that row")
    return mask


def per_token(name: str, value: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Whole numbers for each token: (B, L) on the CPU. One row is enough for all rows.

    None if ``value`` is None. Raises ConfigError for another shape, or a number that is negative or
    not whole.
    """
    if value is None:
        return None
    if (
        value.dim() > 2
        or value.shape[-1] != shape[1]
        or (value.dim() == 2 and len(value) not in (1, shape[0]))
    ):
        raise ConfigError(
            f"{name} has shape {tuple(value.shape)}; expected {tuple(shape)}: rows, tokens"
        )
    numbers = value.cpu().expand(shape)
    if numbers.is_floating_point() or int(numbers.min()) < 0:
        raise ConfigError(f"{name} holds {numbers.min().item()}; expected whole numbers from 0 on")
    return numbers


def several_texts(given: Mapping[str, Any], positions: Tensor | None, mask: Tensor) -> bool:
    """Whether a row holds several texts that the body must keep apart; transformers decides the
    same way.

    It does if positions (B, L) begin again within the row and no attention mask is given. TRL and
    the flattening collators also give other inputs that separate texts (``SAID_AGAIN``). Raises
    ConfigError if one of them names other texts than the positions do.
    """
    begins = torch.zeros_like(mask)
    begins[:, 0] = True
    if positions is not None and "attention_mask" not in given:
        begins[:, 1:] = positions.diff(dim=1) != 1
    starts = begins.flatten().nonzero().flatten()
    edges = torch.cat([starts, torch.tensor([begins.numel()])])
    for name in SAID_AGAIN:
        if name not in given:
            continue
        value = torch.as_tensor(given[name]).cpu()
        if name == "seq_idx":
            same = value.shape == begins.shape and bool(
                ((value.diff(dim=1) != 0) == begins[:, 1:]).all()
            )
        elif name.startswith("cu_seq_lens"):
            same = value.flatten().tolist() == edges.tolist()
        else:
            same = int(value) == int(edges.diff().max())
        if not same:
            raise ConfigError(
                f"{name} names other texts than position_ids: give position_ids that begin anew"
                " with each text, and no attention_mask"
            )
    return len(starts) > len(begins)


def target_positions(labels: Tensor) -> Tensor:
    """The tokens from which a language model predicts a target, (B, L) bool.

    ``labels``: (B, L). Position l predicts token l + 1; a label of -100 is no target.
    """
    return torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))


def loss_positions(given: Mapping[str, Any]) -> Tensor | None:
    """The tokens whose hidden states the loss of a language model reads, (B, L) bool.

    None without labels. Raises ConfigError if the loss reads padding, because the cloud sends no
    hidden states of padding.
    """
    labels, shifted = given.get("labels"), given.get("shift_labels")
    if labels is None:
        return None
    looks = target_positions(labels) if shifted is None else shifted != -100
    mask = given.get("attention_mask")
    if (
        isinstance(mask, Tensor)
        and mask.shape == looks.shape
        and (looks & (mask.to(looks.device) == 0)).any()
    ):
        raise ConfigError(
            "labels hold targets that padding would foretell (attention_mask is 0 there, or just"
            " before): set them to -100"
        )
    return looks
