// What the native kernels share: vectors, the one product they are all made of, transposes, and how tasks are spread over XLA's threads.
// Vector extensions of GCC and Clang: what the machine has is what -march=native says. Two sources take an intrinsic each, where those have no word for it.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Indices = ffi::Buffer<ffi::S32>;
using Results = ffi::ResultBuffer<ffi::F32>;

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 6, VECTORS = 4;  // ROWS x VECTORS sums are held in registers
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6, VECTORS = 2;
#else
constexpr int LANES = 4, ROWS = 4, VECTORS = 4;
#endif
constexpr int BLOCK = 64;  // positions of a tile, or of a chunk: as many as a row of mask bits has
constexpr float HIDDEN = -1e30f;  // a hidden score: finite, so that differences are numbers
constexpr float LOG2E = 1.4426950408889634f;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // in memory, anywhere
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

inline Vector load(const float* x) { return *reinterpret_cast<const Loose*>(x); }
inline void store(float* x, Vector v) { *reinterpret_cast<Loose*>(x) = v; }
inline Vector all(float x) { return x - Vector{}; }
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
inline Vector smaller(Vector a, Vector b) { return a > b ? b : a; }  // NaN where a is

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number

// 2^(f + n) for f from -1/2 to 1/2, of a whole number n given as n + ROUND. The polynomial is Cephes' exp2f.
inline Vector power_of_two(Vector f, Vector rounded) {
  Vector p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  return reinterpret_cast<Vector>(reinterpret_cast<Integers>(p) + ((reinterpret_cast<Integers>(rounded) - reinterpret_cast<Integers>(all(ROUND))) << 23));
}

// 2^x for x <= 127, to 2e-7; 0 below -126, and what is no number stays so.
inline Vector exp2(Vector x) {
  const Vector rounded = x + ROUND, power = power_of_two(x - (rounded - ROUND), rounded);
  return x < all(-126.0f) ? Vector{} : x == x ? power : x;
}

// e^x for x <= 87, to 2e-7, as above; not as 2^(x log2(e)), whose rounding grows with x.
inline Vector exp(Vector x) {
  const Vector rounded = x * LOG2E + ROUND, n = rounded - ROUND;
  const Vector rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2, in two parts of which the first is exact
  const Vector power = power_of_two(rest * LOG2E, rounded);
  return x < all(-87.0f) ? Vector{} : x == x ? power : x;
}

// The number A(m, k) stands at a[m * row + k * column].
struct Left {
  const float* a;
  int64_t row, column;
};

// C[m][:] (+)= sum over k of A(m, k) B[k][:], of M rows and V vectors.
template <int M, int V>
inline __attribute__((always_inline)) void tile(int K, Left A, const float* B, int64_t b_row, float* C, int64_t c_row, bool add) {
  Vector sum[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[m][v] = add ? load(C + m * c_row + v * LANES) : Vector{};
  for (int k = 0; k < K; ++k) {
    Vector b[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) b[v] = load(B + k * b_row + v * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vector a = all(A.a[m * A.row + k * A.column]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[m][v] += a * b[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(C + m * c_row + v * LANES, sum[m][v]);
}

template <int M, int V>
void some_rows(int rows, int K, Left A, const float* B, int64_t b_row, float* C, int64_t c_row, bool add) {
  if constexpr (M > 0) {
    if (rows == M) return tile<M, V>(K, A, B, b_row, C, c_row, add);
    return some_rows<M - 1, V>(rows, K, A, B, b_row, C, c_row, add);
  }
}

template <int V>
void some_vectors(int vectors, int M, int K, Left A, const float* B, int64_t b_row, float* C, int64_t c_row, bool add) {
  if constexpr (V > 0) {
    if (vectors != V) return some_vectors<V - 1>(vectors, M, K, A, B, b_row, C, c_row, add);
    int m = 0;
    for (; m + ROWS <= M; m += ROWS) tile<ROWS, V>(K, {A.a + m * A.row, A.row, A.column}, B, b_row, C + m * c_row, c_row, add);
    some_rows<ROWS - 1, V>(M - m, K, {A.a + m * A.row, A.row, A.column}, B, b_row, C + m * c_row, c_row, add);
  }
}

// C[M][N] (+)= A[M][K] B[K][N]; N is a multiple of LANES.
void product(int M, int N, int K, Left A, const float* B, int64_t b_row, float* C, int64_t c_row, bool add) {
  for (int n = 0; n < N; n += VECTORS * LANES)
    some_vectors<VECTORS>(std::min(VECTORS, (N - n) / LANES), M, K, A, B + n, b_row, C + n, c_row, add);
}

#if defined(__has_builtin) && !defined(NO_SHUFFLE)  // a test leaves it out
#if __has_builtin(__builtin_shufflevector)  // GCC 12, Clang
#define HAS_SHUFFLE
#endif
#endif

// The transpose of LANES vectors: lanes whose index has bit D change places with those of the vector D further on, for every bit.
template <int D, std::size_t... L>
inline __attribute__((always_inline)) void transpose(Vector* x, std::index_sequence<L...> lanes) {
#ifdef HAS_SHUFFLE
  if constexpr (D < LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
      if (!(i & D)) {
        const Vector a = x[i], b = x[i | D];
        x[i] = __builtin_shufflevector(a, b, (L & D ? LANES + L - D : L)...);
        x[i | D] = __builtin_shufflevector(a, b, (L & D ? LANES + L : L + D)...);
      }
    transpose<2 * D>(x, lanes);
  }
#else
  if constexpr (D == 1)
    for (int i = 0; i < LANES; ++i)
      for (int j = 0; j < i; ++j) std::swap(reinterpret_cast<float*>(x + i)[j], reinterpret_cast<float*>(x + j)[i]);
#endif
}

float sum_of_lanes(Vector x) {
  float sum = 0;
  for (int lane = 0; lane < LANES; ++lane) sum += x[lane];
  return sum;
}

// Lane l of the result is the sum of all lanes of x[l], which are spoiled: of two vectors at a time, half of either's lanes.
template <int D, std::size_t... L>
inline __attribute__((always_inline)) Vector sums_of_lanes(Vector* x, std::index_sequence<L...> lanes) {
#ifdef HAS_SHUFFLE
  if constexpr (D < LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 2 * D) {
      const Vector a = x[i], b = x[i + D];
      x[i] = __builtin_shufflevector(a, b, (L & D ? LANES + L - D : L)...) + __builtin_shufflevector(a, b, (L & D ? LANES + L : L + D)...);
    }
    return sums_of_lanes<2 * D>(x, lanes);
  }
  return x[0];
#else
  Vector sums;
  for (int l = 0; l < LANES; ++l) sums[l] = sum_of_lanes(x[l]);
  return sums;
#endif
}

// to[h][i] = factor * from[i][h], zero from `rows` on.
void turn(const float* from, int64_t row, int rows, int H, float factor, float* to) {
  for (int h = 0; h < H; h += LANES)
    for (int i = 0; i < BLOCK; i += LANES) {
      Vector x[LANES];
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) x[l] = i + l < rows ? factor * load(from + (i + l) * row + h) : Vector{};
      transpose<1>(x, std::make_index_sequence<LANES>());
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) store(to + (h + l) * BLOCK + i, x[l]);
    }
}

// to[i][h] = factor[i] * from[h][i].
void turn_back(const float* from, int rows, int H, const float* factor, float* to, int64_t row) {
  for (int h = 0; h < H; h += LANES)
    for (int i = 0; i < rows; i += LANES) {
      Vector x[LANES];
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) x[l] = load(factor + i) * load(from + (h + l) * BLOCK + i);
      transpose<1>(x, std::make_index_sequence<LANES>());
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l)
        if (i + l < rows) store(to + (i + l) * row + h, x[l]);
    }
}

float dot(const float* a, const float* b, int n) {
  Vector sum{};
  for (int i = 0; i < n; i += LANES) sum += load(a + i) * load(b + i);
  return sum_of_lanes(sum);
}

float total(const float* x, int n) {
  Vector sum{};
  for (int i = 0; i < n; i += LANES) sum += load(x + i);
  return sum_of_lanes(sum);
}

void multiply(float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i += LANES) store(x + i, factor * load(x + i));
}

void copy_rows(const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows, int H) {
  for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * to_row, from + i * from_row, sizeof(float) * H);
}

// A part of a float array, and how far apart its rows are.
struct Rows {
  const float* x;
  int64_t row;
};

// Softmax over scores [keys, queries] to base 2, tile by tile: o_t [H, queries] is a sum of values with weights 2^(score - top), and `total` that of the weights.
struct Softmax {
  int H;
  float *o_t, *top, *total;

  void begin() const {
    std::fill(o_t, o_t + H * BLOCK, 0.0f);
    std::fill(top, top + BLOCK, HIDDEN / 2);  // so that hidden pairs get 2^(HIDDEN / 2) = 0 even in a row that sees nothing
    std::fill(total, total + BLOCK, 0.0f);
  }

  // A tile joins what is there; its scores become weights.
  void add(float* scores, int keys, Rows values) const {
    for (int i = 0; i < BLOCK; i += LANES) {
      const Vector old = load(top + i);
      Vector now = old, sum{};
      for (int j = 0; j < keys; ++j) now = larger(now, load(scores + j * BLOCK + i));
      for (int j = 0; j < keys; ++j) {
        const Vector weight = exp2(load(scores + j * BLOCK + i) - now);
        store(scores + j * BLOCK + i, weight);
        sum += weight;
      }
      const Vector shrink = exp2(old - now);
      store(top + i, now);
      store(total + i, load(total + i) * shrink + sum);
      for (int h = 0; h < H; ++h) store(o_t + h * BLOCK + i, load(o_t + h * BLOCK + i) * shrink);
    }
    product(H, BLOCK, keys, {values.x, 1, values.row}, scores, BLOCK, o_t, BLOCK, true);
  }
};

// The logarithm of a sum of weights, and what the sum of values is multiplied by: of a query that sees nothing, -inf and 0.
float logarithm(float top, float total) { return total != 0 ? top / LOG2E + std::log(total) : -std::numeric_limits<float>::infinity(); }
float inverse(float total) { return total != 0 ? 1 / total : 0; }

// The backward pass of one query: 2^(score - top) is its weight, and 0 where it sees nothing. d lse / d score = weight and d o / d score = weight (v - o):
// both fold into one number, delta = do'o - dlse.
float top_of(float lse) { return lse == -std::numeric_limits<float>::infinity() ? -HIDDEN : lse * LOG2E; }

// Of a tile, scores become weights, and ds, products of do and values, the gradients by scores before they were scaled.
void weigh_back(float* scores, float* ds, int keys, const float* top, const float* delta, float scale) {
  for (int j = 0; j < keys; ++j)
    for (int i = 0; i < BLOCK; i += LANES) {
      const Vector weight = exp2(load(scores + j * BLOCK + i) - load(top + i));
      store(scores + j * BLOCK + i, weight);
      store(ds + j * BLOCK + i, weight * (load(ds + j * BLOCK + i) - load(delta + i)) * scale);
    }
}

// Runs task(n, worker) for n < tasks on the pool and on the calling thread, which waits for tasks, never for a thread: all of the pool may be
// busy with callers that wait too.
template <class Task>
void parallel(ffi::ThreadPool& pool, int64_t tasks, int64_t workers, Task task) {
  struct State {
    std::atomic<int64_t> next{0}, worker{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t done = 0;
  };
  auto state = std::make_shared<State>();
  auto work = [state, tasks, &task] {
    int64_t worker = -1;
    for (int64_t n; (n = state->next++) < tasks;) {  // `task` stands while a task is not done
      if (worker < 0) worker = state->worker++;
      task(n, worker);
      std::lock_guard<std::mutex> lock(state->mutex);
      if (++state->done == tasks) state->all_done.notify_all();
    }
  };
  for (int64_t w = 1; w < std::min(workers, tasks); ++w) pool.Schedule([work] { work(); });
  work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == tasks; });
}

// Positions of one chunk of one sequence, by their number in the batch.
struct Chunk {
  int64_t at;
  int rows;
};

template <class Body>
void forwards(int64_t b, int64_t length, Body body) {
  for (int64_t first = 0; first < length; first += BLOCK) body(Chunk{b * length + first, int(std::min<int64_t>(BLOCK, length - first))});
}

template <class Body>
void backwards(int64_t b, int64_t length, Body body) {
  for (int64_t first = (length - 1) / BLOCK * BLOCK; first >= 0; first -= BLOCK) body(Chunk{b * length + first, int(std::min<int64_t>(BLOCK, length - first))});
}

// The working memory of one worker, handed out piece by piece, each from a cache line on: vectors across two lines are read at half the rate.
struct Room {
  float* next;
  float* take(int64_t floats) { return std::exchange(next, next + (floats + 15) / 16 * 16); }
};

// How many floats a struct of such pieces has, of these sizes.
template <class Pieces>
int64_t floats_of(int64_t features, int64_t channels) {
  static float nothing;
  return Pieces{{&nothing}, features, channels}.room.next - &nothing;
}

// Of weights [queries, keys] within a chunk those of keys up to `before` positions before the query stay, and the others become zero.
void see_the_past(int rows, int before, float* weights) {
  Integers lane;
  for (int l = 0; l < LANES; ++l) lane[l] = l;
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < BLOCK; j += LANES) {
      const Integers seen = lane + j <= i - before;
      store(weights + i * BLOCK + j, seen ? load(weights + i * BLOCK + j) : Vector{});
    }
}

}  // namespace
