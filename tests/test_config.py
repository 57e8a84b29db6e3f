"""What a process learns from its environment."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tensorkv.config import (
    DEFAULT_PEER_TIMEOUT_S,
    DEFAULT_TIMEOUT_S,
    SLICE_BOUND_BYTES,
    JobConfig,
    check_transport,
    from_env,
    read_number,
    read_peer_timeout_s,
    read_slice_bound_bytes,
    read_timeout_s,
    read_transport,
    stray_variables,
)
from tensorkv.errors import InvalidArgument, NotInJob

CONFIG = JobConfig(
    role="server",
    rank=1,
    num_workers=4,
    num_servers=2,
    scheduler_host="10.0.0.7",
    scheduler_port=9321,
    token="s3cret",
    host="10.0.0.8",
    timeout_s=12.5,
    peer_timeout_s=7.5,
    slice_bound_bytes=4096,
    transport="shm",
)


def test_outside_a_job_there_is_no_config() -> None:
    assert from_env({}) is None
    assert from_env() is None  # the test's own environment has no job


def test_a_config_survives_the_environment() -> None:
    assert from_env(CONFIG.to_env()) == CONFIG


def test_it_is_read_from_the_process_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CONFIG.to_env().items():
        monkeypatch.setenv(name, value)
    assert from_env() == CONFIG


def test_an_ipv6_scheduler_keeps_its_colons() -> None:
    config = dataclasses.replace(CONFIG, scheduler_host="::1")
    assert from_env(config.to_env()) == config


def test_what_is_not_said_has_a_default() -> None:
    environ = CONFIG.to_env()
    for name in ("ROLE", "TOKEN", "HOST", "TIMEOUT_S", "PEER_TIMEOUT_S", "SLICE_BOUND_BYTES", "TRANSPORT"):
        del environ[f"TENSORKV_{name}"]
    config = from_env(environ)
    assert config is not None
    assert config.role == "worker"
    assert config.token == ""
    assert config.host == "localhost"
    assert config.timeout_s == DEFAULT_TIMEOUT_S
    assert config.peer_timeout_s == DEFAULT_PEER_TIMEOUT_S
    assert config.slice_bound_bytes == SLICE_BOUND_BYTES
    assert config.transport == "auto"


@pytest.mark.parametrize("name", ["RANK", "NUM_WORKERS", "NUM_SERVERS"])
def test_a_missing_variable_is_named(name: str) -> None:
    environ = CONFIG.to_env()
    del environ[f"TENSORKV_{name}"]
    with pytest.raises(NotInJob, match=f"TENSORKV_{name}.*tensorkv run"):
        from_env(environ)


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "first"), ("ROLE", "queen"), ("SCHEDULER", "nowhere"), ("TIMEOUT_S", "soon")],
)
def test_an_unreadable_variable_is_quoted(name: str, value: str) -> None:
    with pytest.raises(NotInJob, match=value):
        from_env({**CONFIG.to_env(), f"TENSORKV_{name}": value})


def test_the_token_is_not_shown() -> None:
    assert "s3cret" not in repr(CONFIG)


def test_numbers_of_the_environment() -> None:
    assert read_number({"N": "3"}, "N", int, 1) == 3
    assert read_number({}, "N", float, 1.5) == 1.5
    with pytest.raises(InvalidArgument, match="N=soon, which is no number"):
        read_number({"N": "soon"}, "N", float, 1.0)
    with pytest.raises(InvalidArgument, match="N=0, but at least 1 is needed"):
        read_number({"N": "0"}, "N", int, 1, least=1)
    with pytest.raises(InvalidArgument, match="N=nan, which is no number"):
        read_number({"N": "nan"}, "N", float, 1.0)


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("TIMEOUT_S", "nan", read_timeout_s),
        ("TIMEOUT_S", "0", read_timeout_s),
        ("PEER_TIMEOUT_S", "nan", read_peer_timeout_s),
        ("PEER_TIMEOUT_S", "-1", read_peer_timeout_s),
        ("SLICE_BOUND_BYTES", "-5", read_slice_bound_bytes),
        ("SLICE_BOUND_BYTES", "nan", read_slice_bound_bytes),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, value: str, read: Any) -> None:
    """By each launcher, and by a process of a job that was started by something else."""
    environ = {f"TENSORKV_{name}": value}
    with pytest.raises(InvalidArgument, match=f"TENSORKV_{name}={value}"):
        read(environ)
    with pytest.raises(NotInJob, match=f"TENSORKV_{name}={value}"):
        from_env({**CONFIG.to_env(), **environ})


def test_an_unknown_transport_is_refused_and_the_known_are_listed() -> None:
    for value in ("udp", "", "SHM"):
        with pytest.raises(
            InvalidArgument, match=f"TENSORKV_TRANSPORT='{value}' is no .*'auto', 'shm', 'tcp'"
        ):
            read_transport({"TENSORKV_TRANSPORT": value})
        with pytest.raises(NotInJob, match=f"TENSORKV_TRANSPORT='{value}'"):
            from_env({**CONFIG.to_env(), "TENSORKV_TRANSPORT": value})
    with pytest.raises(InvalidArgument, match="transport=3 is no transport"):
        check_transport("transport", 3)
    assert check_transport("transport", "tcp") == read_transport({"TENSORKV_TRANSPORT": "tcp"}) == "tcp"


def test_variables_without_a_job_are_told_of() -> None:
    assert stray_variables({}) == stray_variables(CONFIG.to_env()) == ""
    assert stray_variables({"TENSORKV_HOST": "10.0.0.8", "TENSORKV_TOKEN": "s3cret"}) == ""  # a user's own
    assert stray_variables({"TENSORKV_ROLE": "banana"}).startswith("TENSORKV_ROLE=banana is set, but")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fe80::1%eth0", "node-3"])
def test_hosts_of_every_kind_survive_the_environment(host: str) -> None:
    config = dataclasses.replace(CONFIG, scheduler_host=host, host=host)
    assert from_env(config.to_env()) == config


def test_brackets_around_a_host_are_taken_off() -> None:
    config = from_env({**CONFIG.to_env(), "TENSORKV_HOST": "[::1]", "TENSORKV_SCHEDULER": "[::1]:4321"})
    assert config is not None
    assert (config.host, config.scheduler_host, config.scheduler_port) == ("::1", "::1", 4321)


@pytest.mark.parametrize("address", ["::1:4321", "[::1]", "host", "host:http"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(NotInJob, match="the address .* (needs brackets|does not end with the number)"):
        from_env({**CONFIG.to_env(), "TENSORKV_SCHEDULER": address})
