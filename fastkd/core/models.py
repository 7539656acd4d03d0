"""Access to the module inside wrappers, and what a configuration says about logits."""

from __future__ import annotations

from typing import Any

from torch import nn

# Wrappers whose attribute `module` is the model, and whose forward calls it.
PARALLEL_WRAPPERS = (
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "DeepSpeedEngine",
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without torch.compile and DistributedDataParallel, which change the names of its layers."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]  # a module
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def without_wrapper(model: nn.Module) -> nn.Module:
    """The module inside the outermost wrapper of torch.compile, data parallelism, FSDP or DeepSpeed; else the model."""
    inner: Any = None
    if "_orig_mod" in model._modules:
        inner = model._modules["_orig_mod"]
    elif type(model).__name__ in PARALLEL_WRAPPERS:
        inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) else model


def base(model: nn.Module) -> nn.Module:
    """The model without the wrappers of torch.compile, data parallelism, FSDP, DeepSpeed and PEFT."""
    while True:
        inner: Any = without_wrapper(model)
        if inner is model and hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def under_zero3(parameter: object) -> bool:
    """Whether DeepSpeed ZeRO-3 manages a parameter: it is empty on every process unless something gathers it."""
    return hasattr(parameter, "ds_id")


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 manages a parameter that nothing has gathered, so that it is empty now."""
    return under_zero3(parameter) and parameter.shape != parameter.ds_shape


def logit_transform(config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) of a model of transformers: logits = softcap tanh(scale head(hidden) / softcap).

    Cohere multiplies its logits by logit_scale, Falcon-H1 by lm_head_multiplier, others by output_multiplier. Granite
    and MiniCPM3 divide them by logits_scaling, and HyperCLOVA X multiplies them by it. Gemma caps its logits.
    """
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if isinstance(scale, (int, float)):
            return float(scale), softcap
    scaling = getattr(config, "logits_scaling", None)
    if not isinstance(scaling, (int, float)):
        return 1.0, softcap
    multiplies = getattr(config, "model_type", None) == "hyperclovax"
    return (float(scaling) if multiplies else 1.0 / float(scaling)), softcap
