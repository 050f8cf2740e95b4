"""How a program with a model from `dlora.connect` ends, and waits: no thread, no link is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dlora.errors import Interrupted
from kit.connected import batches, config, connected
from kit.processes import until
from kit.serving_cloud import Members, serving

ModelFolder = Callable[..., Path]
SCRIPT = """
import sys, torch, dlora
from kit import queue_cloud
folder, key, federation, task = sys.argv[1:]
settings = queue_cloud.config(folder, **{"split.cloud": "hub", "data.labels": ["no", "yes"]})
model = dlora.connect(settings, name="phone", key=key, federation=federation)
batch = queue_cloud.batch()
inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
loss = model(**inputs, labels=batch.labels).loss
if task == "backward":
    loss.backward()
print("done", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("task", ["forward", "backward"])
def test_a_program_that_just_ends_ends_at_once(
    tmp_path: Path, model_folder: ModelFolder, task: str
) -> None:
    """Without disconnect(), even with a graph that waits for its backward; the cloud has nothing of
    it any more.
    """
    members, bert = Members(tmp_path), model_folder("bert")
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", SCRIPT]
    with serving(members, bert) as served:
        program = subprocess.Popen(
            [*command, str(bert), str(members.key("phone")), str(members.federation), task],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with program:
            assert program.stdout is not None and program.stderr is not None
            assert program.stdout.readline() == "done\n", program.stderr.read()
            since = time.monotonic()
            out, err = program.communicate(timeout=60)
            assert (program.returncode, out, err) == (0, "", "")
            assert time.monotonic() - since < 10
        served.wait_for("closed", device="phone")
        assert served.heard("load", device="phone")[-1]["tokens"] == 0


def test_ctrl_c_while_the_cloud_is_away_gets_out(tmp_path: Path, model_folder: ModelFolder) -> None:
    members, [batch] = Members(tmp_path), batches("bert", 1)

    def interrupt() -> None:
        main = threading.main_thread().ident
        assert main is not None
        until(lambda: "dial" in functions_of(main), "the program to wait for the cloud")
        os.kill(os.getpid(), signal.SIGINT)

    with connected(members, config(model_folder("bert"), "bert")) as model:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            model(**batch)
        thread.join()
    assert all(thread.name != "dlora-wire" for thread in threading.enumerate())


def functions_of(thread: int) -> list[str]:
    """Their names, on the thread's stack."""
    return [
        frame.f_code.co_name for frame, _ in traceback.walk_stack(sys._current_frames()[thread])
    ]


def test_a_wait_for_the_cloud_is_said(
    tmp_path: Path, model_folder: ModelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """Within two seconds: which cloud, where, since when, how to stop it; once more later, and not
    five times a second.
    """
    members, [batch] = Members(tmp_path), batches("bert", 1)
    began_at = time.monotonic()
    said_at: list[float] = []
    with (
        connected(members, config(model_folder("bert"), "bert")) as model,
        ThreadPoolExecutor(1) as pool,
    ):
        forward = pool.submit(lambda: model(**batch))
        until(lambda: len(caplog.messages) > 0, "the first word")
        said_at.append(time.monotonic() - began_at)
        until(lambda: len(caplog.messages) > 1, "the second")
        said_at.append(time.monotonic() - began_at)
        model.disconnect()
        with pytest.raises(Interrupted, match="phone stopped while its cloud was away"):
            forward.result(timeout=30)
    assert said_at[0] >= 1 and said_at[1] - said_at[0] > 2
    for message in caplog.messages:
        assert re.fullmatch(
            rf"cloud away: no link to hub at {re.escape(members.address)} since \d\d:\d\d:\d\d;"
            r" start dlora cloud there,"
            " or stop the wait with Ctrl-C",
            message,
        )
