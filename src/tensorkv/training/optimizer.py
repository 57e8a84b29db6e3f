"""DistributedOptimizer: a torch optimizer that runs where the weights live, on the servers of a store."""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Literal, Self

import torch

from tensorkv.arguments import positive
from tensorkv.errors import InvalidArgument, NotPicklable, NotSupported
from tensorkv.store import KVStore, Reduction
from tensorkv.stores.registry import open_next
from tensorkv.training.buffers import Buffers
from tensorkv.training.choices import choose
from tensorkv.training.gradients import ClippingWatch
from tensorkv.training.servers import ServerSteps
from tensorkv.training.states import STATE_IS_THERE
from tensorkv.training.steps import Steps
from tensorkv.training.workers import WorkerSteps

_HOOKS = frozenset(
    f"_optimizer_{call}_{when}_hooks"
    for call in ("step", "state_dict", "load_state_dict")
    for when in ("pre", "post")
)
"""The attributes in which torch keeps the hooks of an optimizer."""


class DistributedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose steps the servers make, with the mean of all workers' gradients.

    It takes the place of the optimizer it is made from, in a script or a framework: it has the same class of
    options, the same groups, and its `state_dict` is what that optimizer alone would have written, so that
    checkpoints go both ways between one process and any job. Schedulers, hooks and closures work as usual.
    Outside a job everything happens in this process, so the script still runs alone.

        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        optimizer = tensorkv.DistributedOptimizer(optimizer, model)
        for x, y in DataLoader(tensorkv.shard(data), 32):
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    When it is made, all parameters and buffers of the model become rank 0's. A step pushes the gradients and
    pulls the weights that they lead to; in a synchronous job it waits for all workers that have not left. A
    parameter without a gradient takes no part in a step: the mean is over the workers that have one, and
    where none has, the weight stays. Frozen parameters are never sent again; one that is unfrozen later must
    be unfrozen on every worker before the same step. Changes of options, by a schedule say, must be the same
    on all workers: a `ReduceLROnPlateau` gets `tensorkv.average(loss)`.

    Weights that the script changes itself, by loading a checkpoint or by an in-place operation, are sent with
    the next step: those of rank 0 count. A change through `.data` is not seen, and the next step undoes it,
    unless weights are shared.

    Not safe for several threads at once.
    """

    _steps: Steps
    _step_supports_amp_scaling = True  # a GradScaler leaves unscaling and skipping to `step`

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        kind: str | KVStore = "auto",
        reduction: Reduction = "mean",
        where: Literal["servers", "workers"] = "servers",
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        clip: Literal["local"] | None = None,
        buffers: Buffers = "rank0",
        overlap: Literal[False, "backward", "forward"] = False,
        accumulate: int | None = None,
        share_weights: bool | Literal["auto"] = False,
        name: str = "optimizer",
        **options: Any,
    ) -> None:
        """Move an optimizer to the servers.

        Args:
            inner: the optimizer. With where="servers" it must have made no step, and be one that a store can
                run: see `KVStore.set_optimizer`.
            model: the module that has the parameters of `inner`.
            kind: kind of the store. "auto" is "dist_sync" in a job and "local" outside one. A store that is
                open already may be passed instead; its reduction holds then.
            reduction: "mean" or "sum" over the workers' gradients.
            where: "servers", or "workers": then the servers only take the mean of the gradients, and each
                worker makes the same step itself, with all the optimizer's state. Any optimizer works there,
                LBFGS too.
            max_norm: maximum Euclidean norm of the mean of all gradients, over all parameters: each step
                scales them down to it, as `torch.nn.utils.clip_grad_norm_` would in one process on the whole
                batch.
            skip_nonfinite: skip a step in which an element of the mean is infinite or NaN, on all workers.
            clip: "local" if the script clips each worker's own gradients and that is meant: no warning then.
            buffers: what the running statistics of a BatchNorm, say, are after each step on all workers:
                "rank0", those of rank 0, or "mean". Buffers that the first step does not change are not
                exchanged.
            overlap: "backward" lets gradients leave while backward makes the next ones, with the same
                results. Between backward and `step` gradients, weights and options must stay as they are.
                "forward" also lets `step` return before the weights have come: the model's next forward waits
                for them, block by block, and `wait()` for all. Not with where="workers" and a GradScaler;
                "forward" not with share_weights and a compiled model.
            accumulate: number of backward passes in a step. With where="workers" the last of them takes the
                mean, so that what clips gradients before `step`, such as a framework, clips their mean. With
                overlap gradients leave in the last (default: 1). Else `step` counts: leave it away.
            share_weights: let all parameters lie in the servers' own memory, where all workers and servers
                are on one host: one copy of the weights for all of them, nothing is pulled, and gradients are
                held once, in memory that the next backward overwrites. "auto" does so where it is possible.
                Not with on_worker_loss="continue".
            name: name of the store. A second optimizer of the same name gets one of its own.
            **options: further options of `tensorkv.create`: staleness, quorum, timeout_s and so on.

        Raises:
            InvalidArgument: an argument is of another type, a parameter of `inner` is not in `model`, none
                requires a gradient, or `inner` has made steps.
            SettingMismatch: model or optimizer differ between the workers. All of them get this error, with
                the first difference.
            NotSupported: a parameter is a DTensor; share_weights=True is not possible, on all workers
                alike; or max_norm or skip_nonfinite in a store whose steps do not wait for all workers
                (dist_async, quorum).
            UnsupportedOptimizer, InvalidOption, InvalidValue: as `KVStore.set_optimizer`.
            What `tensorkv.create` and `KVStore.init` raise.

        Blocks until all workers have made theirs.

        Example:
            ```python
            model = torch.nn.Linear(2, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer = tensorkv.DistributedOptimizer(optimizer, model)
            model(torch.ones(4, 2)).sum().backward()
            optimizer.step()
            print(optimizer.store.info("bias").round)  # 1
            ```
        """
        _check_arguments(inner, model)
        # Hooks of the inner optimizer are ours; those of its step it runs itself where it steps itself.
        hooks = {name: each for name, each in vars(inner).items() if name in _HOOKS}
        if where == "workers":
            hooks = {name: each for name, each in hooks.items() if "_step_" not in name}
        super().__setstate__({"defaults": inner.defaults, **hooks})  # as for one that was unpickled
        chosen = choose(
            where,
            clip=clip,
            max_norm=max_norm,
            skip_nonfinite=skip_nonfinite,
            buffers=buffers,
            share_weights=share_weights,
            overlap=overlap,
            accumulate=accumulate,
        )
        if isinstance(kind, KVStore):
            store = kind
            if options:
                raise InvalidArgument(
                    f"{next(iter(options))}= beside a store that is open: pass it to tensorkv.create"
                )
        else:
            store = open_next(kind, name, reduction=reduction, **options)
        steps = ServerSteps if where == "servers" else WorkerSteps
        self._steps = steps(inner, model, store, chosen)
        if clip is None and where == "servers" and not overlap and store.num_workers > 1:
            self._steps.watch = ClippingWatch(self._steps.parameters)

    @property
    def store(self) -> KVStore:
        """The store that has the weights, under the names of `model.named_parameters()`.

        Example:
            ```python
            model = torch.nn.Linear(2, 1)
            inner = torch.optim.Adam(model.parameters(), lr=0.1)
            optimizer = tensorkv.DistributedOptimizer(inner, model)
            print(optimizer.store.keys())  # ['weight', 'bias']
            ```
        """
        return self._steps.kv

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # an attribute of torch's
        """The groups of the inner optimizer.

        Example:
            ```python
            model = torch.nn.Linear(2, 1)
            inner = torch.optim.Adam(model.parameters(), lr=0.1)
            optimizer = tensorkv.DistributedOptimizer(inner, model)
            print(optimizer.param_groups[0]["lr"])  # 0.1
            ```
        """
        return self._steps.inner.param_groups

    @property  # type: ignore[override]  # an attribute of torch's
    def state(self) -> MutableMapping[torch.Tensor, Any]:
        """The state of each parameter, read from the servers when it is looked at.

        Example:
            ```python
            model = torch.nn.Linear(2, 1)
            inner = torch.optim.Adam(model.parameters(), lr=0.1)
            optimizer = tensorkv.DistributedOptimizer(inner, model)
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            print(optimizer.state[model.bias]["exp_avg"])  # tensor([0.1000])
            ```
        """
        return self._steps.state

    @state.setter
    def state(self, value: Any) -> None:
        raise NotSupported(STATE_IS_THERE)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Push the gradients, let the servers update the weights, and pull these.

        Args:
            closure: evaluates the model and returns the loss; called once, before the push.

        Returns:
            What the closure has returned.

        Raises:
            StoreClosed: after `close`.
            SettingMismatch: options differ between the workers.
            What `KVStore.pushpull` raises.

        Blocks until the weights of this step are here.

        Example:
            ```python
            model = torch.nn.Linear(2, 1)
            inner = torch.optim.SGD(model.parameters(), lr=0.01)
            optimizer = tensorkv.DistributedOptimizer(inner, model)

            def closure():
                optimizer.zero_grad()
                loss = model(torch.ones(4, 2)).square().sum()
                loss.backward()
                return loss

            before = optimizer.step(closure)
            after = optimizer.step(closure)
            print(bool(after < before))  # True
            ```
        """
        found_inf = getattr(self, "found_inf", None)  # a GradScaler that is calling sets it, and `grad_scale`
        loss = None
        if found_inf is None:
            loss = self._steps.step(closure)
        else:
            self._steps.step_scaled(getattr(self, "grad_scale", None), found_inf)
        self._steps.after_step()
        return loss

    def allreduce_grads(self) -> None:
        """With where="workers": replace each parameter's gradient by its mean over the workers that have one.

        `step` does it, unless it is done already. Call it to look at the means before the step, or to change
        them: the step that follows takes them as they are.

        Raises:
            NotSupported: with where="servers", where the mean is not known here.

        Blocks until all workers have made the call.

        Example:
            ```python
            model = torch.nn.Linear(1, 1)
            inner = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer = tensorkv.DistributedOptimizer(inner, model, where="workers")
            model(torch.full((1, 1), 3.0)).sum().backward()
            optimizer.allreduce_grads()
            print(model.weight.grad)  # tensor([[3.]])
            optimizer.step()
            ```
        """
        if not isinstance(self._steps, WorkerSteps):
            raise NotSupported(
                "allreduce_grads: the servers have the mean; pass where='workers' to have it here"
            )
        self._steps.reduce()

    def wait(self) -> None:
        """Wait until all weights of the last step are here, with `overlap="forward"`.

        The model's own forward and `state_dict` do so. Call it before anything else reads or changes weights,
        such as a moving average.

        Raises:
            What `KVStore.pull` raises.

        Example:
            ```python
            model = torch.nn.Linear(1, 1)
            inner = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer = tensorkv.DistributedOptimizer(inner, model, overlap="forward")
            before = model.bias.item()
            model(torch.ones(1, 1)).sum().backward()
            optimizer.step()
            optimizer.wait()
            print(round(before - model.bias.item(), 3))  # 0.1
            ```
        """
        self._steps.wait()

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context in which backward passes accumulate gradients and send nothing, as DDP's.

        It matters with `overlap` and with `accumulate`: else nothing is sent before `step`.

        Example:
            ```python
            model = torch.nn.Linear(1, 1)
            inner = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer = tensorkv.DistributedOptimizer(inner, model, overlap="backward")
            with optimizer.no_sync():
                model(torch.ones(1, 1)).sum().backward()
            model(torch.ones(1, 1)).sum().backward()  # the sum of both leaves
            optimizer.step()
            print(model.bias.grad)  # tensor([2.])
            ```
        """
        return self._steps.paused()

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Let the next step scale the mean of all workers' gradients down to a norm; return their norm now.

        It stands in for `torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)` between backward and
        step, and is called by every worker. It sends the gradients; neither these nor the weights may change
        until the step. A step that is not made, because the norm is bad say, must be left out by all workers.

        Args:
            max_norm: maximum Euclidean norm over all parameters.

        Returns:
            The norm before clipping, float64.

        Raises:
            NotSupported: the store's steps do not wait for all workers (dist_async, quorum).

        Blocks until all workers have made the call.

        Example:
            ```python
            model = torch.nn.Linear(1, 1, bias=False)
            inner = torch.optim.SGD(model.parameters(), lr=1.0)
            optimizer = tensorkv.DistributedOptimizer(inner, model)
            before = model.weight.item()
            model(torch.full((1, 1), 4.0)).sum().backward()
            print(optimizer.clip_grad_norm_(1.0))  # tensor(4., dtype=torch.float64)
            optimizer.step()
            print(round(before - model.weight.item(), 3))  # 1.0
            ```
        """
        norm = self._steps.clip(positive("max_norm", max_norm))
        return torch.tensor(norm, dtype=torch.float64, device="cpu")

    @property
    def grad_norm(self) -> float | None:
        """The norm of the gradients of the last step before clipping; None if no step has needed it.

        Example:
            ```python
            model = torch.nn.Linear(2, 1)
            inner = torch.optim.Adam(model.parameters(), lr=0.1)
            optimizer = tensorkv.DistributedOptimizer(inner, model, max_norm=1.0)
            model(torch.full((1, 2), 2.0)).sum().backward()
            optimizer.step()
            print(round(optimizer.grad_norm, 6))  # 3.0
            ```
        """
        return self._steps.norm

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped, because a worker has found infinities or NaN.

        Example:
            ```python
            model = torch.nn.Linear(2, 1)
            inner = torch.optim.Adam(model.parameters(), lr=0.1)
            optimizer = tensorkv.DistributedOptimizer(inner, model, skip_nonfinite=True)
            model(torch.full((1, 2), torch.nan)).sum().backward()
            optimizer.step()
            print(optimizer.step_was_skipped)  # True
            ```
        """
        return self._steps.skipped

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters of the model, as torch's optimizers do. Every worker makes the call.

        Raises:
            InvalidArgument: a parameter is not in the model.
            ValueError, TypeError: as torch raises them.

        Blocks until all workers have made it.

        Example:
            ```python
            model = torch.nn.Linear(2, 1)
            optimizer = tensorkv.DistributedOptimizer(torch.optim.SGD([model.weight], lr=0.1), model)
            optimizer.add_param_group({"params": [model.bias], "lr": 0.01})
            print(len(optimizer.store), len(optimizer.param_groups))  # 2 2
            ```
        """
        self._steps.add_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what torch's `load_state_dict` has made of a checkpoint. Every worker loads the same one."""
        self._steps.load(state["state"], state["param_groups"])

    def close(self) -> None:
        """Leave the store: the other workers' steps need this worker no more. Call it when its data have
        ended.

        A worker that ends leaves by itself. Before that, for example while this worker evaluates the model,
        the others wait for its next step. The weights stay as they are; further steps raise StoreClosed.

        Example:
            ```python
            model = torch.nn.Linear(2, 1)
            inner = torch.optim.SGD(model.parameters(), lr=0.1)
            with tensorkv.DistributedOptimizer(inner, model) as optimizer:
                model(torch.ones(4, 2)).sum().backward()
                optimizer.step()
            print(optimizer.store.closed)  # True
            ```
        """
        self._steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc_type is None:
            self._steps.close()
        else:  # the worker counts as lost
            self._steps.release()
            self._steps.kv.__exit__(exc_type, exc, traceback)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse: its store belongs to this process."""
        raise NotPicklable(
            "a DistributedOptimizer cannot be pickled or copied, because its state is on the servers: save "
            "what state_dict() returns, or make another one with a name of its own"
        )

    def __repr__(self) -> str:
        return f"DistributedOptimizer of {self._steps.inner!r} in {self.store!r}"


def _check_arguments(inner: Any, model: Any) -> None:
    if isinstance(inner, DistributedOptimizer):
        raise InvalidArgument("the optimizer is a DistributedOptimizer already; use it as it is")
    if not isinstance(inner, torch.optim.Optimizer):
        raise InvalidArgument(
            f"the optimizer is a {type(inner).__name__}; pass one of torch.optim that was made"
        )
    if not isinstance(model, torch.nn.Module):
        raise InvalidArgument(
            f"the model is a {type(model).__name__}; pass the module that has the optimizer's parameters"
        )
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise InvalidArgument(
            "the model is wrapped in DistributedDataParallel, which averages gradients by itself, so they "
            "would be averaged twice: pass the model without DDP"
        )
    framework = _averaging_framework(model)
    if framework is not None:
        raise InvalidArgument(
            f"{framework} has made several processes a job of its own, in which it averages gradients and "
            "deals out data, so both would be done twice. It does so when torchrun or accelerate starts the "
            "processes: start them with `tensorkv run -n WORKERS -s SERVERS -- python script.py`"
        )


def _averaging_framework(model: Any) -> str | None:
    """Return the framework that is going to wrap the model in DistributedDataParallel, if there is one."""
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is not None and accelerate.PartialState._shared_state.get("num_processes", 1) > 1:
        return "Accelerate (or transformers' Trainer, which uses it)"
    trainer = getattr(model, "_trainer", None)  # of a LightningModule that is being fitted
    if "lightning" in sys.modules and getattr(trainer, "world_size", 1) > 1:
        return "Lightning"
    return None
