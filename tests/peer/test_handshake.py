"""Who is let in, who is not, and what of the token can be seen on the wire."""

from __future__ import annotations

import dataclasses
import hmac
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

from tensorkv.config import JobConfig, Role, Transport
from tensorkv.errors import (
    AuthenticationError,
    InvalidKey,
    PeerLostError,
    ProtocolError,
    ProtocolVersionError,
    TensorKVError,
    TransportUnavailable,
    WaitTimeout,
)
from tensorkv.launch.cluster import LocalCluster
from tensorkv.peer import handshake
from tensorkv.peer.handshake import accept, connect_as, connect_to_server, introduce, receive_message
from tensorkv.transport.base import Buffer, Connection
from tensorkv.transport.endpoint import listen
from tensorkv.wire import messages as m
from tensorkv.wire.codec import MAGIC, MAX_HEADER_BYTES, PREFIX, VERSION, Decoder, encode

TOKEN = "the secret of this job"
DEADLINE_S = 20.0
Ends = tuple[Connection, Connection]
handshake_messages: Decoder[Any] = Decoder(m.HandshakeMessage)


def anybody(role: Role, rank: int) -> TensorKVError | None:
    return None


@pytest.fixture
def pair(pair: Ends) -> Ends:
    for end in pair:
        end.max_header_bytes = 4096
    return pair


def both(
    pair: Ends,
    *,
    theirs: str = TOKEN,
    ours: str = TOKEN,
    check: Callable[[Role, int], TensorKVError | None] = anybody,
) -> tuple[Future[None], Future[tuple[Role, int]]]:
    """Let worker 3 introduce itself; return what came of it on both sides."""
    with ThreadPoolExecutor(2) as pool:
        accepted = pool.submit(accept, pair[1], ours, check)
        introduced = pool.submit(introduce, pair[0], theirs, "worker", 3)
    return introduced, accepted


def test_both_sides_prove_themselves(pair: Ends) -> None:
    introduced, accepted = both(pair)
    introduced.result()
    assert accepted.result() == ("worker", 3)
    assert pair[0].max_header_bytes == pair[1].max_header_bytes == MAX_HEADER_BYTES


def test_a_wrong_token_is_refused_and_told(pair: Ends) -> None:
    introduced, accepted = both(pair, theirs="another")
    for side in (introduced, accepted):
        with pytest.raises(AuthenticationError, match=r"\(worker 3\) does not hold the token"):
            side.result()
    assert pair[1].max_header_bytes == 4096


def test_an_accepting_side_without_a_token_lets_nobody_in(pair: Ends) -> None:
    introduced, accepted = both(pair, ours="")
    for side in (introduced, accepted):
        with pytest.raises(AuthenticationError):
            side.result()


def test_without_a_token_nothing_is_sent(pair: Ends) -> None:
    with pytest.raises(AuthenticationError, match="TENSORKV_TOKEN is not set or empty"):
        introduce(pair[0], "", "worker", 0)
    assert not pair[1].readable()


def test_a_refusal_travels_as_its_own_error(pair: Ends) -> None:
    def check(role: Role, rank: int) -> TensorKVError | None:
        return InvalidKey(f"no place for {role} {rank}")

    for side in both(pair, check=check):
        with pytest.raises(InvalidKey, match="no place for worker 3"):
            side.result()


class Recorder(Connection):
    """Passes everything on, and remembers the bytes that are sent."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.sent: list[bytes] = []

    def send_rest(self, buffers: Any, tick: Any = handshake.no_tick) -> None:
        self.sent += [bytes(each) for each in buffers]
        self._connection.send_rest(buffers, tick)

    def send_now(self, buffers: Any) -> list[Buffer]:
        raise AssertionError("not used in a handshake")

    def __getattribute__(self, name: str) -> Any:
        own = ("_connection", "sent", "send_rest", "send_now", "send", "__class__")
        return object.__getattribute__(self if name in own else self._connection, name)

    def receive(self, sink: Any, tick: Any = handshake.no_tick) -> None: ...
    def readable(self) -> bool: ...
    def receive_now(self, sink: Any) -> bool: ...
    def fileno(self) -> int: ...
    @property
    def drained(self) -> bool: ...
    @property
    def ended(self) -> bool:
        return self._connection.ended

    @property
    def broken(self) -> bool: ...
    @property
    def in_frame(self) -> bool: ...
    def notice_silence(self, timeout_s: float) -> None: ...
    def shutdown(self) -> None: ...
    def close(self) -> None: ...


@pytest.mark.parametrize("theirs", [TOKEN, "another secret"])
def test_the_token_is_never_on_the_wire(pair: Ends, theirs: str) -> None:
    one, other = Recorder(pair[0]), Recorder(pair[1])
    both((one, other), theirs=theirs)
    everything = b"".join(one.sent + other.sent)
    assert len(everything) > 100
    for token in (TOKEN, theirs):
        for trace in (
            token.encode(),
            token.encode().hex().encode(),
            hmac.digest(token.encode(), b"", "sha256"),
        ):
            assert trace not in everything


def test_a_hello_is_good_for_one_connection_only(pair: Ends) -> None:
    """An eavesdropper who sends it again meets another nonce."""
    one = Recorder(pair[0])
    both((one, pair[1]))
    (hello,) = one.sent
    pair[0].send(hello)
    with pytest.raises(AuthenticationError, match="does not hold the token"):
        accept(pair[1], TOKEN, anybody)


def test_messages_sent_back_to_their_sender_prove_nothing(pair: Ends) -> None:
    """A peer without the token that returns whatever it hears."""
    one, other = pair
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(accept, other, TOKEN, anybody)
        one.send(encode(receive_message(one, handshake_messages)))
        with pytest.raises(ProtocolError, match="began with Challenge instead of Hello"):
            accepted.result(DEADLINE_S)


def test_a_hello_sent_back_does_not_pass_for_an_accept(pair: Ends) -> None:
    one, other = pair
    with ThreadPoolExecutor(1) as pool:
        introduced = pool.submit(introduce, one, TOKEN, "worker", 0)
        other.send(encode(m.Challenge(bytes(32))))
        hello = receive_message(other, handshake_messages)
        other.send(encode(m.Accept(hello.proof)))
        with pytest.raises(AuthenticationError, match="does not hold the token"):
            introduced.result(DEADLINE_S)


@pytest.mark.parametrize("answer", [m.Hello(bytes(32), bytes(32), "worker", 0), m.Challenge(bytes(32))])
def test_an_answer_that_is_none(pair: Ends, answer: Any) -> None:
    one, other = pair
    with ThreadPoolExecutor(1) as pool:
        introduced = pool.submit(introduce, one, TOKEN, "worker", 0)
        other.send(encode(m.Challenge(bytes(32))))
        receive_message(other, handshake_messages)
        other.send(encode(answer))
        with pytest.raises(AuthenticationError):
            introduced.result(DEADLINE_S)


@pytest.mark.parametrize(
    ("first", "text"),
    [
        (m.Hello(b"short", bytes(32), "worker", 0), "nonce of 5 bytes, not 32"),
        (m.Accept(bytes(32)), "began with Accept instead of Hello"),
        (m.Goodbye(), "malformed message"),
    ],
)
def test_first_words_that_are_no_hello(pair: Ends, first: Any, text: str) -> None:
    pair[0].send(encode(first))
    with pytest.raises(ProtocolError, match=text):
        accept(pair[1], TOKEN, anybody)


@pytest.mark.parametrize(
    ("first", "text"),
    [
        (m.Challenge(b"short"), "nonce of 5 bytes, not 32"),
        (m.Accept(bytes(32)), "began with Accept instead of Challenge"),
    ],
)
def test_first_words_that_are_no_challenge(pair: Ends, first: Any, text: str) -> None:
    pair[1].send(encode(first))
    with pytest.raises(ProtocolError, match=text):
        introduce(pair[0], TOKEN, "worker", 0)


def test_more_than_4_kib_before_the_proof(pair: Ends) -> None:
    pair[0].send(encode(m.Hello(bytes(5000), b"", "worker", 0)))
    with pytest.raises(ProtocolError, match="over the limit of 4096"):
        accept(pair[1], TOKEN, anybody)


def test_a_payload_before_the_proof(pair: Ends) -> None:
    pair[0].send(encode(m.Hello(bytes(32), b"", "worker", 0), 3), [b"abc"])
    with pytest.raises(ProtocolError, match="a payload of 3 bytes where none belongs"):
        accept(pair[1], TOKEN, anybody)


def test_another_version_of_the_protocol(pair: Ends) -> None:
    pair[0].send(PREFIX.pack(MAGIC, VERSION + 1, 0, 0))
    with pytest.raises(ProtocolVersionError):
        accept(pair[1], TOKEN, anybody)


def test_a_peer_that_says_nothing(pair: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 0.1)
    with pytest.raises(WaitTimeout, match="the handshake with .* did not finish within 0.1 s"):
        accept(pair[1], TOKEN, anybody)


# ---- connect_as --------------------------------------------------------------------------------------


def config(address: tuple[str, int]) -> JobConfig:
    return JobConfig(
        role="worker",
        rank=3,
        num_workers=4,
        num_servers=1,
        scheduler_host=address[0],
        scheduler_port=address[1],
        token=TOKEN,
    )


@pytest.mark.parametrize("host", ["inproc", "127.0.0.1"])
def test_connect_as_the_process_of_a_config(host: str) -> None:
    listener = listen(host)
    with ThreadPoolExecutor(1) as pool:
        introduced = pool.submit(connect_as, config(listener.address), "server 1", *listener.address)
        accepted = listener.accept()
        assert accept(accepted, TOKEN, anybody) == ("worker", 3)
        introduced.result(DEADLINE_S).close()
    accepted.close()
    listener.close()
    with pytest.raises(PeerLostError, match=f"server 1 at {host}:.* cannot be reached"):
        connect_as(config(listener.address), "server 1", *listener.address)


@pytest.mark.parametrize("host", ["inproc", "127.0.0.1"])
def test_a_peer_that_is_stopped_in_the_handshake_is_waited_for_up_to_the_jobs_timeout(host: str) -> None:
    listener = listen(host)
    hurried = dataclasses.replace(config(listener.address), timeout_s=0.1)
    where = re.escape(f"server 1 at {host}:{listener.address[1]}")
    with pytest.raises(
        WaitTimeout, match=f"joining the job did not .*: waiting for {where}, which does not answer"
    ):
        connect_as(hurried, "server 1", *listener.address)
    listener.close()


def test_the_end_of_the_job_ends_a_handshake() -> None:
    listener = listen("127.0.0.1")
    with pytest.raises(PeerLostError, match="server 1 on host there was lost"):
        connect_as(
            config(listener.address),
            "server 1",
            *listener.address,
            failure=lambda: PeerLostError("server 1 on host there was lost"),
        )
    listener.close()


def test_a_stopped_process_has_more_than_a_minute_for_its_handshake() -> None:
    assert handshake.HANDSHAKE_TIMEOUT_S > 60


@pytest.mark.parametrize("host", ["inproc", "127.0.0.1"])
def test_a_peer_that_ends_the_connection_in_the_handshake(host: str) -> None:
    listener = listen(host)
    with ThreadPoolExecutor(1) as pool:
        introduced = pool.submit(connect_as, config(listener.address), "server 1", *listener.address)
        accepted = listener.accept()
        accepted.shutdown()
        accepted.close()
        with pytest.raises(PeerLostError, match="server 1 at .* cannot be joined: .* ended the connection"):
            introduced.result(DEADLINE_S)
    listener.close()


def test_connect_as_keeps_the_error_that_tells_why() -> None:
    listener = listen("127.0.0.1")
    with ThreadPoolExecutor(1) as pool:
        introduced = pool.submit(connect_as, config(listener.address), "server 1", *listener.address)
        accepted = listener.accept()
        with pytest.raises(AuthenticationError):
            accept(accepted, "another", anybody)
        with pytest.raises(AuthenticationError, match="does not hold the token"):
            introduced.result(DEADLINE_S)
        accepted.close()
    listener.close()


# ---- which way a worker reaches a server -----------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    made = LocalCluster(1, 1, host="127.0.0.1", timeout_s=DEADLINE_S)
    yield made
    made.stop()


def reached(cluster: LocalCluster, transport: Transport, **changes: Any) -> str:
    """Connect as worker 0 and return the name of the connection's class."""
    server = cluster.servers[0]
    (host, port), (socket_name, _) = server.addresses
    address = msgspec.structs.replace(m.ServerAddress(host, port, socket_name), **changes)
    config = dataclasses.replace(cluster.config("worker", 0), transport=transport)
    connection = connect_to_server(config, 0, address, lambda: None)
    connection.shutdown()
    connection.close()
    return type(connection).__name__


@pytest.mark.parametrize(
    ("transport", "expected"),
    [("auto", "UnixConnection"), ("shm", "UnixConnection"), ("tcp", "TcpConnection")],
)
def test_the_transport_says_which_way(cluster: LocalCluster, transport: Transport, expected: str) -> None:
    assert reached(cluster, transport) == expected


@pytest.mark.parametrize("socket_name", ["", "@tensorkv-of-another-namespace", "no name", "@" + "x" * 200])
def test_where_memory_cannot_be_shared_auto_goes_over_tcp_and_shm_says_why(
    cluster: LocalCluster, socket_name: str
) -> None:
    why = "offers none" if not socket_name else "cannot connect to"
    with pytest.raises(TransportUnavailable, match=f"transport='shm': server 0 .*: .*{why}"):
        reached(cluster, "shm", socket_name=socket_name)
    assert reached(cluster, "auto", socket_name=socket_name) == "TcpConnection"


def test_a_system_without_shared_memory(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake.unix, "why_not", lambda: "this system has none")
    with pytest.raises(TransportUnavailable, match="this system has none"):
        reached(cluster, "shm")
    assert reached(cluster, "auto") == "TcpConnection"


def test_a_wrong_token_does_not_make_it_go_another_way(cluster: LocalCluster) -> None:
    (host, port), (socket_name, _) = cluster.servers[0].addresses
    config = dataclasses.replace(cluster.config("worker", 0), token="another")
    with pytest.raises(AuthenticationError, match="does not hold the token"):
        connect_to_server(config, 0, m.ServerAddress(host, port, socket_name), lambda: None)
