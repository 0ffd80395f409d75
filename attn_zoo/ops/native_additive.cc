// Additive attention, forward and backward, for CPUs, as calls that XLA makes (its foreign function interface). See native_additive.py.
//
// A score is w'tanh(q + k). With a = exp(2 q) and b = exp(2 k), of which there is one a position, tanh(q + k) = 1 - 2 y and its derivative is 4 (y - y^2), where
// y = 1 / (1 + a b): a pair costs a reciprocal a hidden unit, and no exponential. Where a or b is too large or small for that, it is exp(2 (q + k)).

#include "native.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr float LIMIT = 42;  // of the logarithms of a and b: their product is a number

// 1 / x, for x from 1 to 2^125.
inline Vector reciprocal(Vector x) {
#if defined(__AVX512F__)
  const Vector y = reinterpret_cast<Vector>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));  // to 2^-14, and after a step of Newton's to rounding
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

struct Additive {
  int64_t B, T, S, N, K;
  int R, H;
  bool causal;
  const float *q, *k, *weight, *v;
  const bool* valid;

  int64_t end(int64_t from, int rows) const { return causal ? std::min(S, from + rows) : S; }  // of the keys that these queries see

  void hide(int64_t b, int64_t from, int rows, int64_t first, int keys, float* scores) const {
    if (keys == BLOCK && !valid && (!causal || first + BLOCK <= from + 1)) return;
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < BLOCK; ++j)
        if (j >= keys || (causal && first + j > from + i) || (valid && !valid[b * S + first + j])) scores[i * BLOCK + j] = HIDDEN;
  }
};

Additive additive_of(Floats& q, Floats& k, Floats& weight, Floats& v, ffi::Buffer<ffi::PRED>& valid, bool causal) {
  const auto of_q = q.dimensions(), of_v = v.dimensions();
  return {of_q[0], of_q[1], of_v[1], of_q[2], of_v[2], int(of_q[3]), int(of_v[3]), causal, q.typed_data(), k.typed_data(), weight.typed_data(), v.typed_data(),
          valid.element_count() ? valid.typed_data() : nullptr};
}

// The rows of a tile, exp(2 x) of them, and in which of them all of those are moderate, row i as bit i; rows beyond the last are as for zero.
struct Exponentials {
  float *x, *power;
  uint64_t moderate = 0;

  void make(const float* from, int64_t row, int rows, int R) {
    moderate = 0;
    for (int i = 0; i < BLOCK; ++i) {
      Vector largest{};
      for (int r = 0; r < R; r += LANES) {
        const Vector x_r = i < rows ? load(from + i * row + r) : Vector{}, twice = 2.0f * x_r;
        store(x + i * R + r, x_r);
        store(power + i * R + r, exp(smaller(twice, all(LIMIT))));
        largest = larger(larger(twice, -twice), largest);
      }
      bool is = true;
      for (int lane = 0; lane < LANES; ++lane) is &= largest[lane] <= LIMIT;
      moderate |= uint64_t{is} << i;
    }
  }
};

// y of one vector of hidden units.
template <bool MODERATE>
inline __attribute__((always_inline)) Vector y_of(Vector a, const float* b) {
  return reciprocal(1.0f + (MODERATE ? a * load(b) : exp(smaller(2.0f * (a + load(b)), all(2 * LIMIT)))));
}

template <bool MODERATE>
void score(const float* a, const float* b, const float* weight, int rows, int keys, int R, float* scores) {
  const float sum_of_weights = total(weight, R);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < keys; j += LANES) {
      Vector sum[LANES] = {};
      for (int r = 0; r < R; r += LANES) {
        const Vector a_r = load(a + i * R + r), w_r = load(weight + r);
#pragma GCC unroll 16
        for (int l = 0; l < LANES; ++l) sum[l] += w_r * y_of<MODERATE>(a_r, b + (j + l) * R + r);
      }
      store(scores + i * BLOCK + j, sum_of_weights - 2.0f * sums_of_lanes<1>(sum, std::make_index_sequence<LANES>()));
    }
}

// From gradients ds by the scores of a tile those of queries, keys and weights, which are added.
template <bool MODERATE>
void back(const float* a, const float* b, const float* weight, int rows, int keys, int R, const float* ds, float* dq, int64_t dq_row, float* dk, float* dweight) {
  for (int i = 0; i < rows; ++i) {
    const float* ds_i = ds + i * BLOCK;
    const float sum_of_ds = total(ds_i, BLOCK);
    for (int r = 0; r < R; r += LANES) {
      const Vector a_r = load(a + i * R + r), of_slope = 4.0f * load(weight + r);
      Vector slopes{}, sum{};
      for (int j = 0; j < keys; ++j) {
        const Vector y = y_of<MODERATE>(a_r, b + j * R + r), part = ds_i[j] * y, slope = part - part * y;
        sum += part, slopes += slope;
        store(dk + j * R + r, load(dk + j * R + r) + of_slope * slope);
      }
      store(dq + i * dq_row + r, load(dq + i * dq_row + r) + of_slope * slopes);
      store(dweight + r, load(dweight + r) + sum_of_ds - 2.0f * sum);
    }
  }
}

struct ForwardPieces {
  Room room;
  int64_t R, H;
  Exponentials a{room.take(BLOCK * R), room.take(BLOCK * R)}, b{room.take(BLOCK * R), room.take(BLOCK * R)};
  float *p = room.take(BLOCK * BLOCK), *spare = room.take(BLOCK * BLOCK), *o = room.take(BLOCK * H);
};

struct BackwardPieces {
  Room room;
  int64_t R, H;
  Exponentials a{room.take(BLOCK * R), room.take(BLOCK * R)}, b{room.take(BLOCK * R), room.take(BLOCK * R)};
  float *p = room.take(BLOCK * BLOCK), *dp = room.take(BLOCK * BLOCK), *v_t = room.take(H * BLOCK), *dk = room.take(BLOCK * R), *dv = room.take(BLOCK * H);
  float* spare = room.take(BLOCK * BLOCK);
};

// The numbers of pairs of two moderate rows, or of the others, and zeros in place of the rest.
void keep(const Exponentials& a, const Exponentials& b, bool moderate, int rows, const float* from, float* to) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < BLOCK; ++j) to[i * BLOCK + j] = bool(a.moderate >> i & b.moderate >> j & 1) == moderate ? from[i * BLOCK + j] : 0;
}

// Scores of a tile, hidden ones too. How a pair's is computed goes by that pair alone: no other may change its last bit.
void score_tile(const Additive& s, const Exponentials& a, const Exponentials& b, int64_t batch, int64_t n, int64_t from, int rows, int64_t first, int keys, float* p,
                float* spare) {
  const float* weight = s.weight + n * s.R;
  score<true>(a.power, b.power, weight, rows, keys, s.R, p);
  if (~(a.moderate & b.moderate)) {
    score<false>(a.x, b.x, weight, rows, keys, s.R, spare);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < BLOCK; ++j)
        if (!(a.moderate >> i & b.moderate >> j & 1)) p[i * BLOCK + j] = spare[i * BLOCK + j];
  }
  s.hide(batch, from, rows, first, keys, p);
}

ffi::Error forward(ffi::ThreadPool pool, Floats q, Floats k, Floats weight, Floats v, ffi::Buffer<ffi::PRED> valid, Results o, Results lse, Results memory, bool causal) {
  const Additive s = additive_of(q, k, weight, v, valid, causal);
  const int64_t chunks = (s.T + BLOCK - 1) / BLOCK, size = memory->dimensions()[1];
  parallel(pool, s.B * s.N * chunks, memory->dimensions()[0], [&](int64_t task, int64_t worker) {
    const int64_t b = task / chunks / s.N, n = task / chunks % s.N, head = n / (s.N / s.K), from = task % chunks * BLOCK, row = (b * s.T + from) * s.N + n;
    const int rows = int(std::min<int64_t>(BLOCK, s.T - from));
    ForwardPieces x{{memory->typed_data() + worker * size}, s.R, s.H};
    float top[BLOCK], sum[BLOCK] = {};
    std::fill(top, top + BLOCK, HIDDEN / 2);  // far above what is hidden, which weighs nothing even where all is
    std::fill(x.o, x.o + BLOCK * s.H, 0.0f);
    x.a.make(s.q + row * s.R, s.N * s.R, rows, s.R);
    for (int64_t first = 0; first < s.end(from, rows); first += BLOCK) {
      const int64_t at = (b * s.S + first) * s.K + head;
      const int keys = int(std::min<int64_t>(BLOCK, s.S - first));
      x.b.make(s.k + at * s.R, s.K * s.R, keys, s.R);
      score_tile(s, x.a, x.b, b, n, from, rows, first, keys, x.p, x.spare);
      for (int i = 0; i < rows; ++i) {
        float* p = x.p + i * BLOCK;
        Vector most = all(top[i]);
        for (int j = 0; j < BLOCK; j += LANES) most = larger(most, load(p + j));
        float new_top = top[i];
        for (int lane = 0; lane < LANES; ++lane) new_top = most[lane] > new_top ? most[lane] : new_top;
        for (int j = 0; j < BLOCK; j += LANES) store(p + j, exp2(LOG2E * (load(p + j) - new_top)));
        if (new_top > top[i]) {
          const float shrink = exp2(all(LOG2E * (top[i] - new_top)))[0];
          sum[i] *= shrink, top[i] = new_top;
          multiply(x.o + i * s.H, s.H, shrink);
        }
        sum[i] += total(p, BLOCK);
      }
      product(rows, s.H, keys, {x.p, BLOCK, 1}, s.v + at * s.H, s.K * s.H, x.o, s.H, true);
    }
    for (int i = 0; i < rows; ++i) {
      const bool seen = sum[i] != 0;  // or is no number
      if (seen) multiply(x.o + i * s.H, s.H, 1 / sum[i]);
      copy_rows(x.o + i * s.H, s.H, o->typed_data() + (row + i * s.N) * s.H, s.H, 1, s.H);
      lse->typed_data()[row + i * s.N] = seen ? top[i] + std::log(sum[i]) : -std::numeric_limits<float>::infinity();
    }
  });
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, Floats q, Floats k, Floats weight, Floats v, ffi::Buffer<ffi::PRED> valid, Floats o, Floats lse, Floats d_o, Results dq,
                    Results dk, Results dweight, Results dv, Results memory, bool causal) {
  const Additive s = additive_of(q, k, weight, v, valid, causal);
  const int64_t G = s.N / s.K, size = memory->dimensions()[1];
  std::fill(dq->typed_data(), dq->typed_data() + dq->element_count(), 0.0f);
  std::fill(dweight->typed_data(), dweight->typed_data() + dweight->element_count(), 0.0f);
  parallel(pool, s.B * s.K, memory->dimensions()[0], [&](int64_t task, int64_t worker) {
    const int64_t b = task / s.K, head = task % s.K;
    BackwardPieces x{{memory->typed_data() + worker * size}, s.R, s.H};
    for (int64_t first = 0; first < s.S; first += BLOCK) {
      const int64_t at = (b * s.S + first) * s.K + head;
      const int keys = int(std::min<int64_t>(BLOCK, s.S - first));
      x.b.make(s.k + at * s.R, s.K * s.R, keys, s.R);
      turn(s.v + at * s.H, s.K * s.H, keys, s.H, 1.0f, x.v_t);
      std::fill(x.dk, x.dk + BLOCK * s.R, 0.0f);
      std::fill(x.dv, x.dv + BLOCK * s.H, 0.0f);
      for (int64_t n = head * G; n < (head + 1) * G; ++n)
        for (int64_t from = s.causal ? first : 0; from < s.T; from += BLOCK) {
          const int64_t row = (b * s.T + from) * s.N + n, H = s.H;
          const int rows = int(std::min<int64_t>(BLOCK, s.T - from));
          const float* do_c = d_o.typed_data() + row * H;
          x.a.make(s.q + row * s.R, s.N * s.R, rows, s.R);
          score_tile(s, x.a, x.b, b, n, from, rows, first, keys, x.p, x.spare);
          product(rows, BLOCK, s.H, {do_c, s.N * H, 1}, x.v_t, BLOCK, x.dp, BLOCK, false);
          for (int i = 0; i < rows; ++i) {
            const float delta = dot(do_c + i * s.N * H, o.typed_data() + (row + i * s.N) * H, s.H), lse_i = lse.typed_data()[row + i * s.N];
            const float safe = lse_i == -std::numeric_limits<float>::infinity() ? 0 : lse_i;  // of a row that sees nothing, where all is hidden
            for (int j = 0; j < BLOCK; j += LANES) {
              const Vector p = exp2(LOG2E * (load(x.p + i * BLOCK + j) - safe));
              store(x.p + i * BLOCK + j, p);
              store(x.dp + i * BLOCK + j, p * (load(x.dp + i * BLOCK + j) - delta));
            }
          }
          product(keys, s.H, rows, {x.p, 1, BLOCK}, do_c, s.N * H, x.dv, s.H, true);
          float *dq_c = dq->typed_data() + row * s.R, *dweight_n = dweight->typed_data() + (b * s.N + n) * s.R;
          const float* w = s.weight + n * s.R;
          if (~(x.a.moderate & x.b.moderate)) {
            keep(x.a, x.b, false, rows, x.dp, x.spare);
            back<false>(x.a.x, x.b.x, w, rows, keys, s.R, x.spare, dq_c, s.N * s.R, x.dk, dweight_n);
            keep(x.a, x.b, true, rows, x.dp, x.dp);
          }
          back<true>(x.a.power, x.b.power, w, rows, keys, s.R, x.dp, dq_c, s.N * s.R, x.dk, dweight_n);
        }
      copy_rows(x.dk, s.R, dk->typed_data() + at * s.R, s.K * s.R, keys, s.R);
      copy_rows(x.dv, s.H, dv->typed_data() + at * s.H, s.K * s.H, keys, s.H);
    }
  });
  return ffi::Error::Success();
}

auto bind() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<ffi::Buffer<ffi::PRED>>(); }

}  // namespace

extern "C" int64_t attn_zoo_additive_forward_floats(int64_t R, int64_t H) { return floats_of<ForwardPieces>(R, H); }
extern "C" int64_t attn_zoo_additive_backward_floats(int64_t R, int64_t H) { return floats_of<BackwardPieces>(R, H); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_additive_forward, forward, bind().Ret<Floats>().Ret<Floats>().Ret<Floats>().Attr<bool>("causal"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_additive_backward, backward,
                              bind().Arg<Floats>().Arg<Floats>().Arg<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>().Attr<bool>("causal"));
