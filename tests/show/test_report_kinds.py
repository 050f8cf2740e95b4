"""The page of a real peer, of a device, of peers with a cloud, and of one participant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dlora.show.report.write import write_report
from kit.run_page import CLOUD, Page, make_run


@pytest.mark.usefixtures("blank_pictures")
def test_the_page_of_a_real_peer_knows_its_own_rows_and_its_neighbours(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path, runs=("dec-lora",), names=["north", "south", "west"], labels=["no", "yes"]
    )
    lines = (folder / "log.jsonl").read_text().splitlines()
    start = json.loads(lines[0]) | {"own": "south"}
    for peer in start["peers"]:
        if peer["name"] != "south":
            peer.update(rows=None, labels=None)
    (folder / "log.jsonl").write_text("\n".join([json.dumps(start), *lines[1:]]) + "\n")
    summary = json.loads((folder / "summary.json").read_text())
    summary["runs"]["dec-lora"]["edges"] = {
        "north": {"mixed": 5, "left_out": 1, "in_doubt": 0},
        "west": {"mixed": 6, "left_out": 0, "in_doubt": 0},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(folder))
    cells = page.text("td", "th")
    assert "north 5 1 0" in cells and "west 6 0 0" in cells
    assert "north –" in cells and "south 101" in cells
    assert "sent by all peers" not in page.text()
    assert "north was left out of 1 of 6 rounds." in page.text("p")


@pytest.mark.usefixtures("blank_pictures")
def test_an_average_of_some_is_not_the_result_of_all(tmp_path: Path) -> None:
    folder = make_run(tmp_path, runs=("dec-lora",), names=["north", "south", "west"])
    summary = json.loads((folder / "summary.json").read_text())
    summary["runs"]["dec-lora"] |= {
        "consensus_peers": 1,
        "warnings": ["the average is of 1 of 3 peers"],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    text = Page(write_report(folder)).text("p")
    assert "The average of 1 of the 3 peers on a ring reached 84.3 % accuracy." in text
    assert "the average is of 1 of 3 peers." in text and "together" not in text


def test_a_device_has_a_cloud_and_no_peers(tmp_path: Path) -> None:
    page = Page(
        write_report(
            make_run(tmp_path, runs=("dlora",), names=["phone"], labels=["no", "yes"], split=CLOUD)
        )
    )
    assert "phone with its frozen model in the cloud <hub> reached 84.3 % accuracy." in page.text(
        "p"
    )
    assert (
        page.text("thead", "th") == "Run Accuracy Best With the cloud Time Steps/s Tokens/s DLoRA"
    )
    # written before tokens were counted
    assert page.text("td") == "84.3 % 84.4 % after 4 rounds 180 MB 12.0 s 20 –"
    assert "180 MB" in page.text("b") and "474 kB" not in page.text()
    assert "docs/privacy.md" in page.text("li")
    assert (
        "int8" in page.text("dd")
        and "4" in page.text("dd").split()
        and "100 (no: 10, yes: 10)" in page.text("dd")
    )
    assert len(page.pictures()) == 4  # the score over rounds, bytes and time, and the loss
    assert "with the cloud, both ways (MB)" in page.text("text")
    words = page.text("h1", "h2", "p", "li", "b", "th", "dt", "figcaption", "text").lower()
    for foreign in (
        "peer",
        "together",
        "average",
        "neighbour",
        "graph",
        "consensus",
        "diamond",
        "one message",
    ):
        assert foreign not in words.replace("peft", ""), foreign


@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.parametrize(
    ("stop_at", "said"), [(0, "reached 54.3 %"), (3, "So far, after 3 of 6 rounds: phone with")]
)
def test_a_device_under_way(tmp_path: Path, stop_at: int, said: str) -> None:
    page = Page(
        write_report(
            make_run(tmp_path, runs=("dlora",), names=["phone"], split=CLOUD, stop_at=stop_at)
        )
    )
    assert said in page.text("p")
    assert ("90.0 MB" in page.text("td")) == (stop_at == 3)


def test_peers_with_a_cloud_show_both_wires(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path, runs=("dec-lora", "local"), split=CLOUD)))
    assert (
        "8 peers on a ring with their frozen model in a cloud reached 84.3 % accuracy together"
        in page.text("p")
    )
    assert page.text("th").startswith(
        "Run Average of all Peers' own, mean Best average Sent With the cloud Time Steps/s Tokens/s"
        " Dec-LoRA"
    )
    assert page.text("td").startswith("84.3 % 83.3 % 84.4 % after 4 rounds 474 kB 180 MB 12.0 s 20")
    assert "474 kB" in page.text("b") and "180 MB" in page.text("b")
    assert "sent by all peers (kB)" in page.text(
        "text"
    ) and "with the cloud, both ways (MB)" in page.text("text")
    assert len(page.pictures()) == 8


@pytest.mark.usefixtures("blank_pictures")
def test_one_participant_is_said_to_be_one_and_on_no_graph(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path, runs=("dec-lora",), names=["solo"], stop_at=4)))
    assert page.text("h1") == "One participant"
    assert "So far, after 4 of 6 rounds: one participant reached 82.4 % accuracy." in page.text("p")
    words = page.text("h1", "h2", "p", "li", "b", "figcaption", "th").lower()
    strange = (
        "ring",
        "talks",
        "sent",
        "spectral",
        "together",
        "averaged",
        "dec-lora",
        "peer",
        "peers",
        "neighbours",
    )
    assert not [word for word in strange if word in words.replace(",", " ").split()]
    other = tmp_path / "cloud"
    other.mkdir()
    cloud = Page(write_report(make_run(other, runs=("dec-lora",), names=["solo"], split=CLOUD)))
    assert (
        "One participant with its frozen model in a cloud reached 84.3 % accuracy."
        in cloud.text("p")
    )


@pytest.mark.usefixtures("blank_pictures")
def test_of_many_peers_the_page_shows_some(tmp_path: Path) -> None:
    """The best, the worst and others, and a line that says where all are. Peer 0 scored worst."""
    names = [f"peer-{number:03d}" for number in range(300)]
    folder = make_run(tmp_path, runs=("dec-lora",), names=names, participation=0.1)
    write_report(folder)
    page = Page(folder / "report.html")
    shown = [data for tag, data in page.words if tag == "th" and data.startswith("peer-")]
    assert len(shown) == 50 and shown == sorted(shown)
    assert set(names[:10] + names[-10:]) <= set(shown)
    assert "50 of 300 peers, the 10 best and the 10 worst" in page.text("p")
    assert "summary.json has all." in page.text("p")
    assert "Each round draws 30 peers anew; the others rest." in page.text("p")
