"""Losses on features: what layers of student and teacher compute on the way to their outputs.

Features are of any rank, [B, ..] with the batch first. Half precision is taken to float32 before anything is squared
or summed, and a loss is float32 (float64 where a side is). A mask is bool, of a leading part of the shape ([B], or
[B, L] for [B, L, D]); what it drops may hold anything, NaN included, as it is replaced before it meets a number. With
nothing left, a mean is 0 and part of the graph. A teacher that requires grad gets a gradient.

:class:`fastkd.distiller.Distiller` brings the features of named layers here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.call.checks import check_alike, check_choice, check_flags, check_number
from fastkd.call.contract import widened
from fastkd.core.scalars import plain
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
    """The regressor of FitNets (Romero et al. 2014): a learned map from the student's width to the teacher's.

    Args:
        student_width: features, or channels, of the student's layer.
        teacher_width: of the teacher's.
        kind: "linear" over the last dimension, or "conv", a 1x1 convolution over the channels of [B, C, H, W].
        bias: whether there is one.
        resize: what "conv" does where the teacher's maps are of another size than the student's. None: it raises;
            "interpolate": bilinear; "pool": adaptive average pooling, which suits a smaller teacher's map.

    Shapes: [.., student_width] to [.., teacher_width], or [B, student_width, H, W] to [B, teacher_width, *size]. The
    features are cast to the dtype of the weight; autocast casts both to its own.

    Raises:
        TypeError, ValueError: an option or the features' shape; the message names it.
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
        """The student's features in the teacher's width. size: height and width of the teacher's maps, for "conv"."""
        _check_features("features", features)
        if isinstance(self.map, nn.Linear):
            width, found = self.map.in_features, features.shape[-1]
            shape = f"[.., {width}]"
        else:
            if features.dim() != 4:
                raise ValueError(
                    f"features must be [B, C, H, W] for kind='conv', got shape {tuple(features.shape)}"
                )
            width, found = self.map.in_channels, features.shape[1]
            shape = f"[B, {width}, H, W]"
        if found != width:
            raise ValueError(
                f"features must be {shape}, as student_width says; got shape {tuple(features.shape)}"
            )
        (features,) = savable(features)
        mapped = self.map(features.to(self.map.weight.dtype))
        if size is None or isinstance(self.map, nn.Linear):
            return mapped
        sizes = [] if isinstance(size, Tensor) or not isinstance(size, Iterable) else list(size)
        sizes = list(map(plain, sizes))
        if len(sizes) != 2 or any(type(edge) is not int or edge < 1 for edge in sizes):
            raise ValueError(f"size must be a height and a width, got {size!r}")
        size = sizes
        return _resized(mapped, size, self.resize)


def hint_loss(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """FitNets' 1/2 ||u_h(x) - r(v_g(x))||^2 of an example x: a teacher's layer as a hint (Romero et al. 2014).

    Memory: the difference, in float32.

    Args:
        student: [B, ..], the guided layer, in the teacher's shape (:class:`Regressor` brings it there).
        teacher: [B, ..], the hint.
        mask: bool, of a leading part of that shape: which examples, or positions of examples, count.
        reduction: "mean" over the examples with anything unmasked, "sum" over them, "none": [B];
            "mean_square": the mean of the squares over all unmasked elements, without the 1/2, as common code has it.

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
    student, teacher, kept = _unmasked(student, teacher, mask, student.shape)
    squares = (widened(student) - widened(teacher)).square()
    if reduction == "mean_square":
        return _mean(squares, kept)
    of_examples = 0.5 * squares.sum(tuple(range(1, squares.dim())))
    if reduction == "none":
        return of_examples
    if reduction == "sum":
        return of_examples.sum()
    return _mean(of_examples, None if kept is None else _any_of_example(kept))


class HintLoss(nn.Module):
    """:func:`hint_loss` behind a regressor: a loss of two layers of different widths.

    Args:
        regressor: a :class:`Regressor`, or another module that maps the student's features to the teacher's shape; then
            it is called with the features alone.
        reduction: as in :func:`hint_loss`.
    """

    def __init__(self, regressor: nn.Module, *, reduction: str = "mean") -> None:
        super().__init__()
        check_choice("reduction", reduction, HINT_REDUCTIONS)
        if not isinstance(regressor, nn.Module):
            raise TypeError(f"regressor must be a torch.nn.Module, got {type(regressor).__name__}")
        self.regressor = regressor
        self.reduction = reduction

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss. What mask drops does not reach the regressor."""
        _check_features("student", student)
        _check_features("teacher", teacher)
        if mask is not None:
            student = torch.where(_mask_of("student", student, mask), student, 0.0)
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
    r"""Attention transfer (Zagoruyko and Komodakis 2017): where a layer is active, whatever its channels are.

    With Q = vec(\sum_c |A_c|^p) of an example's activations A, and each Q divided by its Euclidean norm:

        "paper"  beta / 2 sum_j ||Q_S^j - Q_T^j||_2, the mean over the batch
        "code"   beta sum_j (mean of (Q_S^j - Q_T^j)^2 over batch and positions), as the authors' code has it, but for
                 the 1e-12 below which it leaves a norm

    over pairs of layers j. The numbers of channels need not agree. A map that is all zero stays zero, and the gradient
    is 0 there and where both maps are the same.

    Memory: each layer's activations twice, in float32.

    Args:
        student_maps: [B, C, ..], or a sequence of these, one a layer.
        teacher_maps: as many, of the same batch and, but for resize, spatial sizes.
        form: "paper" or "code".
        power: p, at least 1.
        beta: a factor. The authors had 0.1 with "paper", and 1000 with "code".
        resize: what is done with a student's Q of another size than the teacher's, for [B, C, H, W]. None: it raises;
            "interpolate": bilinear; "pool": adaptive average pooling.

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
            f"teacher_maps must be as many as student_maps, {len(students)}; got {len(teachers)}"
        )
    distances = []
    for index, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        _check_maps(f"student_maps[{index}]", student)
        _check_maps(f"teacher_maps[{index}]", teacher)
        if student.shape[0] != teacher.shape[0] or student.device != teacher.device:
            raise ValueError(
                f"teacher_maps[{index}] must be of the batch of student_maps[{index}], {student.shape[0]} on "
                f"{student.device}; got {teacher.shape[0]} on {teacher.device}"
            )
        student, teacher = savable_when_compiled(student, teacher)
        found, wanted = _summed_over_channels(student, power), _summed_over_channels(teacher, power)
        if found.shape != wanted.shape:
            if found.dim() != 3 or wanted.dim() != 3:
                raise ValueError(
                    f"student_maps[{index}] must have the spatial size of teacher_maps[{index}], "
                    f"{tuple(teacher.shape[2:])}; got {tuple(student.shape[2:])}"
                )
            found = _resized(found.unsqueeze(1), wanted.shape[1:], resize).squeeze(1)
        gap = unit(found.flatten(1)) - unit(wanted.flatten(1))  # [B, positions]
        distances.append(0.5 * _mean(_length(gap)) if form == "paper" else _mean(gap.square()))
    return beta * torch.stack(distances).sum()


class FeatureLoss(nn.Module):
    r"""A loss over several layers: sum_l w_l, mean over unmasked positions of ||P_l h_S - h_T||^2 / D.

    A position is what has a feature vector: a token of [B, L, D], an example of [B, D], a place of [B, D, H, W] with
    dim=1. D is the teacher's width. Close relatives are patient distillation (Sun et al. 2019: normalize="l2", without
    the 1/D) and TinyBERT (Jiao et al. 2020: projection="linear").

    Memory: for each layer the projected states and the difference, in float32.

    Args:
        layers: student layer -> teacher layer, a dict or a sequence of pairs (in which a layer may come again). A layer
            is an index into a tuple of states, as transformers' output.hidden_states is, or a name in a dict of them.
        student_width: the width of the student's layers, or one a pair; not needed for "identity" and a tensor.
        teacher_width: likewise.
        projection: P, or one a pair. "linear" is learned; "fixed" is a semi-orthogonal matrix, drawn once and kept in
            the state; "identity" is none; a tensor [teacher width, student width] is itself, fixed.
        bias: whether what is learned has a bias.
        normalize: of P h_S and h_T. "l2" divides each by its norm (zero vectors stay zero); "layer" takes its mean and
            divides by its standard deviation, as a layer norm does.
        weights: w, a number or one a pair; None: 1.
        dim: where the features are, -1 or 1.

    Raises:
        TypeError, ValueError: an option; the message names it.
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
        given = _one_a_pair("weights", 1.0 if weights is None else weights, count)
        self.weights = [
            check_number(f"weights[{index}]", weight, 0.0, math.inf, open_right=True)
            for index, weight in enumerate(given)
        ]
        self.projections = nn.ModuleList(
            _projection(index, kind, widths, bias)
            for index, (kind, *widths) in enumerate(
                zip(
                    _one_a_pair("projection", projection, count),
                    _one_a_pair("student_width", student_width, count),
                    _one_a_pair("teacher_width", teacher_width, count),
                    strict=True,
                )
            )
        )

    @property
    def student_layers(self) -> list[Layer]:
        """The student's layers, each once."""
        return list(dict.fromkeys(student for student, _ in self.layers))

    @property
    def teacher_layers(self) -> list[Layer]:
        """The teacher's layers, each once."""
        return list(dict.fromkeys(teacher for _, teacher in self.layers))

    def forward(
        self, student_states: States, teacher_states: States, *, mask: Tensor | None = None
    ) -> Tensor:
        """The loss.

        Args:
            student_states: tensors by layer, a tuple or a dict.
            teacher_states: likewise.
            mask: bool, of a leading part of the positions' shape ([B] or [B, L] for [B, L, D]), for all layers.
        """
        losses = []
        for pair, projection in zip(self.layers, self.projections, strict=True):
            student = _state("student_states", student_states, pair[0]).movedim(self.dim, -1)
            teacher = _state("teacher_states", teacher_states, pair[1]).movedim(self.dim, -1)
            losses.append(self._of_pair(student, teacher, pair, projection, mask))
        return sum(
            (weight * loss for weight, loss in zip(self.weights[1:], losses[1:], strict=True)),
            self.weights[0] * losses[0],
        )

    def _of_pair(
        self,
        student: Tensor,
        teacher: Tensor,
        pair: tuple[Layer, Layer],
        projection: nn.Module,
        mask: Tensor | None,
    ) -> Tensor:
        of_student, of_teacher = f"student_states[{pair[0]!r}]", f"teacher_states[{pair[1]!r}]"
        positions = student.shape[:-1]
        if teacher.shape[:-1] != positions:
            raise ValueError(
                f"{of_teacher} must have the positions of {of_student}, {tuple(positions)}; got "
                f"{tuple(teacher.shape[:-1])}"
            )
        width = getattr(projection, "in_features", student.shape[-1])
        if student.shape[-1] != width:
            raise ValueError(
                f"{of_student} must have {width} features, as its projection takes; got {student.shape[-1]}"
            )
        student, teacher = savable_when_compiled(student, teacher)
        student, teacher, kept = _unmasked(student, teacher, mask, positions)
        if isinstance(projection, (nn.Linear, _Fixed)):
            (student,) = savable(student)
            student = projection(student.to(projection.weight.dtype))
        _check_pair(of_student, student, of_teacher, teacher)
        student, teacher = (self._normalized(widened(side)) for side in (student, teacher))
        return _mean((student - teacher).square().mean(-1), kept)

    def _normalized(self, features: Tensor) -> Tensor:
        if self.normalize == "l2":
            return unit(features)
        if self.normalize == "layer":
            return F.layer_norm(features, features.shape[-1:])
        return features

    def extra_repr(self) -> str:
        """The options that no submodule shows."""
        return f"layers={self.layers}, weights={self.weights}, normalize={self.normalize!r}"


class _Fixed(nn.Module):
    """A projection that is not learned, in the form of nn.Linear."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.in_features = weight.shape[1]
        self.register_buffer("weight", weight)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight)


def cosine_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The mean of 1 - cos(h_S, h_T) over unmasked positions, as DistilBERT has it (Sanh et al. 2019).

    It is computed as half the squared distance of the unit vectors, which keeps its digits where they are close. The
    cosine to a zero vector counts as 0, with gradient 0.

    Memory: both sides and their unit vectors, in float32.

    Args:
        student: [.., D].
        teacher: [.., D].
        mask: bool, of a leading part of [..].

    Returns:
        0-dim.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; the message names it.
    """
    _check_pair("student", student, "teacher", teacher)
    student, teacher = savable_when_compiled(student, teacher)
    student, teacher, kept = _unmasked(student, teacher, mask, student.shape[:-1])
    student, teacher = unit(widened(student)), unit(widened(teacher))
    absent = sum((side.detach() == 0).all(-1) * 0.5 for side in (student, teacher))
    return _mean(0.5 * (student - teacher).square().sum(-1) + absent, kept)


def _mean(values: Tensor, kept: Tensor | None = None) -> Tensor:
    """Of the values that are kept (bool, of their shape); 0 where there are none."""
    if kept is None:
        return values.sum() / max(values.numel(), 1)
    return torch.where(kept, values, 0.0).sum() / kept.sum().clamp(min=1)


def _length(vectors: Tensor) -> Tensor:
    """[.., D] -> [..]: Euclidean, with derivative 0 at 0."""
    squared = vectors.square().sum(-1)
    somewhere = squared != 0
    return torch.where(somewhere, torch.where(somewhere, squared, 1.0).sqrt(), 0.0)


def unit(vectors: Tensor) -> Tensor:
    """[.., D] over their Euclidean norms; 0 where they are 0, with derivative 0.

    They are divided by their largest entry first, so that no square overflows or vanishes. That divisor drops out, so
    it is no part of the graph.
    """
    scaled, there = over_peak(vectors, -1)
    squared = scaled.square().sum(-1, keepdim=True)
    return torch.where(there, scaled / torch.where(there, squared, 1.0).sqrt(), 0.0)


def over_peak(values: Tensor, *dims: int) -> tuple[Tensor, Tensor]:
    """(values over the largest |value| along dims, whether that is not 0)"""
    if not values.numel():
        return values, values != 0
    peak = values.detach().abs().amax(dims, keepdim=True)
    there = peak != 0  # a NaN stays one
    return values / torch.where(there, peak, 1.0), there


def _summed_over_channels(maps: Tensor, power: float) -> Tensor:
    """[B, C, ..] -> [B, ..]: sum_c |A_c|^p, of A over its largest entry in an example, as only directions matter."""
    scaled, _ = over_peak(widened(maps), *range(1, maps.dim()))
    return scaled.abs().pow(power).sum(1)


def _resized(maps: Tensor, size: Sequence[int], resize: str | None) -> Tensor:
    """[B, C, H, W] -> [B, C, *size]"""
    height, width = size
    if maps.shape[2:] == (height, width):
        return maps
    if resize is None:
        raise ValueError(
            f"the student's maps are {maps.shape[2]} x {maps.shape[3]}, and the teacher's {height} x {width}: choose "
            "layers of one size, or resize='interpolate' (bilinear) or 'pool' (adaptive average)"
        )
    if resize == "pool":
        return F.adaptive_avg_pool2d(maps, (height, width))
    return F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)


def _mask_of(argument: str, features: Tensor, mask: Tensor) -> Tensor:
    """The mask with as many dimensions as the features."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (attention_mask.bool()), got {mask.dtype}")
    if mask.dim() == 0 or mask.shape != features.shape[: mask.dim()]:
        raise ValueError(
            f"mask must have the shape of {argument}, {tuple(features.shape)}, or of its first dimensions; got "
            f"{tuple(mask.shape)}"
        )
    if mask.device != features.device:
        raise ValueError(
            f"mask must be on {features.device}, where {argument} is; got {mask.device}"
        )
    (mask,) = savable(mask)
    return mask.reshape(*mask.shape, *(1,) * (features.dim() - mask.dim()))


def _unmasked(
    student: Tensor, teacher: Tensor, mask: Tensor | None, counted: torch.Size
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(both with 0 where mask drops them, what is kept of the counted shape, which is a leading part of theirs)."""
    if mask is None:
        return student, teacher, None
    if isinstance(mask, Tensor) and mask.dim() > len(counted):
        raise ValueError(
            f"mask must have the shape of the positions, {tuple(counted)}, or of their first dimensions; got "
            f"{tuple(mask.shape)}"
        )
    kept = _mask_of("student", student, mask)
    student, teacher = (torch.where(kept, side, 0.0) for side in (student, teacher))
    return student, teacher, kept.reshape(kept.shape[: len(counted)]).expand(counted)


def _any_of_example(kept: Tensor) -> Tensor:
    return kept.any(tuple(range(1, kept.dim()))) if kept.dim() > 1 else kept


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
            f"{argument} must be [B, C, ..] with positions, got shape {tuple(maps.shape)}"
        )


def _check_features(argument: str, features: object) -> None:
    if not isinstance(features, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(features).__name__}")
    if not features.is_floating_point():
        raise TypeError(f"{argument} must be floating point, got {features.dtype}")
    if features.dim() == 0 or features.shape[-1] == 0:
        raise ValueError(f"{argument} must be [.., D], got shape {tuple(features.shape)}")


def _check_pair(of_student: str, student: Tensor, of_teacher: str, teacher: Tensor) -> None:
    _check_features(of_student, student)
    _check_features(of_teacher, teacher)
    remedy = ". A projection (fastkd.features.Regressor, or FeatureLoss's) makes one width of two"
    check_alike(of_teacher, teacher, of_student, student, remedy)


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
            "layers must map layers of the student to layers of the teacher, a dict or pairs of indices or names; "
            f"got {layers!r}"
        )
    return pairs


def _one_a_pair(argument: str, value: Any, count: int) -> list[Any]:
    if isinstance(value, (str, Tensor)) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{argument} must be one a pair of layers, {count}; got {len(value)}")
    return list(value)


def _projection(index: int, kind: object, widths: Sequence[Any], bias: bool) -> nn.Module:
    if isinstance(kind, Tensor):
        if kind.dim() != 2 or not kind.is_floating_point():
            raise ValueError(
                f"projection[{index}] must be [teacher width, student width] of floating point, got "
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
        there = (
            f"has {', '.join(repr(name) for name in states)}"
            if isinstance(states, Mapping)
            else f"has {len(states)} layers"
            if isinstance(states, (tuple, list))
            else f"is a {type(states).__name__}"
        )
        raise ValueError(f"{argument} must have the layer {layer!r}; it {there}") from None
    _check_features(f"{argument}[{layer!r}]", state)
    return state
