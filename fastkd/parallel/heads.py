"""Access to the lm_head of a wrapped model: a loss reads its weight, and the loss's gradient reaches it.

A loss of hidden states reads the lm_head's weight instead of calling the lm_head. FSDP2 and DeepSpeed ZeRO-3 spread
that weight over processes. They gather it in hooks before a module's forward, and their backward hooks, which reduce
the gradient, are attached to what a forward returns. DDP prepares its reduction in a forward too. A loss that is
computed outside of every forward therefore sees a part of the weight, or its gradient is never reduced. `redirect`
solves this: it runs a function in the place of the model's forward, and the function runs the model and computes the
loss. If the lm_head is gathered by itself, as a unit of FSDP2 or by ZeRO-3, `Head.apply` runs the loss in the place of
the lm_head's forward.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd.call.checks import is_dtensor
from fastkd.core.models import base, is_partitioned, logit_transform, under_zero3, without_wrapper

Result = TypeVar("Result")

# The modules whose forward is replaced by a function that runs now, the innermost last.
_REDIRECTED: list[nn.Module] = []


def is_redirected(model: nn.Module) -> bool:
    """Whether :func:`redirect` runs a function inside the model's forward, or just calls it."""
    if _is_compiled(model):
        return False
    target = _inside_wrappers(model)
    return target is not model or _has_hooks(target)


def head(model: nn.Module, *, module: nn.Module | None = None) -> Head:
    """The lm_head of a model, for a loss from hidden states.

    It is found behind torch.compile, DDP, FSDP2, DeepSpeed and PEFT. Call this after the model has been wrapped.

    Args:
        model: any module, as a training loop calls it. A model of transformers names its lm_head itself
            (get_output_embeddings); for others pass `module`.
        module: the lm_head, a submodule of the model.

    Returns:
        A :class:`Head`.

    Raises:
        TypeError: an argument is not a module.
        ValueError: a loss cannot use the lm_head: the model has none; or it is on the meta device; or it is not exactly
            an nn.Linear (PEFT's modules_to_save and plain LoRA are allowed); or FSDP1 or DataParallel wraps the model;
            or FSDP2 has sharded the two uses of a tied weight separately. The message says what to do.
    """
    return Head(model, module)


def redirect(
    model: nn.Module, function: Callable[..., Result], /, *args: Any, **kwargs: Any
) -> Result:
    """Run function(forward, *args, **kwargs) in the place of the model's forward, inside its wrappers and hooks.

    The wrappers (DDP, DeepSpeed) and the hooks (FSDP2, ZeRO-3) of the model run around the function as they do around
    a forward: they move and cast the arguments, gather parameters, and attach the reduction of gradients to the tensors
    that the function returns. The function must therefore return the loss, either alone or with other tensors in a
    tuple, list or dict. If the model is compiled, or has neither wrappers nor such hooks, nothing is replaced, and the
    function is only called.

    Args:
        model: the model as the training loop calls it.
        function: called once. Its first argument runs the model without its wrappers; the function may call it at most
            once.
        *args: passed through the wrappers to the function.
        **kwargs: passed in the same way.

    Returns:
        What the function returns, as the wrappers return it: FSDP2 casts it to the output_dtype of its policy.

    Raises:
        ValueError: the model is compiled as a whole (torch.compile) and its parameters are sharded, so that the loss
            cannot run inside its forward; compile its layers instead. Or DataParallel wraps the model.
    """
    target = _inside_wrappers(model)
    if "DataParallel" in _kinds(model):
        raise ValueError(
            "DataParallel copies the model in every forward, so a loss cannot run inside of it; use "
            "DistributedDataParallel with one process per device"
        )
    if _is_compiled(model) and _sharding(target):
        raise ValueError(
            f"the model is compiled as a whole and its parameters are sharded ({_sharding(target)}), so the loss "
            "cannot run inside its forward; compile its layers before they are sharded (layer.compile()), not the model"
        )
    if not is_redirected(model):
        return function(model, *args, **kwargs)
    return _in_place_of_forward(model, target, function, *args, **kwargs)


class Captured:
    """What :meth:`Head.captured` has captured: the input of the lm_head, and its output for the first position."""

    def __init__(self) -> None:
        self._hidden: Tensor | None = None
        # [..., 1, V], detached; None: the lm_head did not run.
        self.projected: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        """[..., S, H], the hidden states that the model passed to its lm_head.

        Raises:
            RuntimeError: the model did not call its lm_head.
        """
        if self._hidden is None:
            raise RuntimeError(
                "the model did not call its lm_head, so there are no hidden states; pass the module that computes the "
                "logits to fastkd.parallel.head(model, module=...)"
            )
        return self._hidden


class Head:
    """The lm_head of a model. :func:`head` makes one; docs/parallel.md has a complete step.

    Attributes:
        module: the nn.Linear (or PEFT's LoRA layer around one) that has the weight.
        out_features: V.
        logit_scale: from the model's configuration; 1.0 if it has none. The logits of the model are
            logit_scale lm_head(hidden), or softcap tanh(logit_scale lm_head(hidden) / softcap).
        softcap: from the model's configuration, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module | None = None,
        *,
        name: str = "the model",
        otherwise: str = "compute the loss from logits",
        by_hand: str = "pass it as module, or ",
    ) -> None:
        """Find the lm_head. Messages use the last three arguments: a name for the model, and two remedies."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} must be an nn.Module, got {type(model).__name__}")
        self.name, self.model, self._otherwise = name, model, otherwise
        inner = base(model)
        get_head = getattr(inner, "get_output_embeddings", None)
        if module is None and get_head is not None:
            module = get_head()
        if module is None:
            raise ValueError(
                f"{name} has no lm_head: get_output_embeddings() of {type(inner).__name__} returns none; "
                f"{by_hand}{otherwise}"
            )
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
        # What the model calls, which may be PEFT's wrapper of an lm_head.
        self._called = module
        self._check_wrappers()
        self.module = self._owner()
        self.out_features: int = getattr(self.module, "base_layer", self.module).out_features
        self.logit_scale, self.softcap = logit_transform(getattr(inner, "config", None))
        self._stand_in = _StandIn(module, self.out_features)
        self._check_tie(inner)

    # ---- hidden states

    @contextlib.contextmanager
    def captured(self, *, project: bool | None = None) -> Iterator[Captured]:
        """A context in which the model's hidden states are captured instead of passed to its lm_head.

        The model's logits then have the first position only. They are those of the lm_head if it runs for that
        position, and 0 otherwise.

        Args:
            project: whether the lm_head runs for the first position. None: it does, unless its own hooks gather it (a
                unit of FSDP2, ZeRO-3), because it would then be gathered once more.

        Raises:
            RuntimeError: at the call of the model, if it calls its lm_head twice.
        """
        model = self.model
        if project is None:
            project = _is_compiled(model) or not _has_hooks(self._owner())
        stand_in = self._stand_in
        places = [
            (parent, name)
            for parent in model.modules()
            for name, child in parent._modules.items()
            if child is self._called
        ]
        captured = Captured()
        stand_in.hidden = stand_in.projected = None
        stand_in.projects = project
        try:
            for parent, name in places:
                parent._modules[name] = stand_in
            yield captured
        finally:
            for parent, name in places:
                parent._modules[name] = self._called
            captured._hidden, captured.projected = stand_in.hidden, stand_in.projected
            stand_in.hidden = stand_in.projected = None

    def check_logits(
        self,
        logits: Tensor,
        captured: Captured,
        logit_scale: float,
        softcap: float | None,
        remedy: str = "pass the logit_scale and the softcap of the model to the loss",
    ) -> None:
        """Raise unless the model's logits are those of its lm_head with this scale and softcap.

        Call it for the first batch only, because the host waits for the device.

        Args:
            logits: [..., 1, V], which the model returned inside of ``captured(project=True)``.
            captured: what was captured there.
            logit_scale: the one that the loss gets.
            softcap: the one that the loss gets.
            remedy: what to do, for the message.

        Raises:
            ValueError: the logits differ.
        """
        projected = captured.projected
        if projected is None or not projected.numel():
            return
        expected = projected * logit_scale
        if softcap is not None:
            expected = softcap * torch.tanh(expected / softcap)
        if logits.shape != expected.shape:
            raise ValueError(
                f"the logits of {self.name} have the shape {tuple(logits.shape)}, and its lm_head returned "
                f"{tuple(expected.shape)}; the loss takes all hidden states that the lm_head gets, so {self._otherwise}"
            )
        error = (logits.detach() - expected).abs().max()
        allowed = 8 * torch.finfo(expected.dtype).eps * expected.abs().max()
        if not bool(error <= allowed):
            raise ValueError(
                f"the logits of {self.name} are not those of its lm_head times {logit_scale} with the softcap "
                f"{softcap}; they differ by up to {float(error):.3g}. {remedy[0].upper()}{remedy[1:]}, or "
                f"{self._otherwise}"
            )

    # ---- the weight

    def apply(
        self, function: Callable[[Tensor, Tensor, Tensor | None], Result], hidden: Tensor
    ) -> Result:
        """Run function(hidden, weight, bias). Its gradient reaches the lm_head's parameters, even if they are sharded.

        weight [V, H] and bias [V] (or None) are whole. FSDP2 and ZeRO-3 gather them once, and reduce their gradient
        over the processes as that of any other parameter. With a plain LoRA adapter the weight is
        W + sum of scaling B A, and its gradient reaches A and B. Call this inside :func:`redirect`, on every process in
        every step, also for a batch without counted rows.

        Args:
            function: computes the loss. It must use weight on every process, because the processes reduce its gradient
                together. It must not keep weight, which FSDP2 and ZeRO-3 free afterwards.
            hidden: [..., H], for example from :meth:`captured`.

        Returns:
            What the function returns: a tensor that depends on hidden, or tuples, lists and dicts of such tensors.

        Raises:
            ValueError: the lm_head has since become one that :func:`head` refuses, or ZeRO-3 has partitioned it and
                does not gather it.
            RuntimeError: FSDP2 has sharded the model, and the model's forward is not running.
        """
        owner = self._owner()
        self._check_dropout(owner)
        self._check_inside()
        if not _has_hooks(owner):
            return function(hidden, *self._operands(owner, hidden.dtype))

        def in_place(forward: object, hidden: Tensor) -> Result:
            return function(hidden, *self._operands(owner, hidden.dtype))

        return _in_place_of_forward(owner, owner, in_place, hidden)

    @contextlib.contextmanager
    def gathered(self, dtype: torch.dtype | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """A context that yields (weight, bias), whole and without gradients, for a model that does not train.

        Every process has to enter it. Whole copies of a sharded lm_head exist as long as the tensors are kept.

        Args:
            dtype: of the hidden states. A weight that FSDP2 has sharded is cast to it, as FSDP2 does in its forward.

        Raises:
            ValueError: as :meth:`apply`.
        """
        owner = self._owner()
        self._check_dropout(owner)
        kept: list[Tensor | None] = []

        def keep(forward: object = None) -> None:
            operands = self._operands(owner, dtype)
            kept.extend(None if x is None else _whole(x).detach() for x in operands)

        with torch.no_grad():
            if under_zero3(getattr(owner, "weight", None)):
                # The hooks gather the weight here. GatheredParameters would fail if a hook is about to prefetch it.
                _in_place_of_forward(owner, owner, keep)
            else:
                keep()
        weight, bias = kept
        assert weight is not None
        yield weight, bias

    def _operands(self, owner: Any, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias, cast as FSDP2 would cast them. They are whole only while the lm_head is gathered."""
        linear = getattr(owner, "base_layer", owner)
        weight, bias = linear.weight, linear.bias
        if is_partitioned(weight):
            raise ValueError(
                f"the lm_head of {self.name} is partitioned by DeepSpeed ZeRO-3 and nothing gathers it: call "
                "deepspeed.initialize with the model, and pass the engine or its module"
            )
        if linear is not owner:
            weight = _merged(owner, weight)
        if (
            is_dtensor(weight)
            and dtype is not None
            and not torch.is_autocast_enabled(weight.device.type)
        ):
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return weight, bias

    # ---- what can be a head

    def _owner(self) -> Any:
        """The module that has the weight now: an nn.Linear, or PEFT's LoRA layer around one."""
        module: Any = self._called
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            active = [name for name in module.active_adapters if name in module.modules_to_save]
            own = module.modules_to_save[active[0]] if active else module.original_module
            module = module.original_module if module.disable_adapters else own
        kind = type(module)
        if (kind.__module__, kind.__name__) == ("peft.tuners.lora.layer", "Linear"):
            self._check_lora(module)
            linear = module.base_layer
        else:
            linear = module
        if type(linear) is not nn.Linear and not _is_fsdp_unit(linear, nn.Linear):
            kind = type(linear)
            raise ValueError(
                f"the lm_head of {self.name} must be exactly an nn.Linear, got a "
                f"{kind.__module__}.{kind.__qualname__}, whose output may depend on more than its weight; remove "
                "lm_head from the adapter's target_modules, "
                f"merge the adapter (merge_and_unload), or {self._otherwise}"
            )
        if linear.weight.is_meta:
            raise ValueError(
                f"the lm_head of {self.name} is on the meta device: it is offloaded or not initialized; load it on the "
                f"device of the hidden states, or {self._otherwise}"
            )
        return module

    def _check_lora(self, layer: Any) -> None:
        adapters = [] if layer.disable_adapters else list(layer.active_adapters)
        adapters = [name for name in adapters if name in layer.lora_A]
        variants = {**getattr(layer, "use_dora", {}), **getattr(layer, "lora_variant", {})}
        problem = None
        if any(variants.get(name) for name in adapters):
            problem = "is a variant of LoRA (such as DoRA)"
        elif any(layer.lora_B[name].bias is not None for name in adapters):
            problem = "has a bias (lora_bias=True)"
        elif getattr(layer, "fan_in_fan_out", False):
            problem = "has a transposed weight (fan_in_fan_out=True)"
        elif any(is_dtensor(p) or under_zero3(p) for p in layer.parameters()):
            problem = (
                "is sharded over processes, which gather it in forwards that the loss does not run"
            )
        if problem:
            raise ValueError(
                f"the adapter of the lm_head of {self.name} {problem}, so it cannot be merged for the loss; remove "
                "lm_head from the adapter's target_modules (or put it into modules_to_save), merge the adapter "
                f"(merge_and_unload), or {self._otherwise}"
            )

    def _check_dropout(self, owner: Any) -> None:
        if not hasattr(owner, "base_layer") or owner.disable_adapters:
            return
        dropouts = [owner.lora_dropout[n] for n in owner.active_adapters if n in owner.lora_A]
        if any(drop.training and getattr(drop, "p", 0.0) for drop in dropouts):
            raise ValueError(
                f"the adapter of the lm_head of {self.name} has lora_dropout, which drops hidden states and not "
                "weights, so the adapter cannot be merged for the loss; set lora_dropout=0, remove lm_head from "
                f"target_modules, or {self._otherwise}"
            )

    def _check_inside(self) -> None:
        """Raise if FSDP2 has sharded the model, whose forward is not running: a gradient might never be reduced."""
        target: Any = _inside_wrappers(self.model)
        if any(target is running for running in _REDIRECTED) or not _is_fsdp_unit(target):
            return
        state = getattr(target._get_fsdp_state(), "_training_state", None)
        if getattr(state, "name", "FORWARD") != "FORWARD":
            raise RuntimeError(
                f"FSDP2 has sharded {self.name}, and the loss of its hidden states is computed outside of its forward, "
                "where the gradient of the lm_head may never be reduced; run the model and the loss in a function that "
                "fastkd.parallel.redirect calls"
            )

    def _check_wrappers(self) -> None:
        kinds = {type(module).__name__ for module in self.model.modules()}
        if "FullyShardedDataParallel" in kinds:
            raise ValueError(
                f"{self.name} is wrapped by FullyShardedDataParallel (FSDP1), which keeps the lm_head in one flat "
                "parameter; use FSDP2 (torch.distributed.fsdp.fully_shard, in accelerate fsdp_version=2), or "
                f"{self._otherwise}"
            )
        if "DataParallel" in kinds:
            raise ValueError(
                f"{self.name} is wrapped by DataParallel, which copies the lm_head in every forward; use "
                f"DistributedDataParallel with one process per device, or {self._otherwise}"
            )

    def _check_tie(self, inner: Any) -> None:
        """Raise if the configuration ties the lm_head to the embedding, and FSDP2 has made two parameters of them."""
        config: Any = getattr(inner, "config", None)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        if not getattr(config, "tie_word_embeddings", False) or self.module is not self._called:
            return
        embedding = getattr(inner.get_input_embeddings(), "weight", None)
        weight = self.module.weight
        if embedding is not weight and (is_dtensor(weight) or is_dtensor(embedding)):
            raise ValueError(
                f"the configuration of {self.name} ties the lm_head to the embedding, but they are two parameters: "
                "fully_shard was applied to one of them alone, which unties them. Leave both to one unit, the root"
            )


class _StandIn(nn.Module):
    """Takes the place of an lm_head in its model, and keeps the hidden states that the model passes to it."""

    def __init__(self, called: nn.Module, width: int) -> None:
        super().__init__()
        self._called = (called,)  # a tuple hides it from nn.Module
        self._width = width
        self.hidden: Tensor | None = None
        self.projected: Tensor | None = None
        self.projects = True

    def __getattr__(self, name: str) -> Any:
        """Find what a model reads from its lm_head, such as the dtype of its weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_called"][0], name)

    def forward(self, hidden: Tensor) -> Tensor:
        """Keep the hidden states; return logits of the first position."""
        if self.hidden is not None:
            raise RuntimeError(
                "the model called its lm_head twice in one forward, so its hidden states are ambiguous; compute the "
                "loss from logits"
            )
        self.hidden = hidden
        first = hidden[..., :1, :]
        if not self.projects:
            return first.new_zeros((*first.shape[:-1], self._width))
        logits: Tensor = self._called[0](first)
        self.projected = logits.detach()
        return logits


def _in_place_of_forward(
    outer: nn.Module,
    target: nn.Module,
    function: Callable[..., Result],
    *args: Any,
    **kwargs: Any,
) -> Result:
    """Call the outer module with the function in the place of the target's forward; return what the call returns."""
    own = vars(target).get("forward")  # accelerate gives the instance its own forward
    called: list[bool] = []

    def restore() -> None:
        if own is None:
            vars(target).pop("forward", None)
        else:
            vars(target)["forward"] = own

    def in_place(*args: Any, **kwargs: Any) -> Result:
        restore()
        called.append(True)
        _REDIRECTED.append(target)
        try:
            return function(target.forward, *args, **kwargs)
        finally:
            _REDIRECTED.pop()

    vars(target)["forward"] = in_place
    try:
        result: Result = outer(*args, **kwargs)
    finally:
        restore()
    if not called:
        raise RuntimeError(
            f"the forward of {type(target).__name__} did not run when {type(outer).__name__} was called, so there is "
            "no loss; pass the model as the training loop calls it"
        )
    return result


def _inside_wrappers(model: nn.Module) -> nn.Module:
    """The module whose forward the wrappers call: the model itself, or a PEFT model."""
    while True:
        inner = without_wrapper(model)
        if inner is model:
            return model
        model = inner


def _kinds(model: nn.Module) -> set[str]:
    """The names of the classes of a model's wrappers."""
    kinds = set()
    while (inner := without_wrapper(model)) is not model:
        kinds.add(type(model).__name__)
        model = inner
    return kinds


def _is_compiled(model: nn.Module) -> bool:
    """Whether the model, or what one of its wrappers calls, is compiled as a whole."""
    while True:
        if "_orig_mod" in model._modules or getattr(model, "_compiled_call_impl", None) is not None:
            return True
        inner = without_wrapper(model)
        if inner is model:
            return False
        model = inner


def _is_fsdp_unit(module: object, kind: type = object) -> bool:
    """Whether fully_shard was applied to the module itself; it changes the module's class to a subclass of its own."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    unit = getattr(fsdp, "FSDPModule", None)
    if unit is None or not isinstance(module, unit):
        return False
    return kind is object or type(module).__bases__ == (unit, kind)


def _has_hooks(module: nn.Module) -> bool:
    """Whether hooks around the module's own forward gather its parameters: a unit of FSDP2, or ZeRO-3."""
    inner: Any = getattr(module, "base_layer", module)
    return _is_fsdp_unit(inner) or any(under_zero3(p) for p in inner.parameters())


def _sharding(model: nn.Module) -> str | None:
    """What has spread the parameters of a model over processes."""
    if any(under_zero3(parameter) for parameter in model.parameters()):
        return "DeepSpeed ZeRO-3"
    if any(_is_fsdp_unit(module) for module in model.modules()):
        return "FSDP2"
    return None


def _whole(value: Any) -> Any:
    return value.full_tensor() if is_dtensor(value) else value


def everywhere(model: nn.Module, here: bool) -> bool:
    """Whether `here` is True on all processes that share a sharded model; for other models, `here` itself.

    A run of a sharded model gathers parameters from all processes, so all of them have to run it, or none. Code that
    runs it only for some batches therefore asks this function first.
    """
    sharded = _sharding(model)
    if not sharded or not dist.is_initialized():
        return here
    parameters: list[Any] = list(model.parameters())
    holds = torch.tensor(float(here), device=parameters[0].device)
    meshes = [p.device_mesh for p in parameters if is_dtensor(p)]
    groups = [meshes[0].get_group(i) for i in range(meshes[0].ndim)] if meshes else [None]
    for group in groups:
        dist.all_reduce(holds, dist.ReduceOp.MIN, group=group)
    return bool(holds)


def _merged(layer: Any, weight: Tensor) -> Tensor:
    """The weight of an lm_head with its active LoRA adapters: W + sum of scaling B A."""
    if layer.disable_adapters or layer.merged:
        return weight
    for name in layer.active_adapters:
        if name in layer.lora_A:
            update = layer.lora_B[name].weight @ layer.lora_A[name].weight
            weight = weight + (layer.scaling[name] * update).to(weight.dtype)
    return weight
