"""How rows are divided among peers: iid, dirichlet, label shares, by column, files."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from dlora.config.names import safe_name
from dlora.config.training import PartitionSection
from dlora.data.rows import Row, require_column
from dlora.errors import ConfigError, DataError
from dlora.seeds import derive_seed

Counts = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]

_TRIES = 1000  # redraws of a Dirichlet partition before giving up


def partition(
    section: PartitionSection,
    num_peers: int | None,
    labels: Sequence[int] | None,
    num_labels: int | None,
    rows: Sequence[Row],
    seed: int,
) -> dict[str, list[int]]:
    """For each peer's name the ascending indices of its `rows`; no row is given twice, and no peer
    is left empty. It depends on its arguments alone. `labels` (rows,) are class indices below
    `num_labels`; dirichlet and label-shares need them. Kind files is not known here: its rows come
    divided. Raises DataError or ConfigError when the rows cannot be divided as asked, and says what
    to change.
    """
    if num_peers is not None and num_peers > len(rows):
        raise DataError(
            f"{num_peers} peers asked for, {len(rows)} rows to divide; lower peers.count or bring"
            " more rows"
        )
    if section.kind == "by-column":
        return _by_column(section, num_peers, rows)
    generator = np.random.default_rng(derive_seed(seed, "partition"))
    if section.kind == "iid":
        weights = _sizes(section, num_peers, None)
        order = generator.permutation(len(rows))
        return _named(np.split(order, np.cumsum(_apportion(len(rows), weights))[:-1]))

    assert (
        labels is not None
        and num_labels is not None
        and section.kind in ("dirichlet", "label-shares")
    )
    # (labels,)
    label_counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=num_labels)
    if section.kind == "dirichlet":
        counts = _dirichlet(section, num_peers, label_counts, generator)
    else:
        counts = _label_shares(section, num_peers, label_counts)
    return _named(_deal(counts, np.asarray(labels), generator))


def by_owner(
    owners: Sequence[str], files: Collection[str], num_peers: int | None
) -> dict[str, list[int]]:
    """The same for kind files: `owners` (rows,) says from whose file each row is, `files` names the
    peers. Raises as `partition` does.
    """
    if num_peers is not None and num_peers != len(files):
        raise ConfigError(
            f"peers.count is {num_peers}, data.train names {len(files)} files; make them equal"
        )
    hands: dict[str, list[int]] = {peer: [] for peer in files}
    for index, owner in enumerate(owners):
        hands[owner].append(index)
    for peer, hand in hands.items():
        if not hand:
            raise DataError(f"data.limit leaves {peer} without rows; raise it")
    return hands


def _apportion(total: int, weights: Shares) -> Counts:
    """`total` as whole numbers in proportion to `weights`, largest remainder first; they sum to
    `total`.
    """
    exact: Shares = total * weights / weights.sum()
    counts: Counts = np.floor(exact).astype(np.int64)
    rest = total - int(counts.sum())
    # rounded, so that the last bit of a float does not decide between equal remainders
    counts[np.argsort(-np.round(exact - counts, 9), kind="stable")[:rest]] += 1
    return counts


def _sizes(section: PartitionSection, num_peers: int | None, num_shares: int | None) -> Shares:
    """Relative sizes (peers,); their number is what peers.count, shares and sizes agree on."""
    counts = {
        "peers.count": num_peers,
        "shares": num_shares,
        "sizes": len(section.sizes) if section.sizes else None,
    }
    said = {key: count for key, count in counts.items() if count is not None}
    if not said:
        raise ConfigError(
            f"partition {section.kind} does not say how many peers there are; set peers.count"
        )
    if len(set(said.values())) > 1:
        found = ", ".join(f"{count} by {key}" for key, count in said.items())
        raise ConfigError(
            f"partition {section.kind}: the number of peers is {found}; make them equal"
        )
    return np.array(section.sizes) if section.sizes else np.ones(next(iter(said.values())))


def _dirichlet(
    section: PartitionSection,
    num_peers: int | None,
    label_counts: Counts,
    generator: np.random.Generator,
) -> Counts:
    """Each label's rows in shares ~ Dirichlet(concentration) over the peers (arXiv 1909.06335);
    (peers, labels).
    """
    peers = len(_sizes(section, num_peers, None))
    rows = int(label_counts.sum())
    if peers * section.min_rows > rows:
        raise DataError(
            f"partition dirichlet: {peers} peers with min_rows {section.min_rows} need"
            f" {peers * section.min_rows} rows, there are {rows}; lower peers.count or min_rows"
        )
    alpha = np.full(peers, section.concentration)
    for _ in range(_TRIES):
        draws = generator.dirichlet(alpha, size=len(label_counts))  # (labels, peers)
        counts = np.stack(
            [_apportion(int(n), p) for n, p in zip(label_counts, draws, strict=True)], axis=1
        )
        if counts.sum(axis=1).min() >= section.min_rows:
            return counts
    raise DataError(
        f"partition dirichlet: in {_TRIES} draws with concentration {section.concentration:g} some"
        f" peer of {peers} always had fewer than min_rows {section.min_rows} of {rows} rows; raise"
        " concentration, lower min_rows or peers.count"
    )


def _label_shares(section: PartitionSection, num_peers: int | None, label_counts: Counts) -> Counts:
    """The largest counts (peers, labels) that have the sizes and the shares asked for and use no
    row twice.
    """
    assert section.shares is not None
    labels = len(label_counts)
    for peer, row in enumerate(section.shares):
        if len(row) != labels:
            raise ConfigError(
                f"partition shares: row {peer} has {len(row)} entries, the data has {labels} labels"
            )
        if min(row) < 0 or sum(row) <= 0:
            raise ConfigError(
                f"partition shares: row {peer} is {list(row)}; expected no negatives and a sum"
                " above 0"
            )
    sizes = _sizes(section, num_peers, len(section.shares))
    sizes = sizes / sizes.sum()
    shares = np.array(section.shares, dtype=np.float64)
    shares /= shares.sum(axis=1, keepdims=True)  # (peers, labels)

    demand = sizes @ shares  # (labels,): rows of each label in one row handed out
    asked = demand > 0
    total = int(np.min(label_counts[asked] / demand[asked]) + 1e-9)
    # whole rows may not fit at the exact maximum: then a row or two below it
    for size in range(total, 0, -1):
        rows = np.floor(size * sizes + 1e-9).astype(np.int64)  # (peers,)
        if rows.min() < 1:
            break
        counts = _round_within(rows[:, None] * shares, rows, label_counts)
        if counts is not None:
            return counts
    raise DataError(
        f"partition label-shares: with {label_counts.tolist()} rows a label, shares and sizes leave"
        " a peer without rows; change them or bring more rows"
    )


def _round_within(exact: Shares, rows: Counts, label_counts: Counts) -> Counts | None:
    """`exact` (peers, labels) as whole numbers less than one away; rows sum to `rows`, columns fit
    the labels.
    """
    counts = np.floor(exact + 1e-9).astype(np.int64)
    left = label_counts - counts.sum(axis=0)
    remainders = np.round(exact - counts, 9)
    for peer, missing in enumerate(rows - counts.sum(axis=1)):
        open_labels = np.flatnonzero((left > 0) & (remainders[peer] > 0))
        if len(open_labels) < missing:
            return None
        chosen = open_labels[np.argsort(-remainders[peer, open_labels], kind="stable")[:missing]]
        counts[peer, chosen] += 1
        left[chosen] -= 1
    return counts


def _deal(
    counts: Counts, labels: npt.NDArray[np.int64], generator: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """Row indices for each peer, drawn without replacement from each label; counts is (peers,
    labels).
    """
    hands: list[list[npt.NDArray[np.int64]]] = [[] for _ in counts]
    for label in range(counts.shape[1]):
        order = generator.permutation(np.flatnonzero(labels == label))
        # last: left over
        for hand, piece in zip(hands, np.split(order, np.cumsum(counts[:, label])), strict=False):
            hand.append(piece)
    return [np.concatenate(hand) for hand in hands]


def _by_column(
    section: PartitionSection, num_peers: int | None, rows: Sequence[Row]
) -> dict[str, list[int]]:
    assert section.column is not None
    groups: dict[str, list[int]] = {}
    for index, value in enumerate(require_column(rows, section.column, "the training data")):
        groups.setdefault(str(value), []).append(index)
    if num_peers is None:
        names: dict[str, str] = {}
        for value in sorted(groups):
            name = safe_name(value)
            # some file systems do not tell upper from lower case
            other = names.setdefault(name.casefold(), value)
            if not name or other != value:
                why = (
                    "has no letter or digit"
                    if not name
                    else f"and {other!r} are the same as folder names"
                )
                raise DataError(
                    f"partition by-column {section.column}: {value!r} {why}; rename it, or set"
                    " peers.count"
                )
        return {safe_name(value): groups[value] for value in sorted(groups)}
    if num_peers > len(groups):
        raise DataError(
            f"partition by-column: {num_peers} peers asked for, {section.column} has {len(groups)}"
            " values; lower peers.count or leave it out"
        )
    hands: list[list[int]] = [[] for _ in range(num_peers)]
    for value in sorted(groups, key=lambda value: (-len(groups[value]), value)):
        min(hands, key=len).extend(groups[value])
    return _named([np.array(hand) for hand in hands])


def _named(hands: Sequence[npt.NDArray[np.int64]]) -> dict[str, list[int]]:
    digits = len(str(len(hands) - 1))
    named = {f"peer-{index:0{digits}d}": sorted(hand.tolist()) for index, hand in enumerate(hands)}
    for name, indices in named.items():
        if not indices:
            raise DataError(
                f"the partition leaves {name} without rows; make sizes less unequal or bring more"
                " rows"
            )
    return named
