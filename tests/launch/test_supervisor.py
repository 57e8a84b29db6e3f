"""When a job ends and with which status: the pure core, and any order of events at all."""

from __future__ import annotations

import signal
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorkv.launch.supervisor import (
    Action,
    Finish,
    Kill,
    Node,
    Report,
    StopServers,
    Supervisor,
    Terminate,
    shell_status,
    signal_name,
    status_text,
)

S0, S1 = Node("server", 0), Node("server", 1)
W0, W1, W2 = Node("worker", 0), Node("worker", 1), Node("worker", 2)
LOST_WITH_0 = Finish(6, "worker 2 was lost, although it ended with status 0", W2)


def new() -> Supervisor:
    return Supervisor([S0, W0, W1, W2], grace_s=3, server_stop_s=5, kill_wait_s=7)


def test_a_job_without_faults_stops_its_servers_after_the_last_worker() -> None:
    core = new()
    assert core.exited({W1: 0}, 1.0) == []
    assert core.exited({W0: 0, W2: 0}, 2.0) == [StopServers()]
    assert core.deadline == 7.0
    assert core.exited({S0: 0}, 3.0) == [Finish(0)]
    assert core.deadline is None


def test_everything_may_end_at_once() -> None:
    assert new().exited({S0: 0, W0: 0, W1: 0, W2: 0}, 1.0) == [Finish(0)]


def test_a_server_that_ended_with_0_is_no_failure() -> None:
    core = new()
    assert core.exited({S0: 0}, 1.0) == []
    assert core.exited({W0: 0, W1: 0}, 2.0) == []
    assert core.exited({W2: 0}, 3.0) == [Finish(0)]


def test_the_first_failure_ends_the_others_and_gives_the_status() -> None:
    core = new()
    assert core.exited({W1: 3}, 10.0) == [Terminate((W0, W2))]
    assert core.deadline == 13.0
    assert core.exited({W0: 5}, 10.4) == []
    assert core.exited({W2: -signal.SIGTERM}, 10.5) == [Terminate((S0,))]
    assert core.exited({S0: 0}, 11.0) == [Finish(3, "worker 1 failed with status 3", W1)]


def test_the_last_process_alone_may_fail() -> None:
    core = Supervisor([W0])
    assert core.exited({W0: 2}, 0.0) == [Finish(2, "worker 0 failed with status 2", W0)]


def test_a_signal_counts_128_more() -> None:
    core = new()
    core.exited({W0: -signal.SIGSEGV}, 0.0)
    text = "worker 0 failed with status 139 (SIGSEGV)"
    assert core.exited({S0: 0, W1: 0, W2: 0}, 1.0) == [Finish(139, text, W0)]


@pytest.mark.parametrize(("returncode", "shown"), [(7, "status 7"), (-9, "status 137 (SIGKILL)")])
def test_a_lost_server_is_status_1(returncode: int, shown: str) -> None:
    core = new()
    assert core.exited({S0: returncode}, 0.0) == [Terminate((W0, W1, W2))]
    [finish] = core.exited({W0: 1, W1: 1, W2: 1}, 0.1)
    assert finish == Finish(1, f"server 0 failed with {shown}", S0)


def test_of_failures_seen_at_once_the_killed_one_was_first_then_servers_then_ranks() -> None:
    for exits, culprit in [
        ({S0: 1, W0: 1, W2: -9}, W2),
        ({W2: 1, S0: 1, W0: 1}, S0),
        ({W2: 1, W1: 1}, W1),
        ({W2: 1, W1: 0}, W2),
    ]:
        core = new()
        core.exited(exits, 0.0)
        [finish] = core.exited(dict.fromkeys(core.alive, 0), 1.0)
        assert isinstance(finish, Finish)
        assert finish.culprit == culprit


def test_those_who_stay_are_killed_after_the_grace() -> None:
    core = new()
    core.exited({W0: 1}, 0.0)
    core.exited({W1: 0}, 1.0)
    assert core.tick(2.9) == []
    late = Report("worker 2 did not end within 3 s and will be killed")
    assert core.tick(3.0) == [late, Kill((S0, W2))]
    assert core.deadline == 10.0
    assert core.exited({S0: -9}, 3.1) == []
    assert core.exited({W2: -9}, 3.2) == [Finish(1, "worker 0 failed with status 1", W0)]


def test_a_process_that_even_a_kill_does_not_end_is_given_up() -> None:
    core = new()
    core.exited({W0: 1}, 0.0)
    core.tick(3.0)
    [report, finish] = core.tick(10.0)
    assert report == Report("server 0, worker 1, worker 2 could not be killed")
    assert finish == Finish(1, "worker 0 failed with status 1", W0)
    assert core.tick(99.0) == []


def test_servers_that_do_not_end_are_killed_and_reported_but_the_work_is_done() -> None:
    core = Supervisor([S0, S1, W0], server_stop_s=5)
    assert core.exited({W0: 0}, 0.0) == [StopServers()]
    assert core.exited({S1: 0}, 1.0) == []
    late = Report("server 0 did not end within 5 s and will be killed")
    assert core.tick(5.0) == [late, Kill((S0,))]
    assert core.exited({S0: -9}, 5.1) == [Finish(0)]


def test_servers_that_are_not_wanted_any_more_may_end_in_any_way() -> None:
    core = Supervisor([S0, S1, W0])
    core.exited({W0: 0}, 0.0)
    assert core.dismiss([S1, W0]) == [Terminate((S1,))]
    assert core.dismiss([W0]) == []
    assert core.exited({S1: -15}, 0.1) == []
    assert core.exited({S0: 0}, 0.2) == [Finish(0)]


def test_a_server_that_fails_while_it_stops_is_a_failure() -> None:
    core = Supervisor([S0, S1, W0])
    core.exited({W0: 0}, 0.0)
    assert core.exited({S0: 1}, 1.0) == [Terminate((S1,))]
    assert core.exited({S1: 0}, 1.0) == [Finish(1, "server 0 failed with status 1", S0)]


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_job(signum: signal.Signals, status: int) -> None:
    core = new()
    assert core.signalled(signum, 1.0) == [Terminate((W0, W1, W2))]
    assert core.deadline == 4.0
    assert core.exited(dict.fromkeys((W0, W1, W2), 0), 1.5) == [Terminate((S0,))]
    assert core.exited({S0: -signal.SIGTERM}, 2.0) == [Finish(status, f"ended by {signum.name}")]
    assert core.signalled(signal.SIGINT, 3.0) == []


def test_a_second_ctrl_c_kills_at_once_and_a_third_changes_nothing() -> None:
    core = new()
    core.signalled(signal.SIGINT, 1.0)
    assert core.signalled(signal.SIGTERM, 1.1) == []
    assert core.signalled(signal.SIGINT, 1.2) == [Kill((S0, W0, W1, W2))]
    assert core.signalled(signal.SIGINT, 1.3) == []
    assert core.exited(dict.fromkeys(core.alive, -9), 1.4) == [Finish(130, "ended by SIGINT")]


def test_ctrl_c_during_the_grace_of_a_failure_kills_and_keeps_the_status() -> None:
    core = new()
    core.exited({W1: 4}, 0.0)
    assert core.signalled(signal.SIGINT, 0.1) == [Kill((S0, W0, W2))]
    [finish] = core.exited(dict.fromkeys(core.alive, -9), 0.2)
    assert finish == Finish(4, "worker 1 failed with status 4", W1)


def test_a_signal_while_servers_stop_ends_them() -> None:
    core = Supervisor([S0, W0])
    core.exited({W0: 0}, 0.0)
    assert core.signalled(signal.SIGTERM, 0.1) == [Terminate((S0,))]
    assert core.exited({S0: 0}, 0.2) == [Finish(143, "ended by SIGTERM")]


def test_abort_ends_the_job_once() -> None:
    core = new()
    assert core.abort(141, "nobody reads the output", 0.0) == [Terminate((W0, W1, W2))]
    assert core.abort(1, "again", 0.1) == []
    assert core.exited(dict.fromkeys(core.alive, 0), 0.2) == [Finish(141, "nobody reads the output")]


class TestSuspect:
    """The scheduler lost another process first: that one's status is awaited."""

    def test_its_status_counts_when_it_comes(self) -> None:
        core = new()
        assert core.exited({W0: 1}, 0.0, suspect=W2) == []
        assert core.deadline == 3.0
        assert core.exited({W1: 1}, 0.1, suspect=W2) == []
        assert core.exited({W2: 9}, 0.2, suspect=W2) == [Terminate((S0,))]
        assert core.exited({S0: 0}, 0.3) == [Finish(9, "worker 2 failed with status 9", W2)]

    def test_it_does_not_come_in_time(self) -> None:
        core = new()
        core.exited({W0: 6}, 0.0, suspect=W2)
        assert core.tick(3.0) == [Terminate((W1, W2))]
        [finish] = core.exited(dict.fromkeys(core.alive, -15), 3.1)
        assert finish == Finish(6, "worker 2 was lost, and had not ended 3 s later", W2)

    def test_it_ends_with_0(self) -> None:
        core = new()
        core.exited({W0: 6}, 0.0, suspect=W2)
        assert core.exited({W2: 0}, 0.1, suspect=W2) == [Terminate((W1,))]
        assert core.exited({W1: 0}, 0.2, suspect=W2) == [Terminate((S0,))]
        assert core.exited({S0: 0}, 0.3) == [LOST_WITH_0]

    def test_it_is_among_those_that_ended_at_once(self) -> None:
        core = new()
        core.exited({S0: 1, W0: 1, W1: 5}, 0.0, suspect=W1)
        assert core.exited({W2: 0}, 0.1) == [Finish(5, "worker 1 failed with status 5", W1)]

    def test_it_ended_before(self) -> None:
        core = new()
        core.exited({W2: 0}, 0.0)
        assert core.exited({W0: 6}, 0.1, suspect=W2) == [Terminate((W1,))]
        assert core.exited({W1: 0}, 0.2, suspect=W2) == [Terminate((S0,))]
        assert core.exited({S0: 0}, 0.3) == [LOST_WITH_0]

    def test_a_signal_does_not_wait_for_it(self) -> None:
        core = new()
        core.exited({W0: 6}, 0.0, suspect=W2)
        assert core.signalled(signal.SIGINT, 0.1) == [Terminate((W1, W2))]
        [finish] = core.exited(dict.fromkeys(core.alive, -15), 0.2)
        assert finish == Finish(6, "worker 0 failed with status 6", W0)


class TestSpared:
    """A worker fails, and the job goes on without it."""

    def test_the_others_come_to_their_end_and_the_job_has_succeeded(self) -> None:
        core = new()
        assert core.exited({W1: -9}, 1.0, spared=[W1]) == []
        assert core.running
        assert core.deadline is None
        assert core.exited({W0: 0, W2: 0}, 2.0) == [StopServers()]
        finish = Finish(0, "worker 1 failed with status 137 (SIGKILL)", W1, went_on=True)
        assert core.exited({S0: 0}, 3.0) == [finish]

    def test_the_first_is_named_last_and_the_others_are_reported(self) -> None:
        core = new()
        core.exited({W1: 3}, 1.0, spared=[W1])
        assert core.exited({W0: 4}, 2.0, spared=[W0]) == [Report("worker 0 failed with status 4, too")]
        assert core.exited({W2: 0}, 2.0) == [StopServers()]
        [finish] = core.exited({S0: 0}, 3.0)
        assert finish == Finish(0, "worker 1 failed with status 3", W1, went_on=True)

    def test_a_job_of_which_no_worker_is_left_has_failed(self) -> None:
        core = new()
        for now, (node, status) in enumerate({W1: -9, W0: 4}.items()):
            core.exited({node: status}, float(now), spared=[node])
        core.exited({W2: 3}, 2.0, spared=[W2])
        [finish] = core.exited({S0: 0}, 3.0)
        assert finish == Finish(137, "worker 1 failed with status 137 (SIGKILL)", W1, went_on=True)

    def test_a_failure_that_ends_the_job_is_what_the_job_ends_with(self) -> None:
        core = new()
        core.exited({W1: 3}, 1.0, spared=[W1])
        before = Report("worker 1 failed with status 3 before")
        assert core.exited({S0: 1}, 2.0) == [before, Terminate((W0, W2))]
        assert not core.running
        assert core.exited({W0: 0, W2: 0}, 3.0) == [Finish(1, "server 0 failed with status 1", S0)]

    def test_a_signal_ends_the_job_as_ever(self) -> None:
        core = new()
        core.exited({W1: 3}, 1.0, spared=[W1])
        before = Report("worker 1 failed with status 3 before")
        assert core.signalled(signal.SIGINT, 2.0) == [before, Terminate((W0, W2))]
        [finish] = core.exited(dict.fromkeys(core.alive, 0), 3.0)
        assert finish == Finish(130, "ended by SIGINT")

    def test_one_that_is_spared_and_one_that_is_not_at_once(self) -> None:
        core = new()
        out = core.exited({W1: -9, W0: 2}, 1.0, spared=[W1])
        assert out == [Report("worker 1 failed with status 137 (SIGKILL) before"), Terminate((W2,))]
        [finish] = core.exited({S0: 0, W2: 0}, 2.0)
        assert finish == Finish(2, "worker 0 failed with status 2", W0)


def test_statuses_as_a_shell_shows_them() -> None:
    assert [shell_status(code) for code in (0, 3, -9, -15)] == [0, 3, 137, 143]
    assert [signal_name(number) for number in (9, 250)] == ["SIGKILL", "signal 250"]
    assert [status_text(code) for code in (3, -9)] == ["status 3", "status 137 (SIGKILL)"]


NODES = [S0, S1, W0, W1]
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("exit"), st.sampled_from(NODES), st.sampled_from([0, 1, 3, -9])),
        st.tuples(st.just("signal"), st.sampled_from([signal.SIGINT, signal.SIGTERM]), st.just(0)),
        st.tuples(st.just("tick"), st.sampled_from([0.0, 1.0, 10.0]), st.just(0)),
    ),
    max_size=20,
)


@given(EVENTS, st.sampled_from([None, *NODES]), st.sets(st.sampled_from([W0, W1])))
def test_whatever_happens_the_job_ends_once_within_its_deadlines(
    events: list[tuple[str, object, int]], suspect: Node | None, spared: set[Node]
) -> None:
    core = Supervisor(NODES)
    alive, now, actions = set(NODES), 0.0, list[Action]()
    for kind, subject, status in events:
        if kind == "exit" and isinstance(subject, Node) and subject in alive:
            alive.remove(subject)
            actions += core.exited({subject: status}, now, suspect, spared)
        elif kind == "signal" and isinstance(subject, signal.Signals):
            actions += core.signalled(subject, now)
        elif kind == "tick" and isinstance(subject, float):
            now += subject
            actions += core.tick(now)
    ending = any(isinstance(action, Terminate | Kill) for action in actions)
    for _ in range(4 if ending else 0):  # nobody ever ends, and time goes on
        now += 10.0
        actions += core.tick(now)
    finishes = [action for action in actions if isinstance(action, Finish)]
    assert len(finishes) == (1 if ending or not alive else len(finishes))
    assert not finishes or actions[-1] is finishes[0], "nothing comes after the end"
    asked = [action for action in actions if isinstance(action, Terminate | Kill)]
    assert all(not (isinstance(a, Kill) and isinstance(b, Terminate)) for a, b in pairwise(asked))
    terminated = [node for action in asked if isinstance(action, Terminate) for node in action.nodes]
    assert len(terminated) == len(set(terminated)), "nobody is asked twice"
