// How a thread walks through its columns.
#pragma once
#include "open.h"

namespace fastkd::cuda {

// Moves x one lane down and appends a last element. Loops that use it keep one copy of a long computation in the code
// rather than VECTOR copies; indexing by a variable instead would move the vectors out of registers.
FASTKD_INLINE void shift_in(V (&x)[VECTOR], V last) {
  for (int k = 1; k < VECTOR; ++k) x[k - 1] = x[k];
  x[VECTOR - 1] = last;
}

// x[k] = f(x[k], y[k]), with one copy of f in the code.
template <class Function>
FASTKD_INLINE void transform_each(V (&x)[VECTOR], V (&y)[VECTOR], Function f) {
#pragma unroll 1
  for (int turn = 0; turn < VECTOR; ++turn) {
    shift_in(x, f(x[0], y[0]));
    shift_in(y, y[0]);
  }
}

FASTKD_INLINE void logits_to_z(V (&z)[VECTOR], const Side& side) {
#pragma unroll 1
  for (int turn = 0; turn < VECTOR; ++turn) shift_in(z, side.z(z[0]));
}

// A vector of which n columns exist. `lane` is the label's column if there is a label term, and may be outside the
// vector.
struct PartialVector {
  static constexpr Vectors kind = Vectors::any;
  int n, lane;

  FASTKD_INLINE bool has_label() const { return lane >= 0 && lane < n; }
  FASTKD_INLINE PartialVector rest() const { return {has_label() ? n - 1 : n, lane}; }
};
// A whole vector without the label's column, at a multiple of PIECE: nothing but perhaps the dtype is left to decide at
// run time.
template <Vectors KIND>
struct WholeVector {
  static constexpr Vectors kind = KIND;
  static constexpr int n = VECTOR;

  static FASTKD_INLINE WholeVector rest() { return {}; }
};
template <class Vector>
constexpr bool is_whole = Vector::kind != Vectors::any;

// Calls f(first column, vector) for this thread's vectors in a range.
template <bool MAY_BE_WHOLE, class Function>
FASTKD_INLINE void each_vector(const Call& call, const RowState& row, Place place, Range range, Function f) {
  if (range.first >= range.last) return;
  const int label_column = row.label_column, step = call.threads * VECTOR;  // a power of 2
  const Vectors vectors = MAY_BE_WHOLE ? row.vectors : Vectors::any;
  int first = (range.first ? range.first : -row.shift) + place.thread * VECTOR;  // before 0, columns do not exist
#pragma unroll 1
  while (first < range.last) {
    if (MAY_BE_WHOLE && vectors != Vectors::any && first >= 0) {
      // Whole vectors begin before `end`: this is where the label's vector or the last columns are.
      const int to_label = label_column - first, last = range.last - VECTOR + 1;
      const int label_vector = first + (to_label & -step);
      const bool has_label = to_label >= 0 && (to_label & (step - 1)) < VECTOR && label_vector < last;
      const int end = has_label ? label_vector : last;
      if (vectors == Vectors::bf16)
#pragma unroll 1
        for (; first < end; first += step) f(first, WholeVector<Vectors::bf16>{});
      else
#pragma unroll 1
        for (; first < end; first += step) f(first, WholeVector<Vectors::fp16_or_fp32>{});
    }
    if (first >= range.last) break;
    const int start = first < 0 ? 0 : first, end = first + VECTOR < range.last ? first + VECTOR : range.last;
    f(start, PartialVector{end - start, label_column - start});
    first += step;
  }
}

// Loads z of a vector. Columns past n repeat the first one, which changes neither maxima nor minima.
template <class Vector>
FASTKD_INLINE void load_z(const char* shared, const Side& side, int first, Vector vector, V (&z)[VECTOR]) {
  if constexpr (Vector::kind == Vectors::bf16) return load_bf16(shared + int64_t(first) * 2, z);
  const bool is_fp32 = side.dtype == Dtype::f32;
  if constexpr (Vector::kind == Vectors::fp16_or_fp32)
    return load_fp16_or_fp32(shared + (int64_t(first) << (is_fp32 ? 2 : 1)), is_fp32, z);
  if (vector.n == VECTOR)
    load(shared, side.dtype, first, z);
  else  // column by column, because a neighbour may be storing the others
    for (int k = 0; k < VECTOR; ++k) z[k] = load_one(shared, side.dtype, first + (k < vector.n ? k : 0));
  if (!side.identity()) logits_to_z(z, side);
}

// Removes the label's column: later columns move one lane down, and the last one is padding.
FASTKD_INLINE void exclude_label(PartialVector vector, V (&z)[VECTOR]) {
  if (!vector.has_label()) return;
  for (int k = 0; k + 1 < VECTOR; ++k) z[k] = k < vector.lane ? z[k] : z[k + 1];
  for (int k = 1; k < VECTOR; ++k) z[k] = k < vector.n - 1 ? z[k] : z[0];
}
template <Vectors KIND>
FASTKD_INLINE void exclude_label(WholeVector<KIND>, V (&)[VECTOR]) {}

// Calls f(vector, s, t) for this thread's vectors in a range, without the label's column.
template <bool MAY_BE_WHOLE, class Function>
FASTKD_INLINE void each_vector_without_label(const Call& call, const RowState& row, Place place, Range range,
                                             const char* student, const char* teacher, Function f) {
  each_vector<MAY_BE_WHOLE>(call, row, place, range, [&](int first, auto vector) {
    if (vector.rest().n == 0) return;
    V s[VECTOR], t[VECTOR];
    load_z(student, row.student, first, vector, s);
    load_z(teacher, row.teacher, first, vector, t);
    exclude_label(vector, s);
    exclude_label(vector, t);
    f(vector.rest(), s, t);
  });
}

// Calls f(k, s[k], t[k]) for the columns of a vector. The code has one copy of f per column, or two copies if RARE,
// with vectors that shift. Unrolling must be requested: the compiler keeps a long definition in a loop, and indexing by
// a variable moves the vectors out of registers.
template <bool RARE, class Function>
FASTKD_INLINE void each_column(V (&s)[VECTOR], V (&t)[VECTOR], Function f) {
  if constexpr (RARE) {
#pragma unroll 2
    for (int k = 0; k < VECTOR; ++k) {
      f(k, s[0], t[0]);
      shift_in(s, s[0]);
      shift_in(t, t[0]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) f(k, s[k], t[k]);
  }
}

}  // namespace fastkd::cuda
