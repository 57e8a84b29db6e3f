"""SeldomLog: however many lines there would be, a few are written, and the rest is counted."""

from __future__ import annotations

import logging

import pytest

from tensorkv.transport import seldomlog
from tensorkv.transport.seldomlog import MAX_LINES, SeldomLog

logger = logging.getLogger("tensorkv.test")


def test_ten_thousand_lines_are_ten_and_a_count(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(seldomlog.time, "monotonic", lambda: now)
    log = SeldomLog(logger, "refused connections")
    with caplog.at_level(logging.WARNING):
        for number in range(10_000):
            log.warning("refused %s: %d%%", "somebody", number)
        assert len(caplog.records) == MAX_LINES
        assert caplog.messages[0] == "refused somebody: 0%"
        assert caplog.messages[-1].endswith("; more refused connections are only counted for a while")
        now += seldomlog.INTERVAL_S
        log.warning("refused %s", "another")
    assert caplog.messages[MAX_LINES:] == [
        "9990 more refused connections were left out here",
        "refused another",
    ]


def test_the_rest_is_told_at_the_end_once(caplog: pytest.LogCaptureFixture) -> None:
    log = SeldomLog(logger, "lines")
    with caplog.at_level(logging.WARNING):
        log.end()
        for _ in range(MAX_LINES + 3):
            log.warning("line")
        log.end()
        log.end()
    assert caplog.messages[MAX_LINES:] == ["3 more lines were left out here"]
