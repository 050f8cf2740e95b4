"""The page says what the run's files say, in one file, and escapes all of it."""

from __future__ import annotations

import html
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlora.errors import RunError
from dlora.show.report.write import write_report
from kit.run_page import Page, make_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a run that ended: all four runs on a ring of 8."""
    folder = make_run(tmp_path_factory.mktemp("finished"), labels=["negative", "positive"])
    assert write_report(folder) == folder / "report.html"
    return Page(folder / "report.html")


def test_a_finished_run_in_words_and_numbers(finished: Page) -> None:
    page = finished
    sentence = (
        "8 peers on a ring reached 84.3 % accuracy together; training on the pooled data 84.9 %; "
        "FedAvg 84.5 %; alone they reached 65.0 %."
    )
    assert sentence in page.text("p")
    assert "+19.3 points" in page.text("b") and "−0.6 points" in page.text("b")
    assert "84.4 % after 4 rounds" in page.text("td")  # the best, from the summary
    # 6 rounds x 8 peers x 2 neighbours x 4936 bytes
    assert "474 kB" in page.text("td") and "12.0 s" in page.text("td")
    # the third peer
    assert "negative 12, positive 12" in page.text("td") and "52.0 %" in page.text("td")
    assert "not finished" not in page.text()
    assert len(page.pictures()) == 7


def change_summary(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write summary.json with other figures of the first run and of the whole."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    summary["runs"]["dec-lora"] |= changes.pop("run", {})
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    return summary


@pytest.mark.usefixtures("blank_pictures")
def test_times_tokens_learning_rate_and_what_was_taken_for_what(tmp_path: Path) -> None:
    spent = {"training": 9.0, "exchange": 3.0, "scoring": 4.5, "saving": 0.5}
    folder = make_run(tmp_path, labels=["<i>no", "yes"], runs=("dec-lora",))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    train = {"learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"train": train}))
    change_summary(
        folder,
        spent_s={"start_up": 7.25, **spent, "report": 1.0, "other": 0.1, "in_all": 25.35},
        label_names=["<i>no", "yes"],
        run={
            "spent_s": spent,
            "tokens_per_second": 1234.5,
            "confusion": [[70, 30], [5, 95]],
            "peers_mean_error": {"accuracy": 0.012},
        },
    )
    page = Page(write_report(folder))
    cells = page.text("td")
    assert "7.2 s 9.0 s 9.0 s 3.0 s 3.0 s 4.5 s 4.5 s 0.5 s 0.5 s" in " ".join(cells.split())
    assert "1,234" in cells and "(s.e. 1.2)" in cells
    assert "70 30 5 95" in " ".join(cells.split()) and "<i>no" in page.text("th")
    assert "0.001, linear, 0.001 in the last step of round 6" in page.text("dd")
    assert "25.3" not in page.text() and "Where the time went" in page.text()


@pytest.mark.usefixtures("blank_pictures")
def test_rows_that_were_cut_are_told(tmp_path: Path) -> None:
    """Field case 14: on the page too; an older log says nothing of it."""
    folder = make_run(tmp_path, runs=("dec-lora",))
    assert "max_length" not in Page(write_report(folder)).text("dt")
    start, *rest = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    facts = {"data": {"train": {"rows": 1000, "cut_rows": 250, "cut_share": 0.125}}}
    (folder / "log.jsonl").write_text(
        "".join([json.dumps(json.loads(start) | facts) + "\n", *rest])
    )
    assert "250 of 1,000 training rows; 12.5 % of what is learned is gone" in Page(
        write_report(folder)
    ).text("dd")


@pytest.mark.usefixtures("blank_pictures")
def test_what_is_doubtful_of_the_data_stands_under_the_headline(tmp_path: Path) -> None:
    folder = make_run(tmp_path, runs=("dec-lora",))
    assert "Warning" not in Page(write_report(folder)).text("b")
    start, *rest = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    facts = {
        "warnings": ["9 % of the <b>rows</b> are in training"],
        "data": {"eval": {"rows": 1045}},
    }
    (folder / "log.jsonl").write_text(
        "".join([json.dumps(json.loads(start) | facts) + "\n", *rest])
    )
    page = Page(write_report(folder))
    assert "Warning:" in page.text("b") and "9 % of the <b>rows</b> are in training." in page.text(
        "p"
    )
    assert "of the averaged adapter on 1,045 rows" in page.text("li")


@pytest.mark.usefixtures("blank_pictures")
def test_scores_before_training_are_no_best_ones(tmp_path: Path) -> None:
    """A run that only lost by training names the best of what it trained, not what it began
    with.
    """
    folder = make_run(tmp_path, runs=("dec-lora",))
    change_summary(
        folder, run={"best": {"rounds_done": 0, "accuracy": 0.99, "f1": 0.99, "loss": 0.01}}
    )
    assert "99.0 %" not in Page(write_report(folder)).text("td")


def test_every_picture_is_described_and_captioned(finished: Page) -> None:
    page = finished
    assert all(
        picture["role"] == "img" and len(picture["aria-label"] or "") > 30
        for picture in page.pictures()
    )
    captions = [data for tag, data in page.words if tag == "figcaption"]
    assert len(captions) == len(page.pictures()) == 7
    assert all(caption.strip().endswith(".") for caption in captions)


def test_one_file_without_network_or_scripts_in_the_pages_colours(finished: Page) -> None:
    page = finished
    assert not {tag for tag, _ in page.seen} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "image",
    }
    # Markers in a picture are used by the name they have in the same page; nothing else is fetched.
    links = [
        value or ""
        for _, attributes in page.seen
        for key, value in attributes.items()
        if key in ("href", "src")
    ]
    ids = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)
    assert len(ids) == len(set(ids))
    assert "://" not in page.source.replace("pkg://", "") and "@import" not in page.source
    assert "prefers-color-scheme: dark" in page.source and 'name="viewport"' in page.source
    colours = set(re.findall(r"(?:fill|stroke): (#\w+)", page.source))
    assert not colours  # pictures name the page's colours, none of their own
    named = set(re.findall(r"var\((--\w+)\)", page.source))
    dark = page.source.split("prefers-color-scheme: dark", 1)[1].split("}", 1)[0]
    assert all(f"{name}:" in dark for name in named), named


@pytest.mark.usefixtures("blank_pictures")
def test_an_unfinished_run_shows_how_far_it_came(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path, stop_at=4, runs=("dec-lora", "pooled"))))
    assert (
        "So far, after 4 of 6 rounds: 8 peers on a ring reached 82.4 % accuracy together."
        in page.text("p")
    )
    assert "This run has not finished." in page.text("b")
    assert "(4 of 6 rounds)" in page.text("span") and "(not started)" in page.text("span")
    assert len(page.pictures()) == 7


@pytest.mark.usefixtures("blank_pictures")
def test_a_run_without_any_score_yet(tmp_path: Path) -> None:
    log = make_run(tmp_path, stop_at=0, runs=("dec-lora",)) / "log.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    page = Page(write_report(tmp_path))
    assert "8 peers on a ring started; nothing is scored yet." in page.text("p")
    assert len(page.pictures()) == 2  # the graph and the rows


@pytest.mark.usefixtures("blank_pictures")
def test_one_score_is_no_curve(tmp_path: Path) -> None:
    for name, rounds in {"once": 0, "twice": 1}.items():
        (tmp_path / name).mkdir()
        page = Page(write_report(make_run(tmp_path / name, stop_at=rounds, runs=("dec-lora",))))
        assert ("How the score grew" in page.text("h2")) == (name == "twice")


@pytest.mark.usefixtures("blank_pictures")
def test_causal_lm_speaks_of_perplexity_and_lower_is_better(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path, metric="loss", runs=("dec-lora", "local"))))
    assert f"reached a perplexity of {math.exp(4 - 2 * 0.843):.2f} together" in page.text("p")
    assert "(lower is better)." in page.text("p")
    assert "−" + f"{math.exp(4 - 2 * 0.65) - math.exp(4 - 2 * 0.843):.2f}" in page.text("b")


def test_everything_from_the_run_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>&'
    names = [evil, "$x^2$", "_hidden", "a'b"]
    page = Page(
        write_report(
            make_run(
                tmp_path,
                runs=("dec-lora",),
                names=names,
                labels=[evil, "_under", "$y$"],
                model=evil,
            )
        )
    )
    assert "<script" not in page.source
    assert "script" not in {tag for tag, _ in page.seen}
    assert [name for name in names if name in page.text("th")] == names
    assert (
        "$x^2$" in page.text("text")
        and "_under" in page.text("text")
        and "$y$" in page.text("text")
    )
    assert "<b>train</b>.tsv" in page.text("code")


@pytest.mark.usefixtures("blank_pictures")
def test_how_to_load_the_adapter_is_python(tmp_path: Path) -> None:
    page = Page(
        write_report(
            make_run(
                tmp_path,
                runs=("dec-lora",),
                labels=["a", "b", "c"],
                model="pkg://some_package/sub/model",
            )
        )
    )
    code = html.unescape(re.findall(r"<pre><code>(.*?)</code>", page.source, re.S)[0])
    compile(code, "loading", "exec")
    assert f"dlora.load_base('runs/{tmp_path.name}')" in code
    assert f"PeftModel.from_pretrained(base, 'runs/{tmp_path.name}/consensus')" in code


def test_many_peers_and_labels_are_shortened(tmp_path: Path) -> None:
    names = [f"peer-{number:02d}" for number in range(60)]
    labels = [f"label {number}" for number in range(12)]
    page = Page(
        write_report(
            make_run(
                tmp_path, names=names, labels=labels, kind="base-k", period=9, runs=("dec-lora",)
            )
        )
    )
    text = page.text("text")
    assert "peer-38" in text and "peer-39" not in text and "21 more, mean" in text
    assert "5 other labels" in text and "round 8" in text
    assert "peer-59" in page.text("th") and "and 5 more" in page.text("td")


def test_a_folder_that_is_no_run_or_has_not_started_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"config\.yaml cannot be read"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("model: m\n")
    with pytest.raises(RunError, match=r"log\.jsonl cannot be read"):
        write_report(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(RunError, match="has not started"):
        write_report(tmp_path)
    make_run(tmp_path, runs=("dec-lora",))
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        write_report(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "log.jsonl", "summary.json"]


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    make_run(tmp_path, runs=("dec-lora",), labels=["a", "b"])
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_a_run_without_a_cloud_speaks_of_none(finished: Page) -> None:
    assert "cloud" not in finished.source.lower()
