"""Python programs in processes of their own that need not import torch and megatron-core first.

A new interpreter takes about 6 s of CPU to import them, and the tests start some two hundred. These processes are forks of a
server (multiprocessing's "forkserver") that has imported them; the first call in a test session starts it.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import connection, forkserver
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).parents[2]
# CUDA cannot be used in a fork of a process that has asked for the GPU, as megatron-core's import does.
_FORKS = not Path("/dev/nvidiactl").exists()
_CONTEXT = multiprocessing.get_context("forkserver" if _FORKS else "spawn")
# megatron-core compiles its small functions, which takes minutes on a CPU; torch reads the variable when it is imported.
_SERVER = {"TORCH_COMPILE_DISABLE": "1"}


def python(*arguments: object, processes: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` in the repository's root, `arguments` being a script's path or "-m" and a module, and more.

    More than one of `processes` are the ranks of a torch.distributed group, as torchrun starts them; where one fails, the
    others are ended, and its exit code counts. `environment` has variables to set.
    """
    command = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        for stream in streams:
            stream.touch()
        started = [_started(command, streams, {**os.environ, **environment, **ranked}) for ranked in _environments(processes)]
        code = _ended(started)
        return subprocess.CompletedProcess(command, code, *(stream.read_text() for stream in streams))


def checked(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """A process that ended well; fails with its output otherwise."""
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def _environments(processes: int) -> list[dict[str, str]]:
    """The variables that tell each process its rank."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _started(command: list[str], streams: list[Path], environment: Mapping[str, str]) -> multiprocessing.Process:
    process = _CONTEXT.Process(target=_main, args=(command, streams, {**environment, **_SERVER}))
    if _FORKS:
        _CONTEXT.set_forkserver_preload(["tests.support.preloaded"])
        with mock.patch.dict(os.environ, _SERVER):
            forkserver.ensure_running()
    with mock.patch.dict(sys.modules, __main__=ModuleType("__main__")):  # else each process imports pytest's
        process.start()
    return process


def _ended(started: list[multiprocessing.Process]) -> int:
    """Waits for the processes, and returns the exit code of the first that failed."""
    left, code = {process.sentinel: process for process in started}, 0
    while left:
        for sentinel in connection.wait(list(left)):
            process = left.pop(sentinel)
            process.join()
            if process.exitcode and not code:
                code = process.exitcode
                for other in left.values():
                    other.terminate()
    return code


def _main(command: list[str], streams: list[Path], environment: Mapping[str, str]) -> None:
    """What a process does: the program, as a new interpreter would run it."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.path.insert(0, str(ROOT) if command[0] == "-m" else str(Path(command[0]).parent))
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
