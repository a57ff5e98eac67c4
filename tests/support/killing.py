"""Runs that are killed and go on: a process that forks them, so that each has its imports done.

    python -m tests.support.killing moments|points CHECKPOINT WORK SEED [--recipe fp8] [--dataset PREFIX] [--kills 20]

Prints how often a run was killed, and how many units the runs after it found written; fails where an output differs.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import mptq.calibration.hidden_state_pair  # what a run imports
import mptq.calibration.tokens
import mptq.pipeline.commit
import mptq.pipeline.layer_stream
import mptq.pipeline.run
import mptq.report
from mptq import Options, make_plan, run
from mptq.calibration.datasets.options import DataOptions
from mptq.output.directory import unfinished
from mptq.output.journal import Journal
from mptq.recipes.recipe import load_recipe

DIFFERENT = ("report.json", "report.html")
"""What has the seconds of the run in it."""
TIMES = frozenset(("seconds", "bytes_per_second", "peak_rss_bytes"))
"""The fields of the report that no two runs have alike."""


def quantize(options, out):
    """A whole run, which goes on with what is there."""
    torch.set_num_threads(1)
    datasets = (str(options.dataset),) if options.dataset else ()
    data = DataOptions(datasets, calib_size=6, eval_size=3 if options.dataset else 0, seq_length=32)
    kv_cache = "fp8" if options.dataset else "none"
    plan = make_plan(options.checkpoint, load_recipe(options.recipe).changed(kv_cache=kv_cache), ("hf", "megatron"))
    run(plan, out, Options(device="cpu", data=data, batch_size=4, resume=True, max_shard_bytes=200_000))


def forked(work):
    """A process that does `work` and ends."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    finally:  # before pytest's or the interpreter's own end
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def ended(child):
    """How a child ended: 0, or the signal (negative) that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder):
    """The bytes of every file."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def comparable(out):
    """What runs have alike: the bytes of every file, and what the report, which must be valid, says beside the times."""
    found = {name: data for name, data in contents(out).items() if name not in DIFFERENT}
    report = mptq.report.read(out)
    return found | {f"report.json: {key}": report[key] for key in report.keys() - TIMES}


def check(out, whole, apart=()):
    """The output is that of a run that was never killed (but for what is `apart`), and there is nothing beside it."""
    found, whole = ({key: made[key] for key in made.keys() - set(apart)} for made in (comparable(out), whole))
    differing = sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))
    assert not differing, f"different: {differing}"
    assert [path.name for path in out.parent.iterdir()] == [out.name], list(out.parent.iterdir())


def uninterrupted(options):
    """The output of a run that nobody kills, and its seconds."""
    out = options.work / "whole" / "out"
    start = time.perf_counter()
    assert ended(forked(lambda: quantize(options, out))) == 0
    return comparable(out), time.perf_counter() - start


def moments(options):
    """Kill runs at random moments; each goes on where the last was killed, until it is done."""
    whole, seconds = uninterrupted(options)
    draw, kills, found, out = random.Random(options.seed), 0, [], options.work / "killed" / "out"
    while kills < options.kills:
        child = forked(lambda: quantize(options, out))
        time.sleep(draw.uniform(0, seconds))
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
        if draw.random() < 0.5:  # not killed again: the run after a kill gives the same bytes
            assert ended(forked(lambda: quantize(options, out))) == 0
            check(out, whole)
            shutil.rmtree(out)
    assert ended(forked(lambda: quantize(options, out))) == 0
    check(out, whole)
    print(f"{kills} kills, with {found} units written")


def dying(owner, name, call, after):
    """Let the call number `call` of a method (of all, from 0) be the last thing that the process does."""
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
    """Kill a run before and after every commit: each line of the journal, and every step that makes the output complete."""
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
    if options.dataset:
        import mptq.layers.transformer_layer  # of megatron-core, for the activations
    import mptq.formats.megatron.writer
    import mptq.quantize.modelopt

    sys.exit(globals()[options.mode](options))
