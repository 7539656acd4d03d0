// One row of student and teacher logits, as the threads of a cluster compute it.
//
// Each block holds a slice of the row in shared memory, raw as it lies in device memory, in stages. A row is
//
//   open          what a row's options are; whether it counts
//   copy          the slice comes in: the copy engine moves whole pieces, threads the edges
//   statistics    a thread's maxima, sums of exponentials and moments;  merged over threads and blocks
//   sums          of phi and g, where no closed form gives them;        merged likewise
//   gradient      in place of the logits in shared memory, or straight to device memory
//
// A divergence with a target compares the label's token apart from the others (fastkd/divergences.py, Target): its column
// is left out of statistics and sums, what it adds to these is worked out once a row, and so is its own gradient.
//
// The functions here are what a thread does between two exchanges of data, and what merges two results: nothing in here
// talks to another thread. cluster.h has the exchanges.
//
// Phases are optimistic about log 0, as in csrc/cpu/rows.cpp: arithmetic on -inf gives NaN exactly where the policy of
// fastkd/backends/reference.py (evaluate) matters, and a row whose merged sums are not finite is done again with the policy.
#pragma once
#include <type_traits>

#include "call.h"
#include "math.h"
#include "plan.h"

// Sees every access to logits and gradients but those of the copy engine; tests/support/cuda_host.h counts bytes with it.
#ifndef FASTKD_SEEN
#define FASTKD_SEEN(memory, bytes, writes)
#endif

namespace fastkd::cuda {

#include "../generated/divergences.h"

constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float NEGLIGIBLE = 1e-30f;  // as in fastkd/backends/reference.py
constexpr float INFINITE = 1e6f;

// A thread's place among those that share a row.
struct Place {
  int rank, thread;
};

// ---- rows in memory

FASTKD_INLINE int size_of_element(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// The address of a row's first column; null where there are no rows.
FASTKD_CALL char* row_of(const Call& call, const Rows& rows, int64_t row) {
  if (!rows.data) return nullptr;
  int64_t offset = 0;
#pragma unroll 1
  for (int d = call.dimensions; d-- > 0;) {
    offset += row % call.sizes[d] * rows.strides[d];
    row /= call.sizes[d];
  }
  return rows.data + offset * size_of_element(rows.dtype);
}

// Columns of a block's slice.
struct Range {
  int first, last;
};

// The columns of a row that a block has, and those of a stage of them.
FASTKD_INLINE int64_t first_column(const Call& call, int rank) { return int64_t(rank) * call.slice; }
FASTKD_INLINE int columns_of(const Call& call, int rank) {
  const int64_t rest = call.vocabulary - first_column(call, rank);
  return int(rest < 0 ? 0 : rest < call.slice ? rest : call.slice);
}
FASTKD_INLINE Range range_of(const Call& call, int rank, int stage) {
  const int columns = columns_of(call, rank), first = stage * call.stage, last = first + call.stage;
  return {first < columns ? first : columns, last < columns ? last : columns};
}

// A block's part of a row, in its shared memory or in the device's: where each stage begins. Of two rows that follow each
// other in shared memory, one may lie up to a piece later: a gap keeps its stages off those that are not done with.
struct Slice {
  char* memory;
  int gap;

  FASTKD_INLINE char* stage(int number) const { return memory + number * gap; }
};

// By how much an address misses a multiple of a piece.
FASTKD_INLINE int skew_of(const char* memory) { return int(reinterpret_cast<uintptr_t>(memory) % PIECE); }

// Of bytes in memory, what the copy engine moves: whole pieces. The edges before and after are less than one each.
struct Pieces {
  int64_t first, last;
};
FASTKD_INLINE Pieces whole_pieces(const char* memory, int64_t bytes) {
  const int64_t first = (PIECE - skew_of(memory)) % PIECE;
  if (first >= bytes) return {bytes, bytes};
  return {first, first + (bytes - first) / PIECE * PIECE};
}

FASTKD_INLINE void copy_element(char* to, const char* from, int element) {
  FASTKD_SEEN(from, element, false);
  FASTKD_SEEN(to, element, true);
  if (element == 4)
    *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
  else
    *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
}

// A thread's part of the edges: the first threads have an element each.
FASTKD_INLINE void copy_edges(Place place, char* to, const char* from, Pieces pieces, int64_t bytes, int element) {
  int64_t at = int64_t(place.thread) * element;
  if (at >= pieces.first) at += pieces.last - pieces.first;
  if (at < bytes) copy_element(to + at, from + at, element);
}

// A thread's part of all bytes, element by element: of gradients, whose stores nothing waits for.
FASTKD_CALL void copy_out(const Call& call, Place place, char* to, const char* from, int64_t bytes, int element) {
#pragma unroll 1
  for (int64_t i = int64_t(place.thread) * element; i < bytes; i += int64_t(call.threads) * element)
    copy_element(to + i, from + i, element);
}

struct alignas(PIECE) Piece {
  uint32_t words[4];
};

// 32 bits from the one on that is given, of two words.
FASTKD_INLINE uint32_t bits_of(uint32_t low, uint32_t high, unsigned from) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(low, high, from);
#else
  return uint32_t((uint64_t(high) << 32 | low) >> from);
#endif
}

FASTKD_INLINE void from_two_bf16(const Piece& piece, V (&x)[VECTOR]) {
  for (int k = 0; k < 4; ++k) {
    x[2 * k] = as<float>(piece.words[k] << 16);
    x[2 * k + 1] = as<float>(piece.words[k] & 0xffff0000);
  }
}

// A vector of them at a multiple of a piece.
FASTKD_INLINE void load_bf16(const char* shared, V (&x)[VECTOR]) {
  FASTKD_SEEN(shared, PIECE, false);
  from_two_bf16(*reinterpret_cast<const Piece*>(shared), x);
}

// A vector of logits. Shared memory has room for a whole one at the end of a slice, whatever is in it.
FASTKD_INLINE void load(const char* shared, Dtype dtype, int first, V (&x)[VECTOR]) {
  const char* from = shared + int64_t(first) * size_of_element(dtype);
  FASTKD_SEEN(from, VECTOR * size_of_element(dtype), false);
  const bool skewed = skew_of(from) != 0;  // as the row lies, and the copy engine with it
  if (dtype == Dtype::f32) {
    Piece pieces[2];
    if (skewed)
      for (int k = 0; k < VECTOR; ++k) pieces[k / 4].words[k % 4] = reinterpret_cast<const uint32_t*>(from)[k];
    else
      for (int k = 0; k < 2; ++k) pieces[k] = reinterpret_cast<const Piece*>(from)[k];
    for (int k = 0; k < VECTOR; ++k) x[k] = as<float>(pieces[k / 4].words[k % 4]);
    return;
  }
  Piece piece;
  if (skewed) {
    const uintptr_t odd = reinterpret_cast<uintptr_t>(from) % 4;
    const auto* words = reinterpret_cast<const uint32_t*>(from - odd);
    for (int k = 0; k < 4; ++k) piece.words[k] = bits_of(words[k], words[k + 1], unsigned(odd * 8));
  } else {
    piece = *reinterpret_cast<const Piece*>(from);
  }
  if (dtype == Dtype::bf16)
    from_two_bf16(piece, x);
  else
    for (int k = 0; k < 4; ++k) {
      x[2 * k] = from_fp16(uint16_t(piece.words[k]));
      x[2 * k + 1] = from_fp16(uint16_t(piece.words[k] >> 16));
    }
}

// A vector to a multiple of a piece.
FASTKD_INLINE void store_bf16(char* memory, const V (&x)[VECTOR]) {
  Piece piece;
  for (int k = 0; k < 4; ++k) piece.words[k] = two_bf16(x[2 * k], x[2 * k + 1]);
  FASTKD_SEEN(memory, PIECE, true);
  *reinterpret_cast<Piece*>(memory) = piece;
}

constexpr unsigned EVERY = (1u << VECTOR) - 1;  // a bit a column of a vector

// Those columns of a vector whose bits are set, to memory in its dtype; a whole vector at once where its address allows.
FASTKD_INLINE void store(char* memory, Dtype dtype, int first, unsigned columns, const V (&x)[VECTOR]) {
  Piece pieces[2];
  if (dtype == Dtype::f32)
    for (int k = 0; k < 4; ++k) {
      pieces[0].words[k] = as<uint32_t>(x[k]);
      pieces[1].words[k] = as<uint32_t>(x[k + 4]);
    }
  else
    for (int k = 0; k < 4; ++k) {
      const float low = x[2 * k], high = x[2 * k + 1];
      pieces[0].words[k] = dtype == Dtype::bf16 ? two_bf16(low, high) : two_fp16(low, high);
    }
  const int element = size_of_element(dtype);
  char* to = memory + int64_t(first) * element;
  if (columns == EVERY && skew_of(to) == 0) {
    FASTKD_SEEN(to, VECTOR * element, true);
    reinterpret_cast<Piece*>(to)[0] = pieces[0];
    if (element == 4) reinterpret_cast<Piece*>(to)[1] = pieces[1];
    return;
  }
#pragma unroll
  for (int k = 0; k < VECTOR; ++k)
    if (columns >> k & 1) {
      FASTKD_SEEN(to + k * element, element, true);
      if (element == 4)
        reinterpret_cast<uint32_t*>(to)[k] = pieces[k / 4].words[k % 4];
      else
        reinterpret_cast<uint16_t*>(to)[k] = uint16_t(pieces[0].words[k / 2] >> (k % 2 * 16));
    }
}

FASTKD_INLINE float load_one(const char* memory, Dtype dtype, int64_t column) {
  FASTKD_SEEN(memory + column * size_of_element(dtype), size_of_element(dtype), false);
  if (dtype == Dtype::f32) return reinterpret_cast<const float*>(memory)[column];
  const uint16_t x = reinterpret_cast<const uint16_t*>(memory)[column];
  return dtype == Dtype::bf16 ? from_bf16(x) : from_fp16(x);
}

FASTKD_INLINE void store_one(char* memory, Dtype dtype, int64_t column, float value) {
  FASTKD_SEEN(memory + column * size_of_element(dtype), size_of_element(dtype), true);
  if (dtype == Dtype::f32)
    reinterpret_cast<float*>(memory)[column] = value;
  else
    reinterpret_cast<uint16_t*>(memory)[column] = dtype == Dtype::bf16 ? to_bf16(value) : to_fp16(value);
}

// A thread's part of the zeros of a row that is dropped, and of the padding past the vocabulary of one that is not.
FASTKD_CALL void clear(const Call& call, Place place, const Rows& rows, int64_t row, bool padding_alone) {
  if (!rows.data || (padding_alone && rows.width == call.vocabulary)) return;
  char* memory = row_of(call, rows, row);
  const int64_t step = int64_t(call.ranks) * call.threads;
#pragma unroll 1
  for (int64_t i = int64_t(place.rank) * call.threads + place.thread + (padding_alone ? call.vocabulary : 0);
       i < rows.width; i += step)
    store_one(memory, rows.dtype, i, 0);
}

// ---- what a row is, and what has been found of it

enum Flags : unsigned {
  FORWARD = 1,
  REVERSE = 2,
  CROSS = 4,
  ENTROPY = 8,
  AT_1 = 16,
  SPREAD = 32,
  LOWS = 64,
  TEACHER_AT_1 = 128
};

// One side: z = softcap * tanh(gain * logit), or sign * logit; tempered logits are unit * z, and rate * z to base 2.
struct Side {
  Dtype dtype;
  float sign, softcap, gain, inverse_cap, temperature, unit, rate;
  float top;                // the maximum of z, or 0 where all are -inf
  float weight;             // 1 / the sum of exponentials: of e = 2^(rate (z - top)) to probabilities
  float offset, offset_low;  // log probability = unit (z - top) + offset, to twice float's precision
  float threshold;          // an exponential below it is of a negligible probability

  FASTKD_INLINE bool identity() const { return softcap == 0 && sign == 1; }  // z is the logit
  FASTKD_INLINE V z(V logit) const { return softcap == 0 ? sign * logit : softcap * tanh(gain * logit); }
  // dz / dlogit, without the part of logit_scale that is in unit
  FASTKD_INLINE V slope(V z) const { return softcap == 0 ? sign : softcap * gain * (1 - (z * inverse_cap) * (z * inverse_cap)); }
};

// What is no token of a sparse teacher (topk.h).
struct Others {
  unsigned flags;       // of the statistics over events
  float origin;         // z of the largest token, to which those of events are relative
  float top, weight;    // exp(unit (z - top)) weight is a column's share of their probability
  bool are_event;       // the last one, with
  float z, log_p;
  float gradient;       // of a column's exponential
  bool no_events;
  bool teacher_is_silent, teacher_is_wrong;  // it names no token; one twice, or one that is none
  const char* log_probabilities;  // the teacher's, of the row
};

// What the label's token adds where it is compared apart: all 0 where it is one of many.
struct Apart {
  double phi, g, h;  // to the sums; g and h are its own derivatives too, by the student's logit and the teacher's
  double cost, share;  // -log q of the label at temperature 1, and what multiplies it
  double others;       // the student's probability of all others at temperature 1
};

// What the first phase finds. Exponentials and moments are relative to the tops; x is rate * (z - top), to base 2. Columns
// at a side's top are counted, and left out of the sums that its exponentials are in: beside them the others would be lost.
struct Statistics {
  float s_top, t_top;
  float s_low, t_low;  // the least z, of interest where a gradient takes logarithms that no sum has seen
  float s_sum, t_sum, s_sum_at_1, t_sum_at_1;
  float forward, reverse;  // sum of e_t (x_t - x_s), of e_s (x_s - x_t)
  float cross, entropy;    // sum of e_t x_s, of e_s x_s
  float spread;            // sum of z - pivot
  float s_tops, t_tops;    // columns at the tops
  float t_at, s_at;        // sum of x_t over the student's, of x_s over the teacher's
};

struct Sums {
  float phi, g;
};

// The column that a side is sure of, if it is.
struct Top {
  bool is;
  float z;          // NaN where it is not
  double rest;      // the sum of the others' exponentials
  double gap;       // tempered, the other side's logit there less its top
  float gradient;   // by the tempered logit
};

struct RowState {
  bool with_labels, log_0, finite;
  bool plain;  // both sides are bf16 logits as they are, at multiples of a piece
  unsigned flags;
  int64_t row, label;
  int left_out;  // the label's column of this block's slice, where it is compared apart; else NOWHERE
  float weight;
  float z_label, t_label, pivot;  // z of the label, the student's and the teacher's
  Side student, teacher;
  // log p - log q = ((t - t_origin) ratio - (s - s_origin)) student.unit + ratio_low + ratio_high
  float s_origin, t_origin, ratio, ratio_low, ratio_high;
  float plain_unit, plain_rate, plain_weight, plain_top;  // of the cross-entropy: the student at temperature 1
  float teacher_plain_unit, teacher_plain_rate;
  double distillation, phi, g;     // sums over the row
  double cross_entropy, entropy;
  float sum_g, sum_h;
  float distillation_factor, cross_entropy_factor, teacher_factor, uniform;
  Apart apart;
  Top s_sure, t_sure;
  float label_gradient, teacher_label_gradient;  // of the column left out
  Others others;
  Statistics statistics_of_all;  // of the whole row: merged, or given
  Sums sums_of_all;
};

FASTKD_INLINE float origin(float top) { return top == -INF ? 0 : top; }

// What has faded to nothing is 0, however far a maximum rose.
FASTKD_INLINE float faded(float fade, float moment) { return fade == 0 ? 0 : fade * moment; }

// Statistics relative to higher tops.
FASTKD_INLINE void raise(Statistics& a, float s_top, float t_top, const RowState& row) {
  if (s_top > a.s_top) {  // what was the top is one of the others
    a.s_sum += a.s_tops;
    a.s_sum_at_1 += a.s_tops;
    a.reverse -= a.t_at;
    a.s_tops = a.t_at = 0;
  }
  if (t_top > a.t_top) {
    a.t_sum += a.t_tops;
    a.t_sum_at_1 += a.t_tops;
    a.forward -= a.s_at;
    a.cross += a.s_at;
    a.t_tops = a.s_at = 0;
  }
  const float s_step = a.s_top == -INF ? 0 : (origin(s_top) - a.s_top) * row.student.rate;
  const float t_step = a.t_top == -INF ? 0 : (origin(t_top) - a.t_top) * row.teacher.rate;
  const float s_fade = a.s_top == -INF ? 0 : exp2_of(-s_step);
  const float t_fade = a.t_top == -INF ? 0 : exp2_of(-t_step);
  a.forward = faded(t_fade, a.forward + (s_step - t_step) * a.t_sum);
  a.reverse = faded(s_fade, a.reverse + (t_step - s_step) * a.s_sum);
  a.cross = faded(t_fade, a.cross - s_step * a.t_sum);
  a.entropy = faded(s_fade, a.entropy - s_step * a.s_sum);
  if (row.flags & AT_1) a.s_sum_at_1 *= a.s_top == -INF ? 0 : exp2_of((a.s_top - origin(s_top)) * row.plain_rate);
  if (row.flags & TEACHER_AT_1)
    a.t_sum_at_1 *= a.t_top == -INF ? 0 : exp2_of((a.t_top - origin(t_top)) * row.teacher_plain_rate);
  a.s_sum *= s_fade;
  a.t_sum *= t_fade;
  if (a.s_tops != 0) a.t_at -= t_step * a.s_tops;  // a step may be infinite
  if (a.t_tops != 0) a.s_at -= s_step * a.t_tops;
  a.s_top = s_top;
  a.t_top = t_top;
}

FASTKD_INLINE Statistics merge(Statistics a, Statistics b, const RowState& row) {
  const float s_top = fmaxf(a.s_top, b.s_top), t_top = fmaxf(a.t_top, b.t_top);
  raise(a, s_top, t_top, row);
  raise(b, s_top, t_top, row);
  a.s_sum += b.s_sum;
  a.t_sum += b.t_sum;
  a.s_sum_at_1 += b.s_sum_at_1;
  a.t_sum_at_1 += b.t_sum_at_1;
  a.forward += b.forward;
  a.reverse += b.reverse;
  a.cross += b.cross;
  a.entropy += b.entropy;
  a.spread += b.spread;
  a.s_tops += b.s_tops;
  a.t_tops += b.t_tops;
  a.t_at += b.t_at;
  a.s_at += b.s_at;
  a.s_low = fminf(a.s_low, b.s_low);
  a.t_low = fminf(a.t_low, b.t_low);
  return a;
}

FASTKD_INLINE Sums merge(Sums a, Sums b, const RowState&) { return {a.phi + b.phi, a.g + b.g}; }

FASTKD_INLINE bool label_is_apart(const Call& call) { return call.target != Target::none; }

FASTKD_INLINE bool needs_statistics(const Call& call, const RowState& row) {
  return call.normalized || row.with_labels || call.student_entropy || label_is_apart(call);
}

// ---- open

FASTKD_CALL void open_side(const Rows& rows, const Tempering& tempering, int64_t row, Side& side, float& weight) {
  side.threshold = side.top = 0;
  side.dtype = rows.dtype;
  side.softcap = float(tempering.softcap);
  side.gain = tempering.softcap == 0 ? 0 : float(tempering.logit_scale / tempering.softcap);
  side.inverse_cap = tempering.softcap == 0 ? 0 : float(1 / tempering.softcap);
  side.sign = tempering.logit_scale < 0 ? -1 : 1;
  side.temperature = tempering.per_row ? tempering.per_row[row] : float(tempering.temperature);
  if (!(side.temperature > 0)) {  // a number is valid where it is positive; anything else poisons the row
    weight = NAN;
    side.temperature = 1;
  }
  const float scale = tempering.softcap == 0 ? fabsf(float(tempering.logit_scale)) : 1;
  side.unit = scale / side.temperature;
  side.rate = float(side.unit * LOG2_E_EXACT);
}

// Of all columns, wherever these are (shard.h).
FASTKD_INLINE bool statistics_are_given(const Call& call) { return call.shard.step >= Step::sums; }

// Of a logit in device memory.
FASTKD_CALL float z_at(const Call& call, const Rows& rows, const Side& side, int64_t row, int64_t column) {
  return side.z(load_one(row_of(call, rows, row), rows.dtype, column));
}

FASTKD_INLINE float plain_unit(const Tempering& tempering) {
  return tempering.softcap == 0 ? fabsf(float(tempering.logit_scale)) : 1;
}

// Of the columns of this process.
FASTKD_INLINE bool label_is_here(const Call& call, const RowState& row) {
  return row.label >= 0 && row.label < call.vocabulary;
}

constexpr int NOWHERE = -1;

FASTKD_INLINE int left_out_of(const Call& call, const RowState& row, int rank) {
  const int64_t column = row.label - first_column(call, rank);
  return label_is_apart(call) && column >= 0 && column < columns_of(call, rank) ? int(column) : NOWHERE;
}

FASTKD_CALL void open_row(const Call& call, int64_t index, RowState& row) {
  row.flags = 0;
  row.log_0 = false;
  row.row = index;
  row.label = call.labels ? call.labels[index] : -1;
  row.weight = call.weight ? call.weight[index] : 1;
  row.with_labels = call.labels && (call.alpha < 1 || call.target == Target::label);
  row.phi = row.g = row.cross_entropy = row.entropy = 0;
  row.z_label = row.t_label = row.pivot = 0;
  row.apart = {};
  row.s_sure = row.t_sure = {false, NAN, 0, 0, 0};
  open_side(call.student, call.student_tempering, index, row.student, row.weight);
  open_side(call.teacher, call.teacher_tempering, index, row.teacher, row.weight);
  row.s_origin = row.t_origin = row.ratio_low = row.ratio_high = 0;
  row.ratio = row.teacher.unit / row.student.unit;
  row.plain_unit = plain_unit(call.student_tempering);
  row.plain_rate = float(row.plain_unit * LOG2_E_EXACT);
  row.teacher_plain_unit = plain_unit(call.teacher_tempering);
  row.teacher_plain_rate = float(row.teacher_plain_unit * LOG2_E_EXACT);
  if (row.with_labels || label_is_apart(call)) {
    if (row.label < 0 || row.label >= call.shard.total) {
      row.weight = NAN;
      row.label = 0;
    }
    row.label -= call.shard.first;  // of the columns that are here, if it is one
    const bool look = label_is_here(call, row) && !statistics_are_given(call);
    row.z_label = look ? z_at(call, call.student, row.student, index, row.label) : -INF;
    if (label_is_apart(call)) row.t_label = look ? z_at(call, call.teacher, row.teacher, index, row.label) : -INF;
    row.pivot = origin(row.z_label);
  }
  if (row.with_labels) {
    if (row.student.temperature != 1) row.flags |= AT_1;
    if (call.label_smoothing > 0) row.flags |= SPREAD;
  }
  if (call.target == Target::label && row.teacher.temperature != 1) row.flags |= TEACHER_AT_1;
  if (call.closed_form) {
    if (call.forward != 0) row.flags |= FORWARD;
    if (call.reverse != 0) row.flags |= REVERSE;
    if (call.cross != 0) row.flags |= CROSS;
  }
  if (call.student_entropy) row.flags |= ENTROPY;
  if (call.watches_lows) row.flags |= LOWS;
}

// ---- statistics

// x[k] = f(x[k], y[k]) one after the other, once in the code and not VECTOR times: for what is seldom and long. The
// vectors turn, as an index that is not known when compiling would move them out of registers.
FASTKD_INLINE void push(V (&x)[VECTOR], V last) {
  for (int k = 1; k < VECTOR; ++k) x[k - 1] = x[k];
  x[VECTOR - 1] = last;
}

template <class Function>
FASTKD_INLINE void turn(V (&x)[VECTOR], V (&y)[VECTOR], Function f) {
#pragma unroll 1
  for (int turns = 0; turns < VECTOR; ++turns) {
    push(x, f(x[0], y[0]));
    push(y, y[0]);
  }
}

FASTKD_INLINE void adjust(V (&z)[VECTOR], const Side& side) {
#pragma unroll 1
  for (int turns = 0; turns < VECTOR; ++turns) push(z, side.z(z[0]));
}

// A vector of which n columns are there, one of them, perhaps, the column left out; and one of a row that is plain, about
// which nothing is left to decide.
struct SomeVector {
  static constexpr bool plain = false;
  int n, seat;

  FASTKD_INLINE bool leaves_out() const { return seat >= 0 && seat < VECTOR; }
  FASTKD_INLINE SomeVector rest() const { return {leaves_out() ? n - 1 : n, seat}; }
};
struct PlainVector {
  static constexpr bool plain = true;
  static constexpr int n = VECTOR;

  static FASTKD_INLINE PlainVector rest() { return {}; }
};

// f(first column, vector) of a thread's vectors in a range.
template <bool MAY_BE_PLAIN, class Function>
FASTKD_INLINE void each_vector(const Call& call, const RowState& row, Place place, Range range, Function f) {
  const int left_out = row.left_out;
  int first = range.first + place.thread * VECTOR;
  if (MAY_BE_PLAIN && row.plain)
#pragma unroll 1
    for (; first + VECTOR <= range.last && unsigned(left_out - first) >= VECTOR; first += call.threads * VECTOR)
      f(first, PlainVector{});
#pragma unroll 1
  for (; first < range.last; first += call.threads * VECTOR)
    f(first, SomeVector{range.last - first < VECTOR ? range.last - first : VECTOR, left_out - first});
}

// z of a vector; columns past n repeat the first, whose numbers they do not change.
template <class Vector>
FASTKD_INLINE void load_z(const char* shared, const Side& side, int first, Vector vector, V (&z)[VECTOR]) {
  if constexpr (Vector::plain) return load_bf16(shared + int64_t(first) * 2, z);
  load(shared, side.dtype, first, z);
  if (!side.identity()) adjust(z, side);
  for (int k = 1; k < VECTOR; ++k) z[k] = k < vector.n ? z[k] : z[0];
}

// z of the columns that sums are over: those after the one left out close ranks, and there is padding for one more.
FASTKD_INLINE void leave_out(SomeVector vector, V (&z)[VECTOR]) {
  if (!vector.leaves_out()) return;
  for (int k = 0; k + 1 < VECTOR; ++k) z[k] = k < vector.seat ? z[k] : z[k + 1];
  for (int k = 1; k < VECTOR; ++k) z[k] = k < vector.n - 1 ? z[k] : z[0];
}
FASTKD_INLINE void leave_out(PlainVector, V (&)[VECTOR]) {}

// f(vector, s, t) of a thread's vectors in a range, without the column left out.
template <bool MAY_BE_PLAIN, class Function>
FASTKD_INLINE void each_vector_of_sums(const Call& call, const RowState& row, Place place, Range range,
                                       const char* student, const char* teacher, Function f) {
  each_vector<MAY_BE_PLAIN>(call, row, place, range, [&](int first, auto vector) {
    if (vector.rest().n == 0) return;
    V s[VECTOR], t[VECTOR];
    load_z(student, row.student, first, vector, s);
    load_z(teacher, row.teacher, first, vector, t);
    leave_out(vector, s);
    leave_out(vector, t);
    f(vector.rest(), s, t);
  });
}

template <int N>
FASTKD_INLINE float highest(const V (&z)[N]) {
  float top = z[0];
  for (int k = 1; k < N; ++k) top = fmaxf(top, z[k]);
  return top;
}

// With LOG_0, a probability of (almost) 0 silences its term, whatever the other factor is. APART, where probabilities are
// not known yet, a logarithm of 0 does.
template <bool LOG_0, bool APART>
FASTKD_INLINE V times(V e, V x, float threshold) {
  if (APART) return finite(x) ? e * x : 0;
  return LOG_0 ? (e > threshold ? e * x : 0) : e * x;
}

// Of the first n of N columns.
template <bool LOG_0, bool APART = false, int N>
FASTKD_INLINE void add_vector(Statistics& a, const V (&s)[N], const V (&t)[N], int n, const RowState& row) {
  const float s_highest = highest(s), t_highest = highest(t);
  const float s_top = fmaxf(a.s_top, s_highest), t_top = fmaxf(a.t_top, t_highest);
  if (s_top > a.s_top || t_top > a.t_top) raise(a, s_top, t_top, row);
  const float s_origin = origin(s_top), t_origin = origin(t_top);
  V x_s[N], x_t[N], e_s[N], e_t[N];
  float s_sum = 0, t_sum = 0;
  for (int k = 0; k < N; ++k) {
    x_s[k] = product(s[k] - s_origin, row.student.rate);
    x_t[k] = product(t[k] - t_origin, row.teacher.rate);
    e_s[k] = k < n ? exp2_of(x_s[k]) : 0;
    e_t[k] = k < n ? exp2_of(x_t[k]) : 0;
  }
  const auto counted = [](float x) { return APART && !finite(x) ? 0 : x; };
  const bool with_s_top = s_highest == s_top && finite(s_top), with_t_top = t_highest == t_top && finite(t_top);
  if (with_s_top || with_t_top)
    for (int k = 0; k < N; ++k) {
      if (with_s_top && k < n && s[k] == s_top) a.s_tops += 1, a.t_at += counted(x_t[k]), e_s[k] = 0;
      if (with_t_top && k < n && t[k] == t_top) a.t_tops += 1, a.s_at += counted(x_s[k]), e_t[k] = 0;
    }
  for (int k = 0; k < N; ++k) {
    s_sum += e_s[k];
    t_sum += e_t[k];
  }
  a.s_sum += s_sum;
  a.t_sum += t_sum;
  auto add = [&](float& moment, auto term) {
    float sum = 0;
    for (int k = 0; k < N; ++k) sum += term(k);
    moment += sum;
  };
  const float s_low = row.student.threshold, t_low = row.teacher.threshold;
  if (row.flags & FORWARD) add(a.forward, [&](int k) { return times<LOG_0, APART>(e_t[k], x_t[k] - x_s[k], t_low); });
  if (row.flags & REVERSE) add(a.reverse, [&](int k) { return times<LOG_0, APART>(e_s[k], x_s[k] - x_t[k], s_low); });
  if (row.flags & CROSS) add(a.cross, [&](int k) { return times<LOG_0, APART>(e_t[k], x_s[k], t_low); });
  if (row.flags & ENTROPY) add(a.entropy, [&](int k) { return times<LOG_0, APART>(e_s[k], x_s[k], s_low); });
  if (row.flags & AT_1)
    add(a.s_sum_at_1, [&](int k) { return k < n && !(with_s_top && s[k] == s_top) ? exp2_of((s[k] - s_origin) * row.plain_rate) : 0; });
  if (row.flags & TEACHER_AT_1)
    add(a.t_sum_at_1, [&](int k) { return k < n && !(with_t_top && t[k] == t_top) ? exp2_of((t[k] - t_origin) * row.teacher_plain_rate) : 0; });
  if (row.flags & LOWS)
    for (int k = 0; k < N; ++k) {
      a.s_low = fminf(a.s_low, s[k]);
      a.t_low = fminf(a.t_low, t[k]);
    }
  if (row.flags & SPREAD) add(a.spread, [&](int k) { return k < n ? s[k] - row.pivot : 0; });
}

// Of nothing yet. With LOG_0 the tops are known from the first attempt, and do not rise.
template <bool LOG_0>
FASTKD_INLINE Statistics no_statistics(const RowState& row) {
  return {LOG_0 ? row.student.top : -INF, LOG_0 ? row.teacher.top : -INF, INF, INF};
}

// Of a thread's vectors in a range.
template <bool LOG_0>
FASTKD_INLINE void add_statistics(Statistics& mine, const Call& call, const RowState& row, Place place, Range range,
                                  const char* student, const char* teacher) {
  each_vector_of_sums<!LOG_0>(call, row, place, range, student, teacher, [&](auto vector, const auto& s, const auto& t) {
    add_vector<LOG_0>(mine, s, t, vector.n, row);
  });
}

// In doubles, and once in a kernel's code each: what runs once a row is worth no copy at every place that needs it.
FASTKD_CALL double exponential(double x) { return ::exp(x); }
FASTKD_CALL double logarithm(double x) { return ::log(x); }
FASTKD_CALL double logarithm_of_1_and(double x) { return ::log1p(x); }
FASTKD_INLINE double log_of_sum(double rest, double tops) { return logarithm_of_1_and(rest + (tops - 1)); }

FASTKD_CALL void close_side(Side& side, float top, double rest, double tops) {
  const double sum = rest + tops, offset = -log_of_sum(rest, tops);
  side.top = origin(top);
  side.weight = float(1 / sum);
  side.threshold = float(NEGLIGIBLE * sum);
  side.offset = float(offset);
  side.offset_low = finite(side.offset) ? float(offset - side.offset) : 0;
}

// Where the log-sum-exps of two rows are closer than this, s - t is the most exact way to log q - log p.
constexpr double CLOSE_LOGITS = 8;

// How log p - log q is made: of the difference of two logits. The origins are 0 where that is more exact.
FASTKD_INLINE void close_ratio(RowState& row, double log_quotient) {
  const double unit = row.student.unit;
  const double apart = (double(row.student.top) - row.teacher.top) * unit + log_quotient;
  const bool close = row.student.unit == row.teacher.unit && fabs(apart) < CLOSE_LOGITS;
  row.s_origin = close ? 0 : row.student.top;
  row.t_origin = close ? 0 : row.teacher.top;
  row.ratio = float(row.teacher.unit / unit);
  const double offset = close ? apart : log_quotient;
  row.ratio_high = float(offset);
  row.ratio_low = finite(row.ratio_high) ? float(offset - row.ratio_high) : 0;
}

// Where a side is sure of a column, its probability more than 1/2, the column's own gradient would be a difference of two
// numbers of its size, x_a - q_a sum x. It is x_a (1 - q_a) - q_a times the sum of the others', and known from the moments
// where there is a closed form; else close_sums finds it.
FASTKD_CALL void close_tops(const Call& call, RowState& row) {
  const Statistics& all = row.statistics_of_all;
  const auto sure = [&](float tops, float rest) { return tops == 1 && rest < 1 && !label_is_apart(call) && call.normalized; };
  Top &s = row.s_sure, &t = row.t_sure;
  s = {sure(all.s_tops, all.s_sum), 0, all.s_sum, LN_2_EXACT * all.t_at, 0};
  t = {sure(all.t_tops, all.t_sum), 0, all.t_sum, LN_2_EXACT * all.s_at, 0};
  s.z = s.is ? all.s_top : NAN;
  t.z = t.is ? all.t_top : NAN;
  if (!call.closed_form) return;
  const double s_sum = 1 + s.rest, t_sum = 1 + t.rest, ahead = call.forward + call.cross;
  const bool same = s.is && t.is && s.gap == 0 && t.gap == 0;
  const auto apart = [&](const Top& mine, double other_rest, double other_sum) {
    const double sum = 1 + mine.rest;
    return same ? other_rest / other_sum - mine.rest / sum : 1 / sum - exponential(mine.gap) / other_sum;
  };
  if (s.is) {
    double gradient = 0;
    if (ahead != 0) gradient += ahead * apart(s, t.rest, t.rest + all.t_tops);
    if (call.reverse != 0) gradient -= call.reverse * (s.gap * s.rest + LN_2_EXACT * all.reverse) / s_sum / s_sum;
    s.gradient = float(gradient);
  }
  if (t.is) {
    double gradient = 0;
    if (call.reverse != 0) gradient += call.reverse * apart(t, s.rest, s.rest + all.s_tops);
    if (call.forward != 0) gradient -= call.forward * (t.gap * t.rest + LN_2_EXACT * all.forward) / t_sum / t_sum;
    if (call.cross != 0) gradient -= call.cross * (t.gap * t.rest - LN_2_EXACT * all.cross) / t_sum / t_sum;
    t.gradient = float(gradient);
  }
  if (!finite(float(row.phi) + s.gradient)) s.z = NAN;
  if (!finite(float(row.phi) + t.gradient)) t.z = NAN;
}

// After the first phase, from the statistics of the whole row. They are in shared memory: passed by reference from
// registers, they would go by way of a stack in device memory.
FASTKD_CALL void close_statistics(const Call& call, RowState& row) {
  const Statistics& all = row.statistics_of_all;
  close_side(row.student, all.s_top, all.s_sum, all.s_tops);
  close_side(row.teacher, all.t_top, all.t_sum, all.t_tops);
  const double s_log_sum = log_of_sum(all.s_sum, all.s_tops), t_log_sum = log_of_sum(all.t_sum, all.t_tops);
  const double s_inverse = 1 / (double(all.s_sum) + all.s_tops), t_inverse = 1 / (double(all.t_sum) + all.t_tops);
  const double all_forward = double(all.forward) - all.s_at, all_reverse = double(all.reverse) - all.t_at;
  const double all_cross = double(all.cross) + all.s_at;
  row.entropy = row.flags & ENTROPY ? s_log_sum - LN_2_EXACT * all.entropy * s_inverse : 0;
  double plain_log_sum = s_log_sum;
  row.plain_weight = row.student.weight;
  row.plain_top = row.student.top;
  if (row.flags & AT_1) {
    plain_log_sum = log_of_sum(all.s_sum_at_1, all.s_tops);
    row.plain_weight = float(1 / (double(all.s_sum_at_1) + all.s_tops));
  }
  row.cross_entropy = 0;
  if (row.with_labels) {
    const double smoothing = call.label_smoothing, unit = row.plain_unit, top = row.student.top;
    double target = (1 - smoothing) * (double(row.z_label) - top);
    if (smoothing > 0) target += smoothing * (double(all.spread) / double(call.shard.total) + row.pivot - top);
    row.cross_entropy = plain_log_sum - target * unit;
  }
  row.phi = row.g = 0;
  // A moment that no flag asked for moves with the tops all the same, and means nothing.
  const double quotient = s_log_sum - t_log_sum;
  close_ratio(row, quotient);
  if (row.flags & FORWARD) row.phi += call.forward * (LN_2_EXACT * all_forward * t_inverse + quotient), row.g -= call.forward;
  if (row.flags & REVERSE) {
    const double reverse = LN_2_EXACT * all_reverse * s_inverse - quotient;
    row.phi += call.reverse * reverse;
    row.g += call.reverse * (reverse + 1);
  }
  if (row.flags & CROSS) row.phi += call.cross * (s_log_sum - LN_2_EXACT * all_cross * t_inverse), row.g -= call.cross;
  close_tops(call, row);
  // A moment that fades to nothing takes its NaN along: whether a logarithm overflows is asked of the logits themselves.
  const bool overflows = (row.flags & LOWS) && ((all.s_low - row.student.top) * row.student.rate == -INF ||
                                                (all.t_low - row.teacher.top) * row.teacher.rate == -INF);
  row.finite = row.log_0 || (!overflows && finite(float(row.phi) + float(row.entropy)));
  // NaN or +inf is among the logits; a comparison in a definition may lose it. The label's logits may be in neither sum.
  const double log_sums = s_log_sum + t_log_sum;
  const bool infinite = all.s_top == INF || all.t_top == INF || (label_is_apart(call) && (row.z_label == INF || row.t_label == INF));
  if (call.normalized && call.alpha != 0 && (infinite || log_sums != log_sums)) row.weight = NAN;
}

FASTKD_CALL double sigmoid(double x) { return 1 / (1 + exponential(-x)); }
FASTKD_CALL double softplus(double x) { return (x > 0 ? x : 0) + logarithm_of_1_and(exponential(x > 0 ? -x : x)); }

// What the label adds, given the sums of the others' exponentials: fastkd/backends/reference.py, _apart. a and b are the log-odds
// of the label against all others, the teacher's and the student's.
FASTKD_CALL void close_label(const Call& call, RowState& row, float s_sum, float t_sum, float s_sum_at_1, float t_sum_at_1) {
  const double s_gap = double(row.z_label) - row.student.top, t_gap = double(row.t_label) - row.teacher.top;
  const double a = t_gap * row.teacher.unit - logarithm(double(t_sum));
  const double b = s_gap * row.student.unit - logarithm(double(s_sum));
  const double p = sigmoid(a), p_rest = sigmoid(-a), q = sigmoid(b), q_rest = sigmoid(-b);
  const double cost = softplus(-b), cost_of_rest = softplus(b), weight = call.target_weight;
  const auto term = [](double factor, double gap) { return factor < NEGLIGIBLE ? 0 : factor * gap; };
  row.entropy = term(q, cost) + term(q_rest, cost_of_rest) + q_rest * row.entropy;
  if (call.target == Target::binary) {
    row.apart.phi = term(weight, term(p, cost - softplus(-a)) + term(p_rest, cost_of_rest - softplus(a)));
    row.apart.g = weight * (b > 0 ? p_rest - q_rest : q - p);  // near 1 both have lost their digits
    row.apart.h = term(weight, term(p * p_rest, a - b));
  } else {
    const double sum = row.flags & TEACHER_AT_1 ? t_sum_at_1 : t_sum;
    row.apart.share = weight * sigmoid(t_gap * row.teacher_plain_unit - logarithm(sum));
  }
  if (!row.with_labels) return;
  const double sum = row.flags & AT_1 ? s_sum_at_1 : s_sum, b_at_1 = s_gap * row.plain_unit - logarithm(sum);
  row.apart.cost = softplus(-b_at_1);
  row.apart.others = sigmoid(-b_at_1);
  row.cross_entropy += softplus(b_at_1);  // its normaliser was that of the others
  row.plain_weight = float(row.apart.others / sum);
}

// ---- the divergence

// Whichever the call has: for a few columns, which are not worth a kernel for each divergence.
struct Any {
  static constexpr bool always_normalized = true;
};

struct Terms {
  V phi, g, h;
};

// A call, as all the definitions are in it.
FASTKD_CALL Terms any_terms(const Call& call, V p, V q, V log_p, V log_q, V log_ratio) {
  Terms terms{};
  int number = 0;
#define FASTKD_CASE(name)        \
  if (call.divergence == number++) \
    name::eval(p, q, log_p, log_q, log_ratio, call.params, float(call.degree), terms.phi, terms.g, terms.h);
  FASTKD_DIVERGENCES(FASTKD_CASE)
#undef FASTKD_CASE
  return terms;
}

template <class Divergence>
FASTKD_INLINE bool is_normalized(const Call& call) {
  return Divergence::always_normalized || call.normalized;
}

template <class Divergence>
FASTKD_INLINE void define(const Call& call, V p, V q, V log_p, V log_q, V log_ratio, V& phi, V& g, V& h) {
  const float degree = float(call.degree);
  if constexpr (std::is_same<Divergence, Any>::value) {
    const Terms terms = any_terms(call, p, q, log_p, log_q, log_ratio);
    phi = terms.phi, g = terms.g, h = terms.h;
  } else {
    Divergence::eval(p, q, log_p, log_q, log_ratio, call.params, degree, phi, g, h);
  }
}

// phi, g and h of one column, with the policy of fastkd/backends/reference.py for log 0 where LOG_0.
template <class Divergence, bool LOG_0>
FASTKD_INLINE void settle(const Call& call, V p, V q, V log_p, V log_q, V log_ratio, V& phi, V& g, V& h) {
  if (!LOG_0) return define<Divergence>(call, p, q, log_p, log_q, log_ratio, phi, g, h);
  const bool p_gone = log_p == -INF, q_gone = log_q == -INF;
  const V x = p_gone ? LOWEST : log_p, y = q_gone ? LOWEST : log_q;
  define<Divergence>(call, p, q, x, y, p_gone || q_gone ? x - y : log_ratio, phi, g, h);
  const bool one_side = p_gone != q_gone;
  const bool nothing = (p_gone && q < NEGLIGIBLE) || (q_gone && p < NEGLIGIBLE) || (p_gone && q_gone);
  auto settled = [&](V term) { return nothing ? 0 : one_side && abs(term) > INFINITE ? term * INF : term; };
  phi = settled(phi);
  g = settled(g);
  h = settled(h);
}

template <class Divergence, bool LOG_0>
FASTKD_INLINE void evaluate(const Call& call, const RowState& row, V s, V t, V& p, V& q, V& phi, V& g, V& h) {
  V log_p = product(t, row.teacher.unit), log_q = product(s, row.student.unit);
  V log_ratio = product(product(t, row.ratio) - s, row.student.unit);
  p = q = 1;
  if (is_normalized<Divergence>(call)) {
    const V x_s = product(s - row.student.top, row.student.rate), x_t = product(t - row.teacher.top, row.teacher.rate);
    p = exp2_of(x_t) * row.teacher.weight;
    q = exp2_of(x_s) * row.student.weight;
    log_p = fmaf(x_t, LN_2, row.teacher.offset_low) + row.teacher.offset;
    log_q = fmaf(x_s, LN_2, row.student.offset_low) + row.student.offset;
    const V gap = product(t - row.t_origin, row.ratio) - (s - row.s_origin);
    log_ratio = fmaf(gap, row.student.unit, row.ratio_low) + row.ratio_high;
  }
  settle<Divergence, LOG_0>(call, p, q, log_p, log_q, log_ratio, phi, g, h);
}

// f(k, s[k], t[k]) of a vector's columns. The code has a copy for each of them or, where SELDOM, for two, and the vectors
// turn. Unrolling is asked for: the compiler leaves a long definition in a loop, which indexes its vectors by a number
// that is not known when compiling, and so moves them out of registers.
template <bool SELDOM, class Function>
FASTKD_INLINE void each_column(V (&s)[VECTOR], V (&t)[VECTOR], Function f) {
  if constexpr (SELDOM) {
#pragma unroll 2
    for (int k = 0; k < VECTOR; ++k) {
      f(k, s[0], t[0]);
      push(s, s[0]);
      push(t, t[0]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) f(k, s[k], t[k]);
  }
}

// ---- sums

template <class Divergence, bool LOG_0>
FASTKD_INLINE void add_sums(Sums& mine, const Call& call, const RowState& row, Place place, Range range,
                            const char* student, const char* teacher) {
  each_vector_of_sums<!LOG_0>(call, row, place, range, student, teacher, [&](auto vector, auto& s, auto& t) {
    V p, q, phi, g, h;
    Sums part{0, 0};
    each_column<LOG_0>(s, t, [&](int k, V s_k, V t_k) {
      evaluate<Divergence, LOG_0>(call, row, s_k, t_k, p, q, phi, g, h);
      const bool counts = k < vector.n && s_k != row.s_sure.z && t_k != row.t_sure.z;
      part.phi += counts ? phi : 0;
      part.g += counts ? g : 0;
    });
    mine = merge(mine, part, row);
  });
}

// Of a sure column.
template <class Divergence>
FASTKD_CALL Terms terms_of_top(const Call& call, double log_p, double log_q, double log_ratio) {
  Terms terms;
  settle<Divergence, true>(call, float(exponential(log_p)), float(exponential(log_q)), float(log_p), float(log_q),
                           float(log_ratio), terms.phi, terms.g, terms.h);
  return terms;
}

// What the sure columns add to the sums of the others, and their own gradients.
template <class Divergence>
FASTKD_CALL void add_tops(const Call& call, RowState& row) {
  Top &s = row.s_sure, &t = row.t_sure;
  const double s_log_sum = log_of_sum(s.rest, 1), t_log_sum = log_of_sum(t.rest, 1);
  // Of a side that is not sure, the logarithm of the sum is in the offset.
  const double log_q_top = s.is ? -s_log_sum : double(row.student.offset) + row.student.offset_low;
  const double log_p_top = t.is ? -t_log_sum : double(row.teacher.offset) + row.teacher.offset_low;
  const bool same = s.is && t.is && s.gap == 0 && t.gap == 0;
  double g = row.g, h = call.degree * row.phi - row.g;  // of all columns but the sure one of that side
  const double log_ratio = log_p_top - log_q_top;
  Terms of_s{}, of_t{};  // of the student's column; of the teacher's, where that is another
  if (s.is) of_s = terms_of_top<Divergence>(call, s.gap + log_p_top, log_q_top, s.gap + log_ratio);
  if (t.is && !same) of_t = terms_of_top<Divergence>(call, log_p_top, t.gap + log_q_top, log_ratio - t.gap);
  row.phi += double(of_s.phi) + of_t.phi;
  row.g += double(of_s.g) + of_t.g;
  if (s.is) s.gradient = float((of_s.g * s.rest - (g + of_t.g)) / (1 + s.rest));
  if (t.is) t.gradient = float((same ? of_s.h * t.rest - h : of_t.h * t.rest - (h + of_s.h)) / (1 + t.rest));
  if (!finite(float(row.phi) + s.gradient)) s.z = NAN;
  if (!finite(float(row.phi) + t.gradient)) t.z = NAN;
}

template <class Divergence>
FASTKD_INLINE void close_sums(const Call& call, RowState& row, Sums all) {
  row.phi = all.phi;
  row.g = all.g;
  if (call.shard.step != Step::sums && (row.s_sure.is || row.t_sure.is)) add_tops<Divergence>(call, row);
  row.finite = row.log_0 || finite(float(row.phi) + float(row.g));
}

// ---- the value of the row, and what its gradients are multiplied by

FASTKD_CALL void finish(const Call& call, RowState& row, int rank) {
  const double temperature = row.student.temperature;
  const double square = call.scale_by_temperature ? temperature * temperature : 1;
  const Apart& apart = row.apart;
  const double h = call.degree * row.phi - row.g + apart.h;
  row.phi += apart.phi;
  row.g += apart.g;
  double distillation = row.phi * square;
  if (apart.share != 0) distillation += apart.share * apart.cost;
  if (call.alpha == 1) row.cross_entropy = 0;
  double loss = call.alpha == 0 ? 0 : call.alpha * distillation;
  if (row.with_labels) loss += (1 - call.alpha) * row.cross_entropy;
  if (rank == 0) {
    call.loss[row.row] = float(loss * row.weight);
    if (call.distillation) call.distillation[row.row] = float(distillation);
    if (call.cross_entropy) call.cross_entropy[row.row] = float(row.cross_entropy);
    if (call.student_entropy) call.student_entropy[row.row] = float(row.entropy);
  }
  const double scale = row.weight * call.scale * (call.scale_on_device ? *call.scale_on_device : 1);
  row.sum_g = float(row.g);
  row.sum_h = float(h);
  row.distillation_factor = float(call.alpha * square * scale * row.student.unit);
  row.teacher_factor = float(call.alpha * square * scale * row.teacher.unit);
  // Of -log q, the cross-entropy's and the divergence's; smoothing is of the former alone.
  const double of_labels = 1 - call.alpha, of_both = of_labels + (call.alpha == 0 ? 0 : call.alpha * apart.share);
  const double uniform = call.label_smoothing / double(call.shard.total);
  row.cross_entropy_factor = float(of_both * scale * row.plain_unit);
  row.uniform = float(apart.share != 0 ? uniform * of_labels / of_both : uniform);
  if (!label_is_apart(call)) return;
  double out = call.alpha == 0 ? 0 : apart.g * call.alpha * square * scale * row.student.unit;
  if (row.with_labels)
    out += (of_labels * (call.label_smoothing - uniform) - of_both * apart.others) * scale * row.plain_unit;
  const double teacher_out = call.alpha == 0 ? 0 : apart.h * call.alpha * square * scale * row.teacher.unit;
  row.label_gradient = float(out) * row.student.slope(row.z_label);
  row.teacher_label_gradient = float(teacher_out) * row.teacher.slope(row.t_label);
}

// Whether a row counts. One that does not is not read.
FASTKD_INLINE bool counts(const Call& call, int64_t row) {
  return !(call.labels && call.labels[row] == call.ignore_index) && !(call.weight && call.weight[row] == 0);
}

FASTKD_CALL void drop(const Call& call, int64_t row, Place place) {
  if (call.shard.step == Step::statistics || call.shard.step == Step::sums) return;
  clear(call, place, call.student_gradient, row, false);
  clear(call, place, call.teacher_gradient, row, false);
  if (place.rank != 0 || place.thread != 0) return;
  for (float* out : {call.loss, call.distillation, call.cross_entropy, call.student_entropy})
    if (out) out[row] = 0;
}

// ---- gradient

FASTKD_INLINE V cross_entropy_gradient(const Call& call, const RowState& row, V z, int64_t column) {
  const V x = (z - row.plain_top) * row.plain_rate;
  const V target = row.uniform + (column == row.label ? 1 - float(call.label_smoothing) : 0);
  return (exp2_of(x) * row.plain_weight - target) * row.cross_entropy_factor;
}

// The gradient of the column left out is its own.
FASTKD_INLINE void put_back(SomeVector vector, V (&x)[VECTOR], float value) {
  for (int k = 0; k < VECTOR; ++k) x[k] = k == vector.seat ? value : x[k];
}
FASTKD_INLINE void put_back(PlainVector, V (&)[VECTOR], float) {}

template <class Vector>
FASTKD_INLINE void store(char* memory, Dtype dtype, int first, Vector vector, const V (&x)[VECTOR]) {
  if constexpr (Vector::plain) return store_bf16(memory + int64_t(first) * 2, x);
  store(memory, dtype, first, EVERY >> (VECTOR - vector.n), x);
}

// The gradients of a thread's vectors in a range, of the slice at `student` and `teacher` in shared memory. Each goes to
// the address given: the slice's place in device memory, or the logits' own in shared memory, whence copy_out takes it.
template <class Divergence, bool LOG_0>
FASTKD_INLINE void gradients(const Call& call, const RowState& row, Place place, Range range, const char* student,
                             const char* teacher, char* student_gradient, char* teacher_gradient) {
  const int64_t start = first_column(call, place.rank);
  each_vector<!LOG_0>(call, row, place, range, [&](int first, auto vector) {
    V s[VECTOR], t[VECTOR], out[VECTOR] = {}, teacher_out[VECTOR] = {}, p, q, phi, g, h;
    load_z(student, row.student, first, vector, s);
    load_z(teacher, row.teacher, first, vector, t);
    const auto of_student = [&](V z) {
      const V x = is_normalized<Divergence>(call) ? g - q * row.sum_g : g;
      return (z == row.s_sure.z ? row.s_sure.gradient : x) * row.distillation_factor;
    };
    const auto of_teacher = [&](V z) {
      const V x = is_normalized<Divergence>(call) ? h - p * row.sum_h : h;
      return (z == row.t_sure.z ? row.t_sure.gradient : x) * row.teacher_factor;
    };
    constexpr bool seldom = LOG_0 || !decltype(vector)::plain;
    // Two loops: a branch in each column would cost more than it saves.
    if (call.alpha != 0 && (LOG_0 || teacher_gradient))
      each_column<seldom>(s, t, [&](int k, V s_k, V t_k) {
        evaluate<Divergence, LOG_0>(call, row, s_k, t_k, p, q, phi, g, h);
        if constexpr (seldom)
          push(out, of_student(s_k)), push(teacher_out, of_teacher(t_k));
        else
          out[k] = of_student(s_k), teacher_out[k] = of_teacher(t_k);
      });
    else if (call.alpha != 0)
      each_column<false>(s, t, [&](int k, V s_k, V t_k) {
        evaluate<Divergence, LOG_0>(call, row, s_k, t_k, p, q, phi, g, h);
        out[k] = of_student(s_k);
      });
    if (row.with_labels)
      for (int k = 0; k < VECTOR; ++k) out[k] += cross_entropy_gradient(call, row, s[k], start + first + k);
    if (student_gradient) {
      if (!vector.plain && !row.student.identity()) turn(out, s, [&](V g, V z) { return g * row.student.slope(z); });
      put_back(vector, out, row.label_gradient);
      store(student_gradient, row.student.dtype, first, vector, out);
    }
    if (teacher_gradient) {
      if (!vector.plain && !row.teacher.identity())
        turn(teacher_out, t, [&](V h, V z) { return h * row.teacher.slope(z); });
      put_back(vector, teacher_out, row.teacher_label_gradient);
      store(teacher_gradient, row.teacher.dtype, first, vector, teacher_out);
    }
  });
}

// ---- on the host, before a launch

// Fills in what depends on the whole call; false where a row is too wide to stay on chip.
inline bool prepare(Call& call) {
#define FASTKD_USES_LOGS(name) name::gradient_uses_logs,
  constexpr bool uses_logs[] = {FASTKD_DIVERGENCES(FASTKD_USES_LOGS)};
#undef FASTKD_USES_LOGS
  const bool logs = call.teacher_gradient.data || (call.student_gradient.data && uses_logs[call.divergence]);
  if (call.ids && call.tail == Tail::truncate) call.closed_form = false;  // its sums are over a part of the row
  if (call.shard.step == Step::results && !call.student_gradient.data && !call.teacher_gradient.data)
    call.vocabulary = 0;  // all else is known
  call.watches_lows = call.closed_form && (logs || call.shard.step != Step::all);
  return plan(call);
}

}  // namespace fastkd::cuda
