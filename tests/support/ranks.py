"""Processes forked from one that has imported everything: importing torch takes longer than a short run.

They get of a launcher what `torch.distributed` reads in the environment. Launchers themselves, and starts from nothing,
are in `test_launchers.py`, `test_nodes.py`, `test_main_job.py` and `test_chaos.py`.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest.mock import patch

IMPORTED = (
    "mixres.cli", "mixres.training.trainer", "mixres.training.ema", "mixres.models.qwen.edit", "peft", "accelerate",
    "torch.distributed.fsdp", "torch.distributed.tensor",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
)  # fmt: skip
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload([*IMPORTED])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def run_ranks(commands: Sequence[list[str]], ranks: int, *, cwd: Path, environment: dict[str, str], out: Path) -> None:
    """Each command of mixres after the other, by so many ranks; all succeed. What they print is appended to `out`."""
    with patch.dict(os.environ, environment):
        forkserver.ensure_running()
    meeting = {"WORLD_SIZE": f"{ranks}", "LOCAL_WORLD_SIZE": f"{ranks}", "MASTER_ADDR": "127.0.0.1"}
    meeting["MASTER_PORT"] = f"{free_port()}"
    with ExitStack() as stack:
        started = []
        for rank in range(ranks):
            own = environment | (meeting | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} if ranks > 1 else {})
            process = _FORKED.Process(target=_run, args=(commands, cwd, own, out))
            process.start()
            stack.callback(process.kill)
            started.append(process)
        running = {process.sentinel: process for process in started}
        while running:  # where one fails, the others may wait for it
            for sentinel in connection.wait(list(running)):
                process = running.pop(sentinel)
                process.join()
                assert process.exitcode == 0, out.read_text()[-4000:]


def _run(commands: Sequence[list[str]], cwd: Path, environment: dict[str, str], out: Path) -> None:
    import torch

    from mixres.cli import main

    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    with out.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    for words in commands:
        if code := main(words):
            sys.exit(code)
