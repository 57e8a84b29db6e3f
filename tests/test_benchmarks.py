"""The benchmarks run, check their results and end what they start. No figure is judged here."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import math
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cases
import demo
import harness
import jobs
import link
import measureall
import peerenv
import pictures
import pushpull
import pytest
import servermemory
import sidebyside
import soak
import soakworker
import startup
import stragglers
import sweeps
import systems
import tables
from goals import Goal, judge
from harness import JobFailed, Process, run_job
from rich.console import Console

import tensorkv
import training
from tensorkv.bench import steps
from tensorkv.bench.machine import this_machine
from tensorkv.bench.steps import Plan

QUICK = Plan(warmup=1, steps=3)
DEADLINE_S = 50.0


# ---- the jobs ------------------------------------------------------------------------------------


def _shell(script: str) -> list[Process]:
    return [Process(name="shell", command=["sh", "-c", script])]


def test_result_is_found_behind_a_prefix() -> None:
    result = {"a way": [0.25, 0.5]}
    script = f"echo hello; echo '[worker 0] {steps.MARK}{json.dumps(result)}'"
    assert run_job(_shell(script), timeout_s=30) == result


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo why it failed; exit 3", "(?s)ended with status 3.*why it failed"),
        ("echo nothing to tell", "(?s)0 results.*nothing to tell"),
        ("kill -9 $$", "ended with status -9"),
    ],
)
def test_failed_job_says_why(script: str, reason: str) -> None:
    with pytest.raises(JobFailed, match=reason):
        run_job(_shell(script), timeout_s=30)


def test_late_job_is_ended_with_its_children() -> None:
    with pytest.raises(JobFailed, match="still running") as caught:
        run_job(_shell("sleep 300 & echo pid $!; wait"), timeout_s=2)
    pid = str(caught.value).partition("pid ")[2].split()[0]
    with contextlib.suppress(ProcessLookupError):  # it is gone already
        handle = os.pidfd_open(int(pid))
        # It was killed, but is nobody's child here to wait for: it may be a moment on its way out.
        ended, _, _ = select.select([handle], [], [], DEADLINE_S)
        os.close(handle)
        assert ended, "a process was left running"


def test_sigterm_ends_the_job_with_the_benchmark() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run_job(_shell("kill -TERM $PPID; exec sleep 300"), timeout_s=30)
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before  # and nothing is left running: see conftest.py


def test_helper_that_fails_ends_the_job() -> None:
    worker, helper = _shell("sleep 300")[0], Process(name="server", command=["false"], helper=True)
    with pytest.raises(JobFailed, match="server ended with status 1"):
        run_job([worker, helper], timeout_s=30)


def test_floor_is_measured_in_processes() -> None:
    case = jobs.Case(name="c", title="", kind="dist_sync", plan=QUICK, num_workers=3, num_servers=2)
    times_s = run_job(jobs.floor_job(case), timeout_s=50)
    assert {way: len(found) for way, found in times_s.items()} == {"shm": 3, "tcp": 3}


def test_command_writes_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_json, as_markdown = tmp_path / "out.json", tmp_path / "out.md"
    wanted = ["--quick", "--case=local-assign", f"--json={as_json}", f"--markdown={as_markdown}"]
    pushpull.main(wanted)
    rows = json.loads(as_json.read_text())["rows"]
    assert [(row["system"], row["way"]) for row in rows] == [
        ("tensorkv", "push+pull"),
        ("tensorkv", "pushpull"),
        ("floor", "local"),
    ]
    assert "| floor | local |" in as_markdown.read_text()
    assert str(tmp_path) not in as_markdown.read_text()
    assert "floor" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.e2e
def test_dist_is_measured() -> None:
    case = next(cases.quick(case) for case in cases.CASES if case.name == "dist-sgd")
    times_s = run_job(jobs.tensorkv_job(case), timeout_s=50)
    assert {way: len(found) for way, found in times_s.items()} == {"push+pull": 3, "pushpull": 3}


@pytest.mark.e2e
def test_gloo_is_measured(tmp_path: Path) -> None:
    case = jobs.Case(name="c", title="", kind="dist_sync", plan=QUICK, num_workers=2, num_servers=2)
    times_s = run_job(jobs.gloo_job(case, tmp_path), timeout_s=50)
    assert {way: len(found) for way, found in times_s.items()} == {"flat": 3, "per tensor": 3}


@pytest.mark.parametrize("more", [[], ["--bound"]])
def test_a_checkout_is_measured_beside_another(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    here = harness.SOURCE.parent
    wanted = ["--quick", "--rounds=1", "--case=local-assign", *more]
    with pytest.raises(SystemExit, match="1"):  # nothing is as fast as is allowed
        sidebyside.main([str(here), *wanted, "--allowed=0"])
    printed = capsys.readouterr().out
    rows = [line.split()[:2] for line in printed.splitlines() if "tensorkv," in line]
    assert rows[:2] == [["tensorkv,", "push+pull"], ["tensorkv,", "pushpull"]]
    assert "slower than 0.0: local-assign tensorkv, pus" in printed


def test_what_keeps_a_cpu_awake_gives_way_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(command: list[str]) -> subprocess.Popen[bytes]:
        started.append(real(command))
        return started[-1]

    monkeypatch.setattr(harness.subprocess, "Popen", popen)
    with harness.kept_awake():
        cpus = os.sched_getaffinity(0)
        assert len(started) == len(cpus)
        for process in started:
            until = time.monotonic() + 20.0
            while (
                os.sched_getscheduler(process.pid) != os.SCHED_IDLE
                or len(os.sched_getaffinity(process.pid)) > 1
            ):
                assert process.poll() is None
                assert time.monotonic() < until
        assert {cpu for each in started for cpu in os.sched_getaffinity(each.pid)} == cpus
    assert [process.returncode for process in started] == [-signal.SIGKILL] * len(started)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sidebyside.main([str(tmp_path)])
    assert "has no src/tensorkv" in capsys.readouterr().err


def test_interpreter_without_mxnet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(peerenv.NoPeer, match="has no mxnet 1.9.1"):
        peerenv.peer_python(peerenv.MXNET, sys.executable, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- the figures ---------------------------------------------------------------------------------


def test_ratio_is_taken_round_by_round() -> None:
    ours = [[1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [1.0, 1.0, 1.0]]
    theirs = [[4.0, 6.0, 8.0], [30.0, 40.0, 90.0], [1.5, 9.0, 9.5]]
    found = harness.figures(theirs, ours)
    assert found.ratio == pytest.approx(3.0)  # of 3, 2 and 9
    assert found.ratio_of_min == 1.5
    assert found.median_ms == 9000.0
    assert found.min_ms == 1500.0
    assert found.p99_ms == 90_000.0
    assert harness.figures(ours, None).ratio is None
    assert harness.ratio_of_rounds([[8.0], [2.0]], [[1.0], [1.0]]) == pytest.approx(4.0)  # not 5
    assert harness.ratio_of_rounds([[1.0], [1.0]], [[8.0], [2.0]]) == pytest.approx(1 / 4)


def test_a_goal_is_judged_round_by_round_and_told_with_its_case() -> None:
    case = next(case for case in cases.CASES if case.name == "dist-resnet50")
    asked = [
        Goal.faster(case.name, "tensorkv", "pushpull", "mxnet", "pushpull", 1.5),
        Goal.faster(case.name, "tensorkv", "pushpull", "mxnet", "pushpull", 1.6),
        Goal.within(case.name, "tensorkv", "pushpull", "floor", "tcp", 2.5),
        Goal.within(case.name, "tensorkv", "pushpull", "floor", "tcp", 1.9),
        Goal.time(case.name, "tensorkv", "pushpull", median_ms=1000, p99_ms=9000),
        Goal.time(case.name, "tensorkv", "pushpull", median_ms=1000, p99_ms=8999),
        Goal.time(case.name, "gloo", "flat", median_ms=1000),  # nobody asked for gloo
        Goal.faster(case.name, "tensorkv", "pushpull", "ray", "actors", 2),  # which has failed
    ]
    times = {
        "tensorkv": {"pushpull": [[1.0], [9.0], [1.0]]},
        "mxnet": {"pushpull": [[1.5], [90.0], [1.2]]},
        "floor": {"tcp": [[0.5], [4.5], [0.4]]},
        "ray": {},
    }
    verdicts = judge(asked, {case.name: times})
    assert [verdict.reached for verdict in verdicts] == [True, False, True, False, True, False, None]
    assert [verdict.found for verdict in verdicts[1:4:2]] == ["1.5", "2"]
    text = tables.markdown([(case.title, systems.rows_of(case, times))], this_machine(), "a command")
    assert case.title in text
    assert "    a command\n" in text
    assert "| floor | tcp | 500 |" in text
    asked_and_found = tables.goals_markdown(verdicts)
    missed = "| dist-resnet50 | tensorkv, pushpull | ≥ 1.6 times as fast as mxnet pushpull | 1.5 | NO |"
    assert missed in asked_and_found
    assert "| ≥ 2 times as fast as ray actors | not measured | ? |" in asked_and_found
    reached = [line.endswith("| yes |") for line in asked_and_found.splitlines()[2:]]
    assert reached == sorted(reached, reverse=True)  # what falls short stands last


def test_every_goal_is_of_a_case_and_of_systems_that_can_do_it() -> None:
    by_name = {case.name: case for case in cases.CASES}
    for goal in cases.GOALS:
        assert systems.can_do(goal.step[0], by_name[goal.case])
        assert goal.peer is None or systems.can_do(goal.peer[0], by_name[goal.case])


# ---- how the cost grows --------------------------------------------------------------------------


def test_one_thing_changes_in_a_sweep() -> None:
    for sweep in sweeps.SWEEPS:
        changed = [
            {
                name
                for name, value in dataclasses.asdict(case).items()
                if name != "name" and value != dataclasses.asdict(sweeps.AROUND)[name]
            }
            for _, case in sweep.points
        ]
        assert len(set().union(*changed)) == 1


def test_what_takes_over_half_of_the_memory_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = next(sweep for sweep in sweeps.SWEEPS if sweep.name == "bytes")
    monkeypatch.setattr(sweeps, "memory_bytes", lambda: 6 << 30)
    fits, skipped = sweep.fitting()
    assert [value for value, _ in fits] == ["1MB", "4MB", "16MB", "64MB", "256MB"]
    assert skipped == ["1GB"]
    found = {value: {"tensorkv": {"push+pull": [[0.001]]}} for value, _ in fits}
    text = sweeps.sweep_markdown(sweep, found, skipped)
    assert "| tensorkv | 1 | 1 | 1 | 1 | 1 |" in text
    assert "half of this machine's memory: 1GB." in text


def test_sweeps_are_drawn(tmp_path: Path) -> None:
    found = {
        sweep.name: {value: {"tensorkv": {"push+pull": [[0.001, 0.002]]}} for value, _ in sweep.points}
        for sweep in sweeps.SWEEPS
    }
    pictures.plot_sweeps(sweeps.SWEEPS, found, tmp_path / "growth.png")
    content = (tmp_path / "growth.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20]) == 920  # the width


def test_a_peer_that_fails_is_left_out_and_one_of_ours_is_an_error() -> None:
    case = next(case for case in cases.CASES if case.name == "dist-resnet50")
    good = f"echo '{steps.MARK}{json.dumps({'pushpull': [0.25]})}'"
    makers = {"tensorkv": lambda case: _shell(good), "mxnet": lambda case: _shell("exit 3")}
    output = io.StringIO()
    times = systems.measure(case, makers, 2, Console(file=output))
    assert times == {"tensorkv": {"pushpull": [[0.25], [0.25]]}, "mxnet": {}}
    assert "dist-resnet50: mxnet is left out: shell ended with status 3" in output.getvalue()
    measured = measureall.Measured(this_machine())
    measured.times[case.name] = times
    measured.note_failed(case, times)
    assert "Left out, as their jobs failed: mxnet (dist-resnet50)." in measured.markdown()
    assert "mxnet pushpull | not measured | ? |" in measured.markdown()
    with pytest.raises(JobFailed):
        systems.measure(case, {"tensorkv": makers["mxnet"]}, 1, Console(file=output))


def test_a_peer_that_cannot_be_had_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, list[str]] = {}

    def measured(case: jobs.Case, makers: dict[str, Any], rounds: int, console: Any) -> dict[str, Any]:
        asked[case.name] = list(makers)
        return {"tensorkv": {"push+pull": [[0.001]], "pushpull": [[0.001]]}}

    monkeypatch.setattr(measureall, "measure", measured)
    (tmp_path / "benchmarks.md").write_text(f"{measureall.START}{measureall.END}")
    nowhere = [f"--{peer.name}-python={tmp_path / 'none'}" for peer in peerenv.PEERS]
    measureall.main([f"--docs={tmp_path}", *nowhere])
    assert asked["dist-resnet50"] == ["tensorkv", "tensorkv-shm", "tensorkv-lent", "gloo", "floor"]
    text = (tmp_path / "benchmarks.md").read_text()
    assert "Not measured, as it could not be installed: mxnet, ray." in text
    assert "≥ 1.8 times as fast as mxnet pushpull | not measured | ? |" in text
    assert str(tmp_path) not in text
    assert "mxnet is left out: " in capsys.readouterr().out


def test_nothing_is_asked_of_tiny_sizes() -> None:
    case = next(case for case in cases.CASES if case.name == "dist-one")
    for quick, number in ((False, 1), (True, 0)):
        measured = measureall.Measured(this_machine(), quick=quick)
        measured.times[case.name] = {"tensorkv": {"pushpull": [[0.001]]}}
        assert len(measured.verdicts()) == number


def test_everything_is_measured_and_written_as_it_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With times that stand for real ones; what the jobs do is tested above."""
    looked: list[str] = []

    def measured(case: jobs.Case, makers: dict[str, Any], rounds: int, console: Any) -> dict[str, Any]:
        looked.append((tmp_path / "benchmarks.md").read_text())
        ways = {"tensorkv": ["push+pull", "pushpull", "pushes"], "mxnet": ["push+pull", "pushpull", "pushes"]}
        return {
            system: {way: [[0.001, 0.002]] * rounds for way in ways.get(system, ["flat"])}
            for system in makers
            if system in ("tensorkv", "mxnet", "gloo")
        }

    monkeypatch.setattr(measureall, "measure", measured)
    monkeypatch.setattr(measureall, "peer_pythons", lambda *arguments: {"mxnet": "m", "ray": "r"})
    (tmp_path / "benchmarks.md").write_text(f"above\n{measureall.START}{measureall.END}below\n")
    measureall.main([f"--docs={tmp_path}"])
    text = (tmp_path / "benchmarks.md").read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert all(f"**{case.title}**" in text for case in cases.CASES)
    assert all(f"**{sweep.title}** (ms)" in text for sweep in sweeps.SWEEPS)
    assert "| dist-resnet50 | tensorkv, pushpull | ≥ 1.8 times as fast as mxnet pushpull | 1 | NO |" in text
    assert cases.CASES[0].title not in looked[0]
    assert cases.CASES[0].title in looked[1]
    assert "**Unfinished**" in looked[-1]
    assert "**Unfinished**" not in text
    assert re.search(r"^    make bench \(took \d+ minutes\)$", text, re.MULTILINE)
    assert (tmp_path / measureall.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert "minutes; written: " in capsys.readouterr().out


def test_figures_replace_those_before_them_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{measureall.START}old\n{measureall.END}below\n")
    for figures in ("new", "newer\n"):
        measureall.put_figures(page, figures)
    assert page.read_text() == f"above\n{measureall.START}\nnewer\n\n{measureall.END}below\n"
    page.write_text("above\n")
    with pytest.raises(measureall.NoPlace, match="has no lines"):
        measureall.put_figures(page, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_a_page_without_a_place_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measureall, "peer_pythons", lambda *arguments: pytest.fail("too late"))
    with pytest.raises(measureall.NoPlace, match="no place: .*benchmarks.md"):
        measureall.main([f"--docs={tmp_path}"])


# ---- starting a job ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(150)
def test_a_start_is_measured_and_the_launcher_does_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    startup.main(["--rounds=1"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("launcher and scheduler: torch=False numpy=False memory=")
    assert printed[1].startswith("round 1: imports ")
    assert len(printed) == 5


def test_a_start_is_judged_by_its_rounds() -> None:
    rounds = [startup.Round(imports_s=1.0, job_s=each) for each in (2.0, 2.4, 9.0)]
    lines = startup.report(rounds)
    assert lines[1].endswith("2.40 times as long")
    assert lines[2].endswith("3.00 s   80% of it used, reached: yes")
    assert startup.report(rounds[2:])[2].endswith("300% of it used, reached: NO")


# ---- a limited link ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(150)
def test_steps_over_a_limited_link_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    status = link.main(["--set=1MB", "--mbit=500", "--rounds=1", "--steps=1"])
    printed = capsys.readouterr().out
    if "not measured: " in printed:
        pytest.skip(printed.strip())
    assert status == 0
    assert "1MB: 1 MB each way, 1 worker(s) behind 500 Mbit/s, 2 server(s)" in printed
    assert [line.split("  ")[0] for line in printed.splitlines()[-2:]] == ["push+pull", "pushpull"]
    namespaces = link._run("ip netns list").stdout
    assert f"tkvl{os.getpid() % 100_000}" not in namespaces


def test_without_root_no_link_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(link.os, "geteuid", lambda: 1000)
    assert link.main([]) == 1
    assert "not measured: making a network namespace needs root" in capsys.readouterr().out


# ---- a long run ----------------------------------------------------------------------------------


def tracks(**ends_mb: float) -> dict[str, soak.Track]:
    """Looks each second, 101 in all, at processes whose memory goes from 100 MB to these, evenly."""
    found: dict[str, soak.Track] = {}
    for process, end_mb in ends_mb.items():
        track = found[process] = soak.Track()
        for second in range(101):
            memory_mb = 100.0 + (end_mb - 100.0) * second / 100
            figures = {soak.MEMORY: memory_mb, soak.SHARED: second / 100, "threads": 5.0, "open files": 7.0}
            track.add(float(second), figures)
    return found


def test_a_figure_is_judged_by_what_its_least_grew() -> None:
    lines, all_flat = soak.table(tracks(launcher=100.0, worker=107.0))
    assert lines[2] == "| launcher | 100 → 100 | 0.22 → 0.82 | 5 → 5 | 7 → 7 | yes |"
    assert lines[3] == "| worker | 101.5 → 105.7 | 0.22 → 0.82 | 5 → 5 | 7 → 7 | yes |"
    assert all_flat
    lines, all_flat = soak.table(tracks(launcher=100.0, worker=110.0))
    assert lines[3].endswith("| NO: resident memory |")
    assert not all_flat


def test_what_comes_and_goes_is_not_growth() -> None:
    found = tracks(launcher=100.0)
    memory_mb = found["launcher"].figures[soak.MEMORY]
    memory_mb[:] = [100.0 + (40.0 if second > 60 and second % 7 else 0.0) for second in range(101)]
    assert soak.table(found)[1]
    memory_mb[:] = [each + (6.0 if second > 60 else 0.0) for second, each in enumerate(memory_mb)]
    assert not soak.table(found)[1]


def test_one_thread_more_is_not_flat_and_one_less_is() -> None:
    assert soak.is_flat("threads", 5.0, 4.0)
    assert not soak.is_flat("threads", 5.0, 6.0)
    assert soak.is_flat(soak.SHARED, 0.0, 0.0)


def test_a_long_run_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "soak.png"
    soak.plot(tracks(launcher=100.0, worker=107.0), path, "a title")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20]) == 900  # the width
    assert len(content) < 150_000


def test_a_soak_uses_a_store_in_every_way_and_knows_what_it_must_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(soakworker, "SIZES", [1, 6, 64, 64, 1000, 1000])
    counts: collections.Counter[str] = collections.Counter()
    rules: set[str] = set()
    for seed in range(8):
        with tensorkv.create("local", reduction="mean" if seed % 2 else "sum") as kv:
            trial = soakworker.Trial(kv, random.Random(seed), counts)
            for _ in range(2):
                trial.step()
            rules.add(trial.rule)
    assert rules == set(soakworker.RULES)
    assert all(counts[what] for what in ("keys deleted in use", "values put", "values checked", "pushes"))


def test_a_soak_sees_one_wrong_element() -> None:
    with tensorkv.create("local") as kv:
        trial = soakworker.Trial(kv, random.Random(0), collections.Counter())
        trial.make(1)
        (key,) = trial.keys
        value = kv.pull(key)
        trial.check([key], [value])
        value[-1] += 1
        with pytest.raises(soakworker.WrongValue, match=key):
            trial.check([key], [value])


def test_nothing_is_held_in_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soakworker, "REST_S", 0.0)
    counts: collections.Counter[str] = collections.Counter()
    with tensorkv.create("local") as kv:
        trial = soakworker.Trial(kv, random.Random(0), counts)
        for _ in range(2):
            trial.step()
        soakworker.rest(trial)
        assert kv.keys() == []
        assert counts["rests"] == 1
        trial.step()


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(150)
def test_a_short_run_is_watched(capsys: pytest.CaptureFixture[str]) -> None:
    status = soak.main(["--minutes=0.05", "--every-s=0.1", "--workers=2", "--servers=1"])
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split(" |")[0] for line in printed if line.startswith("| ")][2:]
    assert rows == ["| launcher, scheduler", "| server 0", "| worker 0", "| worker 1"]
    assert printed[-1] == ("NOT FLAT" if status else "all flat")


def test_a_long_run_whose_job_fails_has_failed(capfd: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--minutes=0.05", "--workers=0"]) == 1
    assert "the job ended with status 2" in capfd.readouterr().out


def test_drawing_without_matplotlib_is_refused_before_the_job_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="2"):
        soak.main(["--plot=soak.png"])
    assert "--plot needs matplotlib: pip install" in capsys.readouterr().err


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.parametrize("system", ["shared", "zero"])
def test_memory_of_a_training_is_sampled_in_its_phases(system: str) -> None:
    base_bytes, peak_bytes = training.peak_of(system, 2, "compute")
    assert 2 * 10**7 < base_bytes < peak_bytes + 10**8  # both are of the whole job


@pytest.mark.e2e
@pytest.mark.parametrize("system", ["tensorkv", "forward", "shared-backward", "ddp"])
def test_each_system_trains_and_tells_the_seconds(system: str) -> None:
    job = training._job(system, "compute", 2, 3)
    found = run_job([job], timeout_s=DEADLINE_S)
    assert {part: len(seconds) for part, seconds in found.items()} == {"whole": 3, "compute": 3, "step": 3}
    assert all(second > 0 for seconds in found.values() for second in seconds)


def test_the_overhead_of_a_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "OVERHEAD_STEPS", 20)
    table = training.overhead(1)
    assert table.row_count == 1


def test_the_demo_draws_what_it_has_measured(tmp_path: Path) -> None:
    curves = {name: [(0.0, 0.1), (1.0, 0.9)] for name in demo.COLORS}
    demo.plot(curves, dict.fromkeys(demo.SYSTEMS, 5.0), tmp_path / "demo.svg")
    drawn = (tmp_path / "demo.svg").read_text()
    assert all(f"<!-- {name} -->" in drawn for name in demo.COLORS)


@pytest.mark.e2e
def test_the_demo_trains_in_each_way() -> None:
    curves = demo.accuracy(0.5)
    assert list(curves) == list(demo.COLORS)
    assert all(len(curve) > 1 for curve in curves.values())


# ---- stragglers ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_policy_trains_beside_a_straggler(tmp_path: Path) -> None:
    script, picture = Path(stragglers.__file__), tmp_path / "stragglers.png"
    worker = [sys.executable, str(script), "--seconds", "0.3", "--plot", str(picture)]
    run = [sys.executable, "-m", "tensorkv", "run", "--timeout", "40", "-n", "2", "-s", "1", "--", *worker]
    done = subprocess.run(run, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert picture.stat().st_size > 1000
    for title in (stragglers.AT_RANDOM, stragglers.SKEWED):
        assert f"{title}:" in done.stdout
    for name in stragglers.COLORS:
        assert done.stdout.count(f"  {name} ") == 2


def test_the_images_are_dealt_out_once() -> None:
    data = stragglers.digits.load()
    for title in (stragglers.AT_RANDOM, stragglers.SKEWED):
        shares = [stragglers.deal(data, rank, 4, title) for rank in range(4)]
        assert sum(len(share.labels) for share in shares) == len(data.train_labels)
        assert sum(share.images.sum().item() for share in shares) == pytest.approx(data.train_images.sum())
    assert {int(label) for label in shares[3].labels} == {8, 9}
    assert not {8, 9} & {int(label) for share in shares[:3] for label in share.labels}


def test_an_accuracy_is_the_mean_of_a_second() -> None:
    curve = [(0.0, 0.0), (1.0, 0.2), (1.5, 0.4), (2.0, 0.6)]
    assert stragglers.mean_before(curve, 2.0) == pytest.approx(0.5)
    assert stragglers.mean_before(curve, 1.0) == pytest.approx(0.2)
    assert math.isnan(stragglers.mean_before(curve, -1.0))  # beside other load a short run has few points


def test_what_a_server_takes_is_counted_in_models(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(servermemory, "WAYS", [("tcp", "assign")])
    servermemory.main(["--times", "1", "--wait-s", "0"])
    found = re.search(r"tcp, assign: the server takes (\d\.\d\d) models of 192 MB", capfd.readouterr().out)
    assert found is not None
    assert 1.0 <= float(found[1]) < 3.0  # it has the values
