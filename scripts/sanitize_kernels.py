"""The fused kernel under compute-sanitizer: `python scripts/sanitize_kernels.py [--output FILE]`, on a Hopper GPU.

Every case of the matrix below, in every format of weights, under memcheck, racecheck, synccheck and initcheck, several
at a time. Prints a line for each and a table, and writes both as JSON. Exits with 1 where a tool found something or a
case ended otherwise than it should, with 2 where there was no time for all of them or the tool does not work here.
`scripts/probe build checks` builds what it runs.
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FORMATS = ("fp8_block", "fp8_channel", "mxfp4")
# What the launches are, and the program with its arguments. Many tokens are served by the normal orientation, in
# MXFP4 with decoders. Late CTAs in clusters are left out: the other CTA's copies are ordered
# after the dispatch of vacant shares by a counter in device memory, which racecheck does not follow.
CASES = {
    "swapAB": "probe check 512 384 8 4 5",
    "one token, in each CTA if decoded": "probe check 640 384 8 4 1",
    "swapAB, full chunks": "probe check 512 384 8 4 70",
    "swapAB, few tokens, in halves if decoded": "probe check 640 1408 16 4 9",
    "swapAB, larger chunks, in halves if decoded": "probe check 640 1408 16 4 36 one",
    "swapAB, masked": "probe check 512 384 8 4 40 masked",
    "swapAB, more experts than CTAs' tokens": "probe check 512 384 32 4 40",
    "swapAB, experts with one chunk and more": "probe check 512 384 16 4 150",
    "many tokens": "probe check 512 256 8 4 300",
    "many tokens, rows gathered": "probe check 512 384 48 4 640",
    "many tokens, clusters": "probe check 640 384 4 2 400",
    "4 ranks, swapAB": "ranks check 512 384 16 4 5 4 uniform 4 0 4",
    "2 ranks, swapAB, late CTAs": "ranks check 512 384 16 4 16 2 uniform 3 7 64 40",
    "2 ranks, few tokens, late CTAs, in halves if decoded": "ranks check 640 1408 32 4 8 2 uniform 3 7 64 40",
    "2 ranks, many tokens": "ranks check 512 384 16 4 150 2 masked 2 0 8",
    "2 ranks, many tokens, rows sent": "ranks check 256 2048 32 4 220 2 uniform 2",
    "2 ranks, many tokens, images assembled": "ranks check 512 384 8 2 800 2 uniform 2",
}
CLEAN, FOUND, FAILED, LATE, NOT_RUN = "clean", "FOUND", "FAILED", "NOT IN TIME", "not run"
# Of the tool's own doing: the program's is 1 where a result is wrong.
FOUND_STATUS = 86


@dataclasses.dataclass(frozen=True)
class Job:
    """One case under one tool."""

    tool: str
    format: str
    case: str

    def command(self, sanitizer: str) -> list[str]:
        """Bare of the programs' own guard bands and poison, which would hide from the tool what it looks for."""
        program, *arguments = CASES[self.case].split()
        variant = "_racecheck" if self.tool == "racecheck" else ""
        options = ["--error-exitcode", str(FOUND_STATUS), "--tool", self.tool]
        return [sanitizer, *options, f"build/{program}{variant}", *arguments]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of it, and what was printed where that is not "clean"."""

    job: Job
    outcome: str
    seconds: float
    summary: str
    text: str


def main(arguments: list[str] | None = None) -> int:
    """Runs the matrix, or a part of it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--cases", default="", help="a regular expression that their names have to match")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th one from the I-th on")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each")
    parser.add_argument("--total", type=float, default=3600, help="seconds for all; those that are left are not run")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="at a time, on one GPU")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file")
    options = parser.parse_args(arguments)
    tools, formats = options.tools.split(","), options.formats.split(",")
    jobs = choose(tools, formats, options.cases, options.part)
    sanitizer = os.environ.get("COMPUTE_SANITIZER", "compute-sanitizer")
    if reason := why_not(sanitizer):
        print(reason, file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.total
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(options.processes) as pool:
        for outcome in pool.map(lambda job: run(job, sanitizer, options.limit, deadline), jobs):
            outcomes.append(outcome)
            print(line_of(outcome), flush=True)
            if options.output is not None:
                write(options.output, outcomes)
    for outcome in outcomes:
        if outcome.text:
            print(f"== {line_of(outcome)}\n{outcome.text}")
    print(table(outcomes, tools))
    found = {outcome.outcome for outcome in outcomes}
    return 1 if found & {FOUND, FAILED} else 2 if found - {CLEAN} else 0


def choose(tools: Sequence[str], formats: Sequence[str], cases: str, part: str) -> list[Job]:
    """The jobs of the matrix that are asked for; case after case, so that the slow ones begin at different times."""
    for name, known in [*((tool, TOOLS) for tool in tools), *((format, FORMATS) for format in formats)]:
        if name not in known:
            raise SystemExit(f"{name!r} is none of {', '.join(known)}.")
    number, count = map(int, part.split("/"))
    names = [case for case in CASES if re.search(cases, case)]
    jobs = [Job(tool, format, case) for case in names for format in formats for tool in tools]
    return jobs[number - 1 :: count]


def why_not(sanitizer: str) -> str | None:
    """Why nothing can be run here: a sentence, or None."""
    missing = [f"build/{name}" for name in ("probe", "ranks", "probe_racecheck", "ranks_racecheck")]
    missing = [name for name in missing if not (ROOT / name).exists()]
    if missing:
        return f"There is no {', '.join(missing)}: run scripts/probe build checks."
    if shutil.which(sanitizer) is None:
        return f"There is no {sanitizer} on PATH: install a CUDA toolkit, or name it by COMPUTE_SANITIZER."
    first = run(Job("memcheck", "fp8_block", "swapAB"), sanitizer, 120, time.monotonic() + 120)
    if re.search("Device not supported|unsupported|initialization failed", first.text, re.IGNORECASE):
        return f"{sanitizer} does not work on this machine:\n{first.text}"
    return None


def run(job: Job, sanitizer: str, limit: float, deadline: float) -> Outcome:
    """Runs one, as long as there is time."""
    limit = min(limit, deadline - time.monotonic())
    if limit <= 0:
        return Outcome(job, NOT_RUN, 0.0, "", "")
    begun = time.monotonic()
    environment = {**os.environ, "PROBE_FORMAT": job.format, "PROBE_BARE": "1"}
    process = subprocess.Popen(
        job.command(sanitizer),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    )
    try:
        text, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the tool has a child of its own
        text, _ = process.communicate()
        return Outcome(job, LATE, time.monotonic() - begun, "", text)
    return judge(job, process.returncode, text, time.monotonic() - begun)


def judge(job: Job, status: int, text: str, seconds: float) -> Outcome:
    """By the tool's status, and by what program and tool say: neither alone is trusted to tell that all was well."""
    summaries = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", text)
    summary = summaries[-1].strip() if summaries else ""
    if status == FOUND_STATUS or (summary and not re.search(r"SUMMARY: 0 (errors|hazards)", summary)):
        return Outcome(job, FOUND, seconds, summary, text)
    if status or not summary or not re.search(r"^ok ", text, re.MULTILINE):
        return Outcome(job, FAILED, seconds, summary, text)
    return Outcome(job, CLEAN, seconds, summary, "")


def line_of(outcome: Outcome) -> str:
    """As it is printed."""
    job = outcome.job
    return f"{outcome.outcome:11} {job.tool:9} {job.format:11} {job.case}: {outcome.summary} ({outcome.seconds:.0f} s)"


def table(outcomes: Iterable[Outcome], tools: Sequence[str]) -> str:
    """A row for each case and format, a column for each tool."""
    found = {outcome.job: outcome.outcome for outcome in outcomes}
    rows = sorted({(job.case, job.format) for job in found}, key=lambda row: (list(CASES).index(row[0]), row[1]))
    lines = [f"{'':40} {'':11} " + " ".join(f"{tool:11}" for tool in tools)]
    for case, format in rows:
        cells = (found.get(Job(tool, format, case), "") for tool in tools)
        lines.append(f"{case:40} {format:11} " + " ".join(f"{cell:11}" for cell in cells).rstrip())
    counts = Counter(found.values())
    return "\n".join([*lines, ", ".join(f"{count} {what}" for what, count in counts.items())])


def write(path: Path, outcomes: Iterable[Outcome]) -> None:
    """All that is known so far."""
    rows = [{**dataclasses.asdict(outcome.job), **dataclasses.asdict(outcome)} for outcome in outcomes]
    for row in rows:
        row["command"], row["seconds"] = CASES[row["case"]], round(row["seconds"], 1)
        del row["job"]
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
