"""The cloud's events become a table, figures for Prometheus and a summary."""

from __future__ import annotations

import io
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from dlora.events.cloud import CloudRecord
from dlora.show.cloud.metrics import CloudMetrics
from dlora.show.cloud.table import CloudView
from dlora.show.tables import served_table

NOW = "2026-01-02T03:04:05.678Z"
SERVING: Any = {
    "event": "serving",
    "model": "[b]model",
    "listen": "[::]:7000",
    "federation": "federation.yaml",
    "metrics": "127.0.0.1:9100",
}
STORY: list[Any] = [
    {"event": "linked", "device": "[i]phone"},
    {"event": "opened", "device": "[i]phone", "wire": "bfloat16", "groups": 4},
    {
        "event": "load",
        "device": "[i]phone",
        "parts": 2,
        "tokens": 60,
        "sent_bytes": 1000,
        "received_bytes": 500,
    },
    {
        "event": "part",
        "device": "[i]phone",
        "tokens": 30,
        "keep": True,
        "seconds": 0.3,
        "waited_s": 0.2,
    },
    {
        "event": "part",
        "device": "[i]phone",
        "tokens": 30,
        "keep": False,
        "seconds": 9.0,
        "waited_s": 0.2,
    },
    {
        "event": "part",
        "device": "[i]phone",
        "tokens": 30,
        "keep": True,
        "seconds": 0.1,
        "waited_s": 0.05,
    },
    {
        "event": "load",
        "device": "[i]phone",
        "parts": 1,
        "tokens": 30,
        "sent_bytes": 3000,
        "received_bytes": 2500,
    },
    {"event": "linked", "device": "tablet"},
    {"event": "refused", "device": "tablet", "reason": "vocabulary: the device has 8, the cloud 9"},
    {"event": "closed", "device": "tablet"},
    {"event": "failed", "device": "[i]phone", "why": "memory", "text": "no room"},
    {"event": "connection-refused", "reason": "ipv4:192.0.2.1:99: a stranger"},
]


def tell(listener: CloudRecord | CloudMetrics | CloudView, *events: Any) -> None:
    for event in events:
        timed: Any = {"time": NOW, **event}
        listener(timed)


def drawn(view: CloudView) -> str:
    file = io.StringIO()
    Console(file=file, width=120).print(view._drawn())
    return file.getvalue().replace("\u00a0", " ")


def test_a_table_of_who_is_here_and_what_went_wrong() -> None:
    with CloudView(Console(file=io.StringIO(), force_terminal=True, width=120)) as view:
        assert "starting" in drawn(view)
        tell(view, {"event": "loading", "text": "loading model"})
        assert "loading model" in drawn(view)
        tell(view, SERVING)
        assert drawn(view) == "no device is here\n"
        tell(view, *STORY[:2])
        assert "idle" in drawn(view)
        tell(view, *STORY[2:])
        lines = drawn(view).splitlines()
    assert lines[0].split() == [
        "device",
        "here",
        "since",
        "wire",
        "tokens",
        "down",
        "up",
        "a",
        "step",
        "now",
    ]
    for part in ("[i]phone", "bfloat16", "90", "3.0 kB", "2.5 kB", "200 ms", "1 part"):
        assert part in lines[1], part
    assert [line.split(maxsplit=1)[1].strip() for line in lines[2:]] == [
        "tablet refused: vocabulary: the device has 8, the cloud 9",
        "[i]phone: memory: no room",
        "ipv4:192.0.2.1:99: a stranger",
    ]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_line_each_where_there_is_no_terminal(quiet: bool) -> None:
    file = io.StringIO()
    with CloudView(Console(file=file, force_terminal=False, width=20), quiet) as view:
        tell(view, {"event": "loading", "text": "loading model"}, SERVING, *STORY)
    begins, *said = file.getvalue().splitlines() or [""]
    assert ("starting" in begins) == (not quiet)
    lines = [
        (
            "serving [b]model on [::]:7000 for devices of federation.yaml; metrics on"
            " 127.0.0.1:9100; Ctrl-C stops"
        ),
        "[i]phone is here",
        "tablet is here",
        "tablet refused: vocabulary: the device has 8, the cloud 9",
        "tablet has gone",
        "[i]phone: a part failed (memory): no room",
        "connection refused: ipv4:192.0.2.1:99: a stranger",
    ]
    assert said == ([] if quiet else lines)


def test_prometheus_reads_the_figures(tmp_path: Path) -> None:
    with CloudMetrics("127.0.0.1", 0) as metrics:
        tell(metrics, *STORY)
        url = f"http://127.0.0.1:{metrics.port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    expected = {
        ("dlora_devices_linked",): 1,
        ("dlora_parts_in_flight", "[i]phone"): 1,
        ("dlora_tokens_in_flight", "[i]phone"): 30,
        ("dlora_tokens_total", "[i]phone"): 90,
        ("dlora_steps_total", "[i]phone"): 2,
        ("dlora_sent_bytes_total", "[i]phone"): 3000,
        ("dlora_received_bytes_total", "[i]phone"): 2500,
        ("dlora_waited_seconds_total", "[i]phone"): pytest.approx(0.45),
        ("dlora_failures_total", "[i]phone", "memory"): 1,
        ("dlora_refused_links_total",): 2,
        ("dlora_step_seconds_count",): 2,
        ("dlora_step_seconds_sum",): pytest.approx(0.4),
        ("dlora_step_seconds_bucket", "0.1"): 1,
    }
    assert {key: found.get(key) for key in expected} == expected
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=10)


def test_the_record_adds_up_over_links() -> None:
    record = CloudRecord()
    tell(
        record,
        *STORY,
        {"event": "closed", "device": "[i]phone"},
        {"event": "linked", "device": "[i]phone"},
    )
    phone = record.devices["[i]phone"]
    assert (phone.since, phone.wire, phone.parts_here) == (NOW, None, 0)
    summary = {
        "links": 2,
        "tokens": 90,
        "parts": 3,
        "steps": 2,
        "sent_bytes": 3000,
        "received_bytes": 2500,
    }
    assert phone.summary() == {
        **summary,
        "step_s": pytest.approx(0.4),
        "waited_s": pytest.approx(0.45),
        "failures": {"memory": 1},
    }
    assert record.refused_links == 2
    file = io.StringIO()
    devices = {name: served.summary() for name, served in record.devices.items()}
    Console(file=file, width=120, markup=False).print(
        served_table({"model": "m", "seconds": 61.0, "refused_links": 2, "devices": devices})
    )
    shown = file.getvalue().replace("\u00a0", " ")
    for part in (
        "served m for 1 min 1 s, 2 links refused",
        "[i]phone",
        "3.0 kB",
        "memory 1",
        "tablet",
    ):
        assert part in shown
