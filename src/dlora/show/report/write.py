"""A run as a page a person likes to read."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import yaml

from dlora.errors import RunError
from dlora.events.log import read_log
from dlora.events.record import run_records
from dlora.files import write_atomically
from dlora.show.report.page import Page
from dlora.show.report.pictures import Pictures
from dlora.show.report.tables import Tables
from dlora.show.words import bytes_text, seconds_text


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into the run's folder and return its path: one file that needs no
    network.

    Reads config.yaml, log.jsonl and, once it is there, summary.json: an unfinished run is shown as
    far as it came. Raises RunError when the folder holds no run that has started.
    """
    import jinja2

    run_dir = Path(run_dir)
    config_text, events = _read(run_dir / "config.yaml"), read_log(run_dir / "log.jsonl")
    start = next((event for event in reversed(events) if event["event"] == "start"), None)
    if start is None:
        raise RunError(
            f"run {run_dir} has not started: its log.jsonl holds no start event; run it first"
        )
    try:
        summary = (
            json.loads(_read(run_dir / "summary.json"))
            if (run_dir / "summary.json").exists()
            else {}
        )
        config = yaml.safe_load(config_text)
    except (ValueError, yaml.YAMLError) as error:
        raise RunError(
            f"run {run_dir}: summary.json or config.yaml is damaged"
            f" ({' '.join(str(error).split())})"
        ) from error
    page = Page(config, start, run_records(events, start, summary), summary)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals |= {"bytes_text": bytes_text, "seconds_text": seconds_text}
    told = {
        "page": page,
        "tables": Tables(page),
        "drawn": Pictures(page),
        "config_text": config_text,
        "start": start,
        "summary": summary,
    }
    template = environment.from_string(
        files("dlora.show.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    path = run_dir / "report.html"
    write_atomically(path, template.render(told))
    return path


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"{path} cannot be read ({error.strerror}); give the folder of a run"
        ) from error
