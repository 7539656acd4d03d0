// A row against a sparse teacher: fastkd/backends/sparse.py says why this is a dense loss over K + 1 events.
//
//   mark       the tokens in a block's slice, a bit a column
//   sweep      statistics of the whole row and, as if they were the teacher, of the columns that are no tokens
//   gather     the largest token
//   events     statistics, sums and gradient of the tokens, each in its block, and of the others as one event
//   spread     the gradient of that event over the columns, and the cross-entropy's
//
// One read of the logits and one write of the gradient, however many tokens there are.
#pragma once
#include "row.h"

namespace fastkd::cuda {

// What the sweep and the tokens tell of the whole row.
struct Whole {
  Statistics sweep;  // s: of the row; t: of the columns that are no tokens
  float tokens_top;
  int seated, invalid;
};

FASTKD_INLINE Whole no_whole(const RowState& row) { return {no_statistics<false>(row), -INF, 0, 0}; }

FASTKD_INLINE Whole merge(const Whole& a, const Whole& b, const RowState& row) {
  return {merge(a.sweep, b.sweep, row), fmaxf(a.tokens_top, b.tokens_top), a.seated + b.seated, a.invalid | b.invalid};
}

FASTKD_CALL void open_topk_row(const Call& call, int64_t index, RowState& row) {
  open_row(call, index, row);
  row.others.flags = row.flags & (FORWARD | REVERSE | CROSS | LOWS);
  row.flags &= AT_1 | SPREAD | ENTROPY;
  row.teacher = row.student;  // until the sweep is done
  row.others.log_probabilities = row_of(call, call.teacher, index);
}

FASTKD_INLINE float log_probability(const Call& call, const RowState& row, int64_t token) {
  return load_one(row.others.log_probabilities, call.teacher.dtype, token);
}

// f(number, column of the slice) of a thread's share of the tokens that are in its block.
template <class Function>
FASTKD_INLINE void each_token(const Call& call, const RowState& row, Place place, Function f) {
  const int64_t* ids = call.ids + row.row * call.tokens;
  const int64_t start = first_column(call, place.rank);
  const int columns = columns_of(call, place.rank);
#pragma unroll 1
  for (int64_t j = place.thread; j < call.tokens; j += call.threads) {
    const int64_t column = ids[j] - call.shard.first - start;
    if (column >= 0 && column < columns) f(j, int(column));
  }
}

FASTKD_INLINE float z_of(const Call& call, const RowState& row, const Slice& slice, int column) {
  return row.student.z(load_one(slice.stage(column / call.stage), row.student.dtype, column));
}

// mark(word, bit) sets a bit and says what the word was before.
template <class Mark>
FASTKD_INLINE void mark_tokens(const Call& call, const RowState& row, Place place, uint32_t* bits, Whole& mine, Mark mark) {
  each_token(call, row, place, [&](int64_t, int column) {
    const uint32_t bit = 1u << (column % 32);
    if (mark(bits + column / 32, bit) & bit) mine.invalid = 1;
    ++mine.seated;
  });
  const int64_t* ids = call.ids + row.row * call.tokens;
#pragma unroll 1
  for (int64_t j = place.thread; j < call.tokens; j += call.threads)
    if (ids[j] < -1 || ids[j] >= call.shard.total) mine.invalid = 1;
}

// Which of a vector's columns are tokens.
FASTKD_INLINE unsigned tokens_among(const uint32_t* bits, int first) { return bits[first / 32] >> (first % 32) & EVERY; }

// An exponential of 0 silences its term whatever that is: a threshold is not known yet.
FASTKD_INLINE void add_whole(Statistics& mine, const Call& call, const RowState& row, Place place, Range range,
                             const char* student, const uint32_t* bits) {
  each_vector<false>(call, row, place, range, [&](int first, auto vector) {
    const unsigned tokens = tokens_among(bits, first);
    V s[VECTOR], t[VECTOR];
    load_z(student, row.student, first, vector, s);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) t[k] = k < vector.n && !(tokens >> k & 1) ? s[k] : -INF;
    add_vector<true>(mine, s, t, vector.n, row);
  });
}

FASTKD_INLINE void gather_tokens(const Call& call, const RowState& row, Place place, const Slice& slice, Whole& mine) {
  each_token(call, row, place, [&](int64_t token, int column) {
    const float z = z_of(call, row, slice, column);
    mine.tokens_top = fmaxf(mine.tokens_top, z);
    if (call.shard.tokens) call.shard.tokens[row.row * call.tokens + token] = z;
  });
}

FASTKD_INLINE void close_whole(const Call& call, RowState& row, const Whole& all) {
  row.statistics_of_all = all.sweep;
  close_statistics(call, row);
  const bool others = all.sweep.t_top > -INF || all.sweep.t_sum != all.sweep.t_sum;
  Others& out = row.others;
  out.top = row.teacher.top;
  out.weight = others ? row.teacher.weight : 0;
  out.origin = all.tokens_top > -INF ? all.tokens_top : out.top;
  const double log_sum = log_of_sum(all.sweep.t_sum, all.sweep.t_tops) / row.student.unit;
  out.z = others ? float(double(out.top) - double(out.origin) + log_sum) : -INF;
  out.log_p = call.tail_logprob ? call.tail_logprob[row.row] : -INF;
  out.are_event = call.tail != Tail::renormalize;
  out.teacher_is_silent = all.seated == 0;
  out.teacher_is_wrong = all.invalid;
  if (all.invalid) row.weight = NAN;
  row.flags = out.flags;
  open_side(call.teacher, call.teacher_tempering, row.row, row.teacher, row.weight);
}

// f(number) of a thread's share of all tokens, wherever their logits are: the first warp's, so that processes with other
// columns, and perhaps other blocks, add in the same order.
template <class Function>
FASTKD_INLINE void each_token_of_all(const Call& call, const RowState& row, Place place, Function f) {
  constexpr int LANES = 32;
  if (place.rank != 0 || place.thread >= LANES) return;
  const int64_t* ids = call.ids + row.row * call.tokens;
#pragma unroll 1
  for (int64_t j = place.thread; j < call.tokens; j += LANES)
    if (ids[j] >= 0 && ids[j] < call.shard.total) f(j);
}

// f(z, log probability) of a thread's events; the others are the first thread's.
template <class Function>
FASTKD_INLINE void each_event(const Call& call, const RowState& row, Place place, const Slice& slice, bool with_others,
                              Function f) {
  const auto event = [&](int64_t token, float z) { f(z - row.others.origin, log_probability(call, row, token)); };
  if (call.shard.step == Step::all)
    each_token(call, row, place, [&](int64_t token, int column) { event(token, z_of(call, row, slice, column)); });
  else
    each_token_of_all(call, row, place,
                      [&](int64_t token) { event(token, call.shard.tokens[row.row * call.tokens + token]); });
  if (with_others && place.rank == 0 && place.thread == 0) f(row.others.z, row.others.log_p);
}

template <bool LOG_0>
FASTKD_INLINE Statistics statistics_of_events(const Call& call, const RowState& row, Place place, const Slice& slice) {
  Statistics mine = no_statistics<LOG_0>(row);
  each_event(call, row, place, slice, row.others.are_event, [&](float z, float log_p) {
    const V s[1] = {z}, t[1] = {log_p};
    add_vector<LOG_0>(mine, s, t, 1, row);
  });
  return mine;
}

// Keeps what belongs to the whole row.
FASTKD_INLINE void close_events(const Call& call, RowState& row) {
  const double cross_entropy = row.cross_entropy, entropy = row.entropy;
  const float plain_weight = row.plain_weight, plain_top = row.plain_top;
  row.others.no_events = row.statistics_of_all.s_sum + row.statistics_of_all.s_tops == 0;
  close_statistics(call, row);
  row.cross_entropy = cross_entropy, row.entropy = entropy;
  row.plain_weight = plain_weight, row.plain_top = plain_top;
  if (call.tail == Tail::truncate) {  // the teacher as it is given
    row.teacher.unit = row.teacher.weight = 1;
    row.teacher.rate = LOG2_E;
    row.teacher.top = row.teacher.offset = row.teacher.offset_low = 0;
    row.teacher.threshold = NEGLIGIBLE;
    row.s_sure.is = row.t_sure.is = false;
    row.s_sure.z = row.t_sure.z = NAN;
    row.s_origin = row.student.top, row.t_origin = 0;
    row.ratio = 1 / row.student.unit;
    row.ratio_high = -row.student.offset, row.ratio_low = -row.student.offset_low;
  }
}

struct Evaluated {
  V p, q, phi, g, h;
};

// A call, as all the definitions are in it.
template <bool LOG_0>
FASTKD_CALL Evaluated evaluate_event(const Call& call, const RowState& row, float z, float log_p) {
  Evaluated out;
  evaluate<Any, LOG_0>(call, row, z, log_p, out.p, out.q, out.phi, out.g, out.h);
  return out;
}

template <bool LOG_0>
FASTKD_INLINE Sums sums_of_events(const Call& call, const RowState& row, Place place, const Slice& slice) {
  Sums mine{0, 0};
  const bool with_others = row.others.are_event && call.tail != Tail::truncate;
  each_event(call, row, place, slice, with_others, [&](float z, float log_p) {
    if (z == row.s_sure.z || log_p == row.t_sure.z) return;
    const Evaluated event = evaluate_event<LOG_0>(call, row, z, log_p);
    mine = merge(mine, {event.phi, event.g}, row);
  });
  return mine;
}

// Without any event there is no divergence, unless the teacher names none.
FASTKD_INLINE void close_sums_of_events(const Call& call, RowState& row, Sums all) {
  close_sums<Any>(call, row, all);
  if (row.others.no_events) row.phi = NAN;
}

// By the z of an event; 0 times the row's weight where there is none, which is NaN in a row that is not valid.
template <bool LOG_0>
FASTKD_INLINE float event_gradient(const Call& call, const RowState& row, float z, float log_p, bool in_sums) {
  if (call.alpha == 0) return 0 * row.weight;
  if (z == row.s_sure.z && in_sums) return row.s_sure.gradient * row.distillation_factor;
  const Evaluated event = evaluate_event<LOG_0>(call, row, z, log_p);
  return ((in_sums ? event.g : 0) - event.q * row.sum_g) * row.distillation_factor;
}

FASTKD_INLINE void finish_others(const Call& call, RowState& row) {
  Others& others = row.others;
  const bool in_sums = call.tail != Tail::truncate;
  others.gradient = 0 * row.weight;
  if (others.are_event && others.z != -INF && !others.teacher_is_silent)
    others.gradient = others.weight * (row.log_0 ? event_gradient<true>(call, row, others.z, others.log_p, in_sums)
                                                 : event_gradient<false>(call, row, others.z, others.log_p, in_sums));
}

// To the tokens' columns of the slice at `to`, which may be where the logits are.
template <bool LOG_0>
FASTKD_INLINE void token_gradients(const Call& call, const RowState& row, Place place, const Slice& slice, const Slice& to) {
  each_token(call, row, place, [&](int64_t token, int column) {
    const float z = z_of(call, row, slice, column);
    float out = event_gradient<LOG_0>(call, row, z - row.others.origin, log_probability(call, row, token), true);
    if (row.with_labels) out += cross_entropy_gradient(call, row, z, first_column(call, place.rank) + column);
    if (!row.student.identity()) out *= row.student.slope(z);
    store_one(to.stage(column / call.stage), row.student.dtype, column, out);
  });
}

// To all other columns of a range.
FASTKD_INLINE void spread(const Call& call, const RowState& row, Place place, Range range, const char* student,
                          const uint32_t* bits, char* to) {
  const int64_t start = first_column(call, place.rank);
  const float gradient = row.others.gradient;
  each_vector<false>(call, row, place, range, [&](int first, auto vector) {
    V s[VECTOR], out[VECTOR];
    load_z(student, row.student, first, vector, s);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
      const V x = product(s[k] - row.others.top, row.student.rate);
      out[k] = gradient == 0 ? 0 : exp2_of(x) * gradient;
    }
    if (row.with_labels)
#pragma unroll
      for (int k = 0; k < VECTOR; ++k) out[k] += cross_entropy_gradient(call, row, s[k], start + first + k);
    if (!row.student.identity()) turn(out, s, [&](V g, V z) { return g * row.student.slope(z); });
    store(to, row.student.dtype, first, (EVERY >> (VECTOR - vector.n)) & ~tokens_among(bits, first), out);
  });
}

}  // namespace fastkd::cuda
