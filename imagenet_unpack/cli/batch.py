"""Read this job's part from the batch system's variables, and write batch scripts.

Variables: sbatch(1) and srun(1) of Slurm; qsub(1B) of PBS Pro; bsub(1) of LSF; qsub(1) of Grid Engine.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from imagenet_unpack.errors import UsageError
from imagenet_unpack.model import Part

_ARRAYS = (
    # system; names of index, lowest index, number of elements, highest index, step; the index that part 0 should have
    ("Slurm", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MAX", "", 0),
    ("Grid Engine", "SGE_TASK_ID", "SGE_TASK_FIRST", "", "SGE_TASK_LAST", "SGE_TASK_STEPSIZE", 1),
)


def part_of(environ: Mapping[str, str]) -> Part:
    """Read from the batch system's variables which part of the job this process is.

    Raises:
        UsageError: they do not say, or could mean something else.
    """
    for system, index, first, count, last, step, base in _ARRAYS:
        if _is_number(environ.get(index)):
            return _array_part(environ, system, index, first, count, last, step, _write(index, first=base))
    if _is_number(environ.get("PBS_ARRAY_INDEX")):
        number = environ["PBS_ARRAY_INDEX"]
        raise UsageError(f"--part auto: PBS tells the index ({number}) but not the number: {_write('PBS_ARRAY_INDEX')}")
    if _is_number(environ.get("LSB_JOBINDEX")) and environ["LSB_JOBINDEX"] != "0":
        if environ.get("LSB_JOBINDEX_STEP", "1") != "1" or not _is_number(environ.get("LSB_JOBINDEX_END")):
            raise UsageError(f"--part auto: LSF's array is not 1 to N: {_write('LSB_JOBINDEX', first=1)}")
        return _checked(int(environ["LSB_JOBINDEX"]) - 1, int(environ["LSB_JOBINDEX_END"]), "LSB_JOBINDEX")
    # In the batch shell SLURM_PROCID is 0 and SLURM_NTASKS what was asked for: they mean something in a step alone.
    if all(_is_number(environ.get(name)) for name in ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS")):
        return _checked(int(environ["SLURM_PROCID"]), int(environ["SLURM_NTASKS"]), "SLURM_PROCID of SLURM_NTASKS")
    raise UsageError("--part auto: no batch array and no srun step around this process: write --part I/N")


def _array_part(
    environ: Mapping[str, str], system: str, index: str, first: str, count: str, last: str, step: str, remedy: str
) -> Part:
    numbers = [environ.get(name) for name in (index, first, last)]
    if not all(_is_number(number) for number in numbers):
        raise UsageError(f"--part auto: {system} does not say how large the array is: {remedy}")
    at, low, high = (int(number) for number in numbers if number is not None)
    stride = int(environ[step]) if step and _is_number(environ.get(step)) else 1
    size = int(environ[count]) if count and _is_number(environ.get(count)) else (high - low) // stride + 1
    if stride != 1 or size != high - low + 1:
        raise UsageError(f"--part auto: {system}'s array ({size} elements from {low} to {high}) has gaps: {remedy}")
    if size == 1 and (low, high) != (0, 0):
        # One element submitted again looks just like an array of one.
        raise UsageError(f"--part auto: {system}'s array has the one element {at}: was it a part of more? {remedy}")
    return _checked(at - low, size, f"{index} of {low}-{high}")


def _checked(index: int, count: int, source: str) -> Part:
    if not 0 <= index < count:
        raise UsageError(f"--part auto: {source} gives part {index} of {count}: write --part I/N")
    return Part(index=index, count=count, source=source)


def _write(variable: str, *, first: int = 0) -> str:
    if first:
        return f"write --part $(({variable} - {first}))/N with N written out"
    return f"write --part ${variable}/N with N written out, and parts counted from 0"


def _is_number(text: str | None) -> bool:
    return text is not None and text.isascii() and text.isdecimal()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a batch script asks for; None or "" is left to the cluster.

    Attributes:
        parts: 1: one job; more: an array of parts and a job behind it that checks and publishes.
        cpus: of each job; also its number of workers.
        signal_s: seconds before the time limit at which the job is told to end in good order.
    """

    parts: int = 1
    cpus: int = 8
    memory: str = "8G"
    time: str = "04:00:00"
    account: str = ""
    partition: str = ""
    job_name: str = "imagenet"
    signal_s: int = 120


def slurm_script(python: str, arguments: Sequence[str], resources: Resources, folder: str) -> str:
    """Return a batch script that runs `python -m imagenet_unpack` with `arguments` in `folder`.

    With parts, the script submits an array of them and a job behind it; it does so under `bash` and as a job itself.

    Args:
        python: the interpreter, absolute.
        arguments: of `unpack`, without `--workers` and `--part`.
        resources: what to ask for.
        folder: where relative paths are meant.

    Raises:
        UsageError: a value cannot be written as a directive of Slurm.
    """
    if "/" in resources.job_name:
        raise UsageError(f"--job-name {resources.job_name}: it is part of the log's name and takes no slash")
    if "\\" in folder:
        raise UsageError(
            f"{folder}: Slurm cannot write a log in a folder with a backslash in its name: work in another"
        )
    if resources.parts == 1:
        return _job(python, arguments, resources, folder, "%x-%j.log")
    shard = f'--part "$SLURM_ARRAY_TASK_ID/{resources.parts}"'
    parts = _job(python, arguments, resources, folder, "%x-%A_%a.log", shard, f"0-{resources.parts - 1}")
    # Whatever became of the parts (afterany): what a lost one left undone is done there.
    last = _job(python, arguments, resources, folder, "%x-publish-%j.log", "--part 0/1")
    launch = _directives(replace(resources, cpus=1, memory="200M", time="10"), folder, "%x-submit-%j.log")
    return f"""#!/bin/bash
{launch}
# Submits {resources.parts} parts as an array, then a job held until they are done that does what a lost part left
# undone, checks and publishes.
set -euo pipefail
parts=$(sbatch --parsable <<'END_OF_PARTS'
{parts}END_OF_PARTS
)
last=$(sbatch --parsable --dependency="afterany:${{parts%%;*}}" --kill-on-invalid-dep=yes <<'END_OF_LAST'
{last}END_OF_LAST
) || {{
    scancel "${{parts%%;*}}" # nothing would publish what they extract
    exit 1
}}
echo "parts: job ${{parts%%;*}}; check and publish: job ${{last%%;*}}"
"""


def _job(
    python: str,
    arguments: Sequence[str],
    resources: Resources,
    folder: str,
    log: str,
    shard: str = "",
    array: str = "",
) -> str:
    """Return the script of one job.

    The program is a child that the shell waits for: under cgroup tracking the batch shell alone is told of the end,
    and it hands the signal on. Exit code 138 is the program's after USR1, which comes before the time limit alone.
    A job that was requeued continues: `--restart` is for its first start.
    """
    restart = ""
    words = [_word(word) for word in (python, "-m", "imagenet_unpack", *arguments)]
    if "--restart" in words:
        words = [word if word != "--restart" else '"${restart[@]}"' for word in words]
        restart = """restart=(--restart)
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    restart=() # requeued: what it did before is continued
fi
"""
    command = " ".join(words)
    lines = _directives(resources, folder, log) + (f"\n#SBATCH --array={array}" if array else "")
    return f"""#!/bin/bash
{lines}
#SBATCH --requeue
#SBATCH --signal=B:USR1@{resources.signal_s}
# Told {resources.signal_s} s before the time limit, the program ends in good order; the job then goes back into the
# queue and continues.
program=
trap 'kill -USR1 "$program"' USR1
trap 'kill -USR2 "$program"' USR2
trap 'kill -TERM "$program"' TERM
{restart}# shellcheck disable=SC2016 # every word is meant as it stands
{command} --workers "$SLURM_CPUS_PER_TASK" {shard + " " if shard else ""}&
program=$!
code=0
wait "$program" || code=$?
while kill -0 "$program" 2>/dev/null; do # a signal ended the wait, not the program
    code=0
    wait "$program" || code=$?
done
if [ "$code" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _directives(resources: Resources, folder: str, log: str) -> str:
    if "%" in folder:  # a relative name is expanded together with the folder's
        log = f"{folder.replace('%', '%%')}/{log}"
    wanted = {
        "job-name": resources.job_name,
        "account": resources.account,
        "partition": resources.partition,
        "nodes": "1",
        "ntasks": "1",
        "cpus-per-task": str(resources.cpus),
        "mem": resources.memory,
        "time": resources.time,
        "chdir": folder,
        "output": log,
        "open-mode": "append",
    }
    return "\n".join(f"#SBATCH --{name}={_directive(value)}" for name, value in wanted.items() if value)


def _word(text: str) -> str:
    """Quote a word for bash, on one line and in ASCII where it is not text.

    A line break would end a here-document early, and bytes that are not UTF-8 cannot be printed.
    """
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(rf"\{byte:03o}" for byte in os.fsencode(text)) + "'"


def _directive(value: str) -> str:
    """Quote a value as sbatch reads its directives: in double quotes, with a backslash before quote and backslash."""
    if not value.isprintable():
        raise UsageError(f"{value!r}: a directive of Slurm takes no control characters and no bytes that are not UTF-8")
    if re.fullmatch(r"[\w.,:/%@+=-]+", value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
