"""Set after set in one job, and what rank 0 reports of it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import pytest

from tensorkv.bench import measuring
from tensorkv.bench.measuring import Event, measure_sets, print_event, read_event
from tensorkv.bench.steps import Plan

PLANS = [Plan(warmup=1, steps=2), Plan(tensors="4KB", warmup=1, steps=2)]


@pytest.mark.parametrize("options", [{}, {"embedded": True}], ids=["local", "dist_sync"])
def test_each_set_has_a_result(options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "TELL_EVERY_S", 0.0)
    events: list[Event] = []
    measure_sets("dist_sync" if options else "local", PLANS, events.append, **options)
    results = [event for event in events if event["event"] == "result"]
    assert [event["tensors"] for event in results] == ["quick", "4KB"]
    assert [len(event["times_s"]["pushpull"]) for event in results] == [2, 2]
    assert [event["num_workers"] for event in results] == [1, 1]
    told = [(event["way"], event["number"], event["num_steps"]) for event in events if event not in results]
    assert told == [("push+pull", 0, 2), ("push+pull", 1, 2), ("pushpull", 0, 2), ("pushpull", 1, 2)] * 2


def test_events_are_found_in_what_a_job_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    print_event({"event": "progress", "number": 3})
    line = capsys.readouterr().out
    assert read_event(f"[worker 0] {line}") == {"event": "progress", "number": 3}
    assert read_event("anything else") is None
    plans = [f"--plan={json.dumps(asdict(plan))}" for plan in PLANS]
    monkeypatch.setattr(sys, "argv", ["measuring", "--kind=local", *plans])
    measuring.main()
    events = [read_event(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["tensors"] for event in events if event and event["event"] == "result"] == ["quick", "4KB"]
