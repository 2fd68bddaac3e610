"""Training many adapters in one step, each as if it were alone.

::

    optimizer = adapter_ext.optim.AdamW(model, lr=1e-3, adapters={"fr": {"lr": 3e-4}, "de": {}})
    for x, target, names in batches:
        optimizer.zero_grad()
        with adapter_ext.route_adapters(model, names):
            losses = F.cross_entropy(model(x), target, reduction="none")
        adapter_ext.optim.mean_per_adapter(losses, names).backward()
        optimizer.step()

PyTorch's optimizers skip parameters whose gradient is None: moments, step count and weight decay
too. All that is done here is to make that so for adapters without samples, and
to give each adapter a parameter group of its own. The arithmetic is PyTorch's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from adapter_ext import sample_counts
from adapter_ext.mixin import hosts_of, named_hosts, unwrapped

__all__ = ["AdamW", "adapter_groups", "drop_idle_gradients", "mean_per_adapter"]

# What a group may have besides options of torch.optim.AdamW; initial_lr is a scheduler's.
_KEYS = ("params", "param_names", "adapter", "max_norm", "initial_lr")


def adapter_groups(
    model: nn.Module, adapters: Mapping[str, Mapping[str, Any]] | Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups, one an adapter, for any optimizer.

    Args:
        model: any module; its submodules have the adapters.
        adapters: the names of those that are wanted, or by name the options of their groups
            (``{"fr": {"lr": 3e-4}, "de": {}}``); None means all.

    Returns:
        A group each: ``"params"``, the adapter's parameters in the whole model that require grad;
        ``"adapter"``, its name; and its options. Adapters without such parameters have none.

    Raises:
        TypeError: if adapters is a name by itself, or else no sequence or mapping, or the options
            of a name are no mapping.
        ValueError: if there is no adapter of a name, none of its parameters requires grad, or its
            options have "params" or "adapter".
    """
    if isinstance(adapters, str) or not isinstance(adapters, Sequence | Mapping | None):
        raise TypeError(
            f"adapters must be a sequence of names, or options by name; "
            f"got {adapters if isinstance(adapters, str) else type(adapters).__name__!r}"
        )
    parameters: dict[str, dict[nn.Parameter, None]] = {}  # each once, though hosts may share it
    for host in hosts_of(model):
        sample_counts.prepare(host)  # the model may have moved since the adapters were added
        for name, adapter in host._adapters().items():
            own = parameters.setdefault(name, {})
            own.update((p, None) for p in adapter.parameters() if p.requires_grad)
    if adapters is None:
        adapters = [name for name, own in parameters.items() if own]
    for name in adapters:
        if name not in parameters:
            raise ValueError(f"there is no adapter named {name!r}; there are {list(parameters)}")
        if not parameters[name]:
            raise ValueError(f"no parameter of adapter {name!r} requires grad: unfreeze it first")
    groups = []
    for name in adapters:
        options = adapters[name] if isinstance(adapters, Mapping) else {}
        if not isinstance(options, Mapping):
            raise TypeError(
                f"the options of adapter {name!r} must be a mapping, got {type(options).__name__}"
            )
        group: dict[str, Any] = {"params": [*parameters[name]], "adapter": name}
        for key in options.keys() & group.keys():
            raise ValueError(f"the options of adapter {name!r} can't have {key!r}")
        groups.append({**group, **options})
    return groups


def drop_idle_gradients(
    model: nn.Module, process_group: torch.distributed.ProcessGroup | None = None
) -> None:
    """Sets the gradients to None of adapters that had no samples in the backward passes.

    For any optimizer but :class:`AdamW`, which does it itself: call it before ``step``. It matters
    where :func:`adapter_ext.route_adapters` says that adapters without samples have gradients.
    Each call starts the count of samples anew; in other cases it does nothing. A gradient that is
    not zero stays: it is that of a pass that counts no samples, by names or without routes.

    Args:
        model: any module; its submodules have the adapters.
        process_group: where torch.distributed is in use, the processes whose samples count; None
            means all. Each of them must call this.
    """
    for host, name in sample_counts.take_idle(model, process_group):
        for parameter in host._adapters()[name].parameters():
            parameter.grad = None


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` for adapters that are trained together, each as if it were alone.

    Each adapter is a parameter group, with options of its own; other parameters can be added with
    ``add_param_group``. A step leaves adapters without samples untouched bit for bit: weights,
    moments, step count.

    Args:
        model: any module; its submodules have the adapters. May be wrapped by
            DistributedDataParallel or torch.compile.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        max_norm: clips the gradient of each adapter to this norm, taken over all its parameters in
            the model, before a step; None does not clip.
        adapters: which adapters, and which of the options above each has instead; see
            :func:`adapter_groups`. None means all with parameters that require grad.
        process_group: see :func:`drop_idle_gradients`.
        fused: whether to use PyTorch's fused kernels; None means where neither foreach nor
            differentiable is asked for, which exclude them.
        **options: other options of ``torch.optim.AdamW``.

    A copy, by ``copy.deepcopy`` or pickle, trains a copy of the model: copy both together to have
    that one. Not with a process_group, which PyTorch cannot copy.

    Raises:
        TypeError: if an option is of a wrong type, adapters is a name by itself, or else no
            sequence or mapping, or the options of a name are no mapping.
        ValueError: if an option is out of range, an adapter has one that is unknown, or an adapter
            is unknown or frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float | None = None,
        adapters: Mapping[str, Mapping[str, Any]] | Sequence[str] | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        fused: bool | None = None,
        **options: Any,
    ) -> None:
        _check_options(
            "AdamW",
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "max_norm": max_norm,
            },
        )
        if fused is None:
            fused = not (options.get("foreach") or options.get("differentiable"))
        groups = adapter_groups(model, adapters)
        if not groups:
            raise ValueError("there are no adapters with parameters that require grad")
        for group in groups:
            group.setdefault("max_norm", max_norm)
        super().__init__(groups, lr, betas, eps, weight_decay, fused=fused, **options)
        # A fused step would unscale the gradients itself, after they were clipped.
        self._step_supports_amp_scaling = False
        self.model = unwrapped(model)  # what is around it cannot always be copied
        self.process_group = process_group
        self._max_norm = max_norm

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in ("model", "process_group", "_max_norm")}
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in PyTorch, but with options that are checked.

        Args:
            param_group: ``"params"``, and options of the group's own, ``"max_norm"`` among them.

        Raises:
            TypeError: if an option is of a wrong type.
            ValueError: if an option is unknown or out of range, or a parameter in another group.
        """
        if isinstance(param_group, dict):  # PyTorch refuses all else
            self._complete(param_group)
        super().add_param_group(param_group)

    def _complete(self, group: dict[str, Any]) -> None:
        """Checks what was given for a group; its own foreach goes before the fused of all."""
        where = f"adapter {group['adapter']!r}" if "adapter" in group else "the parameter group"
        for key in group:
            if key not in self.defaults and key not in _KEYS:
                known = ", ".join((*self.defaults, "max_norm"))
                raise ValueError(f"{where}: there is no option {key!r}; there are {known}")
        _check_options(where, group)
        if group.get("foreach") or group.get("differentiable"):
            group.setdefault("fused", False)
            if group["fused"]:
                raise ValueError(f"{where}: fused excludes foreach and differentiable")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Steps the adapters that had samples since the last step.

        Args:
            closure: computes the gradients and returns the loss.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        drop_idle_gradients(self.model, self.process_group)
        for group in self.param_groups:
            if group.get("max_norm") is not None:
                nn.utils.clip_grad_norm_(group["params"], group["max_norm"])
        step: Any = torch.optim.AdamW.step
        if getattr(step, "hooked", False):
            step = step.__wrapped__  # the wrapper runs hooks, as the one around this method does
        step(self)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets the gradients to None, and forgets samples of backward passes without a step.

        Args:
            set_to_none: must be True; with gradients of zero, adapters without samples would be
                stepped.

        Raises:
            ValueError: if it is not.
        """
        if not set_to_none:
            raise ValueError(
                "set_to_none must be True: a gradient of zero is not that of no sample"
            )
        super().zero_grad()
        sample_counts.forget(self.model)

    def state_dict(self) -> dict[str, Any]:
        """As in PyTorch; adapters that were never stepped have the state of those in it too.

        torch.distributed.checkpoint, when it resumes, asks for the state of every parameter.
        """
        state_dict = super().state_dict()
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            moments = ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"][: group["amsgrad"]]]
            for number, parameter in zip(saved["params"], group["params"], strict=True):
                if number not in state_dict["state"]:
                    values = {key: torch.zeros_like(parameter) for key in moments}
                    state_dict["state"][number] = {"step": torch.zeros(()), **values}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, of each adapter by its name.

        Args:
            state_dict: the state of an optimizer of the same adapters, in any order. Other groups
                are matched by their order.

        Raises:
            ValueError: if it is of other adapters, a group has another number of parameters, or a
                tensor another shape. Nothing has changed then.
        """

        def by_name(group: Mapping[str, Any]) -> tuple[bool, str]:
            return "adapter" in group, str(group.get("adapter"))

        saved = state_dict["param_groups"]
        if sorted(map(by_name, self.param_groups)) != sorted(map(by_name, saved)):
            raise ValueError(
                f"the state must be of the adapters "
                f"{[group.get('adapter') for group in self.param_groups]}, got "
                f"{[group.get('adapter') for group in saved]}"
            )
        # Names differ, and groups without one keep their order: sorting is stable.
        count = len(saved)
        places = sorted(range(count), key=lambda i: by_name(self.param_groups[i]))
        by_place = dict(zip(places, sorted(saved, key=by_name), strict=True))
        groups = [by_place[i] for i in range(count)]
        names = {p: name for name, p in self.model.named_parameters()}
        for i, (given, group) in enumerate(zip(groups, self.param_groups, strict=True)):
            pairs = zip(given["params"], group["params"], strict=False)  # PyTorch compares numbers
            for j, (number, parameter) in enumerate(pairs):
                what = names.get(parameter, f"param_groups[{i}]['params'][{j}]")
                _check_shapes(what, parameter, state_dict["state"].get(number, {}))
        super().load_state_dict({**state_dict, "param_groups": groups})

    def match_model(
        self, adapters: Mapping[str, Mapping[str, Any]] | Sequence[str] | None = None
    ) -> None:
        """Follows the model after adapters were added, removed, renamed, frozen or unfrozen.

        The groups become those of a new optimizer. Adapters that stay keep their options and state,
        also under a new name; new ones start from nothing; of others no state remains. Learning
        rate schedulers must be made anew, since they know groups by their number.

        Args:
            adapters: as in the constructor; options that are given here replace kept ones.

        Raises:
            TypeError: if adapters is a name by itself, or else no sequence or mapping, the options
                of a name are no mapping, or one of them is of a wrong type. Nothing has changed
                then.
            ValueError: if there is no adapter of a name, none of its parameters requires grad, one
                of them is in a group of another, or an option is unknown or out of range. Nothing
                has changed then.
        """
        wanted = adapter_groups(self.model, adapters)
        for group in wanted:
            self._complete(group)
        before = {
            parameter: group
            for group in self.param_groups
            if "adapter" in group
            for parameter in group["params"]
        }
        others = [group for group in self.param_groups if "adapter" not in group]
        owners = {parameter: None for group in others for parameter in group["params"]}
        for group in wanted:
            name = group["adapter"]
            if any(owners.setdefault(p, name) != name for p in group["params"]):
                raise ValueError(f"adapter {name!r} has a parameter that another group has too")
        kept = {parameter for group in wanted for parameter in group["params"]}
        self.param_groups = others
        for group in wanted:
            old = dict(next((before[p] for p in group["params"] if p in before), {}))
            if "lr" in group:
                old.pop("initial_lr", None)  # a new scheduler would begin with that
            # What a scheduler noted in the old group is none of the options that are checked.
            super().add_param_group({"max_norm": self._max_norm, **old, **group})
        for parameter in before.keys() - kept:
            self.state.pop(parameter, None)

    def adapter_state_dict(self, name: str) -> dict[str, Any]:
        """The options and the state of one adapter, for ``torch.save``.

        Args:
            name: the adapter's.

        Returns:
            ``"options"`` of its group, and ``"state"``: by parameter, named
            ``"path.of.module:name.in.adapter"``, what the optimizer keeps of it.

        Raises:
            ValueError: if the adapter has no group.
        """
        group = self._group(name)
        return {
            "options": {k: v for k, v in group.items() if k not in ("params", "adapter")},
            "state": {
                key: dict(self.state[parameter])
                for key, parameter in self._named_parameters(name).items()
                if parameter in self.state
            },
        }

    def load_adapter_state_dict(self, name: str, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`adapter_state_dict` returned, also under another name.

        Args:
            name: the adapter's.
            state_dict: the options and the state; copied.

        Raises:
            ValueError: if the adapter has no group, or the state is of other parameters. Nothing
                has changed then.
        """
        group = self._group(name)
        parameters = self._named_parameters(name)
        state = {}
        for key, values in state_dict["state"].items():
            if key not in parameters:
                raise ValueError(
                    f"the state is of {key!r}, which adapter {name!r} does not have or does not "
                    f"train; it trains {list(parameters)}"
                )
            _check_shapes(f"{key!r} of adapter {name!r}", parameters[key], values)
            state[parameters[key]] = {k: v.detach().clone() for k, v in values.items()}
        for parameter in parameters.values():
            self.state.pop(parameter, None)
        group.pop("initial_lr", None)  # that of a scheduler, unless the options have it too
        group.update(state_dict["options"])
        for parameter, values in state.items():
            on_device = group["fused"] or group["capturable"]
            for key, value in values.items():
                if key != "step":
                    values[key] = value.to(parameter)
                elif on_device:
                    values[key] = value.to(parameter.device)
            self.state[parameter] = values

    def _group(self, name: str) -> dict[str, Any]:
        groups = {group["adapter"]: group for group in self.param_groups if "adapter" in group}
        if name not in groups:
            raise ValueError(f"adapter {name!r} is not trained here; those are {list(groups)}")
        return groups[name]

    def _named_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters in the optimizer, as :meth:`adapter_state_dict` names them."""
        own = set(self._group(name)["params"])
        return {
            f"{path}:{key}": parameter
            for path, host in named_hosts(self.model)
            if name in host._adapters()
            for key, parameter in host._adapters()[name].named_parameters()
            if parameter in own
        }


def _without_place(name: str | None) -> str | None:
    """A model's adapter may be called by its place, too."""
    return name.rpartition(":")[2] if isinstance(name, str) else name


def _check_options(where: str, options: Mapping[str, Any]) -> None:
    """Checks those options that are numbers, which PyTorch checks for the constructor alone."""
    numbers = {key: options[key] for key in ("lr", "eps", "weight_decay") if key in options}
    if options.get("max_norm") is not None:
        numbers["max_norm"] = options["max_norm"]
    if "betas" in options:
        betas = options["betas"]
        if not isinstance(betas, Sequence) or isinstance(betas, str):
            raise TypeError(f"{where}: betas must be two numbers, got {betas!r}")
        if len(betas) != 2:
            raise ValueError(f"{where}: betas must be two numbers, got {betas!r}")
        numbers |= {f"betas[{i}]": beta for i, beta in enumerate(betas)}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real | Tensor):
            raise TypeError(f"{where}: {key} must be a number, got {value!r}")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{where}: {key} must be one number, got {value!r}")
        if not float(value) >= 0.0:
            raise ValueError(f"{where}: {key} must be at least 0, got {value!r}")
        if key.startswith("betas") and not float(value) < 1.0:
            raise ValueError(f"{where}: {key} must be below 1, got {value!r}")


def _check_shapes(what: str, parameter: Tensor, state: Mapping[str, Any]) -> None:
    """Checks what fused kernels do not: they read and write as many elements as a parameter has."""
    for key, value in state.items():
        shape = torch.Size() if key == "step" else parameter.shape
        if isinstance(value, Tensor) and value.shape != shape:
            raise ValueError(
                f"the state {key!r} of {what} must have shape {list(shape)}, "
                f"got {list(value.shape)}"
            )


def mean_per_adapter(
    losses: Tensor,
    names: Sequence[str | None] | Tensor,
    *,
    counts: Mapping[Any, int] | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """The sum over adapters of the mean loss of each one's own samples.

    Its gradient for an adapter is that of a batch of its samples alone; a mean over the whole batch
    would divide it by the number of all samples.

    Args:
        losses: the losses of samples, ``[B]``, or of rows, ``[B, T]``.
        names: what :func:`adapter_ext.route_adapters` got: names, or indices of losses's shape.
            Samples without an adapter are averaged on their own.
        counts: by name, or index, the number of samples to divide by; None means those of this
            call, in all processes. For gradient accumulation, give those of all the batches of the
            step: with a process group, of the batches of all processes.
        process_group: processes whose gradients are averaged, by DistributedDataParallel or
            fully_shard for instance: the means are over the samples of all of them. Each must call
            this.

    Returns:
        A scalar of the type of losses, computed in float32 at least.

    Raises:
        TypeError: if names is one name.
        ValueError: if losses has another shape than names, or counts lacks an adapter.
    """
    if isinstance(names, str):
        raise TypeError(f"names must be a sequence of names or a tensor of indices, got {names!r}")
    keys: Sequence[Any]
    if isinstance(names, Tensor):
        shape = tuple(names.shape)
        ids = names.to(losses.device)
        keys = names.flatten().tolist() if counts is not None or process_group is not None else []
    else:
        shape = (len(names),)
        keys = [_without_place(name) for name in names]
        numbers = {name: i for i, name in enumerate(dict.fromkeys(keys))}
        ids = torch.tensor([numbers[name] for name in keys], dtype=torch.int64).to(losses.device)
        if counts is not None:
            given, counts = counts, Counter()
            for name, count in given.items():
                counts[_without_place(name)] += count
    if tuple(losses.shape) != shape:
        raise ValueError(
            f"losses must have a loss for each of the samples {list(shape)} that were routed, "
            f"got {list(losses.shape)}"
        )
    processes = 1
    if process_group is not None:
        processes = torch.distributed.get_world_size(process_group)
        if counts is None:
            counters: list[Counter[Any] | None] = [None] * processes
            torch.distributed.all_gather_object(counters, Counter(keys), group=process_group)
            counts = sum((c for c in counters if c is not None), Counter())
    if counts is None:
        ordered = ids.flatten().sort().values
        # The number of samples of each sample's adapter, without waiting for the device.
        samples = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    else:
        missing = [key for key in keys if key not in counts]
        if missing:
            raise ValueError(f"counts must have adapter {missing[0]!r}; it has {list(counts)}")
        samples = torch.tensor([counts[key] for key in keys], device=losses.device).reshape(shape)
    # In float16 a count of 65520 is infinite, and in bfloat16 most counts are rounded.
    dtype = torch.promote_types(losses.dtype, torch.float32)
    mean = (losses.to(dtype) / samples).sum() * processes
    return mean.to(losses.dtype) if losses.is_floating_point() else mean
