"""Losses on features, the outputs of intermediate layers of student and teacher.

Features may have any rank, [B, ..] with the batch first. Half precision is converted to float32 before anything is
squared or summed, and losses are float32 (float64 if either side is). A mask is bool with the features' leading
dimensions ([B], or [B, L] for [B, L, D]). Masked features are replaced by 0 before any arithmetic, so they may hold
NaN. A mean over nothing is 0 and still part of the graph. A teacher that requires grad receives a gradient.

:class:`fastkd.distiller.Distiller` captures the features of named layers and passes them to these losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.call.checks import check_alike, check_choice, check_flags
from fastkd.call.contract import widened
from fastkd.core.scalars import check_number, plain
from fastkd.core.tensors import savable, savable_when_compiled

KINDS = ("linear", "conv")
RESIZES = (None, "interpolate", "pool")
HINT_REDUCTIONS = ("mean", "sum", "none", "mean_square")
FORMS = ("paper", "code")
PROJECTIONS = ("linear", "fixed", "identity")
NORMALIZATIONS = (None, "l2", "layer")

Layer = int | str
States = Sequence[Tensor] | Mapping[Any, Tensor]


class Regressor(nn.Module):
    """Learned map from the student's width to the teacher's, the regressor of FitNets (Romero et al. 2014).

    Args:
        student_width: number of features, or channels, of the student's layer.
        teacher_width: number of features, or channels, of the teacher's layer.
        kind: "linear" over the last dimension, or "conv", a 1x1 convolution over the channels of [B, C, H, W].
        bias: whether the map has a bias.
        resize: what "conv" does if the teacher's maps differ in height or width from the student's. None: raise;
            "interpolate": bilinear interpolation; "pool": adaptive average pooling, for teacher maps that are smaller.

    Shapes: [.., student_width] to [.., teacher_width], or [B, student_width, H, W] to [B, teacher_width, *size]. The
    features are cast to the dtype of the weight; under autocast both are cast to the autocast dtype.

    Raises:
        TypeError, ValueError: an option or the features have the wrong type, shape or value; the message names it.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        kind: str = "linear",
        *,
        bias: bool = True,
        resize: str | None = None,
    ) -> None:
        super().__init__()
        student_width = _checked_width("student_width", student_width)
        teacher_width = _checked_width("teacher_width", teacher_width)
        check_choice("kind", kind, KINDS)
        check_choice("resize", resize, RESIZES)
        check_flags(bias=bias)
        if resize is not None and kind == "linear":
            raise ValueError("resize is for kind='conv', whose features have a height and a width")
        self.resize = resize
        self.map: nn.Linear | nn.Conv2d = (
            nn.Linear(student_width, teacher_width, bias=bias)
            if kind == "linear"
            else nn.Conv2d(student_width, teacher_width, 1, bias=bias)
        )

    def forward(self, features: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Map the student's features to the teacher's width.

        Args:
            features: [.., student_width], or [B, student_width, H, W] for "conv".
            size: height and width of the teacher's maps, for "conv"; None: those of features.
        """
        _check_features("features", features)
        if isinstance(self.map, nn.Linear):
            expected_width, width = self.map.in_features, features.shape[-1]
            shape = f"[.., {expected_width}]"
        else:
            if features.dim() != 4:
                raise ValueError(
                    f"features must be [B, C, H, W] for kind='conv', got shape {tuple(features.shape)}"
                )
            expected_width, width = self.map.in_channels, features.shape[1]
            shape = f"[B, {expected_width}, H, W]"
        if width != expected_width:
            raise ValueError(
                f"features must be {shape}, to match student_width; got shape {tuple(features.shape)}"
            )
        (features,) = savable(features)
        mapped = self.map(features.to(self.map.weight.dtype))
        if size is None or isinstance(self.map, nn.Linear):
            return mapped
        edges = [] if isinstance(size, Tensor) or not isinstance(size, Iterable) else list(size)
        edges = list(map(plain, edges))
        if len(edges) != 2 or any(type(edge) is not int or edge < 1 for edge in edges):
            raise ValueError(f"size must be a height and a width, got {size!r}")
        return _resized(mapped, edges, self.resize)


def hint_loss(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Hint loss of FitNets, 1/2 ||u_h(x) - r(v_g(x))||^2 for an example x (Romero et al. 2014).

    u_h(x) are the features of a teacher's layer, the hint; r(v_g(x)) are those of the student's guided layer, mapped to
    the teacher's shape by a :class:`Regressor`.

    Memory: the difference, in float32.

    Args:
        student: [B, ..], the student's features in the teacher's shape.
        teacher: [B, ..], the hint.
        mask: bool with the features' leading dimensions; False drops an example, or a position of an example.
        reduction: "mean" over the examples that are not fully masked; "sum" over examples; "none": [B];
            "mean_square": the mean of the squares over all unmasked elements, without the factor 1/2, as many
            implementations define the loss.

    Returns:
        0-dim, or [B] for reduction="none".

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.
    """
    check_choice("reduction", reduction, HINT_REDUCTIONS)
    _check_pair("student", student, "teacher", teacher)
    if student.dim() < 2:
        raise ValueError(f"student must be [B, ..], got shape {tuple(student.shape)}")
    student, teacher = savable_when_compiled(student, teacher)
    student, teacher, unmasked = _apply_mask(student, teacher, mask, student.shape)
    squares = (widened(student) - widened(teacher)).square()
    if reduction == "mean_square":
        return _mean(squares, unmasked)
    per_example = 0.5 * squares.sum(tuple(range(1, squares.dim())))
    if reduction == "none":
        return per_example
    if reduction == "sum":
        return per_example.sum()
    return _mean(per_example, None if unmasked is None else _any_per_example(unmasked))


class HintLoss(nn.Module):
    """:func:`hint_loss` with a regressor, for layers of different widths.

    Args:
        regressor: a :class:`Regressor`, or another module that maps the student's features to the teacher's shape and
            takes the features as its only argument.
        reduction: as in :func:`hint_loss`.

    Raises:
        TypeError, ValueError: regressor is not a torch.nn.Module, or reduction is unknown.
    """

    def __init__(self, regressor: nn.Module, *, reduction: str = "mean") -> None:
        super().__init__()
        check_choice("reduction", reduction, HINT_REDUCTIONS)
        if not isinstance(regressor, nn.Module):
            raise TypeError(f"regressor must be a torch.nn.Module, got {type(regressor).__name__}")
        self.regressor = regressor
        self.reduction = reduction

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the loss. Masked features are replaced by 0 before the regressor."""
        _check_features("student", student)
        _check_features("teacher", teacher)
        if mask is not None:
            student = torch.where(_broadcastable_mask("student", student, mask), student, 0.0)
        if isinstance(self.regressor, Regressor):
            mapped = self.regressor(student, teacher.shape[2:] if teacher.dim() == 4 else None)
        else:
            mapped = self.regressor(student)
        return hint_loss(mapped, teacher, mask=mask, reduction=self.reduction)


def attention_transfer_loss(
    student_maps: Tensor | Sequence[Tensor],
    teacher_maps: Tensor | Sequence[Tensor],
    *,
    form: str = "paper",
    power: float = 2.0,
    beta: float = 1.0,
    resize: str | None = None,
) -> Tensor:
    r"""Attention transfer (Zagoruyko and Komodakis 2017), which compares where layers are active.

    The attention map of activations A of one example is Q = vec(\sum_c |A_c|^p), divided by its Euclidean norm. With j
    over pairs of layers, the loss is

        "paper"  beta / 2 sum_j ||Q_S^j - Q_T^j||_2, averaged over the batch
        "code"   beta sum_j (mean of (Q_S^j - Q_T^j)^2 over batch and positions), as in the authors' code, which also
                 clamps norms to at least 1e-12

    Student and teacher may have different numbers of channels. A map of zeros stays zero and has gradient 0, and so do
    two equal maps.

    Memory: each layer's activations twice, in float32.

    Args:
        student_maps: [B, C, ..], or a sequence of these, one per layer.
        teacher_maps: as many maps as student_maps, of the same batch and, unless resize is set, the same spatial sizes.
        form: "paper" or "code".
        power: p, at least 1.
        beta: factor of the loss. The authors use 0.1 with "paper", and 1000 with "code".
        resize: what to do if the student's Q differs in height or width from the teacher's, for [B, C, H, W]. None:
            raise; "interpolate": bilinear interpolation; "pool": adaptive average pooling.

    Returns:
        0-dim.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.
    """
    check_choice("form", form, FORMS)
    check_choice("resize", resize, RESIZES)
    power = check_number("power", power, 1.0, math.inf, open_right=True)
    beta = check_number("beta", beta, 0.0, math.inf, open_right=True)
    students, teachers = (
        _layers("student_maps", student_maps),
        _layers("teacher_maps", teacher_maps),
    )
    if len(students) != len(teachers):
        raise ValueError(
            f"teacher_maps must have as many layers as student_maps, {len(students)}; got {len(teachers)}"
        )
    distances = []
    for index, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        _check_maps(f"student_maps[{index}]", student)
        _check_maps(f"teacher_maps[{index}]", teacher)
        if student.shape[0] != teacher.shape[0] or student.device != teacher.device:
            raise ValueError(
                f"teacher_maps[{index}] must have the batch size and device of student_maps[{index}], "
                f"{student.shape[0]} on {student.device}; got {teacher.shape[0]} on {teacher.device}"
            )
        student, teacher = savable_when_compiled(student, teacher)
        student_q, teacher_q = (_summed_over_channels(maps, power) for maps in (student, teacher))
        if student_q.shape != teacher_q.shape:
            if student_q.dim() != 3 or teacher_q.dim() != 3:
                raise ValueError(
                    f"student_maps[{index}] must have the spatial size of teacher_maps[{index}], "
                    f"{tuple(teacher.shape[2:])}; got {tuple(student.shape[2:])}"
                )
            student_q = _resized(student_q.unsqueeze(1), teacher_q.shape[1:], resize).squeeze(1)
        gap = unit(student_q.flatten(1)) - unit(teacher_q.flatten(1))  # [B, positions]
        distances.append(0.5 * _mean(_norm(gap)) if form == "paper" else _mean(gap.square()))
    return beta * torch.stack(distances).sum()


class FeatureLoss(nn.Module):
    r"""Squared distance of features, summed over pairs of layers: sum_l w_l mean(||P_l h_S - h_T||^2 / D).

    The mean is over unmasked positions. A position has one feature vector: a token of [B, L, D], an example of [B, D],
    or a pixel of [B, D, H, W] with dim=1. D is the teacher's width. Patient distillation (Sun et al. 2019) corresponds
    to normalize="l2", apart from the 1/D; TinyBERT (Jiao et al. 2020) to projection="linear".

    Memory: for each layer the projected states and the difference, in float32.

    Args:
        layers: student layer -> teacher layer, a dict or a sequence of pairs (in which layers may repeat). A layer is
            an index into a tuple of states, such as transformers' output.hidden_states, or a name in a dict of states.
        student_width: the width of the student's layers, one for all or one per pair; not needed if projection is
            "identity" or a tensor.
        teacher_width: the width of the teacher's layers, in the same forms.
        projection: P, one for all pairs or one per pair. "linear" is learned; "fixed" is a random semi-orthogonal
            matrix stored as a buffer; "identity" is no projection; a tensor [teacher width, student width] is used as
            it is and not trained.
        bias: whether learned projections have a bias.
        normalize: how P h_S and h_T are normalized before they are compared. "l2" divides each by its norm (zero
            vectors stay zero); "layer" subtracts the mean and divides by the standard deviation, as layer norm does.
        weights: w, a number or one per pair; None: 1.
        dim: the dimension of the features, -1 or 1.

    Raises:
        TypeError, ValueError: an option has the wrong type or value; the message names it.
    """

    def __init__(
        self,
        layers: Mapping[Layer, Layer] | Sequence[tuple[Layer, Layer]],
        student_width: int | Sequence[int] | None = None,
        teacher_width: int | Sequence[int] | None = None,
        *,
        projection: str | Tensor | Sequence[str | Tensor] = "linear",
        bias: bool = False,
        normalize: str | None = None,
        weights: float | Sequence[float] | None = None,
        dim: int = -1,
    ) -> None:
        super().__init__()
        self.layers = _pairs(layers)
        count = len(self.layers)
        check_choice("normalize", normalize, NORMALIZATIONS)
        check_choice("dim", dim, (-1, 1))
        check_flags(bias=bias)
        self.normalize, self.dim = normalize, dim
        weights = _one_per_pair("weights", 1.0 if weights is None else weights, count)
        self.weights = [
            check_number(f"weights[{index}]", weight, 0.0, math.inf, open_right=True)
            for index, weight in enumerate(weights)
        ]
        self.projections = nn.ModuleList(
            _projection(index, kind, widths, bias)
            for index, (kind, *widths) in enumerate(
                zip(
                    _one_per_pair("projection", projection, count),
                    _one_per_pair("student_width", student_width, count),
                    _one_per_pair("teacher_width", teacher_width, count),
                    strict=True,
                )
            )
        )

    @property
    def student_layers(self) -> list[Layer]:
        """The student's layers without repeats."""
        return list(dict.fromkeys(student for student, _ in self.layers))

    @property
    def teacher_layers(self) -> list[Layer]:
        """The teacher's layers without repeats."""
        return list(dict.fromkeys(teacher for _, teacher in self.layers))

    def forward(
        self, student_states: States, teacher_states: States, *, mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss.

        Args:
            student_states: the student's features by layer, a tuple or a dict.
            teacher_states: the teacher's features by layer, a tuple or a dict.
            mask: bool with the leading dimensions of the positions ([B] or [B, L] for [B, L, D]), used for all layers.

        Raises:
            TypeError, ValueError: a layer is missing, or has the wrong type, shape or device; the message names it.
        """
        losses = []
        for pair, projection in zip(self.layers, self.projections, strict=True):
            student = _state("student_states", student_states, pair[0]).movedim(self.dim, -1)
            teacher = _state("teacher_states", teacher_states, pair[1]).movedim(self.dim, -1)
            losses.append(self._pair_loss(student, teacher, pair, projection, mask))
        return sum(
            (weight * loss for weight, loss in zip(self.weights[1:], losses[1:], strict=True)),
            self.weights[0] * losses[0],
        )

    def _pair_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        pair: tuple[Layer, Layer],
        projection: nn.Module,
        mask: Tensor | None,
    ) -> Tensor:
        student_name, teacher_name = f"student_states[{pair[0]!r}]", f"teacher_states[{pair[1]!r}]"
        positions = student.shape[:-1]
        if teacher.shape[:-1] != positions:
            raise ValueError(
                f"{teacher_name} must have the positions of {student_name}, {tuple(positions)}; got "
                f"{tuple(teacher.shape[:-1])}"
            )
        width = getattr(projection, "in_features", student.shape[-1])
        if student.shape[-1] != width:
            raise ValueError(
                f"{student_name} must have {width} features, the input width of its projection; got {student.shape[-1]}"
            )
        student, teacher = savable_when_compiled(student, teacher)
        student, teacher, unmasked = _apply_mask(student, teacher, mask, positions)
        if isinstance(projection, (nn.Linear, _Fixed)):
            (student,) = savable(student)
            student = projection(student.to(projection.weight.dtype))
        _check_pair(student_name, student, teacher_name, teacher)
        student, teacher = (self._normalized(widened(side)) for side in (student, teacher))
        return _mean((student - teacher).square().mean(-1), unmasked)

    def _normalized(self, features: Tensor) -> Tensor:
        if self.normalize == "l2":
            return unit(features)
        if self.normalize == "layer":
            return F.layer_norm(features, features.shape[-1:])
        return features

    def extra_repr(self) -> str:
        """Return the options that no submodule's repr shows."""
        return f"layers={self.layers}, weights={self.weights}, normalize={self.normalize!r}"


class _Fixed(nn.Module):
    """A projection that is not trained, with the interface of nn.Linear."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.in_features = weight.shape[1]
        self.register_buffer("weight", weight)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight)


def cosine_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean of 1 - cos(h_S, h_T) over unmasked positions, the cosine loss of DistilBERT (Sanh et al. 2019).

    It is computed as half the squared distance of the unit vectors, which is precise even if they are close. The
    cosine with a zero vector is defined as 0, with gradient 0.

    Memory: both sides and their unit vectors, in float32.

    Args:
        student: [.., D].
        teacher: [.., D].
        mask: bool with leading dimensions of [..]; False drops a position.

    Returns:
        0-dim.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; the message names it.
    """
    _check_pair("student", student, "teacher", teacher)
    student, teacher = savable_when_compiled(student, teacher)
    student, teacher, unmasked = _apply_mask(student, teacher, mask, student.shape[:-1])
    student, teacher = unit(widened(student)), unit(widened(teacher))
    # A zero vector contributes 0 to the squared distance in place of 1, half of which is added here.
    for_zero_vectors = sum((side.detach() == 0).all(-1) * 0.5 for side in (student, teacher))
    return _mean(0.5 * (student - teacher).square().sum(-1) + for_zero_vectors, unmasked)


def _mean(values: Tensor, unmasked: Tensor | None = None) -> Tensor:
    """Return the mean of the values where unmasked (bool, the same shape) is True; 0 if there are none."""
    if unmasked is None:
        return values.sum() / max(values.numel(), 1)
    return torch.where(unmasked, values, 0.0).sum() / unmasked.sum().clamp(min=1)


def _norm(vectors: Tensor) -> Tensor:
    """Return the Euclidean norms [..] of vectors [.., D], with derivative 0 at 0."""
    squared = vectors.square().sum(-1)
    nonzero = squared != 0
    return torch.where(nonzero, torch.where(nonzero, squared, 1.0).sqrt(), 0.0)


def unit(vectors: Tensor) -> Tensor:
    """Divide vectors [.., D] by their Euclidean norms. Zero vectors stay 0, with derivative 0.

    Each vector is first divided by its largest absolute entry, so that its squares neither overflow nor underflow. This
    divisor cancels, so it is excluded from the graph.
    """
    scaled, nonzero = over_peak(vectors, -1)
    squared = scaled.square().sum(-1, keepdim=True)
    return torch.where(nonzero, scaled / torch.where(nonzero, squared, 1.0).sqrt(), 0.0)


def over_peak(values: Tensor, *dims: int) -> tuple[Tensor, Tensor]:
    """Divide values by their largest absolute value along dims; return (quotient, whether that value is not 0)."""
    if not values.numel():
        return values, values != 0
    peak = values.detach().abs().amax(dims, keepdim=True)
    nonzero = peak != 0  # True for NaN, which therefore propagates
    return values / torch.where(nonzero, peak, 1.0), nonzero


def _summed_over_channels(maps: Tensor, power: float) -> Tensor:
    """Return sum_c |A_c|^p, [B, ..], for maps A [B, C, ..] divided by their largest absolute value per example.

    The division avoids overflow. It does not change the loss, which normalizes the sums.
    """
    scaled, _ = over_peak(widened(maps), *range(1, maps.dim()))
    return scaled.abs().pow(power).sum(1)


def _resized(maps: Tensor, size: Sequence[int], resize: str | None) -> Tensor:
    """Resize maps [B, C, H, W] to [B, C, *size]."""
    height, width = size
    if maps.shape[2:] == (height, width):
        return maps
    if resize is None:
        raise ValueError(
            f"the student's maps are {maps.shape[2]} x {maps.shape[3]}, and the teacher's {height} x {width}: choose "
            "layers of the same size, or pass resize='interpolate' (bilinear) or 'pool' (adaptive average)"
        )
    if resize == "pool":
        return F.adaptive_avg_pool2d(maps, (height, width))
    return F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)


def _broadcastable_mask(argument: str, features: Tensor, mask: Tensor) -> Tensor:
    """Check the mask and return it with trailing dimensions of 1, so that it broadcasts with the features."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (attention_mask.bool()), got {mask.dtype}")
    if mask.dim() == 0 or mask.shape != features.shape[: mask.dim()]:
        raise ValueError(
            f"mask must have the shape of {argument}, {tuple(features.shape)}, or its first dimensions; got "
            f"{tuple(mask.shape)}"
        )
    if mask.device != features.device:
        raise ValueError(
            f"mask must be on {features.device}, where {argument} is; got {mask.device}"
        )
    (mask,) = savable(mask)
    return mask.reshape(*mask.shape, *(1,) * (features.dim() - mask.dim()))


def _apply_mask(
    student: Tensor, teacher: Tensor, mask: Tensor | None, shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Replace masked features by 0 and expand the mask to shape, which is a leading part of the features' shape.

    Returns:
        (student, teacher, the expanded mask or None).
    """
    if mask is None:
        return student, teacher, None
    if isinstance(mask, Tensor) and mask.dim() > len(shape):
        raise ValueError(
            f"mask must have the shape of the positions, {tuple(shape)}, or its first dimensions; got "
            f"{tuple(mask.shape)}"
        )
    unmasked = _broadcastable_mask("student", student, mask)
    student, teacher = (torch.where(unmasked, side, 0.0) for side in (student, teacher))
    return student, teacher, unmasked.reshape(unmasked.shape[: len(shape)]).expand(shape)


def _any_per_example(unmasked: Tensor) -> Tensor:
    return unmasked.any(tuple(range(1, unmasked.dim()))) if unmasked.dim() > 1 else unmasked


def _layers(argument: str, maps: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    if isinstance(maps, Tensor):
        return (maps,)
    if not isinstance(maps, Sequence) or not maps:
        raise TypeError(f"{argument} must be a tensor or a sequence of tensors, got {maps!r}")
    return maps


def _check_maps(argument: str, maps: object) -> None:
    _check_features(argument, maps)
    assert isinstance(maps, Tensor)
    if maps.dim() < 3 or 0 in maps.shape[1:]:
        raise ValueError(
            f"{argument} must be [B, C, ..] with at least one position, got shape {tuple(maps.shape)}"
        )


def _check_features(argument: str, features: object) -> None:
    if not isinstance(features, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(features).__name__}")
    if not features.is_floating_point():
        raise TypeError(f"{argument} must be floating point, got {features.dtype}")
    if features.dim() == 0 or features.shape[-1] == 0:
        raise ValueError(f"{argument} must be [.., D], got shape {tuple(features.shape)}")


def _check_pair(student_name: str, student: Tensor, teacher_name: str, teacher: Tensor) -> None:
    _check_features(student_name, student)
    _check_features(teacher_name, teacher)
    remedy = (
        ". If the widths differ, project the student with fastkd.features.Regressor or FeatureLoss"
    )
    check_alike(teacher_name, teacher, student_name, student, remedy)


def _checked_width(argument: str, width: object) -> int:
    width = plain(width)
    if type(width) is not int or not 1 <= width < 2**31:
        raise ValueError(f"{argument} must be a positive int, got {width!r}")
    return width


def _pairs(
    layers: Mapping[Layer, Layer] | Sequence[tuple[Layer, Layer]],
) -> list[tuple[Layer, Layer]]:
    items = layers.items() if isinstance(layers, Mapping) else layers
    try:
        pairs = [(plain(student), plain(teacher)) for student, teacher in items]
    except (TypeError, ValueError):
        pairs = []
    if not pairs or any(type(layer) not in (int, str) for pair in pairs for layer in pair):
        raise ValueError(
            "layers must map student layers to teacher layers, as a dict or a sequence of pairs of indices or names; "
            f"got {layers!r}"
        )
    return pairs


def _one_per_pair(argument: str, value: Any, count: int) -> list[Any]:
    if isinstance(value, (str, Tensor)) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"{argument} must have one value per pair of layers, {count}; got {len(value)}"
        )
    return list(value)


def _projection(index: int, kind: object, widths: Sequence[Any], bias: bool) -> nn.Module:
    if isinstance(kind, Tensor):
        if kind.dim() != 2 or not kind.is_floating_point():
            raise ValueError(
                f"projection[{index}] must be a floating-point tensor [teacher width, student width], got "
                f"{tuple(kind.shape)} {kind.dtype}"
            )
        return _Fixed(kind.detach().clone())
    check_choice(f"projection[{index}]", kind, PROJECTIONS)
    if kind == "identity":
        return nn.Identity()
    names = ("student_width", "teacher_width")
    student_width, teacher_width = map(_checked_width, names, widths)
    if kind == "linear":
        return nn.Linear(student_width, teacher_width, bias=bias)
    return _Fixed(nn.init.orthogonal_(torch.empty(teacher_width, student_width)))


def _state(argument: str, states: States, layer: Layer) -> Tensor:
    try:
        state = states[layer]  # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        contents = (
            f"has {', '.join(repr(name) for name in states)}"
            if isinstance(states, Mapping)
            else f"has {len(states)} layers"
            if isinstance(states, (tuple, list))
            else f"is a {type(states).__name__}"
        )
        raise ValueError(f"{argument} must have the layer {layer!r}; it {contents}") from None
    _check_features(f"{argument}[{layer!r}]", state)
    return state
