"""What adapters need to know to run a student and a teacher that may be any modules.

It determines which inputs a model takes, how its labels are aligned with its logits, where the examples of a packed
batch begin, and which loss a model adds to its cross-entropy. Where possible, it runs the model once instead of looking
up its class, because a subclass or a wrapper may change anything. It never imports transformers: a model from
transformers has already imported it.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastkd.core.models import base as base
from fastkd.parallel.heads import everywhere

# The label that drops a position, in transformers and in torch.
IGNORED = -100
# Inputs that say where the examples of a packed batch begin.
BOUNDARIES = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # fmt: skip
# Losses of labels that are not a cross-entropy over classes.
_OTHER_LOSSES = (
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
)


def from_transformers(model: nn.Module) -> bool:
    """Whether the model is a transformers.PreTrainedModel."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)


# Inputs


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Signature(NamedTuple):
    """The inputs of a model's forward."""

    names: frozenset[str]
    # Whether it takes **kwargs.
    open: bool
    # Inputs of only the other model, which this one does not get.
    others: frozenset[str] = frozenset()

    def chosen(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """Select the features that the model takes, and add use_cache=False if it has that input and they do not.

        A loss does not need a key-value cache, and with one, transformers ignores the boundaries of packed examples.
        """
        inputs = {
            name: value
            for name, value in features.items()
            if name in self.names or (self.open and name not in self.others)
        }
        if "use_cache" in self.names and "use_cache" not in inputs:
            inputs["use_cache"] = False
        return inputs


def signature(model: nn.Module) -> Signature:
    """The inputs in the signature of a model's forward, without its wrappers.

    If a forward takes *args and **kwargs, it passes them to the forward of a base class, so that signature is included.
    """
    inner = base(model)
    # accelerate sets a forward(*args, **kwargs) on the instance, which hides the one of the class.
    holders = [vars(inner), *map(vars, type(inner).__mro__)]
    forwards = [holder["forward"] for holder in holders if "forward" in holder]
    names: set[str] = set()
    kinds: set[Any] = set()
    for forward in forwards:
        if forward is nn.Module.forward:
            break
        try:
            parameters = inspect.signature(forward).parameters.values()
        except (TypeError, ValueError):
            return Signature(frozenset(names), True)
        names |= {p.name for p in parameters if p.kind not in _VARIADIC and p.name != "self"}
        kinds = {p.kind for p in parameters} & set(_VARIADIC)
        if len(kinds) < len(_VARIADIC):
            break
    return Signature(frozenset(names), inspect.Parameter.VAR_KEYWORD in kinds)


def by_name(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    inner = base(model)
    forward = type(inner).forward
    names = [name for name in inspect.signature(forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def beside(model: nn.Module, other: object) -> Signature:
    """The signature of a model for batches that it shares with another one.

    A model with **kwargs gets every input. A model of transformers names all inputs that it uses, so it does not get
    inputs that only the other model names.
    """
    own = signature(model)
    if not isinstance(other, nn.Module) or not from_transformers(base(model)):
        return own
    return own._replace(others=signature(other).names - own.names)


def part(outputs: Any, name: str) -> Tensor | None:
    """The tensor `name` in a model's outputs, or None."""
    value = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
    return value if isinstance(value, Tensor) else None


def logits_of(outputs: Any, whose: str = "a model") -> Tensor:
    """The logits [..., C] in a model's outputs: themselves, "logits", or a tuple's first tensor with dimensions.

    Raises:
        TypeError: the outputs have no logits.
    """
    logits = outputs if isinstance(outputs, Tensor) else part(outputs, "logits")
    if logits is None and isinstance(outputs, (tuple, list)):
        # A tuple may begin with losses, which are 0-dim.
        logits = next((x for x in outputs if isinstance(x, Tensor) and x.dim() > 0), None)
    if logits is None:
        names = ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise TypeError(
            f"no logits in the outputs of {whose}, which have {names or 'nothing'}; distillation needs a model with a "
            "head over classes or tokens (AutoModelForCausalLM, not AutoModel) and an output named logits"
        )
    return logits


# Encoder-decoders


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the configuration says that the model is an encoder-decoder."""
    return bool(getattr(getattr(base(model), "config", None), "is_encoder_decoder", False))


def with_decoder_inputs(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None
) -> dict[str, Any]:
    """The inputs; for an encoder-decoder, decoder inputs are made from labels by the model's own rule if missing.

    Raises:
        ValueError: the model's rule is not known, or there are no labels.
    """
    complete = dict(inputs)
    decoder_inputs = ("decoder_input_ids", "decoder_inputs_embeds")
    if not is_encoder_decoder(model) or any(complete.get(n) is not None for n in decoder_inputs):
        return complete
    if "decoder_input_ids" not in signature(model).names:
        return complete
    inner: Any = base(model)
    shift = getattr(sys.modules.get(type(inner).__module__), "shift_tokens_right", None)
    if labels is None or labels.dim() != 2:
        # Without labels, BART and similar models shift their inputs instead, and so do their classifiers.
        if shift is None and hasattr(inner, "prepare_decoder_input_ids_from_labels"):
            raise ValueError(
                f"labels or decoder_input_ids must be in the batch for {type(inner).__name__}: without them, its "
                "decoder has no input"
            )
        return complete
    config = inner.config
    start, pad = (getattr(config, n, None) for n in ("decoder_start_token_id", "pad_token_id"))
    if hasattr(inner, "prepare_decoder_input_ids_from_labels"):
        ids = inner.prepare_decoder_input_ids_from_labels(labels=labels)
    elif shift is not None and list(inspect.signature(shift).parameters)[1:] == [
        "pad_token_id",
        "decoder_start_token_id",
    ]:
        ids = shift(labels, pad, start)
    else:
        raise ValueError(
            f"decoder_input_ids must be in the batch for {type(inner).__name__}, because fastkd does not know how it "
            "makes them from labels"
        )
    return {**complete, "decoder_input_ids": ids}


# Labels and logits


def shifts_labels(model: nn.Module) -> bool | None:
    """Whether position i of a model predicts label i + 1, judged by its class; None: the class does not tell."""
    inner = base(model)
    if not from_transformers(inner):
        return None
    if is_encoder_decoder(inner):
        return False
    auto = sys.modules.get("transformers.models.auto.modeling_auto")
    causal = set(getattr(auto, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {}).values())
    causal |= set(getattr(auto, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", {}).values())
    ancestors = {ancestor.__name__ for ancestor in type(inner).__mro__}
    if ancestors & {name for name in causal if isinstance(name, str)}:
        return True
    if any("ForMaskedLM" in n or "Classification" in n for n in ancestors):
        return False
    losses = sys.modules.get("transformers.loss.loss_utils")
    loss_type = getattr(inner, "loss_type", None)
    mapping = getattr(losses, "LOSS_MAPPING", {})
    if losses is None or loss_type not in mapping:
        return None
    return mapping[loss_type] is losses.ForCausalLMLoss


def starts(features: Mapping[str, Any], shape: Sequence[int]) -> Tensor | None:
    """Where the second and later examples of packed rows begin, bool [B, S]; None: nothing is packed."""
    if len(shape) != 2:
        return None
    masks: list[Tensor] = []
    positions, index = features.get("position_ids"), features.get("seq_idx")
    lengths = features.get("cu_seq_lens_q")
    if isinstance(positions, Tensor) and positions.shape == shape:
        masks.append(F.pad(positions[:, 1:] <= positions[:, :-1], (1, 0)))
    if isinstance(index, Tensor) and index.shape == shape:
        masks.append(F.pad(index[:, 1:] != index[:, :-1], (1, 0)))
    if isinstance(lengths, Tensor) and lengths.dim() == 1 and shape[0] == 1:
        at = torch.zeros(shape, dtype=torch.bool, device=lengths.device)
        at[0, lengths[1:-1].long()] = True
        masks.append(at)
    if not masks:
        return None
    begins = masks[0]
    for other in masks[1:]:
        begins = begins | other.to(begins.device)
    mask = features.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == shape:  # padding may have any position_ids
        real = mask.to(begins.device) != 0
        begins = begins & real & F.pad(real[:, :-1], (1, 0))
    return begins


def targets(
    labels: Tensor, shifts: bool, begins: Tensor | None = None, ignored: int = IGNORED
) -> Tensor:
    """The label of each row of logits.

    The labels are shifted, not the logits: autograd would copy the gradient of a view of the logits into a whole one.
    The last position of an example predicts nothing, because the next token belongs to another example.
    """
    if not shifts:
        return labels
    if begins is not None and begins.shape == labels.shape:
        labels = labels.masked_fill(begins.to(labels.device), ignored)
    return F.pad(labels[..., 1:], (0, 1), value=ignored)


def counted_without_labels(
    model: nn.Module, features: Mapping[str, Any], shape: torch.Size, shifts: bool
) -> Tensor | None:
    """Which rows of logits [*shape, C] count in a batch without labels; None: all.

    Rows of tokens that are not padding count. In a causal model the next token must also be real and belong to the same
    example. The last position of a row never counts, because it predicts nothing.
    """
    if len(shape) != 2:
        return None
    name = "decoder_attention_mask" if is_encoder_decoder(model) else "attention_mask"
    mask = features.get(name)
    real = mask != 0 if isinstance(mask, Tensor) and mask.shape == shape else None
    if not shifts:
        return real
    if real is None:
        device = next((x.device for x in features.values() if isinstance(x, Tensor)), None)
        real = torch.ones(shape, dtype=torch.bool, device=device)
    begins = starts(features, shape)
    predicted = real if begins is None else real & ~begins.to(real.device)
    return real & F.pad(predicted[:, 1:], (0, 1))


# Losses that a model adds


class LabelLoss(TorchFunctionMode):
    """A mode in which each cross-entropy with these labels is 0, so that a model's loss is only what it adds.

    Args:
        labels: [B] or [B, S], the labels of the call.
    """

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        self.labels = labels
        # Whether labels were shifted in the cross-entropies that were replaced by 0.
        self.shifts: set[bool] = set()
        # The name of a loss of labels that is not a cross-entropy.
        self.other: str | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Replace the loss of labels by 0, and call every other function."""
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if function in (F.cross_entropy, F.nll_loss):
            arguments = inspect.signature(function).bind(*args, **kwargs).arguments
            shifts = self._alignment(arguments["target"], arguments.get("ignore_index", IGNORED))
            if shifts is not None:
                self.shifts.add(shifts)
                per_row = arguments.get("reduction") == "none"
                return arguments["input"].new_zeros(arguments["target"].shape if per_row else ())
        elif (
            name in _OTHER_LOSSES
            and len(args) > 1
            and isinstance(args[1], Tensor)
            and args[1].numel() == self.labels.numel()
        ):
            self.other = name
        return function(*args, **kwargs)

    def _alignment(self, target: Tensor, ignored: int) -> bool | None:
        """Whether the targets of a cross-entropy are the labels shifted by one; None: they are not the labels."""
        labels = self.labels.to(target.device)
        if target.is_floating_point():
            return None

        def same(targets: Tensor, labels: Tensor) -> bool:
            counted = targets != ignored
            if not bool(counted.any()):
                return False
            return torch.equal(targets[counted], labels.to(targets.dtype)[counted])

        if labels.dim() != 2:
            flat = labels.reshape(-1)
            return (
                False
                if flat.shape == target.reshape(-1).shape and same(target.reshape(-1), flat)
                else None
            )
        batch, length = labels.shape
        if not batch or target.numel() % batch:
            return None
        rows = target.reshape(batch, -1)
        if rows.shape[1] >= length:  # a soft prompt puts its positions before the tokens
            rows = rows[:, -length:]
            if same(rows, labels):
                return False
            return True if same(rows, targets(labels, True)) else None
        return True if rows.shape[1] == length - 1 and same(rows, labels[:, 1:]) else None


class Habits(NamedTuple):
    """How a model uses labels."""

    # Whether position i predicts label i + 1; None: unknown.
    shifts: bool | None
    # Where its added loss appears: "nothing", "outputs" (of a call without labels) or "labels" (of a call with labels).
    own: str


def habits_of(
    call: Callable[..., Any],
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor | None,
    own_loss: str = "keep",
) -> Habits:
    """Determine how a model uses labels, by a run on the first example, in its current mode and without gradients.

    The run has artificial labels, for which shifted and unshifted ones differ. Random state and buffers are restored
    afterwards. If the forward has no argument labels, the class of the model decides.

    Args:
        call: the model as it is called, wrappers included.
        model: the model, for its signature.
        inputs: the inputs of the call, without labels.
        labels: the labels of the batch, for their shape; None: there are none.
        own_loss: "keep", or "drop" if the added loss is not needed.

    Raises:
        ValueError: the model's loss of labels is not a cross-entropy, or cannot be separated from the added loss.
    """
    by_class = shifts_labels(model)
    has_labels = labels is not None and labels.numel() > 0
    if (
        labels is None
        or "labels" not in signature(model).names
        or not everywhere(model, has_labels)
    ):
        return Habits(by_class, "outputs" if own_loss == "keep" else "nothing")
    check_labels(labels)
    one, size = _first_example(inputs, labels)
    pattern = (
        torch.arange(labels[:size].numel(), device=labels.device)
        // (2 if labels.dim() > 2 else 1)
        % 2
    )
    if labels.dim() == 2:  # 0 1 0 1 .., in each row
        pattern = (torch.arange(labels.shape[1], device=labels.device) % 2).repeat(size)
    artificial = pattern.reshape(labels[:size].shape).to(labels.dtype)
    own = LabelLoss(artificial)
    with _undone(model, labels.device), torch.no_grad(), own:
        outputs = call(**one, labels=artificial)
    if own.other is not None:
        raise ValueError(_NO_CLASSES.format(f"the student's own loss of them is {own.other}"))
    loss = loss_in(outputs)
    if len(own.shifts) == 1:
        by_class = own.shifts.pop()
    elif loss is not None:
        by_class, loss = _compared(outputs, artificial, loss, by_class, own_loss)
    if own_loss == "drop" or loss is None or not bool((loss != 0).any()):
        return Habits(by_class, "nothing")
    aux = part(outputs, "aux_loss")
    if aux is not None:
        coefficient = _coefficient(model)
        if coefficient is not None and torch.allclose(
            loss.double(), coefficient * aux.double(), rtol=1e-4
        ):
            return Habits(by_class, "outputs")
    return Habits(by_class, "labels")


def loss_in(outputs: Any) -> Tensor | None:
    """The loss in a model's outputs: "loss", or the first member of a tuple if it is 0-dim."""
    loss = part(outputs, "loss")
    if (
        loss is None
        and isinstance(outputs, (tuple, list))
        and not hasattr(outputs, "_fields")
        and len(outputs)
    ):
        first = outputs[0]
        loss = first if isinstance(first, Tensor) and first.dim() == 0 else None
    return loss


def own_loss(model: nn.Module, outputs: Any) -> Tensor | None:
    """The loss that a model adds, with the model's coefficient, from outputs of a call without labels; or None.

    Raises:
        ValueError: there is an added loss, and its coefficient is not known.
    """
    loss = loss_in(outputs)
    if loss is not None and isinstance(outputs, (tuple, list)) and not isinstance(outputs, Mapping):
        raise ValueError(
            "the student, called without labels, returns a tuple that begins with a number of unknown meaning; return "
            "a dict with 'loss' and 'logits', or pass own_loss='drop' to leave it out"
        )
    names = [] if not isinstance(outputs, Mapping) else [
        name for name, value in outputs.items()
        if name != "loss" and name.endswith("loss") and isinstance(value, Tensor) and value.numel() == 1
    ]  # fmt: skip
    if not names or loss is not None:
        return loss
    coefficient = _coefficient(model)
    if names != ["aux_loss"] or coefficient is None:
        raise ValueError(
            f"the student returns {', '.join(names)} with its logits, and the coefficient in its own loss is not "
            "known; turn it off in the student's configuration (output_router_logits=False), or pass own_loss='drop' "
            "to leave it out"
        )
    aux = outputs["aux_loss"]
    return coefficient * aux if coefficient else None


_NO_CLASSES = (
    "labels must be class indices, one per row of logits, and {}: a regression or multi-label head has no "
    "distribution over classes to distil. Write its loss in a compute_loss of your own"
)


def check_labels(labels: Tensor) -> None:
    """Raise for labels of a regression or multi-label head."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(_NO_CLASSES.format(f"these are {labels.dtype} {tuple(labels.shape)}"))


def check_heads(student: nn.Module, teacher: object) -> None:
    """Raise if a head has no distribution over classes, or if two classifiers order their classes differently."""
    sides = [("the student", student)]
    if isinstance(teacher, nn.Module):
        sides.append(("the teacher", teacher))
    names = []
    for whose, model in sides:
        inner = base(model)
        config = getattr(inner, "config", None)
        problem = getattr(config, "problem_type", None)
        classifies = "Classification" in type(inner).__name__
        if problem in ("regression", "multi_label_classification"):
            raise ValueError(_NO_CLASSES.format(f"the problem_type of {whose} is {problem!r}"))
        if classifies and getattr(config, "num_labels", 2) == 1:
            raise ValueError(_NO_CLASSES.format(f"{whose} has num_labels=1"))
        table = getattr(config, "id2label", None)
        if classifies and isinstance(table, Mapping):
            names.append([str(table[key]) for key in sorted(table)])
    if len(names) == 2 and names[0] != names[1] and sorted(names[0]) == sorted(names[1]):
        raise ValueError(
            f"the student's classes are {', '.join(names[0])} and the teacher's {', '.join(names[1])}, the same in a "
            "different order; give both models the same id2label, or permute the teacher's head"
        )


def check_rows(labels: Tensor | None, rows: torch.Size, whose: str = "the student") -> None:
    """Raise unless there is one label per row of logits [*rows, C]."""
    if labels is None or labels.shape == rows:
        return
    hint = "labels must have the shape of the logits without their last dimension"
    if len(rows) == labels.dim() == 2 and rows[0] == labels.shape[0] and rows[1] > labels.shape[1]:
        hint = (
            f"{rows[1] - labels.shape[1]} positions, such as those of a soft prompt, have no label; remove them from "
            "the logits in the student's forward, or put as many labels of -100 before the others"
        )
    raise ValueError(
        f"labels are {tuple(labels.shape)} and the logits of {whose} have rows {tuple(rows)}; {hint}"
    )


def virtual_tokens(model: nn.Module) -> int:
    """How many positions a PEFT soft prompt puts before the tokens; 0 for other models."""
    while not hasattr(model, "peft_config"):
        inner = model._modules.get("_orig_mod") or getattr(model, "module", None)
        if not isinstance(inner, nn.Module) or inner is model:
            return 0
        model = inner
    config: Any = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return 0
    return int(getattr(config, "num_virtual_tokens", 0) or 0)


def without_soft_prompt(model: nn.Module, rows: Tensor, shape: torch.Size | None) -> Tensor:
    """The rows [B, S, ...] of a batch's tokens [B, S], without the rows of a PEFT soft prompt before them."""
    count = virtual_tokens(model)
    longer = count and shape is not None and len(shape) == 2 and rows.dim() == 3
    return rows[:, count:] if longer and rows.shape[1] == shape[1] + count else rows  # type: ignore[index]


@contextlib.contextmanager
def _undone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A context that restores random state and buffers."""
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, version, before in buffers:
                if (
                    buffer._version != version
                ):  # an unchanged buffer may be saved for a later backward
                    buffer.copy_(before)


def _first_example(inputs: Mapping[str, Any], labels: Tensor) -> tuple[dict[str, Any], int]:
    """Return (the inputs of the first example, 1), or (all inputs, the batch size) if they cannot be separated."""
    batch = len(labels)
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
    if batch == 1 or any(len(value) != batch for value in tensors):
        return dict(inputs), batch
    return {
        name: value[:1] if isinstance(value, Tensor) and value.dim() else value
        for name, value in inputs.items()
    }, 1


def _compared(
    outputs: Any, labels: Tensor, loss: Tensor, shifts: bool | None, own_loss: str
) -> tuple[bool | None, Tensor | None]:
    """Return (whether labels are shifted, None) if the loss is the mean cross-entropy of the logits.

    Otherwise the loss is returned too, or the function raises.
    """
    logits = part(outputs, "logits")
    if logits is None or loss.numel() != 1:
        return shifts, None if logits is None and shifts is not None else loss
    for shifted in (False, True):
        rows = targets(labels, shifted) if labels.dim() == 2 else labels
        if logits.shape[:-1] == rows.shape:
            exact = F.cross_entropy(logits.flatten(0, -2).double(), rows.flatten())
            if torch.allclose(loss.double().reshape(()), exact, rtol=1e-2):
                return shifted, None
    if own_loss == "drop":
        return shifts, None
    raise ValueError(
        "the student's loss of labels is not the cross-entropy of its logits, so any loss that it adds would be "
        "lost; pass own_loss='drop' to leave that out, and pass shift_labels"
    )


def _coefficient(model: nn.Module) -> float | None:
    """The coefficient of the router's auxiliary loss in a mixture of experts; None: unknown."""
    inner = base(model)
    config: Any = getattr(inner, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for holder in (inner, text, config):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            value = getattr(holder, name, None)
            if isinstance(value, (int, float)):
                return float(value)
    return None


# Packed batches


def check_boundaries(
    model: nn.Module,
    call: Callable[..., Any],
    inputs: Mapping[str, Any],
    features: Mapping[str, Any],
    whose: str,
) -> None:
    """Raise if a model reads from one example of a packed batch into the next.

    The end of one example and the beginning of the next are run twice, without gradients and in eval mode. The second
    run has other tokens in the first example, which must not change the logits of the second. If the model has inputs
    of other kinds, nothing is checked, because it is not known how to cut them. Neither is a sharded model if the batch
    of some process has only one example per row, because all processes have to run it.

    Args:
        model: the model.
        call: the model as it is called, wrappers included.
        inputs: the inputs of the call.
        features: the features of the batch, which say where its examples begin, even if the model does not take them.
        whose: the name of the model in the error.

    Raises:
        ValueError: the model reads across examples.
    """
    ids = inputs.get("input_ids")
    known = {"input_ids", "attention_mask", "use_cache", "return_dict", *BOUNDARIES}
    others = [n for n, v in inputs.items() if isinstance(v, Tensor) and n not in known]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or others:
        return
    begins = starts(features, ids.shape)
    if not everywhere(model, begins is not None and bool(begins.any())) or begins is None:
        return
    row, at = (int(x) for x in begins.nonzero()[0])
    after = begins[row, at + 1 :].nonzero()
    end = min(at + 8, at + 1 + int(after[0]) if len(after) else ids.shape[1])
    first = max(at - 8, 0)
    window = {
        name: value[row : row + 1, first:end]
        if isinstance(value, Tensor) and value.shape == ids.shape
        else value
        for name, value in inputs.items()
        if name not in BOUNDARIES[2:]
    }
    if isinstance(inputs.get("cu_seq_lens_q"), Tensor):
        # The lengths of the two examples in the window.
        lengths = inputs["cu_seq_lens_q"].new_tensor([0, at - first, end - first])
        longest = max(at - first, end - at)
        cut = dict(zip(BOUNDARIES[2:], (lengths, lengths, longest, longest), strict=True))
        window |= {name: value for name, value in cut.items() if name in inputs}
    tokens = window["input_ids"]
    changed = tokens.clone()
    changed[:, : at - first] = torch.where(tokens[:, : at - first] == 1, 2, 1)
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with _undone(model, ids.device), torch.no_grad():
            results = [
                logits_of(call(**window | {"input_ids": x}), whose)[:, at - first - end :].float()
                for x in (tokens, changed)
            ]
    finally:
        for module in training:
            module.training = True
    # accelerate replaces the forward by one under autocast, and keeps the original.
    low = hasattr(base(model), "_original_forward") or any(
        p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()
    )
    allowed = (2e-2 if low or torch.is_autocast_enabled(ids.device.type) else 1e-5) * results[
        0
    ].abs().max()
    if bool((results[0] - results[1]).abs().max() > allowed):
        raise ValueError(
            f"{whose} reads across the examples of a packed batch: the logits of an example change with the tokens of "
            "the one before. Leave attention_mask out of the batch, pass position_ids that restart in each example, "
            "and load both models with an attn_implementation that respects them, or do not pack"
        )
