// One filter a head along the sequence, forward and backward, for CPUs. See ops/convolution.py, native_convolution.py.
//
// ROWS neighbouring results are one product: of a band matrix, whose rows are the taps, each a place further on, with the rows of the input they reach.

#include "native.h"

namespace {

constexpr int TAPS = 11;  // whose gradients are summed at once: a register each, of sixteen, and sums that wait for no other

struct Shape {
  int64_t B, S, K, N;
  int H, W;
  int64_t group() const { return N / K; }
  int64_t chunks() const { return (S + BLOCK - 1) / BLOCK; }  // of a sequence
};

struct Pieces {
  Room room;
  int64_t W, H;
  // The taps between zeros, and the input from W / 2 positions before a chunk to as many after it, zero beyond the ends of the sequence.
  float *taps = room.take(W + 2 * ROWS), *window = room.take((BLOCK + W + TAPS) * H), *d_window = room.take((BLOCK + W + TAPS) * H);
};

// The taps of head n, in this order or the other.
void place_taps(const Shape& s, const float* taps, bool reversed, float* to) {
  std::fill(to, to + s.W + 2 * ROWS, 0.0f);
  for (int w = 0; w < s.W; ++w) to[ROWS + w] = taps[reversed ? s.W - 1 - w : w];
}

// Of head n of x [B, S, heads, H], what the chunk at `first` reaches.
void place_window(const Shape& s, const float* x, int64_t heads, int64_t b, int64_t n, int64_t first, float* to) {
  const int64_t begin = first - s.W / 2, end = begin + BLOCK + s.W + TAPS;
  const int64_t from = std::clamp<int64_t>(begin, 0, s.S), until = std::clamp<int64_t>(end, 0, s.S);
  std::fill(to, to + (from - begin) * s.H, 0.0f);
  copy_rows(x + ((b * s.S + from) * heads + n) * s.H, heads * s.H, to + (from - begin) * s.H, s.H, until - from, s.H);
  std::fill(to + (until - begin) * s.H, to + (end - begin) * s.H, 0.0f);
}

// to[i] (+)= sum over w of taps[w] window[i + w], of `rows` rows.
void filter(const Shape& s, const float* taps, const float* window, int rows, float* to, int64_t to_row, bool add) {
  for (int i = 0; i < rows; i += ROWS)
    product(std::min(ROWS, rows - i), s.H, s.W + ROWS - 1, {taps + ROWS, -1, 1}, window + i * s.H, s.H, to + i * to_row, to_row, add);
}

// body(pieces, b, n): chunk n of sequence b, all its heads, whose channels stand beside each other in memory.
template <class Body>
void over_chunks(ffi::ThreadPool& pool, const Shape& s, Results& memory, Body body) {
  parallel(pool, s.B * s.chunks(), memory->dimensions()[0], [&](int64_t task, int64_t worker) {
    const Pieces x{{memory->typed_data() + worker * memory->dimensions()[1]}, s.W, s.H};
    body(x, task / s.chunks(), task % s.chunks());
  });
}

Shape shape_of(const Floats& v, const Floats& taps) {
  const auto of_v = v.dimensions(), of_taps = taps.dimensions();
  return {of_v[0], of_v[1], of_v[2], of_taps[0], int(of_v[3]), int(of_taps[1])};
}

ffi::Error forward(ffi::ThreadPool pool, Floats v, Floats taps, Results o, Results memory) {
  const Shape s = shape_of(v, taps);
  over_chunks(pool, s, memory, [&](const Pieces& x, int64_t b, int64_t chunk) {
    const int64_t first = chunk * BLOCK;
    const int rows = int(std::min<int64_t>(BLOCK, s.S - first));
    for (int64_t n = 0; n < s.N; ++n) {
      if (n % s.group() == 0) place_window(s, v.typed_data(), s.K, b, n / s.group(), first, x.window);
      place_taps(s, taps.typed_data() + n * s.W, false, x.taps);
      filter(s, x.taps, x.window, rows, o->typed_data() + ((b * s.S + first) * s.N + n) * s.H, s.N * s.H, false);
    }
  });
  return ffi::Error::Success();
}

// d_taps[w] = sum over the chunk's positions and channels of d_o[i] window[i + w].
void filter_gradient(const Shape& s, const Pieces& x, float* d_taps) {
  const float* d_o = x.d_window + s.W / 2 * s.H;  // zero beyond the end
  for (int w = 0; w < s.W; w += TAPS) {
    Vector sum[TAPS] = {};
    for (int i = 0; i < BLOCK; i += 2)
      for (int h = 0; h < s.H; h += LANES) {
        const Vector first = load(d_o + i * s.H + h), second = load(d_o + (i + 1) * s.H + h);
        Vector reached = load(x.window + (i + w) * s.H + h);
#pragma GCC unroll 16
        for (int u = 0; u < TAPS; ++u) {
          const Vector next = load(x.window + (i + w + u + 1) * s.H + h);
          sum[u] += first * reached;
          sum[u] += second * next;
          reached = next;
        }
      }
#pragma GCC unroll 16
    for (int u = 0; u < TAPS; ++u)
      if (w + u < s.W) d_taps[w + u] = sum_of_lanes(sum[u]);
  }
}

// d_taps [B, chunks, N, W].
ffi::Error backward(ffi::ThreadPool pool, Floats v, Floats taps, Floats d_o, Results dv, Results d_taps, Results memory) {
  const Shape s = shape_of(v, taps);
  over_chunks(pool, s, memory, [&](const Pieces& x, int64_t b, int64_t chunk) {
    const int64_t first = chunk * BLOCK;
    const int rows = int(std::min<int64_t>(BLOCK, s.S - first));
    for (int64_t n = 0; n < s.N; ++n) {
      const int64_t head = n / s.group();
      const bool begins = n % s.group() == 0;
      if (begins) place_window(s, v.typed_data(), s.K, b, head, first, x.window);
      place_window(s, d_o.typed_data(), s.N, b, n, first, x.d_window);
      place_taps(s, taps.typed_data() + n * s.W, true, x.taps);
      filter(s, x.taps, x.d_window, rows, dv->typed_data() + ((b * s.S + first) * s.K + head) * s.H, s.K * s.H, !begins);
      filter_gradient(s, x, d_taps->typed_data() + ((b * s.chunks() + chunk) * s.N + n) * s.W);
    }
  });
  return ffi::Error::Success();
}

auto bind() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>(); }

}  // namespace

extern "C" int64_t attn_zoo_convolution_forward_floats(int64_t W, int64_t H) { return floats_of<Pieces>(W, H); }
extern "C" int64_t attn_zoo_convolution_backward_floats(int64_t W, int64_t H) { return floats_of<Pieces>(W, H); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_convolution_forward, forward, bind().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_convolution_backward, backward, bind().Arg<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>());
