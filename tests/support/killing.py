"""Runs that are killed and resumed, forked from one process in which everything is imported and compiled.

    python -m tests.support.killing moments|points CHECKPOINT WORK [--seed 0] [--recipe fp8] [--dataset PREFIX] [--kills 20]

Prints the number of kills and of units that were written at each kill; fails if an output differs.
"""

import argparse
import contextlib
import gc
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import mptq.pipeline.run
import mptq.report
from mptq import Options, make_plan, run
from mptq.calibration.datasets.options import DataOptions
from mptq.output.directory import partial_of, unfinished
from mptq.output.journal import NAME, Journal
from mptq.recipes.recipe import load_recipe

DIFFERENT = ("report.json", "report.html")
"""Files that contain the times of the run."""
TIMES = frozenset(("seconds", "bytes_per_second", "peak_rss_bytes"))
"""The fields of the report that differ in every run."""


def quantize(options, out):
    """Run to the end, resuming from an unfinished output if there is one."""
    torch.set_num_threads(1)
    datasets = (str(options.dataset),) if options.dataset else ()
    data = DataOptions(datasets, calib_size=6, eval_size=3 if options.dataset else 0, seq_length=32)
    kv_cache = "fp8" if options.dataset else "none"
    plan = make_plan(options.checkpoint, load_recipe(options.recipe).changed(kv_cache=kv_cache), ("hf", "megatron"))
    run(plan, out, Options(device="cpu", data=data, batch_size=4, resume=True, max_shard_bytes=200_000))


def forked(work):
    """Fork a process that does `work` and exits; return its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    finally:  # bypasses pytest's and the interpreter's own exit
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def ended(child):
    """The exit code of a child: 0, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder):
    """The bytes of every file below a folder, by relative path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def comparable(out):
    """The part of an output that all runs share: the bytes of every file, and the fields of a valid report without times."""
    found = {name: data for name, data in contents(out).items() if name not in DIFFERENT}
    report = mptq.report.read(out)
    return found | {f"report.json: {key}": report[key] for key in report.keys() - TIMES}


def check(out, whole, apart=()):
    """Check that the output equals that of an uninterrupted run (except for `apart`), and that nothing is next to it."""
    found, whole = ({key: made[key] for key in made.keys() - set(apart)} for made in (comparable(out), whole))
    differing = sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))
    assert not differing, f"different: {differing}"
    assert [path.name for path in out.parent.iterdir()] == [out.name], list(out.parent.iterdir())


def uninterrupted(options):
    """The output of an uninterrupted run, and the time in seconds of a run forked from a process that has run once."""
    quantize(options, options.work / "whole" / "out")
    gc.collect()
    gc.freeze()
    start = time.perf_counter()
    assert ended(forked(lambda: quantize(options, options.work / "killed" / "out"))) == 0
    seconds = time.perf_counter() - start
    whole = comparable(options.work / "whole" / "out")
    check(options.work / "killed" / "out", whole)
    shutil.rmtree(options.work / "killed" / "out")
    return whole, seconds


def moments(options):
    """Kill runs at random moments; each resumes where the last was killed, until the output is complete."""
    whole, seconds = uninterrupted(options)
    draw, kills, found, out = random.Random(options.seed), 0, [], options.work / "killed" / "out"
    while kills < options.kills:
        child = forked(lambda: quantize(options, out))
        if draw.random() < 0.3:
            time.sleep(draw.uniform(0, seconds))
        else:  # from the moment when its journal exists; units are written in a small part of the time
            while not (partial_of(out) / NAME).exists():
                time.sleep(0.001)
            time.sleep(draw.uniform(0, seconds / 10))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        how = ended(child)
        assert how in (0, -signal.SIGKILL), how
        if how == 0:
            check(out, whole)
            shutil.rmtree(out)
            continue
        kills += 1
        found.append(unfinished(out))
        if draw.random() < 0.5:  # let the next run finish: after a single kill it must give the same bytes
            assert ended(forked(lambda: quantize(options, out))) == 0
            check(out, whole)
            shutil.rmtree(out)
    assert ended(forked(lambda: quantize(options, out))) == 0
    check(out, whole)
    print(f"{kills} kills, with {found} units written")


def dying(owner, name, call, after):
    """Kill the process before (or `after`) the call number `call` of a method, counted from 0."""
    method, calls = getattr(owner, name), [0]

    def last(*arguments, **named):
        mine = calls[0] == call
        calls[0] += 1
        if mine and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = method(*arguments, **named)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, last)


POINTS = ((Journal, "_append"), (Path, "rename"), (mptq.pipeline.run.manifest, "write_manifest"))


def points(options):
    """Kill a run before and after every commit: each line of the journal, and every step that completes the output."""
    whole, _ = uninterrupted(options)
    kills, found, out = 0, [], options.work / "killed" / "out"
    for owner, name in POINTS:
        for call in range(1000):
            for after in (False, True):

                def work(place=(owner, name, call, after)):
                    dying(*place)
                    quantize(options, out)

                how = ended(forked(work))
                assert how in (0, -signal.SIGKILL), how
                if how == 0:
                    break
                kills += 1
                found.append(unfinished(out))
                assert ended(forked(lambda: quantize(options, out))) == 0
                check(out, whole)
                shutil.rmtree(out)
            if how == 0:
                check(out, whole)
                shutil.rmtree(out)
                break
    print(f"{kills} kills, with {found} units written")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=("moments", "points"))
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="fp8-blockwise")
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    sys.exit(globals()[options.mode](options))
