"""Reading what vLLM and SGLang return for a prompt: every form, every rule, and what must be refused."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import served
from support.served import Bigram, FlatLogprobs, Logprob
from torch import Tensor

import fastkd
from fastkd.sampled import k1
from fastkd.serving import (
    Scored,
    from_sglang,
    from_vllm,
    from_vllm_token_ids,
    sglang_request,
    vllm_params,
    vllm_request,
)

V = 13
IDS = [3, 7, 12, 0, 5, 5, 1]

# Every form of the K most probable tokens, as a function of (rows [S - 1, V], ids, k).
FORMS: dict[str, tuple[Callable[..., Any], Callable[..., Scored]]] = {
    "vllm objects": (served.vllm_objects, from_vllm),
    "vllm flat": (served.vllm_flat, from_vllm),
    "vllm json": (served.vllm_json, from_vllm),
    "sglang lists": (served.sglang_meta, from_sglang),
    "sglang flat": (lambda *given: served.sglang_meta(*given, form="flat"), from_sglang),
    "sglang base64": (lambda *given: served.sglang_meta(*given, form="base64"), from_sglang),
}
form = pytest.mark.parametrize("name", FORMS)
vllm_form = pytest.mark.parametrize("name", [name for name in FORMS if name.startswith("vllm")])


def read(name: str, rows: Tensor, ids: list[int], k: int, **options: Any) -> Scored:
    """What the parser of a form makes of what the server would send, once JSON has written and read it."""
    make, parse = FORMS[name]
    reply = make(rows, ids, k)
    if name not in ("vllm objects", "vllm flat"):
        reply = json.loads(json.dumps(reply))
    return parse(reply, ids, k=k, **options)


def teacher_of(scored: Scored) -> fastkd.TopK:
    assert scored.teacher is not None
    return scored.teacher


# ---- what is read


@form
@pytest.mark.parametrize("start", [1, 2, 5, 6, 7])
def test_row_i_predicts_token_start_plus_i(name: str, start: int) -> None:
    """Each row is the teacher's distribution after the token before the one that the row predicts."""
    teacher = Bigram(V)
    scored = read(name, teacher.rows(IDS), IDS, 4, start=start)
    assert len(scored) == len(IDS) - start and scored.start == start
    assert scored.kept.all() and scored.kept.dtype == torch.bool
    for row in range(len(scored)):
        distribution = teacher.table[IDS[start + row - 1]]
        values, ids = distribution.topk(4)
        assert torch.equal(teacher_of(scored).ids[row], ids)
        assert torch.equal(teacher_of(scored).logprobs[row], values)
        assert scored.sampled_logprobs[row] == distribution[IDS[start + row]]
    assert teacher_of(scored).ids.shape == (len(IDS) - start, 4)
    assert teacher_of(scored).ids.dtype == torch.int64
    assert teacher_of(scored).logprobs.dtype == scored.sampled_logprobs.dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    length=st.integers(1, 9),
    k=st.integers(0, V),
    scale=st.sampled_from([0.3, 3.0, 40.0]),
    data=st.data(),
)
def test_all_forms_agree(seed: int, length: int, k: int, scale: float, data: st.DataObject) -> None:
    teacher = Bigram(V, seed, scale)
    ids = torch.randint(V, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    start = data.draw(st.integers(1, length))
    rows = teacher.rows(ids)
    expected = rows[start - 1 :]
    for name in FORMS:
        if k == 0 and name in ("sglang flat", "sglang base64"):
            continue
        scored = read(name, rows, ids, k, start=start)
        own = torch.tensor(ids[start:], dtype=torch.int64)
        assert torch.equal(scored.sampled_logprobs, expected.gather(-1, own[:, None])[:, 0]), name
        if k == 0:
            assert scored.teacher is None
            continue
        assert torch.equal(teacher_of(scored).ids, expected.topk(k).indices), name
        assert torch.equal(teacher_of(scored).logprobs, expected.topk(k).values), name


@form
def test_the_example_of_three_tokens(name: str) -> None:
    """Values worked out by hand: an own token of rank 9, and one of rank 1."""
    rows = torch.full((2, 12), -30.0)
    rows[0, [1, 2, 3, 7]] = torch.tensor([-0.1, -2.5, -2.9, -3.0])
    rows[1, [5, 8]] = torch.tensor([-0.1, -2.4])
    scored = read(name, rows, [11, 7, 5], 2)
    assert teacher_of(scored).ids.tolist() == [[1, 2], [5, 8]]
    expected = torch.tensor([[-0.1, -2.5], [-0.1, -2.4]])
    assert torch.equal(teacher_of(scored).logprobs, expected)
    assert torch.equal(scored.sampled_logprobs, torch.tensor([-3.0, -0.1]))


@form
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "renormalize_teacher", "truncate"])
def test_a_loss_takes_the_rows(name: str, tail: str) -> None:
    """With K = V - 1, the tail is one token, so that the bucket is the dense loss."""
    teacher, student = Bigram(V), torch.randn(len(IDS), V, dtype=torch.float64)
    scored = read(name, teacher.rows(IDS), IDS, V - 1, start=3, tail=tail)
    assert teacher_of(scored).tail == tail and teacher_of(scored).temperature == 1.0
    loss = fastkd.kd_loss(student[2:-1], teacher_of(scored), mask=scored.kept)
    p = teacher.rows(IDS)[2:].double()
    q = student[2:-1].log_softmax(-1)
    if tail == "bucket":
        torch.testing.assert_close(
            loss.double(), (p.exp() * (p - q)).sum(-1).mean(), rtol=1e-4, atol=1e-5
        )
    assert loss.isfinite()
    estimate = k1(
        q.gather(-1, torch.tensor(IDS[3:])[:, None])[:, 0].float(), scored.sampled_logprobs
    )
    assert estimate.isfinite().all()


def test_the_temperature_of_a_bucket_cannot_be_changed() -> None:
    """Servers take log-probabilities at temperature 1; a loss at another needs a tail policy that renormalizes."""
    rows, student = Bigram(V).rows(IDS), torch.randn(len(IDS) - 1, V)
    for tail in ("bucket", "truncate"):
        scored = read("vllm json", rows, IDS, 4, tail=tail)
        with pytest.raises(ValueError, match="teacher_temperature is 2.0, and teacher.logprobs"):
            fastkd.kd_loss(student, teacher_of(scored), temperature=2.0)
    scored = read("vllm json", rows, IDS, 4, tail="renormalize")
    assert fastkd.kd_loss(student, teacher_of(scored), temperature=2.0).isfinite()


# ---- the rules


@vllm_form
@pytest.mark.parametrize("own", range(6))
def test_the_own_token_is_in_the_k_or_outside(name: str, own: int) -> None:
    """The K are the same whichever token follows, although vLLM lists the own token first."""
    row = torch.tensor([-1.0, -1.5, -2.0, -2.5, -3.0, -3.5])
    scored = read(name, row.expand(1, -1), [0, own], 3)
    assert teacher_of(scored).ids.tolist() == [[0, 1, 2]]
    assert scored.sampled_logprobs.item() == row[own]


def test_the_order_of_a_json_object_does_not_matter() -> None:
    rows = Bigram(V).rows(IDS)
    expected = read("vllm json", rows, IDS, 4)
    for order in (sorted, lambda keys: sorted(keys, key=int, reverse=True)):
        reply = [
            one and {key: one[key] for key in order(one)} for one in served.vllm_json(rows, IDS, 4)
        ]
        scored = from_vllm(reply, IDS, k=4)
        assert torch.equal(teacher_of(scored).ids, teacher_of(expected).ids)
        assert torch.equal(scored.sampled_logprobs, expected.sampled_logprobs)


@vllm_form
def test_ties(name: str) -> None:
    """Ties raise the own token's rank only. The tokens with ranks 1 to K are taken, not another equal one."""
    row = torch.tensor([-2.0, -1.0, -2.0, -2.0, -2.0, -9.0])
    listed = row.topk(3).indices.tolist()
    for own in range(6):
        scored = read(name, row.expand(1, -1), [0, own], 3)
        assert teacher_of(scored).ids.tolist() == [listed]
        assert scored.sampled_logprobs.item() == row[own]


def test_many_zeros() -> None:
    """Where only two tokens are possible, the others tie at -9999, and the own token has the highest rank."""
    row = torch.full((8,), -math.inf)
    row[[2, 6]] = math.log(0.5)
    for name in ("vllm objects", "vllm flat", "vllm json"):
        scored = read(name, row.expand(1, -1), [0, 7], 4)
        ids, logprobs = teacher_of(scored).ids[0].tolist(), teacher_of(scored).logprobs[0].tolist()
        assert ids == row.topk(4).indices.tolist()
        assert logprobs[2:] == [-math.inf, -math.inf]
        assert scored.sampled_logprobs.item() == -math.inf and scored.kept.all()


@pytest.mark.parametrize("value", [-9999.0, -1e5, -math.inf])
def test_minus_9999_is_a_probability_of_zero(value: float) -> None:
    listed = {"4": {"logprob": value, "rank": 2}, "1": {"logprob": -0.1, "rank": 1}}
    scored = from_vllm([None, listed], [0, 4], k=2)
    assert teacher_of(scored).ids.tolist() == [[1, 4]]
    assert teacher_of(scored).logprobs[0, 1] == scored.sampled_logprobs[0] == -math.inf
    just_above = {"4": {"logprob": -9998.0, "rank": 2}, "1": {"logprob": -0.1, "rank": 1}}
    assert from_vllm([None, just_above], [0, 4], k=2).sampled_logprobs[0] == -9998.0


@form
def test_fewer_entries_than_k_are_padded(name: str) -> None:
    rows, ids = Bigram(3).rows([0, 2, 1]), [0, 2, 1]
    make, parse = FORMS[name]
    scored = parse(make(rows, ids, 3), ids, k=5)
    assert teacher_of(scored).ids.shape == (2, 5)
    assert (teacher_of(scored).ids[:, 3:] == -1).all()
    assert (teacher_of(scored).logprobs[:, 3:] == -math.inf).all()
    assert torch.equal(teacher_of(scored).ids[:, :3], rows.topk(3).indices)


@form
@pytest.mark.parametrize("k", [0, 1, 3])
def test_more_than_k_entries(name: str, k: int) -> None:
    """A reply to a larger request serves a smaller k."""
    rows = Bigram(V).rows(IDS)
    make, parse = FORMS[name]
    scored = parse(make(rows, IDS, 8), IDS, k=k)
    assert torch.equal(
        scored.sampled_logprobs, rows.gather(-1, torch.tensor(IDS[1:])[:, None])[:, 0]
    )
    if k:
        assert torch.equal(teacher_of(scored).ids, rows.topk(k).indices)


def test_keys_of_either_type_and_ranks_that_are_unknown() -> None:
    listed = {7: Logprob(-3.0), "1": {"logprob": -0.2, "rank": None}, 2: {"logprob": -2.5}}
    scored = from_vllm([None, listed], [0, 7], k=2)
    assert teacher_of(scored).ids.tolist() == [[1, 2]] and scored.sampled_logprobs.item() == -3.0


def test_an_own_token_without_rank_among_ranked_ones() -> None:
    """One unknown rank makes the others useless: the order is then that of the log-probabilities."""
    listed = {
        "7": {"logprob": -2.2},
        "1": {"logprob": -2.0, "rank": 1},
        "2": {"logprob": -2.5, "rank": 2},
    }
    assert teacher_of(from_vllm([None, listed], [0, 7], k=2)).ids.tolist() == [[1, 7]]


def test_the_last_token_of_the_vocabulary_is_reported_as_0() -> None:
    ids = [3, V - 1, 4, 0, V - 1]
    rows = Bigram(V).rows(ids)
    for start_len in (0, 1):
        meta = served.sglang_meta(rows, ids, 2, start_len=start_len, vocabulary=V)
        with pytest.raises(
            ValueError,
            match="token 0 and input_ids has 12. SGLang reports the last .* pass vocab_size",
        ):
            from_sglang(meta, ids, k=2, start=start_len + 1)
        scored = from_sglang(meta, ids, k=2, start=start_len + 1, vocab_size=V)
        assert scored.sampled_logprobs[-1] == rows[-1, V - 1]
    with pytest.raises(
        ValueError, match="at position 4 the server reports token 0 and input_ids has 12"
    ):
        from_sglang(meta, ids, k=2, start=2, vocab_size=V + 1)
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 12\), got 12"):
        from_sglang(meta, ids, k=2, start=2, vocab_size=V - 1)


@pytest.mark.parametrize("form_of_k", ["lists", "flat", "base64"])
@pytest.mark.parametrize("start_len", [0, 1, 3])
def test_sglang_may_start_anywhere_before_the_first_scored_token(
    form_of_k: str, start_len: int
) -> None:
    rows = Bigram(V).rows(IDS)
    meta = served.sglang_meta(rows, IDS, 3, start_len=start_len, form=form_of_k)
    scored = from_sglang(meta, IDS, k=3, start=4)
    assert torch.equal(teacher_of(scored).ids, rows[3:].topk(3).indices)
    assert scored.sampled_logprobs[0] == rows[3, IDS[4]]


@pytest.mark.parametrize("form_of_k", ["lists", "flat", "base64"])
def test_sglang_that_starts_too_late_is_refused(form_of_k: str) -> None:
    """logprob_start_len = P instead of P - 1 lacks the first token of the completion."""
    meta = served.sglang_meta(Bigram(V).rows(IDS), IDS, 3, start_len=4, form=form_of_k)
    with pytest.raises(ValueError, match="must have between 4 and 7 positions .* to start - 1, 3"):
        from_sglang(meta, IDS, k=3, start=4)


@pytest.mark.parametrize("form_of_k", ["lists", "flat", "base64", "named"])
def test_lists_of_different_lengths_would_shift_rows(form_of_k: str) -> None:
    named = [1, 2, 3] if form_of_k == "named" else None
    options = {"form": "lists" if named else form_of_k, "token_ids": named}
    rows = Bigram(V).rows(IDS)
    meta = served.sglang_meta(rows, IDS, 3, start_len=3, **options)
    more = served.sglang_meta(rows, IDS, 3, start_len=2, **options)
    from_sglang(meta, IDS, k=3, start=4, token_ids=named)
    meta = {**more, "input_token_logprobs": meta["input_token_logprobs"]}
    with pytest.raises(ValueError, match="must have as many positions as .*, 4; got 5"):
        from_sglang(meta, IDS, k=3, start=4, token_ids=named)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_top_logprobs_shape": [2, 3]}, "must have between 7 and 7 positions"),
        ({"input_top_logprobs_shape": [5, 3], "input_top_logprobs_null_prefix": 2}, "null_prefix'] must be in"),
        ({"input_top_logprobs_shape": [7, 3], "input_top_logprobs_null_prefix": 0}, "null_prefix'] must be in"),
        ({"input_top_logprobs_shape": 6}, "must be .rows, k., with an int"),
        ({"input_top_logprobs_null_prefix": None}, "must be .rows, k., with an int"),
        ({"input_top_logprobs_val_flat": None}, "must be a list, got NoneType"),
        ({"input_top_logprobs_val_flat": [0.0]}, "must have 18 numbers, got 1"),
        ({"input_top_logprobs_val_flat_b64": "????"}, "must be base64"),
        ({"input_top_logprobs_val_flat_b64": "AAAA"}, "must have 4 bytes per number, got 3 bytes"),
        ({"input_top_logprobs_val_flat_b64": ""}, "must have 18 numbers, got 0"),
        ({"input_top_logprobs_idx_flat_b64": "AAAA", "input_top_logprobs_idx_flat_b64_dtype": "int64"},
         "dtype'] must be one of float32, int32; got 'int64'"),
        ({"input_top_logprobs_idx_flat": [1.5] * 18}, "must be numbers, got 1.5"),
        ({"input_top_logprobs_idx_flat": [-1] * 18}, "must not be negative, got -1"),
    ],
)  # fmt: skip
def test_damaged_flat_forms(changed: dict[str, Any], message: str) -> None:
    meta = served.sglang_meta(Bigram(V).rows(IDS), IDS, 3, form="flat")
    with pytest.raises((ValueError, TypeError), match=message):
        from_sglang({**meta, **changed}, IDS, k=3)


# ---- missing values


def _with_nan(row: int) -> Tensor:
    rows = Bigram(V).rows(IDS).clone()
    rows[row] = math.nan  # a log-softmax of NaN is NaN everywhere
    return rows


def _reply_with_nan(name: str, row: int) -> Any:
    make, _ = FORMS[name]
    reply = make(_with_nan(row), IDS, 3)
    if name == "vllm json":  # the server of today fails instead; others write NaN or null
        reply[row + 1] = {key: {**one, "logprob": None} for key, one in reply[row + 1].items()}
    return reply


@form
@pytest.mark.parametrize("row", [0, 3, 5])
def test_a_missing_row_is_an_error_or_dropped(name: str, row: int) -> None:
    parse = FORMS[name][1]
    reply = _reply_with_nan(name, row)
    with pytest.raises(
        ValueError, match=rf"those of token {IDS[row + 1]} at position {row + 1} are missing"
    ):
        parse(reply, IDS, k=3)
    whole = read(name, Bigram(V).rows(IDS), IDS, 3)
    scored = parse(reply, IDS, k=3, missing="drop")
    kept = torch.arange(len(IDS) - 1) != row
    assert torch.equal(scored.kept, kept)
    assert (teacher_of(scored).ids[row] == -1).all()
    assert (teacher_of(scored).logprobs[row] == -math.inf).all()
    assert scored.sampled_logprobs[row].isnan()
    assert torch.equal(teacher_of(scored).ids[kept], teacher_of(whole).ids[kept])
    assert torch.equal(scored.sampled_logprobs[kept], whole.sampled_logprobs[kept])
    student = torch.randn(len(IDS) - 1, V)
    loss = fastkd.kd_loss(student, teacher_of(scored), mask=scored.kept)
    other = fastkd.kd_loss(
        student[kept], fastkd.TopK(teacher_of(whole).ids[kept], teacher_of(whole).logprobs[kept])
    )
    torch.testing.assert_close(loss, other)
    # A position after the one that is missing does not need it.
    if row + 2 < len(IDS):
        assert parse(reply, IDS, k=3, start=row + 2).kept.all()


@pytest.mark.parametrize("empty", [None, {}])
def test_a_position_without_entries(empty: object) -> None:
    reply = served.vllm_json(Bigram(V).rows(IDS), IDS, 3)
    reply[2] = empty
    for k in (0, 3):
        with pytest.raises(ValueError, match="of token 12 at position 2 are missing"):
            from_vllm(reply, IDS, k=k)
        assert from_vllm(reply, IDS, k=k, missing="drop").kept.tolist() == [
            True,
            False,
            *[True] * 4,
        ]


@pytest.mark.parametrize("value", [None, math.nan])
def test_one_entry_that_is_missing(value: float | None) -> None:
    """A row of which one of the K is unknown has no known tail either."""
    reply = served.vllm_json(Bigram(V).rows(IDS), IDS, 3)
    last = reply[4]
    assert last is not None
    last[list(last)[-1]]["logprob"] = value
    replies: list[Scored] = [from_vllm(reply, IDS, k=3, missing="drop")]
    for change in (
        lambda meta: meta["input_token_logprobs"][4].__setitem__(0, value),
        lambda meta: meta["input_top_logprobs"][4][1].__setitem__(0, value),
        lambda meta: meta["input_top_logprobs"].__setitem__(4, None),
    ):
        meta = served.sglang_meta(Bigram(V).rows(IDS), IDS, 3)
        change(meta)
        replies.append(from_sglang(meta, IDS, k=3, missing="drop"))
    for scored in replies:
        assert scored.kept.tolist() == [True, True, True, False, True, True]
        assert scored.sampled_logprobs.isnan().tolist() == (~scored.kept).tolist()
        assert (teacher_of(scored).ids[3] == -1).all()


# ---- what is refused


@form
@pytest.mark.parametrize("length", [3, 6, 8])
def test_another_number_of_positions(name: str, length: int) -> None:
    ids = (IDS + IDS)[:length]
    make, parse = FORMS[name]
    reply = make(Bigram(V).rows(ids), ids, 3)
    with pytest.raises(ValueError, match=r"one entry per token|must have between"):
        parse(reply, IDS, k=3)


@form
def test_the_reply_to_another_prompt(name: str) -> None:
    """vLLM lists K tokens and the own one, so an id that it does not list was not sent."""
    changed = 2
    other = [*IDS[:changed], 9, *IDS[changed + 1 :]]
    make, parse = FORMS[name]
    rows = Bigram(V).rows(other)
    assert IDS[changed] not in rows[changed - 1].topk(3).indices.tolist()
    with pytest.raises(ValueError, match="must be the ids that the server scored; at position 2"):
        parse(make(rows, other, 3), IDS, k=3)


@vllm_form
def test_a_first_position_with_entries(name: str) -> None:
    """The log-probabilities of generated tokens have no None at the front."""
    make, parse = FORMS[name]
    reply = make(Bigram(V).rows([0, *IDS]), [0, *IDS], 3)
    if name == "vllm flat":
        reply.start_indices, reply.end_indices = reply.start_indices[1:], reply.end_indices[1:]
    else:
        reply = reply[1:]
    with pytest.raises(ValueError, match="must have None or no entry for token 0"):
        parse(reply, IDS, k=3)


def test_sglang_without_the_leading_null() -> None:
    meta = served.sglang_meta(Bigram(V).rows(IDS), IDS, 3)
    for name, first in (
        ("input_token_logprobs", [-1.0, 3, None]),
        ("input_top_logprobs", [[-1.0, 3, None]]),
    ):
        changed = {**meta, name: [first, *meta[name][1:]]}
        with pytest.raises(ValueError, match=f"{name}'] must begin with null"):
            from_sglang(changed, IDS, k=3)


def _change(position: int, **entries: Any) -> list[Any]:
    reply: list[Any] = served.vllm_json(Bigram(V).rows(IDS), IDS, 2)
    reply[position] = {**reply[position], **entries}
    return reply


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (None, TypeError, "must be a list or a FlatLogprobs, got NoneType; the request must ask for"),
        ({"1": {}}, TypeError, "must be a list or a FlatLogprobs, got dict"),
        ([None, *[[1.0]] * 6], TypeError, "must be dicts by token id, or None; got list at position 1"),
        ([None, *[{3: 1.0}] * 6], TypeError, "must hold objects with a logprob, got float at position 1"),
        (_change(1, x={"logprob": -9.0}), ValueError, "token ids must be whole numbers, got 'x'"),
        (_change(1, **{"-4": {"logprob": -9.0}}), ValueError, "token ids must be whole numbers, got '-4'"),
        (_change(2, **{"07": {"logprob": -9.0}, "7": {"logprob": -9.0}}), ValueError,
         "must be distinct at a position; position 2 repeats some"),
        (_change(3, **{"11": {"logprob": "-9.0"}}), TypeError, "logprob must be numbers, got '-9.0'"),
        (_change(3, **{"11": {"logprob": True}}), TypeError, "logprob must be numbers, got True"),
        (_change(3, **{"11": {"logprob": -1.0, "rank": 1.5}}), TypeError, "rank must be numbers, got 1.5"),
        (_change(4, **{"11": {"logprob": 2.5}}), ValueError,
         "those at position 4 have a sum of .* must run with --logprobs-mode raw_logprobs"),
    ],
)  # fmt: skip
def test_replies_that_cannot_be_right(reply: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_vllm(reply, IDS, k=2)


def test_keys_that_are_no_ids() -> None:
    for key in (1.0, True, None):
        with pytest.raises(ValueError, match="token ids must be whole numbers"):
            from_vllm([None, {key: {"logprob": -1.0}}], [0, 1], k=1)
    with pytest.raises(ValueError, match="token ids must not be negative, got -7"):
        from_vllm([None, {-7: {"logprob": -1.0}, 1: {"logprob": -1.0}}], [0, 1], k=1)
    with pytest.raises(ValueError, match="token ids must not be negative, got -1"):
        from_vllm(FlatLogprobs([0, 0], [0, 2], [1, -1], [-1.0] * 2, [2, 1]), [0, 1], k=1)
    with pytest.raises(ValueError, match="token_ids must be ids, or -1 for padding; got -2"):
        from_vllm_token_ids(torch.zeros(1, 3), [0, 1], [[3, -2]])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"input_token_logprobs": None}, TypeError, "got NoneType; the request must set return_logprob"),
        ({"input_top_logprobs": None}, TypeError, "got NoneType; the request must set top_logprobs_num"),
        ({"input_token_logprobs": [None] * 7}, TypeError, "must list .log-probability, id, text. for each token, got"),
        ({"input_top_logprobs": [None] + [3] * 6}, TypeError, "must hold lists or null, got int"),
        ({"input_top_logprobs": [None] + [[[-0.5, 2, None]] * 2] * 6}, ValueError, "position 1 repeats some"),
        ({"input_top_logprobs": [None] + [[[0.9, 2, None]]] * 6}, ValueError, "have a sum of 2.46"),
        ({"input_top_logprobs": [None] + [[[-0.9, -1, None]]] * 6}, ValueError, "must not be negative, got -1"),
        ({"input_token_logprobs": [[None, 3, None], *([9.0, i, None] for i in IDS[1:])]}, ValueError, "a sum of 8103"),
        ({"input_top_logprobs": [None] + [[[-0.9, 2**70, None]]] * 6}, ValueError, "must be numbers that fit in"),
    ],
)  # fmt: skip
def test_meta_info_that_cannot_be_right(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    meta = served.sglang_meta(Bigram(V).rows(IDS), IDS, 2)
    with pytest.raises(error, match=message):
        from_sglang({**meta, **changed}, IDS, k=2)


@form
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": -1}, "k must be at least 0, got -1"),
        ({"k": 2.0}, "k must be an int, got float"),
        ({"start": 0}, r"start must be in \[1, 7\], got 0: .* nothing predicts token 0"),
        ({"start": 8}, r"start must be in \[1, 7\], got 8"),
        ({"tail": "none"}, "tail must be one of bucket"),
        ({"missing": "skip"}, "missing must be one of raise, drop; got 'skip'"),
        ({"input_ids": []}, "input_ids must be .S., and not empty"),
        ({"input_ids": [[1]]}, "input_ids must be .S., and not empty"),
        ({"input_ids": [1.0] * 7}, "input_ids must be integers, got torch.float32"),
        ({"input_ids": "abc"}, "input_ids must be token ids, got str"),
        ({"input_ids": [*IDS[:6], -100]}, "input_ids must not be negative, got -100"),
    ],
)
def test_bad_arguments(name: str, changed: dict[str, Any], message: str) -> None:
    make, parse = FORMS[name]
    options = {"input_ids": IDS, "k": 2, **changed}
    with pytest.raises((TypeError, ValueError), match=message):
        parse(make(Bigram(V).rows(IDS), IDS, 2), **options)


def test_input_ids_of_every_kind() -> None:
    import numpy as np

    rows = Bigram(V).rows(IDS)
    expected = read("vllm json", rows, IDS, 2)
    for ids in (tuple(IDS), torch.tensor(IDS), torch.tensor(IDS, dtype=torch.int32), np.array(IDS)):
        scored = from_vllm(served.vllm_json(rows, IDS, 2), ids, k=2)
        assert torch.equal(teacher_of(scored).ids, teacher_of(expected).ids)


# ---- tokens that the request names


NAMED = torch.tensor([[1, 2, 3], [5, 7, -1], [-1, 4, 12], [0, 12, 9]])


@pytest.mark.parametrize("as_text", [False, True])
def test_scores_of_named_tokens(as_text: bool) -> None:
    rows, start = Bigram(V).rows(IDS), 3
    params = vllm_params(IDS, token_ids=NAMED, start=start)
    asked = torch.tensor(params["prompt_logprob_token_ids"])
    assert params["prompt_logprob_start"] == 2 and asked[:, 0].tolist() == IDS[3:]
    # As vLLM documents it: row i scores the prediction of token prompt_logprob_start + i + 1.
    scores = torch.stack(
        [
            torch.where(asked[i] < 0, -math.inf, rows[params["prompt_logprob_start"] + i][asked[i].clamp(min=0)])
            for i in range(len(asked))
        ]
    )  # fmt: skip
    reply = served.npy(scores) if as_text else scores.numpy()
    scored = from_vllm_token_ids(reply, IDS, NAMED, start=start)
    assert teacher_of(scored).ids.tolist() == [[1, 2, 3], [5, 7, -1], [4, 12, -1], [0, 12, 9]]
    for i in range(4):
        for token, value in zip(
            teacher_of(scored).ids[i].tolist(), teacher_of(scored).logprobs[i], strict=True
        ):
            assert value == (rows[start + i - 1, token] if token >= 0 else -math.inf)
        assert scored.sampled_logprobs[i] == rows[start + i - 1, IDS[start + i]]
    # A token of probability 0 keeps its id, unlike padding.
    zero = scores.clone()
    zero[0, 2] = -math.inf
    assert teacher_of(from_vllm_token_ids(zero, IDS, NAMED, start=start)).ids[0].tolist() == [
        1,
        2,
        3,
    ]
    zero[2] = math.nan
    with pytest.raises(ValueError, match="of token 5 at position 5 are missing"):
        from_vllm_token_ids(zero, IDS, NAMED, start=start)
    dropped = from_vllm_token_ids(zero, IDS, NAMED, start=start, missing="drop")
    assert dropped.kept.tolist() == [True, True, False, True]


def _npy_with(old: bytes, new: bytes) -> str:
    content = base64.b64decode(served.npy(torch.zeros(4, 4)))
    assert old in content
    return base64.b64encode(content.replace(old, new)).decode()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(4, 3), r"scores must be \[n, 1 \+ K\], here \(4, 4\), .* got \(4, 3\)"),
        (torch.zeros(3, 4), r"got \(3, 4\)"),
        ("???", "scores must be an .npy file in base64"),
        ("AAAA", "the content is no .npy file"),
        (_npy_with(b"<f4", b"|O8"), "must be an .npy file of floats: KeyError"),
        (_npy_with(b"'descr'", b"import "), "must be an .npy file of floats"),
        (_npy_with(b"False", b"True "), "must be an .npy file in C order"),
        (_npy_with(b"(4, 4)", b"(4, 9)"), "must have 144 bytes for shape"),
        (_npy_with(b"(4, 4), ", b"(-4, -4)"), "must have 64 bytes for shape .-4, -4., got"),
        (_npy_with(b"(4, 4)", b"('a',)"), "must be an .npy file of floats"),
        (None, "scores must be an array of numbers, got NoneType"),
        ([[None] * 4] * 4, "scores must be an array of numbers, got list"),
        ([["-1"] * 4] * 4, "scores must be an array of numbers, got list"),
        (torch.ones(4, 4, dtype=torch.bool), "scores must be an array of numbers, got torch.bool"),
    ],
)
def test_damaged_scores_of_named_tokens(scores: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        from_vllm_token_ids(scores, IDS, NAMED, start=3)


def test_named_tokens_must_fit_the_scored_ones() -> None:
    for call in (
        lambda: from_vllm_token_ids(torch.zeros(4, 4), IDS, NAMED, start=2),
        lambda: vllm_params(IDS, token_ids=NAMED, start=2),
    ):
        with pytest.raises(ValueError, match="token_ids must have one row"):
            call()
    with pytest.raises(ValueError, match="token ids must be distinct"):
        from_vllm_token_ids(torch.full((4, 4), -9.0), IDS, NAMED.clamp(min=1, max=3), start=3)


def test_sglang_scores_the_same_tokens_everywhere() -> None:
    rows, named = Bigram(V).rows(IDS), [9, 0, 4]
    meta = served.sglang_meta(rows, IDS, 0, start_len=2, token_ids=named)
    scored = from_sglang(meta, IDS, k=3, start=3, token_ids=named)
    assert teacher_of(scored).ids.tolist() == [named] * 4
    assert torch.equal(teacher_of(scored).logprobs, rows[2:][:, named])
    with pytest.raises(ValueError, match="at position 3 the server lists no entry for token 5"):
        from_sglang(meta, IDS, k=3, start=3, token_ids=[9, 5, 4])
    with pytest.raises(ValueError, match="k must be the number of token_ids, 3; got 2"):
        from_sglang(meta, IDS, k=2, start=3, token_ids=named)
    meta["input_token_ids_logprobs"][2] = None
    dropped = from_sglang(meta, IDS, k=3, start=3, token_ids=named, missing="drop")
    assert dropped.kept.tolist() == [True, False, True, True]


# ---- requests


def test_the_request_of_vllm() -> None:
    path, body = vllm_request(torch.tensor(IDS), 20, model="m")
    assert path == "/v1/completions"
    assert body == {
        "model": "m", "prompt": IDS, "stream": False, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 20,
    }  # fmt: skip
    json.dumps(body)
    assert vllm_params(IDS, 5) == {
        "max_tokens": 1, "temperature": 1.0, "detokenize": False, "prompt_logprobs": 5,
    }  # fmt: skip
    path, body = vllm_request(IDS, token_ids=NAMED, start=3)
    assert path == "/inference/v1/generate" and set(body) == {"token_ids", "sampling_params"}
    assert body["token_ids"] == IDS
    assert body["sampling_params"] == {
        "max_tokens": 1, "temperature": 1.0, "detokenize": False, "prompt_logprob_start": 2,
        "prompt_logprob_token_ids": [[0, 1, 2, 3], [5, 5, 7, -1], [5, -1, 4, 12], [1, 0, 12, 9]],
    }  # fmt: skip
    for options in ({}, {"k": 2, "token_ids": NAMED, "start": 3}):
        with pytest.raises(ValueError, match="exactly one of k and token_ids must be passed"):
            vllm_request(IDS, **options)


def test_the_request_of_sglang() -> None:
    path, body = sglang_request(torch.tensor(IDS), 20, start=4)
    assert path == "/generate"
    assert body == {
        "input_ids": IDS, "sampling_params": {"max_new_tokens": 1, "temperature": 1.0}, "stream": False,
        "return_logprob": True, "logprob_start_len": 3, "return_text_in_logprobs": False, "top_logprobs_num": 20,
    }  # fmt: skip
    json.dumps(body)
    flat = sglang_request(IDS, 20, flat=True).body
    assert flat["return_flat_raw_top_logprobs"] and flat["return_flat_raw_top_logprobs_b64"]
    assert flat["logprob_start_len"] == 0
    named = sglang_request(IDS, 3, token_ids=torch.tensor([9, 0, 4])).body
    assert named["top_logprobs_num"] == 0 and named["token_ids_logprob"] == [9, 0, 4]
    with pytest.raises(ValueError, match="k must be the number of token_ids, 2; got 3"):
        sglang_request(IDS, 3, token_ids=[1, 2])
    with pytest.raises(ValueError, match="flat must be False with token_ids"):
        sglang_request(IDS, 2, token_ids=[1, 2], flat=True)
    with pytest.raises(ValueError, match="start must be in"):
        sglang_request(IDS, 2, start=0)


# ---- vLLM itself


@pytest.mark.stacks
@pytest.mark.parametrize("own", range(6))
def test_the_emulation_of_vllm(own: int) -> None:
    """The entries of the emulated server are those that vLLM's own code makes, and the parser reads vLLM's objects."""
    logprobs = pytest.importorskip("vllm.logprobs", reason="vllm is not installed")
    row, k = torch.tensor([-1.0, -1.5, -2.0, -2.0, -2.0, -9.0]), 3
    ((_, _, rank), *_) = entries = next(iter(served.vllm_entries(row[None], [0, own], k)))
    for flat, make in ((False, served.vllm_objects), (True, served.vllm_flat)):
        made = logprobs.create_prompt_logprobs(flat)
        tokens, values = [one[0] for one in entries], [one[1] for one in entries]
        logprobs.append_logprobs_for_next_position(made, tokens, values, [None] * (k + 1), rank, k)
        emulated: Any = make(row[None], [0, own], k)
        if flat:
            for name in ("start_indices", "end_indices", "token_ids", "logprobs", "ranks"):
                assert getattr(made, name) == getattr(emulated, name), name
            assert isinstance(emulated, FlatLogprobs)
        else:
            assert made[0] is None
            assert [(i, one.logprob, one.rank) for i, one in made[1].items()] == [
                (i, one.logprob, one.rank) for i, one in emulated[1].items()
            ]
        scored = from_vllm(made, [0, own], k=k)
        assert teacher_of(scored).ids.tolist() == [row.topk(k).indices.tolist()]
        assert scored.sampled_logprobs.item() == row[own]
