// A row against a sparse teacher, as a dense loss over K + 1 events (fastkd/backends/sparse.py).
//
//   mark       marks the listed tokens in a block's slice, one bit per column
//   sweep      computes statistics of the student's logits: those of the whole row and, stored as the teacher's, those
//              of the columns that are not listed
//   gather     finds the largest z of the listed tokens; if ranks share the vocabulary, also stores each z
//   events     computes statistics, sums and gradients of the listed tokens and of the tail
//   scatter    distributes the tail's gradient over its columns, and adds the cross-entropy's
//
// The kernel reads the student's logits once and writes the gradient once, however many tokens are listed.
#pragma once
#include "row.h"

namespace fastkd::cuda {

// Statistics of the sweep and of the listed tokens, of a part of the row or of all of it.
struct SparseStatistics {
  Statistics sweep;  // s: the whole row; t: the columns that are not listed
  float token_max;
  int token_count, invalid;
};

FASTKD_INLINE SparseStatistics empty_sparse_statistics(const RowState& row) {
  return {empty_statistics<false>(row), -INF, 0, 0};
}

FASTKD_INLINE SparseStatistics add(const SparseStatistics& a, const SparseStatistics& b) {
  return {add(a.sweep, b.sweep), fmaxf(a.token_max, b.token_max), a.token_count + b.token_count, a.invalid | b.invalid};
}
FASTKD_INLINE Maxima maxima_of(const SparseStatistics& a) { return maxima_of(a.sweep); }
FASTKD_INLINE void rescale(SparseStatistics& a, Maxima max, const RowState& row) { rescale(a.sweep, max, row); }

FASTKD_INLINE SparseStatistics merge(const SparseStatistics& a, const SparseStatistics& b, const RowState& row) {
  return {merge(a.sweep, b.sweep, row), fmaxf(a.token_max, b.token_max), a.token_count + b.token_count,
          a.invalid | b.invalid};
}

FASTKD_PER_ROW void open_topk_row(const Call& call, int64_t index, RowState& row) {
  open_row(call, index, row);
  row.tail.event_flags = row.flags & (FORWARD | REVERSE | CROSS | MINIMA);
  row.flags &= EXP_SUM_T1 | CENTERED_SUM | ENTROPY;
  row.teacher = row.student;  // the sweep treats the columns that are not listed as the teacher's
  row.tail.log_probabilities = row_address(call, call.teacher, index);
}

FASTKD_INLINE float log_probability(const Call& call, const RowState& row, int64_t token) {
  return load_one(row.tail.log_probabilities, call.teacher.dtype, token);
}

// Calls f(position in the list, column of the slice) for this thread's share of the listed tokens in its block's slice.
template <class Function>
FASTKD_INLINE void each_token(const Call& call, const RowState& row, Place place, Function f) {
  const int64_t* ids = call.ids + row.row * call.tokens;
  const int64_t start = first_column(call, place.rank);
  const int columns = columns_in_slice(call, place.rank);
#pragma unroll 1
  for (int64_t j = place.thread; j < call.tokens; j += call.threads) {
    const int64_t column = ids[j] - call.shard.first - start;
    if (column >= 0 && column < columns) f(j, int(column));
  }
}

FASTKD_INLINE float token_z(const Call& call, const RowState& row, const Slice& slice, int column) {
  return row.student.z(load_one(slice.stage(column / call.stage), row.student.dtype, column));
}

// mark(word, bit) sets a bit and returns the previous word.
template <class Mark>
FASTKD_INLINE void mark_tokens(const Call& call, const RowState& row, Place place, uint32_t* bits,
                               SparseStatistics& local, Mark mark) {
  each_token(call, row, place, [&](int64_t, int column) {
    const uint32_t bit = 1u << (column % 32);
    if (mark(bits + column / 32, bit) & bit) local.invalid = 1;
    ++local.token_count;
  });
  const int64_t* ids = call.ids + row.row * call.tokens;
#pragma unroll 1
  for (int64_t j = place.thread; j < call.tokens; j += call.threads)
    if (ids[j] < -1 || ids[j] >= call.shard.total) local.invalid = 1;
}

// The listed tokens among a vector's columns, one bit per column.
FASTKD_INLINE unsigned tokens_among(const uint32_t* bits, int first) {
  return bits[first / 32] >> (first % 32) & ALL_COLUMNS;
}

// Calls f(vector, s, t) for this thread's vectors in a range. s is the student's z; t is the same, but -inf in the
// columns of listed tokens.
template <class Function>
FASTKD_INLINE void each_sparse_vector(const Call& call, const RowState& row, Place place, Range range,
                                      const char* student, const uint32_t* bits, Function f) {
  each_vector<false>(call, row, place, range, [&](int first, auto vector) {
    const unsigned tokens = tokens_among(bits, first);
    V s[VECTOR], t[VECTOR];
    load_z(student, row.student, first, vector, s);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) t[k] = k < vector.n && !(tokens >> k & 1) ? s[k] : -INF;
    f(vector, s, t);
  });
}

FASTKD_INLINE void add_sweep_extremes(Extremes& local, const Call& call, const RowState& row, Place place, Range range,
                                      const char* student, const uint32_t* bits) {
  each_sparse_vector(call, row, place, range, student, bits,
                     [&](auto, const auto& s, const auto& t) { local.add(s, t, row.flags); });
}

// Uses the policy for log 0, so that a logit of -inf adds 0 to the entropy. Side::threshold is still 0 (set_softmax
// sets it later), so only exponentials that are 0 count as negligible.
FASTKD_INLINE void add_sweep(Sweep<true, false>& local, const Call& call, const RowState& row, Place place, Range range,
                             const char* student, const uint32_t* bits) {
  each_sparse_vector(call, row, place, range, student, bits,
                     [&](auto vector, const auto& s, const auto& t) { local.add(s, t, vector.n, row); });
}

FASTKD_INLINE void gather_tokens(const Call& call, const RowState& row, Place place, const Slice& slice,
                                 SparseStatistics& local) {
  each_token(call, row, place, [&](int64_t token, int column) {
    const float z = token_z(call, row, slice, column);
    local.token_max = fmaxf(local.token_max, z);
    if (call.shard.tokens) call.shard.tokens[row.row * call.tokens + token] = z;
  });
}

FASTKD_INLINE void finish_sweep(const Call& call, RowState& row, const SparseStatistics& all) {
  row.statistics = all.sweep;
  finish_statistics(call, row);
  const bool has_tail = all.sweep.t_max > -INF || all.sweep.t_exp_sum != all.sweep.t_exp_sum;
  TailEvent& out = row.tail;
  out.max = row.teacher.max;
  out.inverse_sum = has_tail ? 1 / (all.sweep.t_exp_sum + all.sweep.t_max_count) : 0;
  out.origin = all.token_max > -INF ? all.token_max : out.max;
  const double log_sum = log_of_sum(all.sweep.t_exp_sum, all.sweep.t_max_count) / row.student.unit;
  out.z = has_tail ? float(double(out.max) - double(out.origin) + log_sum) : -INF;
  out.log_p = call.tail_logprob ? call.tail_logprob[row.row] : -INF;
  out.is_event = call.tail != Tail::renormalize;
  out.teacher_lists_no_token = all.token_count == 0;
  out.teacher_is_invalid = all.invalid;
  if (all.invalid) row.weight = NAN;
  row.flags = out.event_flags;
  open_side(call.teacher, call.teacher_tempering, row.row, row.teacher, row.weight);
}

// Calls f(position in the list) for this thread's share of all listed tokens, in the first warp of the first block.
// The order of the additions is then the same in every process, even if their clusters differ in the number of blocks.
template <class Function>
FASTKD_INLINE void each_token_of_row(const Call& call, const RowState& row, Place place, Function f) {
  constexpr int LANES = 32;
  if (place.rank != 0 || place.thread >= LANES) return;
  const int64_t* ids = call.ids + row.row * call.tokens;
#pragma unroll 1
  for (int64_t j = place.thread; j < call.tokens; j += LANES)
    if (ids[j] >= 0 && ids[j] < call.shard.total) f(j);
}

// Calls f(z - row.tail.origin, log probability) for this thread's events; the tail belongs to the first thread.
template <class Function>
FASTKD_INLINE void each_event(const Call& call, const RowState& row, Place place, const Slice& slice, bool with_tail,
                              Function f) {
  const auto event = [&](int64_t token, float z) { f(z - row.tail.origin, log_probability(call, row, token)); };
  if (call.shard.step == Step::all)
    each_token(call, row, place, [&](int64_t token, int column) { event(token, token_z(call, row, slice, column)); });
  else
    each_token_of_row(call, row, place,
                      [&](int64_t token) { event(token, call.shard.tokens[row.row * call.tokens + token]); });
  if (with_tail && place.rank == 0 && place.thread == 0) f(row.tail.z, row.tail.log_p);
}

// Calls f(s, t) with the logits of this thread's events, a vector of one column each.
template <class Function>
FASTKD_INLINE void each_event_vector(const Call& call, const RowState& row, Place place, const Slice& slice,
                                     Function f) {
  each_event(call, row, place, slice, row.tail.is_event, [&](float z, float log_p) {
    const V s[1] = {z}, t[1] = {log_p};
    f(s, t);
  });
}

FASTKD_INLINE Extremes event_extremes(const Call& call, const RowState& row, Place place, const Slice& slice) {
  Extremes local;
  each_event_vector(call, row, place, slice, [&](const auto& s, const auto& t) { local.add(s, t, row.flags); });
  return local;
}

template <bool LOG_0>
FASTKD_INLINE void add_events(Sweep<LOG_0, false>& local, const Call& call, const RowState& row, Place place,
                              const Slice& slice) {
  each_event_vector(call, row, place, slice, [&](const auto& s, const auto& t) { local.add(s, t, 1, row); });
}

// Finishes the statistics of events. Cross-entropy and entropy stay those of the whole row.
FASTKD_INLINE void finish_events(const Call& call, RowState& row) {
  const double cross_entropy = row.cross_entropy, entropy = row.entropy;
  const float inverse_sum_t1 = row.inverse_sum_t1, max_t1 = row.max_t1;
  row.tail.no_events = row.statistics.s_exp_sum + row.statistics.s_max_count == 0;
  finish_statistics(call, row);
  row.cross_entropy = cross_entropy, row.entropy = entropy;
  row.inverse_sum_t1 = inverse_sum_t1, row.max_t1 = max_t1;
  if (call.tail == Tail::truncate) {  // the teacher's probabilities are not normalized again
    row.teacher.unit = row.teacher.inverse_sum = 1;
    row.teacher.rate = LOG2_E;
    row.teacher.max = row.teacher.origin = row.teacher.offset = row.teacher.offset_low = 0;
    row.teacher.is_far = false;
    row.teacher.threshold = NEGLIGIBLE;
    row.s_sure.exists = row.t_sure.exists = false;
    row.s_sure.z = row.t_sure.z = NAN;
    row.s_origin = row.student.max, row.t_origin = 0;
    row.unit_ratio = 1 / row.student.unit;
    const double log_sum = log_of_sum(row.statistics.s_exp_sum, row.statistics.s_max_count);
    row.log_ratio_high = float(log_sum);
    row.log_ratio_low = finite(row.log_ratio_high) ? float(log_sum - row.log_ratio_high) : 0;
  }
}

struct EventTerms {
  V p, q, phi, g, h;
};

// Not inlined, because it contains the definitions of all divergences.
template <bool LOG_0>
FASTKD_PER_ROW EventTerms evaluate_event(const Call& call, const RowState& row, float z, float log_p) {
  EventTerms out;
  evaluate<AnyDivergence, LOG_0>(call, row, z, log_p, out.p, out.q, out.phi, out.g, out.h);
  return out;
}

template <bool LOG_0>
FASTKD_INLINE Sums event_sums(const Call& call, const RowState& row, Place place, const Slice& slice) {
  Sums local{0, 0, 0};
  const bool with_tail = row.tail.is_event && call.tail != Tail::truncate;
  each_event(call, row, place, slice, with_tail, [&](float z, float log_p) {
    if (z == row.s_sure.z || log_p == row.t_sure.z) return;
    const EventTerms event = evaluate_event<LOG_0>(call, row, z, log_p);
    local = add(local, {event.phi, event.g, 0});
  });
  return local;
}

// If the student gives every event probability 0, the divergence is NaN; Sparse::finish_row makes it 0 if the teacher
// lists no token.
FASTKD_INLINE void finish_event_sums(const Call& call, RowState& row, Sums all) {
  finish_sums<AnyDivergence>(call, row, all);
  if (row.tail.no_events) row.phi = NAN;
}

// Gradient with respect to the z of an event. in_sums: whether the event is part of the sums of phi and g. If alpha is
// 0, the gradient is 0, or NaN if the row is invalid (its weight is NaN).
template <bool LOG_0>
FASTKD_INLINE float event_gradient(const Call& call, const RowState& row, float z, float log_p, bool in_sums) {
  if (call.alpha == 0) return 0 * row.weight;
  if (z == row.s_sure.z && in_sums) return row.s_sure.gradient * row.distillation_factor;
  const EventTerms event = evaluate_event<LOG_0>(call, row, z, log_p);
  return ((in_sums ? event.g : 0) - event.q * row.sum_g) * row.distillation_factor;
}

FASTKD_INLINE void finish_tail(const Call& call, RowState& row) {
  TailEvent& tail = row.tail;
  const bool in_sums = call.tail != Tail::truncate;
  tail.gradient = 0 * row.weight;
  if (tail.is_event && tail.z != -INF && !tail.teacher_lists_no_token)
    tail.gradient = tail.inverse_sum * (row.log_0_policy ? event_gradient<true>(call, row, tail.z, tail.log_p, in_sums)
                                                    : event_gradient<false>(call, row, tail.z, tail.log_p, in_sums));
}

// Stores the gradients of listed tokens in the slice `to`, which may be the slice that holds the logits.
template <bool LOG_0>
FASTKD_INLINE void token_gradients(const Call& call, const RowState& row, Place place, const Slice& slice,
                                   const Slice& to) {
  each_token(call, row, place, [&](int64_t token, int column) {
    const float z = token_z(call, row, slice, column);
    float out = event_gradient<LOG_0>(call, row, z - row.tail.origin, log_probability(call, row, token), true);
    if (row.with_labels) out += cross_entropy_gradient(call, row, z, first_column(call, place.rank) + column);
    if (!row.student.identity()) out *= row.student.slope(z);
    store_one(to.stage(column / call.stage), row.student.dtype, column, out);
  });
}

// Stores the gradients of all other columns of a range.
FASTKD_INLINE void scatter_tail(const Call& call, const RowState& row, Place place, Range range, const char* student,
                                const uint32_t* bits, char* to) {
  const int64_t start = first_column(call, place.rank);
  const float gradient = row.tail.gradient;
  each_vector<false>(call, row, place, range, [&](int first, auto vector) {
    V s[VECTOR], out[VECTOR];
    load_z(student, row.student, first, vector, s);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
      const V x = product(s[k] - row.tail.max, row.student.rate);
      out[k] = gradient == 0 ? 0 : exp2_of(x) * gradient;
    }
    if (row.with_labels)
#pragma unroll
      for (int k = 0; k < VECTOR; ++k) out[k] += cross_entropy_gradient(call, row, s[k], start + first + k);
    if (!row.student.identity()) transform_each(out, s, [&](V g, V z) { return g * row.student.slope(z); });
    const unsigned tokens = row.tail.teacher_is_invalid ? 0 : tokens_among(bits, first);
    store(to, row.student.dtype, first, (ALL_COLUMNS >> (VECTOR - vector.n)) & ~tokens, out);
  });
}

}  // namespace fastkd::cuda
