// Vectors and elements of logits: how a thread loads, converts and stores them.
#pragma once
#include "slice.h"

namespace fastkd::cuda {

struct alignas(PIECE) Piece {
  uint32_t words[4];
};

// A word of which `low` has the upper half below, and `high` the lower half above.
FASTKD_INLINE uint32_t middle_word(uint32_t low, uint32_t high) { return low >> 16 | high << 16; }

template <class T>
FASTKD_INLINE T read(const char* memory) {
  FASTKD_TRACE_ACCESS(memory, int(sizeof(T)), false);
  return *reinterpret_cast<const T*>(memory);
}
#if defined(__CUDA_ARCH__)
template <>
FASTKD_INLINE Piece read<Piece>(const char* memory) {
  const uint4 words = *reinterpret_cast<const uint4*>(memory);  // one instruction; a struct is read word by word
  return {words.x, words.y, words.z, words.w};
}
#endif
FASTKD_INLINE void write(char* memory, const Piece& piece) {
  FASTKD_TRACE_ACCESS(memory, PIECE, true);
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<uint4*>(memory) = {piece.words[0], piece.words[1], piece.words[2], piece.words[3]};
#else
  *reinterpret_cast<Piece*>(memory) = piece;
#endif
}

// Loads a piece of 16-bit elements from an address that is a multiple of 2. It reads no other element, because
// neighbours may be storing theirs.
FASTKD_INLINE Piece load_skewed(const char* from) {
  Piece piece;
  if (reinterpret_cast<uintptr_t>(from) % 4 == 0) {
    for (int k = 0; k < 4; ++k) piece.words[k] = read<uint32_t>(from + 4 * k);
    return piece;
  }
  const uint32_t first = read<uint16_t>(from), last = read<uint16_t>(from + 14);
  uint32_t words[3];
  for (int k = 0; k < 3; ++k) words[k] = read<uint32_t>(from + 2 + 4 * k);
  piece.words[0] = first | words[0] << 16;
  piece.words[1] = middle_word(words[0], words[1]);
  piece.words[2] = middle_word(words[1], words[2]);
  piece.words[3] = words[2] >> 16 | last << 16;
  return piece;
}

FASTKD_INLINE void from_two_bf16(const Piece& piece, V (&x)[VECTOR]) {
  for (int k = 0; k < 4; ++k) {
    x[2 * k] = as<float>(piece.words[k] << 16);
    x[2 * k + 1] = as<float>(piece.words[k] & 0xffff0000);
  }
}

FASTKD_INLINE void from_two_fp16(const Piece& piece, V (&x)[VECTOR]) {
  for (int k = 0; k < 4; ++k) {
    x[2 * k] = from_fp16(uint16_t(piece.words[k]));
    x[2 * k + 1] = from_fp16(uint16_t(piece.words[k] >> 16));
  }
}

FASTKD_INLINE void from_fp32(const Piece& low, const Piece& high, V (&x)[VECTOR]) {
  for (int k = 0; k < 4; ++k) {
    x[k] = as<float>(low.words[k]);
    x[k + 4] = as<float>(high.words[k]);
  }
}

// Loads a vector of bf16 from a multiple of PIECE.
FASTKD_INLINE void load_bf16(const char* shared, V (&x)[VECTOR]) { from_two_bf16(read<Piece>(shared), x); }

// Loads a vector of fp16 or fp32 from a multiple of PIECE.
FASTKD_INLINE void load_fp16_or_fp32(const char* shared, bool is_fp32, V (&x)[VECTOR]) {
  const Piece piece = read<Piece>(shared);
  if (is_fp32)
    from_fp32(piece, read<Piece>(shared + PIECE), x);
  else
    from_two_fp16(piece, x);
}

// The larger of two bf16 in each half of a word. NaN is ignored.
FASTKD_INLINE uint32_t max_of_two_bf16(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t y;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
#else
  const float low = fmaxf(as<float>(a << 16), as<float>(b << 16));
  const float high = fmaxf(as<float>(a & 0xffff0000), as<float>(b & 0xffff0000));
  return as<uint32_t>(low) >> 16 | (as<uint32_t>(high) & 0xffff0000);
#endif
}

// Loads a vector of logits from any address.
FASTKD_INLINE void load(const char* shared, Dtype dtype, int first, V (&x)[VECTOR]) {
  const char* from = shared + int64_t(first) * size_of_element(dtype);
  const bool skewed = skew_of(from) != 0;  // a slice keeps its row's alignment, because bulk copies need that
  if (dtype == Dtype::f32) {
    Piece pieces[2];
    if (skewed)
      for (int k = 0; k < VECTOR; ++k) pieces[k / 4].words[k % 4] = read<uint32_t>(from + 4 * k);
    else
      for (int k = 0; k < 2; ++k) pieces[k] = read<Piece>(from + PIECE * k);
    return from_fp32(pieces[0], pieces[1], x);
  }
  const Piece piece = skewed ? load_skewed(from) : read<Piece>(from);
  dtype == Dtype::bf16 ? from_two_bf16(piece, x) : from_two_fp16(piece, x);
}

// Stores a vector of bf16 to a multiple of PIECE.
FASTKD_INLINE void store_bf16(char* memory, const V (&x)[VECTOR]) {
  Piece piece;
  for (int k = 0; k < 4; ++k) piece.words[k] = two_bf16(x[2 * k], x[2 * k + 1]);
  write(memory, piece);
}

// Stores a vector of fp16 or fp32 to a multiple of PIECE.
FASTKD_INLINE void store_fp16_or_fp32(char* memory, bool is_fp32, const V (&x)[VECTOR]) {
  Piece low, high;
  for (int k = 0; k < 4; ++k) {
    low.words[k] = is_fp32 ? as<uint32_t>(x[k]) : two_fp16(x[2 * k], x[2 * k + 1]);
    high.words[k] = as<uint32_t>(x[k + 4]);
  }
  write(memory, low);
  if (is_fp32) write(memory + PIECE, high);
}

constexpr unsigned ALL_COLUMNS = (1u << VECTOR) - 1;  // one bit per column of a vector

// Stores the columns of a vector whose bits are set, converted to dtype; the whole vector at once if it is aligned.
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
  const int element_size = size_of_element(dtype);
  char* to = memory + int64_t(first) * element_size;
  if (columns == ALL_COLUMNS && skew_of(to) == 0) {
    write(to, pieces[0]);
    if (element_size == 4) write(to + PIECE, pieces[1]);
    return;
  }
#pragma unroll
  for (int k = 0; k < VECTOR; ++k)
    if (columns >> k & 1) {
      FASTKD_TRACE_ACCESS(to + k * element_size, element_size, true);
      if (element_size == 4)
        reinterpret_cast<uint32_t*>(to)[k] = pieces[k / 4].words[k % 4];
      else
        reinterpret_cast<uint16_t*>(to)[k] = uint16_t(pieces[0].words[k / 2] >> (k % 2 * 16));
    }
}

FASTKD_INLINE float load_one(const char* memory, Dtype dtype, int64_t column) {
  FASTKD_TRACE_ACCESS(memory + column * size_of_element(dtype), size_of_element(dtype), false);
  if (dtype == Dtype::f32) return reinterpret_cast<const float*>(memory)[column];
  const uint16_t x = reinterpret_cast<const uint16_t*>(memory)[column];
  return dtype == Dtype::bf16 ? from_bf16(x) : from_fp16(x);
}

FASTKD_INLINE void store_one(char* memory, Dtype dtype, int64_t column, float value) {
  FASTKD_TRACE_ACCESS(memory + column * size_of_element(dtype), size_of_element(dtype), true);
  if (dtype == Dtype::f32)
    reinterpret_cast<float*>(memory)[column] = value;
  else
    reinterpret_cast<uint16_t*>(memory)[column] = dtype == Dtype::bf16 ? to_bf16(value) : to_fp16(value);
}

// Zeroes this thread's share of a dropped row, or of a kept row's padding past the vocabulary.
FASTKD_PER_ROW void store_zeros(const Call& call, Place place, const Rows& rows, int64_t row, bool padding_alone) {
  if (!rows.data || (padding_alone && rows.width == call.vocabulary)) return;
  char* memory = row_address(call, rows, row);
  const int64_t step = int64_t(call.ranks) * call.threads;
#pragma unroll 1
  for (int64_t i = int64_t(place.rank) * call.threads + place.thread + (padding_alone ? call.vocabulary : 0);
       i < rows.width; i += step)
    store_one(memory, rows.dtype, i, 0);
}

}  // namespace fastkd::cuda
