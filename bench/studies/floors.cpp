// A loss on logits, and the least arithmetic that it needs: the program that floors.py compiles for one instruction set
// (FASTKD_ISA) and links with the object file of the kernels.
//
//   floors kernel ROWS CASE      computes the loss and the student's gradient once
//   floors floor ROWS CASE       computes the exponentials and logarithms once
//   floors time ROUNDS CASE      prints, for each round, the seconds of the kernel and of the floor on 64 rows
//
// CASE is DTYPE DIVERGENCE EXPONENTIALS LOGARITHMS DIVISIONS CLOSED FORWARD REVERSE CROSS PARAMS...

#include "cpu/kernel.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <limits>
#include <memory>
#include <random>
#include <string>

namespace fastkd::FASTKD_ISA {

#include "cpu/vec.h"

#include "cpu/load_store.h"
#include "cpu/softmax.h"

namespace {

constexpr int64_t COLUMNS = 49'152;

struct Case {
  Dtype dtype;
  int exponentials, logarithms, divisions;
  Call call;
};

FASTKD_INLINE V logarithm_of(V x) {
  const I k = ((I)x - 0x3f3504f3) >> 23;  // x = 2^k m with m in [sqrt(1/2), sqrt(2))
  const V m = (V)((I)x - (k << 23));
  return log1p_near_0(m - 1.0f) + __builtin_convertvector(k, V) * 0.69314718f;
}

FASTKD_INLINE V exponential_of(V x) {
  V power;
  return exp_less_power_in_range(at_least(x, splat(EXP_LOWEST)), power) + power;
}

template <class T>
FASTKD_INLINE V load_logits(const T* from) {
  if constexpr (sizeof(T) == 4)
    return load(from);
  else
    return from_bf16(load_half(from));
}

template <class T>
FASTKD_INLINE void store_gradient(T* to, V value) {
  if constexpr (sizeof(T) == 4) {
    stream(to, value);
  } else {
#if defined(__AVX512BF16__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)value));
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)to_bf16(value));
#else
    store_half(to, to_bf16(value));
#endif
  }
}

// Loads both logits, computes the functions and stores one value, for each column. The first two exponentials are those
// of the two softmax functions.
template <int EXPONENTIALS, int LOGARITHMS, int DIVISIONS, class T>
void least_row(const T* s, const T* t, T* out) {
  const Softmax softmax(1);
  for (int64_t i = 0; i < COLUMNS; i += LANES) {
    const V z_s = load_logits(s + i), z_t = load_logits(t + i);
    const V q = softmax.exponential(z_s), p = softmax.exponential(z_t);
    V value = q + p;
    if (EXPONENTIALS > 2) value += exponential_of(z_s * 0.5f);
    if (EXPONENTIALS > 3) value += exponential_of(z_t * 0.5f);
    if (EXPONENTIALS > 4) value += exponential_of(z_t * 0.25f);
    if (LOGARITHMS > 0) value = logarithm_of(value);
    if (DIVISIONS > 0) value = p / value;
    store_gradient(out + i, value);
  }
}

template <class T>
void least_rows(const Case& of, int64_t rows) {
  const int kind = of.exponentials * 100 + of.logarithms * 10 + of.divisions;
  const Call& call = of.call;
  auto at = [](const Rows& rows, int64_t i) { return reinterpret_cast<T*>(rows.data) + i * rows.strides[0]; };
  FlushSubnormals guard;
  for (int64_t i = 0; i < rows; ++i) {
    const T *s = at(call.student, i), *t = at(call.teacher, i);
    T* out = at(call.student_gradient, i);
    switch (kind) {
      case 200: least_row<2, 0, 0>(s, t, out); break;
      case 300: least_row<3, 0, 0>(s, t, out); break;
      case 310: least_row<3, 1, 0>(s, t, out); break;
      case 311: least_row<3, 1, 1>(s, t, out); break;
      case 500: least_row<5, 0, 0>(s, t, out); break;
      default: std::fprintf(stderr, "no loop has the functions %d\n", kind), std::exit(2);
    }
  }
}

__attribute__((noinline)) void run_floor(const Case& of, int64_t rows) {
  of.dtype == Dtype::f32 ? least_rows<float>(of, rows) : least_rows<uint16_t>(of, rows);
}

void run_kernel(Case& of, int64_t rows) {
  of.call.rows = rows;
  of.call.sizes = {rows};
  kd_rows(of.call);
}

// Fills the rows with normal numbers: the first one with new ones, the others with those in another order.
template <class T>
void fill(T* to, int64_t rows, unsigned seed) {
  std::mt19937 bits(seed);
  std::normal_distribution<float> normal(-20, 3);  // below 0, as a logit minus its maximum is
  for (int64_t i = 0; i < COLUMNS; ++i) {
    const float value = normal(bits);
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if constexpr (sizeof(T) == 4)
      to[i] = value;
    else
      to[i] = T(word >> 16);
  }
  for (int64_t row = 1; row < rows; ++row) {
    const int64_t shift = row * 256;
    std::memcpy(to + row * COLUMNS, to + shift, (COLUMNS - shift) * sizeof(T));
    std::memcpy(to + (row + 1) * COLUMNS - shift, to, shift * sizeof(T));
  }
}

// Time of this thread: what it waits for the processor does not count.
double seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

int main_of(int count, char** words) {
  const std::string mode = words[1], divergence = words[4];
  const int64_t repeats = std::atoll(words[2]), streamed = STREAM_BYTES / COLUMNS / (std::string(words[3]) == "float32" ? 4 : 2) + 1,
                rows = mode == "time" ? streamed : repeats;
  Case of{std::string(words[3]) == "bfloat16" ? Dtype::bf16 : Dtype::f32, std::atoi(words[5]), std::atoi(words[6]),
          std::atoi(words[7]), {}};
  Call& call = of.call;
  const auto names = divergences();
  call.divergence = int(std::find(names.begin(), names.end(), divergence) - names.begin());
  call.closed_form = std::atoi(words[8]);
  call.forward = std::atof(words[9]), call.reverse = std::atof(words[10]), call.cross = std::atof(words[11]);
  for (int k = 12; k < count; ++k) call.params[k - 12] = float(std::atof(words[k]));
  call.degree = 1;
  call.vocabulary = call.shard.total = COLUMNS;
  const int64_t bytes = rows * COLUMNS * element_size(of.dtype);
  auto tensor = [&](unsigned seed) {
    char* data = static_cast<char*>(std::aligned_alloc(4096, bytes));
    if (of.dtype == Dtype::f32)
      fill(reinterpret_cast<float*>(data), rows, seed);
    else
      fill(reinterpret_cast<uint16_t*>(data), rows, seed);
    return Rows{data, of.dtype, COLUMNS, {COLUMNS}};
  };
  call.student = tensor(1);
  call.teacher = tensor(2);
  call.student_gradient = tensor(3);
  std::unique_ptr<float[]> losses(new float[rows]);
  float total;
  call.loss = losses.get();
  call.total = &total;
  if (mode == "kernel") return run_kernel(of, rows), 0;
  if (mode == "floor") return run_floor(of, rows), 0;
  for (int64_t round = 0; round < repeats; ++round) {
    const double start = seconds();
    run_kernel(of, rows);
    const double between = seconds();
    run_floor(of, rows);
    std::printf("%.9f %.9f\n", between - start, seconds() - between);
  }
  return 0;
}

}  // namespace

int entry(int count, char** words) { return main_of(count, words); }

}  // namespace fastkd::FASTKD_ISA

int main(int count, char** words) { return fastkd::FASTKD_ISA::entry(count, words); }
