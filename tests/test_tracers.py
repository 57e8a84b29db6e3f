"""A step under torch.compile uses a store as it would without; other tracers and transforms are refused."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tensorkv
from tensorkv import tracers
from tensorkv.errors import InvalidValue
from tensorkv.store import KVStore
from tensorkv.tracers import opaque
from tensorkv.work import Work

KINDS = pytest.mark.parametrize("kind", ["local", "device", "dist_sync", "dist_async"])


def open_store(kind: str, **options: Any) -> KVStore:
    return tensorkv.create(kind, embedded=kind.startswith("dist"), **options)


class Counting:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.num_graphs += 1
        return graph.forward


def breaks() -> int:
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


@pytest.fixture
def dynamo() -> Any:
    """Dynamo without anything from before; its warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch._dynamo as found
        from torch._dynamo.utils import counters
    found.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch's own, of a tensor that goes from one graph to the next
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        yield found
    found.reset()


def test_importing_and_using_a_store_does_not_import_dynamo() -> None:
    code = (
        "import sys, torch, tensorkv\n"
        "with tensorkv.create('dist_sync', embedded=True) as kv:\n"
        "    kv.init('w', torch.zeros(2)); kv.push('w', torch.ones(2)); kv.pull('w')\n"
        "    kv.set_optimizer('adam'); kv.push('w', torch.ones(2)); kv.pull('w')\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@KINDS
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_step_pushes_graph_outputs_and_pulls_into_graph_inputs(
    dynamo: Any, kind: str, dynamic: bool | None
) -> None:
    backend = Counting()
    with open_store(kind) as kv:
        kv.init("w", torch.zeros(64))

        @torch.compile(backend=backend, dynamic=dynamic)
        def step(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            kv.push("w", x * 2)
            kv.pull("w", out)
            return out.sum() + 1

        found = [step(torch.full((64,), float(n)), torch.empty(64)).item() for n in range(4)]
        assert found == [128.0 * n + 1 for n in range(4)]
        assert breaks() == 2
        assert backend.num_graphs == 2  # before the push, and after the pull: none is compiled again


VERBS: dict[str, Callable[[KVStore, torch.Tensor], Any]] = {
    "init": lambda kv, x: (kv.delete("v"), kv.init("v", x + 1)),
    "push": lambda kv, x: kv.push("w", x + 1),
    "push of devices": lambda kv, x: kv.push("w", [x + 1, x + 1]),
    "push of a dict": lambda kv, x: kv.push({"w": x + 1, "v": x + 1}),
    "push ABSENT": lambda kv, x: kv.push(["w", "v"], [x + 1, tensorkv.ABSENT]),
    "push async": lambda kv, x: kv.push("w", x, async_op=True).wait(),  # type: ignore[union-attr]
    "pull": lambda kv, x: kv.pull("w"),
    "pull out": lambda kv, x: kv.pull(["w", "v"], [x, x + 1]),
    "pull async": lambda kv, x: kv.pull("w", async_op=True).result(),
    "pushpull": lambda kv, x: kv.pushpull("w", x + 1, x),
    "put": lambda kv, x: kv.put("w", x + 1),
    "barrier": lambda kv, x: (x + 1, kv.barrier()),
    "info": lambda kv, x: kv.info("w").shape,
    "keys": lambda kv, x: (x + 1, kv.keys()),
    "len": lambda kv, x: (x + 1, len(kv)),
    "in": lambda kv, x: (x + 1, "w" in kv),
    "set_updater": lambda kv, x: kv.set_updater("add"),
    "set_optimizer": lambda kv, x: kv.set_optimizer("sgd", lr=0.5),
    "state_dict": lambda kv, x: kv.state_dict(),
    "empty_like": lambda kv, x: kv.empty_like("w"),
    "properties": lambda kv, x: (kv.rank, kv.num_workers, kv.world_size, kv.kind, kv.name, kv.reduction),
    "closed": lambda kv, x: (x + 1, kv.closed),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["local", "dist_sync"])
def test_every_verb_does_what_it_does_outside(dynamo: Any, kind: str, verb: str) -> None:
    backend = Counting()
    seen = []
    for compiled in (False, True):
        with open_store(kind) as kv:
            kv.init({"w": torch.arange(4.0), "v": torch.zeros(4)})
            kv.put("w", torch.ones(4))
            call = torch.compile(VERBS[verb], backend=backend) if compiled else VERBS[verb]
            found = [call(kv, torch.full((4,), float(n))) for n in range(2)]
            num_graphs = backend.num_graphs
            found += [call(kv, torch.full((4,), float(n))) for n in range(2)]
            assert backend.num_graphs == num_graphs  # nothing is compiled again
            found = [] if verb == "empty_like" else found
            seen.append(str((found, {key: kv.pull(key) for key in ("w", "v")}, kv.info("w").version)))
    assert seen[0] == seen[1]
    calls = {"init": 2, "push async": 2, "pull async": 2, "info": 1, "properties": 0}.get(verb, 1)
    assert breaks() <= calls


def test_a_commit_in_a_step(dynamo: Any) -> None:
    with open_store("dist_sync") as kv:
        kv.init("w", torch.zeros(2))

        @torch.compile(backend="eager")
        def step(x: torch.Tensor) -> torch.Tensor:
            kv.push("w", x, apply=False)
            done = kv.commit(max_norm=0.5)
            return kv.pull("w") * done.norm

        for _ in range(3):
            assert step(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([1.5, 2.0])
        assert 1 <= breaks() <= 3


def test_a_step_that_trains_a_model(dynamo: Any) -> None:
    def losses(compiled: bool) -> list[float]:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        with open_store("dist_sync", reduction="mean") as kv:
            names = [name for name, _ in model.named_parameters()]
            parameters = list(model.parameters())
            kv.set_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
            kv.broadcast(names, parameters, parameters)

            def step(x: torch.Tensor) -> torch.Tensor:
                loss = model(x).square().mean()
                grads = torch.autograd.grad(loss, parameters)
                kv.pushpull(names, list(grads), parameters)
                return loss.detach()

            call = torch.compile(step, backend="eager") if compiled else step
            return [call(torch.randn(16, 4)).item() for _ in range(5)]

    assert losses(True) == losses(False)


def test_a_store_that_a_step_opens_and_closes(dynamo: Any) -> None:
    @torch.compile(backend="eager")
    def step(x: torch.Tensor) -> torch.Tensor:
        kv = tensorkv.create("local")
        kv.init("w", x + 1)
        pulled = kv.pull("w")
        kv.close()
        return pulled * 2

    for _ in range(2):
        assert step(torch.ones(2)).tolist() == [4.0, 4.0]


def test_fullgraph_says_what_is_in_its_way(dynamo: Any) -> None:
    with open_store("local") as kv:
        kv.init("w", torch.zeros(2))
        step = torch.compile(lambda x: kv.push("w", x), backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="leave fullgraph=True away"):
            step(torch.ones(2))
        assert kv.info("w").round == 0


def test_a_torch_that_skips_no_calls_is_gone_around(dynamo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.8 Dynamo can skip one function, and would trace what that one calls."""
    c_api: Any = torch._C._dynamo.eval_frame
    mark, strategy, action = c_api.set_code_exec_strategy, c_api._FrameExecStrategy, c_api._FrameAction
    traced = []

    class Old:
        set_eval_frame = staticmethod(c_api.set_eval_frame)

        @staticmethod
        def skip_code(code: Any) -> None:
            mark(code, strategy(action.SKIP, action.DEFAULT))

    def inner(x: torch.Tensor) -> torch.Tensor:
        traced.append(torch.compiler.is_compiling())
        return x + 1

    def verb(x: torch.Tensor) -> torch.Tensor:
        return inner(x) + 1

    with monkeypatch.context() as patch:
        patch.setattr(torch._C._dynamo, "eval_frame", Old)
        found = opaque(verb)
    backend = Counting()
    step = torch.compile(lambda x: found(x * 2) * 2, backend=backend)
    for _ in range(2):
        assert step(torch.ones(1)).item() == 8
    assert backend.num_graphs == 2
    assert traced == [False, False]
    assert found.__name__ == "verb"
    with pytest.raises(TypeError):
        found()
    assert c_api.set_eval_frame(None) is None  # and the callback is what it was


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="inductor needs a C++ compiler")
@pytest.mark.timeout(900)
def test_a_step_that_inductor_compiles(dynamo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test for all kinds: what the C++ compiler takes long for is the same in all of them."""
    warnings.simplefilter("default")  # inductor's own
    inductor = importlib.import_module("torch._inductor.config")
    monkeypatch.setattr(inductor, "compile_threads", 1)  # a pool of them would outlive the test
    for kind, dynamic in (("local", None), ("device", None), ("dist_sync", None), ("dist_async", True)):
        dynamo.reset()
        with open_store(kind) as kv:
            kv.init("w", torch.zeros(64))
            kv.set_updater("add")

            @torch.compile(dynamic=dynamic)
            def step(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
                kv.push("w", x.sin() * 2)  # called before the loop goes on
                kv.pull("w", out)
                return out.cos().sum()

            total = torch.zeros(64)
            for n in range(3):
                x = torch.full((64,), float(n))
                total += x.sin() * 2
                out = torch.empty(64)
                torch.testing.assert_close(step(x, out), total.cos().sum())
                torch.testing.assert_close(out, total)


# ---- refused -------------------------------------------------------------------------------------------


def under_fake(step: Callable[..., Any], x: torch.Tensor) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return step(torch.ones(4))


def under_make_fx(step: Callable[..., Any], x: torch.Tensor) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(step)(x)


def under_export(step: Callable[..., Any], x: torch.Tensor) -> Any:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return step(x)

    return torch.export.export(Module(), (x,), strict=False)


TRANSFORMS: dict[str, tuple[str, Callable[[Callable[..., Any], torch.Tensor], Any]]] = {
    "vmap": ("torch.vmap", lambda step, x: torch.vmap(step)(torch.stack([x, x]))),
    "grad": ("torch.func.grad", lambda step, x: torch.func.grad(step)(x)),
    "jacrev": ("torch.func.grad", lambda step, x: torch.func.jacrev(step)(x)),
    "jvp": ("torch.func.jvp", lambda step, x: torch.func.jvp(step, (x,), (x,))),
    "functionalize": ("torch.func.functionalize", lambda step, x: torch.func.functionalize(step)(x)),
    "fake": ("FakeTensorMode", under_fake),
    "make_fx": ("torch.fx's make_fx", under_make_fx),
    "export": ("FakeTensorMode", under_export),
    "jit.trace": ("torch.jit.trace", lambda step, x: torch.jit.trace(step, (x,))),
}

CALLS: dict[str, Callable[[KVStore, torch.Tensor], Any]] = {
    "init": lambda kv, x: kv.init("new", x),
    "push": lambda kv, x: kv.push("w", x),
    "pull": lambda kv, x: kv.pull("w", x),
    "pushpull": lambda kv, x: kv.pushpull(["w"], [x], [x]),
    "put": lambda kv, x: kv.put({"w": x}),
    "broadcast": lambda kv, x: kv.broadcast("new", x, x),
    "commit": lambda kv, x: kv.commit(),
    "state_dict": lambda kv, x: kv.state_dict(),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["local", "dist_sync"])
def test_a_transform_is_refused_and_nothing_is_changed(kind: str, transform: str) -> None:
    name, apply = TRANSFORMS[transform]
    with open_store(kind) as kv:
        kv.init("w", torch.full((4,), 5.0))
        for call, verb in CALLS.items():

            def step(x: torch.Tensor) -> torch.Tensor:
                verb(kv, x)  # noqa: B023  # called before the loop goes on
                return x.sum()

            with pytest.raises(InvalidValue) as caught:
                apply(step, torch.ones(4))
            assert str(caught.value).startswith(call)
            assert f"under {name}: " in str(caught.value)
            key = {"init": "'new'", "broadcast": "'new'", "commit": "", "state_dict": ""}.get(call, "'w'")
            assert key in str(caught.value)
        assert kv.keys() == ["w"]
        assert (kv.info("w").round, kv.info("w").version) == (0, 0)
        assert kv.pull("w").tolist() == [5.0] * 4
        assert kv.pushpull("w", torch.ones(4)).tolist() == [1.0] * 4


def test_a_transform_of_another_thread_is_in_nobodys_way() -> None:
    with open_store("local") as kv:
        kv.init("w", torch.zeros(2))

        def batched(x: torch.Tensor) -> torch.Tensor:
            thread = threading.Thread(target=kv.push, args=("w", torch.ones(2)))
            thread.start()
            thread.join()
            return x

        torch.vmap(batched)(torch.ones(3, 2))
        assert kv.pull("w").tolist() == [1.0, 1.0]


@KINDS
@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        torch.enable_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.autograd.forward_ad.dual_level,
    ],
    ids=["no_grad", "inference_mode", "enable_grad", "autocast", "dual_level"],
)
def test_what_only_changes_how_torch_computes_is_taken(kind: str, mode: Callable[[], Any]) -> None:
    with open_store(kind) as kv:
        kv.init("w", torch.full((3,), 1 / 3))
        kv.set_updater("add")
        with mode():
            kv.push("w", torch.full((3,), 1 / 3, requires_grad=True) * 1)
            found = kv.pull("w")
        assert found.dtype == torch.float32
        assert found.tolist() == (torch.full((3,), 1 / 3) * 2).tolist()
        assert kv.pushpull("w", torch.ones(3)).tolist() == (torch.full((3,), 1 / 3) * 2 + 1).tolist()


def test_a_mode_that_only_watches_is_taken() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with open_store("local") as kv, FlopCounterMode(display=False):
        kv.init("w", torch.zeros(2))
        assert kv.pushpull("w", torch.ones(2)).tolist() == [1.0, 1.0]


def test_every_public_method_is_opaque() -> None:
    for cls in (KVStore, Work):
        for name, each in vars(cls).items():
            if not name.startswith("_") and callable(each):
                assert each._torchdynamo_disable, name
    assert tensorkv.create._torchdynamo_disable  # type: ignore[attr-defined]
    assert tracers._tracer() is None
