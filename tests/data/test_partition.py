"""Partitions: no row twice, nobody empty, shares kept, the same by the same seed."""

import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlora.config.names import safe_name
from dlora.config.training import PartitionSection
from dlora.data.partition import by_owner, partition
from dlora.data.rows import read_rows
from dlora.errors import ConfigError, DataError, UserError

Hands = dict[str, list[int]]


def divide(
    kind: str,
    peers: int | None,
    labels: list[int],
    seed: int = 0,
    num_labels: int | None = None,
    **keys: Any,
) -> Hands:
    section = PartitionSection.model_validate({"kind": kind, **keys})
    rows = [{"text": "x"}] * len(labels)
    return partition(section, peers, labels, num_labels or max(labels) + 1, rows, seed)


def check(hands: Hands, num_rows: int) -> None:
    dealt = [index for hand in hands.values() for index in hand]
    assert len(dealt) == len(set(dealt))
    assert all(0 <= index < num_rows for index in dealt)
    assert all(hands.values())
    assert all(hand == sorted(hand) for hand in hands.values())


@given(st.integers(1, 12), st.integers(0, 200), st.integers(0, 5))
def test_iid_deals_every_row_evenly(peers: int, extra: int, seed: int) -> None:
    labels = [0] * (peers + extra)
    hands = divide("iid", peers, labels, seed)
    check(hands, len(labels))
    sizes = [len(hand) for hand in hands.values()]
    assert sum(sizes) == len(labels) and max(sizes) - min(sizes) <= 1
    assert hands == divide("iid", peers, labels, seed)


def test_names_are_zero_padded() -> None:
    assert list(divide("iid", 3, [0] * 20)) == ["peer-0", "peer-1", "peer-2"]
    assert list(divide("iid", 11, [0] * 20))[::10] == ["peer-00", "peer-10"]


def test_iid_sizes_are_relative_and_count_the_peers() -> None:
    hands = divide("iid", None, [0] * 100, sizes=(1, 2, 7))
    assert [len(hand) for hand in hands.values()] == [10, 20, 70]


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("iid", {}),
        ("dirichlet", {"concentration": 0.5}),
        ("label-shares", {"shares": ((1, 3), (3, 1))}),
    ],
)
def test_another_seed_is_another_partition(kind: str, keys: dict[str, Any]) -> None:
    labels = [0, 1] * 50
    assert divide(kind, 2, labels, 1, **keys) == divide(kind, 2, labels, 1, **keys)
    assert divide(kind, 2, labels, 1, **keys) != divide(kind, 2, labels, 2, **keys)


@settings(deadline=None)
@given(
    st.integers(1, 6),
    st.lists(st.integers(20, 60), min_size=1, max_size=4),
    st.sampled_from([0.3, 1.0, 100.0]),
)
def test_dirichlet_deals_every_row_and_keeps_min_rows(
    peers: int, counts: list[int], concentration: float
) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    hands = divide("dirichlet", peers, labels, concentration=concentration, min_rows=2)
    check(hands, len(labels))
    assert sum(map(len, hands.values())) == len(labels)
    assert min(map(len, hands.values())) >= 2


def test_dirichlet_small_is_skewed_and_large_is_even() -> None:
    labels = [0, 1] * 2000

    def spread(concentration: float) -> float:
        hands = divide("dirichlet", 4, labels, concentration=concentration)
        shares = [sum(labels[index] for index in hand) / len(hand) for hand in hands.values()]
        return max(shares) - min(shares)

    assert spread(0.05) > 0.9
    assert spread(10_000) < 0.1


def test_dirichlet_gives_up_in_words() -> None:
    with pytest.raises(
        DataError,
        match="in 1000 draws with concentration 0.01 .* min_rows 25 of 100 rows; raise conc",
    ):
        divide("dirichlet", 4, [0] * 100, concentration=0.01, min_rows=25)
    with pytest.raises(DataError, match="4 peers with min_rows 30 need 120 rows, there are 100"):
        divide("dirichlet", 4, [0] * 100, concentration=1.0, min_rows=30)


@st.composite
def shared(draw: st.DrawFn) -> tuple[list[int], list[list[int]], list[float]]:
    labels, peers = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    shares = draw(
        st.lists(
            st.lists(st.integers(0, 9), min_size=labels, max_size=labels).filter(any),
            min_size=peers,
            max_size=peers,
        )
    )
    sizes = draw(st.lists(st.sampled_from([1.0, 2.0, 3.5]), min_size=peers, max_size=peers))
    return draw(st.lists(st.integers(60, 300), min_size=labels, max_size=labels)), shares, sizes


@settings(deadline=None)
@given(shared(), st.booleans())
def test_label_shares_are_kept_within_a_row(
    made: tuple[list[int], list[list[int]], list[float]], sized: bool
) -> None:
    counts, shares, sizes = made
    sizes = sizes if sized else [1.0] * len(shares)
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    keys: dict[str, Any] = {"sizes": tuple(sizes)} if sized else {}
    hands = divide(
        "label-shares",
        None,
        labels,
        num_labels=len(counts),
        shares=tuple(map(tuple, shares)),
        **keys,
    )
    check(hands, len(labels))
    for hand, row in zip(hands.values(), shares, strict=True):
        held = Counter(labels[index] for index in hand)
        for label, share in enumerate(row):
            assert abs(held[label] - len(hand) * share / sum(row)) < 1
    totals = [len(hand) for hand in hands.values()]
    if not sized:
        assert len(set(totals)) == 1
    for total, size in zip(totals, sizes, strict=True):
        assert abs(total - sum(totals) * size / sum(sizes)) <= len(sizes)
    # As large as possible: some label is used up to rounding, its rest is less than a row or two a
    # peer.
    demand = [
        sum(s * row[i] / sum(row) for s, row in zip(sizes, shares, strict=True)) / sum(sizes)
        for i in range(len(counts))
    ]
    largest = min(count / need for count, need in zip(counts, demand, strict=True) if need)
    assert largest - 2 * len(shares) - 2 <= sum(totals) <= largest + 1e-9


def test_the_papers_three_peers() -> None:
    labels = [0] * 1000 + [1] * 1000
    hands = divide("label-shares", 3, labels, shares=((0.15, 0.85), (0.85, 0.15), (0.5, 0.5)))
    made = [Counter(labels[index] for index in hand) for hand in hands.values()]
    assert [sum(counter.values()) for counter in made] == [666, 666, 666]
    assert [round(counter[0] / 666, 2) for counter in made] == [0.15, 0.85, 0.5]


def test_label_shares_round_within_the_rows_there_are() -> None:
    # 4 rows a peer are 1.33 and 2.67: two peers round as nearest, the third takes what is left.
    labels = [0] * 4 + [1] * 8
    hands = divide("label-shares", None, labels, shares=((1, 2),) * 3)
    check(hands, 12)
    assert [sum(labels[index] for index in hand) for hand in hands.values()] == [3, 3, 2]
    assert [len(hand) for hand in hands.values()] == [4, 4, 4]


@pytest.mark.parametrize(
    ("kind", "peers", "labels", "keys", "said"),
    [
        (
            "iid",
            4,
            [0, 1, 0],
            {},
            "4 peers asked for, 3 rows to divide; lower peers.count or bring more rows",
        ),
        (
            "iid",
            None,
            [0, 1],
            {},
            "partition iid does not say how many peers there are; set peers.count",
        ),
        (
            "iid",
            2,
            [0] * 9,
            {"sizes": (1, 1, 1)},
            "the number of peers is 2 by peers.count, 3 by sizes; make them equal",
        ),
        ("iid", None, [0] * 9, {"sizes": (1, 1000)}, "the partition leaves peer-0 without rows"),
        (
            "dirichlet",
            None,
            [0, 1],
            {"concentration": 1},
            "partition dirichlet does not say how many peers",
        ),
        (
            "label-shares",
            3,
            [0, 1] * 9,
            {"shares": ((1, 1), (1, 1))},
            "3 by peers.count, 2 by shares",
        ),
        (
            "label-shares",
            2,
            [0, 1] * 9,
            {"shares": ((1, 1), (1, 1, 1))},
            "row 1 has 3 entries, the data has 2 labels",
        ),
        (
            "label-shares",
            1,
            [0, 1] * 9,
            {"shares": ((0, 0),)},
            "expected no negatives and a sum above 0",
        ),
        (
            "label-shares",
            1,
            [0, 1] * 9,
            {"shares": ((2, -1),)},
            "expected no negatives and a sum above 0",
        ),
        (
            "label-shares",
            3,
            [0, 1, 1, 1],
            {"shares": ((1, 0),) * 3},
            "with [1, 3] rows a label, shares and sizes leave",
        ),
    ],
)
def test_what_cannot_be_divided(
    kind: str, peers: int | None, labels: list[int], keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        divide(kind, peers, labels, **keys)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def by_column(values: list[Any], peers: int | None = None) -> Hands:
    rows = [{"site": value} for value in values]
    return partition(
        PartitionSection.model_validate({"kind": "by-column", "column": "site"}),
        peers,
        None,
        None,
        rows,
        0,
    )


def test_by_column_names_the_peers() -> None:
    assert by_column(["b/1", "a b", "b/1", 7]) == {"7": [3], "a-b": [1], "b-1": [0, 2]}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.data())
def test_by_column_deals_whole_values(values: list[int], data: st.DataObject) -> None:
    peers = data.draw(st.integers(1, len(set(values))))
    hands = by_column(values, peers)
    check(hands, len(values))
    assert sorted(index for hand in hands.values() for index in hand) == list(range(len(values)))
    holders = {
        value: {peer for peer, hand in hands.items() for i in hand if values[i] == value}
        for value in values
    }
    assert all(len(peers) == 1 for peers in holders.values())
    # Largest first to the smallest peer: nobody is ahead by more than the largest value.
    sizes = [len(hand) for hand in hands.values()]
    assert max(sizes) - min(sizes) <= max(Counter(values).values())


def test_by_column_deals_the_largest_first() -> None:
    assert by_column(["a", "b", "c", "c"], 2) == {"peer-0": [2, 3], "peer-1": [0, 1]}


def test_by_column_errors() -> None:
    with pytest.raises(DataError, match="3 peers asked for, site has 2 values"):
        by_column(["a", "b", "a"], 3)
    with pytest.raises(DataError, match="'a b' and 'A/B' are the same as folder names; rename it"):
        by_column(["a b", "A/B"])
    with pytest.raises(DataError, match="'\\?\\?' has no letter or digit"):
        by_column(["??"])
    with pytest.raises(DataError, match="the training data row 2 has no value for site"):
        by_column(["a", None])


def test_by_owner() -> None:
    assert by_owner(["x", "y", "x"], ["x", "y"], None) == {"x": [0, 2], "y": [1]}
    with pytest.raises(ConfigError, match="peers.count is 3, data.train names 2 files"):
        by_owner(["x", "y"], ["x", "y"], 3)
    with pytest.raises(DataError, match="data.limit leaves y without rows"):
        by_owner(["x"], ["x", "y"], None)


def test_a_by_column_name_fits_every_disk() -> None:
    """Field case 35: 80 letters of four bytes are 320, and a name takes 255; found before training,
    not after.
    """
    clients = ["\U00020000" * 80, "\U00020001" * 80, "é" * 80]
    section = PartitionSection(kind="by-column", column="who")
    hands = partition(section, None, None, None, [{"who": who} for who in clients], 0)
    assert [len(name.encode()) for name in hands] == [160, 200, 200]
    same = [{"who": clients[0]}, {"who": clients[0] + "!"}]
    with pytest.raises(DataError, match="are the same as folder names"):
        partition(section, None, None, None, same, 0)


def test_safe_name() -> None:
    assert [safe_name(name) for name in ("FIRST Citizen:", "../..", "Zoë", "x" * 99)] == [
        "FIRST-Citizen",
        "",
        "Zoë",
        "x" * 80,
    ]


@pytest.mark.skipif(
    "DLORA_ASSETS" not in os.environ, reason="DLORA_ASSETS names no folder with the real data"
)
def test_dirichlet_on_sst2() -> None:
    labels = [
        int(row["label"])
        for row in read_rows(f"{os.environ['DLORA_ASSETS']}/data/glue/SST-2/train.tsv")
    ]
    hands = divide("dirichlet", 10, labels, concentration=0.1, min_rows=20)
    check(hands, len(labels))
    assert sum(map(len, hands.values())) == 67_349 and min(map(len, hands.values())) >= 20
    shares = [sum(labels[index] for index in hand) / len(hand) for hand in hands.values()]
    assert max(shares) > 0.95 and min(shares) < 0.05
