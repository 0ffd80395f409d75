// Attention of each query over its own list of keys, forward and backward, for CPUs, as calls that XLA makes (its foreign function interface); and the lists
// of keys with the largest scores. See native_gathered.py.
//
// Keys and values of a head are copied together first, so that what a list names lies in the cache; their gradients are summed there too.

#include <functional>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "native.h"

namespace {

using Bits = ffi::Buffer<ffi::PRED>;

int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

struct Lists {
  int64_t B, T, S, N, K, R;
  int H;
  int64_t of_sequence, of_head;  // how far apart the lists of two sequences, or heads, are: 0 where they share them
  const int32_t* index;
  const bool *seen, *valid;

  int64_t at(int64_t b, int64_t head, int64_t t) const { return b * of_sequence + head * of_head + t * R; }
};

Lists lists_of(Floats& q, Floats& k, Indices& index, Bits& seen, Bits& valid) {
  const auto of_q = q.dimensions(), of_k = k.dimensions(), of_index = index.dimensions();
  const int64_t T = of_q[1], R = of_index[3], heads = of_index[1];
  return {of_q[0], T, of_k[1], of_q[2], of_k[2], R, int(of_q[3]), of_index[0] > 1 ? heads * T * R : 0, heads > 1 ? T * R : 0,
          index.typed_data(), seen.typed_data(), valid.element_count() ? valid.typed_data() : nullptr};
}

// What one query lists: its seen and valid keys, the last of them again up to a whole vector, and numbers of each.
struct Listed {
  float* room;
  int64_t R;
  int n = 0;
  int32_t *key = reinterpret_cast<int32_t*>(room), *place = key + R;
  float *p = room + 2 * R, *dp = p + R, *factor = dp + R;

  void read(const Lists& s, int64_t b, int64_t head, int64_t t, const float* factors) {
    const int64_t at = s.at(b, head, t);
    n = 0;
    for (int64_t r = 0; r < s.R; ++r) {
      const int32_t j = s.index[at + r];
      key[n] = j, place[n] = int32_t(r);
      n += s.seen[at + r] && j >= 0 && j < s.S && (!s.valid || s.valid[b * s.S + j]);
    }
    for (int64_t i = n; n && i < whole(n); ++i) key[i] = key[n - 1];
    if (factors)
      for (int i = 0; i < n; ++i) factor[i] = factors[place[i]];
  }
};

// The working memory of one worker: `keys` = S H numbers of a head, and a list of R.
struct ForwardPieces {
  Room room;
  int64_t keys, R;
  float *k = room.take(keys), *v = room.take(keys), *list = room.take(5 * whole(R));
};

struct BackwardPieces {
  Room room;
  int64_t keys, R;
  float *k = room.take(keys), *v = room.take(keys), *dk = room.take(keys), *dv = room.take(keys), *list = room.take(5 * whole(R));
};

// out[i] = x'rows[key[i]], up to a whole vector of them.
void score(const float* x, const float* rows, int H, const Listed& list, float* out) {
  for (int i = 0; i < list.n; i += LANES) {
    const float* row[LANES];
    Vector sum[LANES] = {};
    for (int l = 0; l < LANES; ++l) row[l] = rows + int64_t{list.key[i + l]} * H;
    for (int h = 0; h < H; h += LANES) {
      const Vector x_h = load(x + h);
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) sum[l] += x_h * load(row[l] + h);
    }
    store(out + i, sums_of_lanes<1>(sum, std::make_index_sequence<LANES>()));
  }
}

// list.p, products of the query and keys, become softmax weights; returns the logarithm of the sum that they are divided by.
float weigh(const Listed& list, float scale) {
  const int n = int(whole(list.n));
  for (int i = 0; i < n; i += LANES) store(list.p + i, scale * load(list.p + i));
  Vector most = load(list.p);
  for (int i = 0; i < n; i += LANES) most = larger(most, load(list.p + i));
  float top = most[0];
  for (int lane = 1; lane < LANES; ++lane) top = most[lane] > top ? most[lane] : top;
  for (int i = 0; i < n; i += LANES) store(list.p + i, exp2(LOG2E * (load(list.p + i) - top)));
  for (int i = list.n; i < n; ++i) list.p[i] = 0;
  const float sum = total(list.p, n);
  for (int i = 0; i < n; i += LANES) store(list.p + i, load(list.p + i) / sum);
  return top + std::log(sum);
}

// out[:] = sum over i of weight[i] rows[key[i]][:], of V vectors.
template <int V>
void mix(const float* weight, const float* rows, int H, const Listed& list, float* out) {
  Vector even[V] = {}, odd[V] = {};
  int i = 0;
  for (; i + 2 <= list.n; i += 2) {
    const float *a = rows + int64_t{list.key[i]} * H, *b = rows + int64_t{list.key[i + 1]} * H;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) even[v] += weight[i] * load(a + v * LANES), odd[v] += weight[i + 1] * load(b + v * LANES);
  }
  if (i < list.n)
    for (int v = 0; v < V; ++v) even[v] += weight[i] * load(rows + int64_t{list.key[i]} * H + v * LANES);
  for (int v = 0; v < V; ++v) store(out + v * LANES, even[v] + odd[v]);
}

void mix(const float* weight, const float* rows, int H, const Listed& list, float* out) {
  int h = 0;
  for (; h + 4 * LANES <= H; h += 4 * LANES) mix<4>(weight, rows + h, H, list, out + h);
  for (; h < H; h += LANES) mix<1>(weight, rows + h, H, list, out + h);
}

// rows[key[i]][:] += weight[i] x[:].
void spread(const float* weight, const float* x, int H, const Listed& list, float* rows) {
  for (int i = 0; i < list.n; ++i) {
    float* row = rows + int64_t{list.key[i]} * H;
    for (int h = 0; h < H; h += LANES) store(row + h, load(row + h) + weight[i] * load(x + h));
  }
}

// Runs body(b, key head, pieces of memory with its keys and values, a list) for every key head of every sequence.
template <class Pieces, class Body>
void over_heads(ffi::ThreadPool& pool, const Lists& s, Floats& k, Floats& v, Results& memory, Body body) {
  const int64_t size = memory->dimensions()[1];
  parallel(pool, s.B * s.K, memory->dimensions()[0], [&](int64_t task, int64_t worker) {
    const int64_t b = task / s.K, head = task % s.K, first = (b * s.S * s.K + head) * s.H;
    const Pieces x{{memory->typed_data() + worker * size}, s.S * s.H, s.R};
    copy_rows(k.typed_data() + first, s.K * s.H, x.k, s.H, s.S, s.H);
    copy_rows(v.typed_data() + first, s.K * s.H, x.v, s.H, s.S, s.H);
    body(b, head, x, Listed{x.list, whole(s.R)});
  });
}

ffi::Error forward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Indices index, Bits seen, Bits valid, Floats factor, Results o, Results lse,
                   Results memory, float scale) {
  const Lists s = lists_of(q, k, index, seen, valid);
  const int64_t G = s.N / s.K;
  over_heads<ForwardPieces>(pool, s, k, v, memory, [&](int64_t b, int64_t head, const ForwardPieces& x, Listed list) {
    for (int64_t t = 0; t < s.T; ++t) {
      list.read(s, b, head, t, factor.element_count() ? factor.typed_data() + ((b * s.K + head) * s.T + t) * s.R : nullptr);
      for (int64_t n = head * G; n < (head + 1) * G; ++n) {
        const int64_t row = (b * s.T + t) * s.N + n;
        float* o_t = o->typed_data() + row * s.H;
        if (!list.n) {
          std::fill(o_t, o_t + s.H, 0.0f);
          lse->typed_data()[row] = -std::numeric_limits<float>::infinity();
          continue;
        }
        score(q.typed_data() + row * s.H, x.k, s.H, list, list.p);
        lse->typed_data()[row] = weigh(list, scale);
        if (factor.element_count())
          for (int i = 0; i < list.n; ++i) list.p[i] *= list.factor[i];
        mix(list.p, x.v, s.H, list, o_t);
      }
    }
  });
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Indices index, Bits seen, Bits valid, Floats factor, Floats o, Floats d_o, Floats d_lse,
                    Results dq, Results dk, Results dv, Results d_factor, Results memory, float scale) {
  const Lists s = lists_of(q, k, index, seen, valid);
  const int64_t G = s.N / s.K;
  over_heads<BackwardPieces>(pool, s, k, v, memory, [&](int64_t b, int64_t head, const BackwardPieces& x, Listed list) {
    std::fill(x.dk, x.list, 0.0f);
    for (int64_t t = 0; t < s.T; ++t) {
      const int64_t at = ((b * s.K + head) * s.T + t) * s.R;
      const bool factors = factor.element_count();
      list.read(s, b, head, t, factors ? factor.typed_data() + at : nullptr);
      if (factors) std::fill(d_factor->typed_data() + at, d_factor->typed_data() + at + s.R, 0.0f);
      for (int64_t n = head * G; n < (head + 1) * G; ++n) {
        const int64_t row = (b * s.T + t) * s.N + n;
        const float *q_t = q.typed_data() + row * s.H, *do_t = d_o.typed_data() + row * s.H;
        float* dq_t = dq->typed_data() + row * s.H;
        if (!list.n) {
          std::fill(dq_t, dq_t + s.H, 0.0f);
          continue;
        }
        score(q_t, x.k, s.H, list, list.p);
        score(do_t, x.v, s.H, list, list.dp);
        const float delta = dot(do_t, o.typed_data() + row * s.H, s.H) - d_lse.typed_data()[row];
        weigh(list, scale);  // anew, and not from the logsumexp: differences of large scores are exact
        if (factors)
          for (int i = 0; i < list.n; ++i) {
            d_factor->typed_data()[at + list.place[i]] += list.p[i] * list.dp[i];
            list.dp[i] *= list.factor[i];
          }
        for (int i = 0; i < list.n; i += LANES) store(list.dp + i, scale * load(list.p + i) * (load(list.dp + i) - delta));
        if (factors)
          for (int i = 0; i < list.n; ++i) list.p[i] *= list.factor[i];
        mix(list.dp, x.k, s.H, list, dq_t);
        spread(list.dp, q_t, s.H, list, x.dk);
        spread(list.p, do_t, s.H, list, x.dv);
      }
    }
    const int64_t first = (b * s.S * s.K + head) * s.H;
    copy_rows(x.dk, s.H, dk->typed_data() + first, s.K * s.H, s.S, s.H);
    copy_rows(x.dv, s.H, dv->typed_data() + first, s.K * s.H, s.S, s.H);
  });
  return ffi::Error::Success();
}

// Which lanes of a comparison hold, lane l as bit l.
inline uint64_t bits(Integers lanes) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(lanes), reinterpret_cast<__m512i>(lanes));
#elif defined(__AVX__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(lanes));
#else
  uint64_t found = 0;
  for (int l = 0; l < LANES; ++l) found |= uint64_t(lanes[l] != 0) << l;
  return found;
#endif
}

// A score and its key as one number, larger the better: equal scores go by position, and what is no number counts as largest, so that it is not lost in silence.
int64_t ranked(float score, int32_t key) {
  int32_t bits = std::numeric_limits<int32_t>::max();
  if (score == score) {
    score += 0.0f;  // no negative zero
    std::memcpy(&bits, &score, sizeof bits);
    bits ^= (bits >> 31) & std::numeric_limits<int32_t>::max();
  }
  return int64_t{bits} << 32 | uint32_t(~key);
}

int32_t key_of(int64_t ranked) { return ~int32_t(uint32_t(ranked)); }

float score_of(int64_t ranked) {
  int32_t bits = int32_t(ranked >> 32);
  bits ^= (bits >> 31) & std::numeric_limits<int32_t>::max();
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

// The keys of largest score of one query so far: more than `wanted` of them at times, those that are too many thrown out when there is no room.
struct Best {
  static constexpr int SPARE = 32;
  static int64_t room_of(int64_t wanted) { return wanted + std::max<int64_t>(wanted, SPARE) + BLOCK; }

  int wanted;
  int64_t* kept;  // room for room_of(wanted)
  int n = 0;
  float least = -std::numeric_limits<float>::infinity();  // what a further one must surpass

  // scores[j] of keys first + j, of which there are `count` up to BLOCK.
  void add(const float* scores, int count, int32_t first) {
    uint64_t better = 0;
    for (int j = 0; j < BLOCK; j += LANES) better |= bits(~(load(scores + j) <= all(least))) << j;
    if (count < BLOCK) better &= (uint64_t{1} << count) - 1;
    for (; better; better &= better - 1) {
      const int j = __builtin_ctzll(better);
      kept[n++] = ranked(scores[j], first + j);
    }
    if (n < wanted + std::max(wanted, SPARE)) return;
    std::nth_element(kept, kept + wanted - 1, kept + n, std::greater<int64_t>());
    n = wanted;
    const float score = score_of(kept[wanted - 1]);
    if (score == score) least = score;
  }

  void sort() {
    std::sort(kept, kept + n, std::greater<int64_t>());
    n = std::min(n, wanted);
  }
};

struct BestPieces {
  Room room;
  int64_t R, H;
  float *k_t = room.take(H * BLOCK), *scores = room.take(BLOCK * BLOCK), *kept = room.take(2 * BLOCK * Best::room_of(R));  // ranks of 64 bits
};

// index[b, n, t, :] are the keys of largest score, best first, -1 where there are no more that may be seen.
ffi::Error best_keys(ffi::ThreadPool pool, Floats q, Floats k, Bits valid, ffi::ResultBuffer<ffi::S32> index, Results memory, bool causal) {
  const auto of_q = q.dimensions(), of_k = k.dimensions();
  const int64_t T = of_q[1], N = of_q[2], S = of_k[1], K = of_k[2], R = index->dimensions()[3], chunks = (T + BLOCK - 1) / BLOCK;
  const int64_t size = memory->dimensions()[1];
  const int H = int(of_q[3]);
  parallel(pool, of_q[0] * N * chunks, memory->dimensions()[0], [&](int64_t task, int64_t worker) {
    const int64_t b = task / chunks / N, n = task / chunks % N, from = task % chunks * BLOCK;
    const int rows = int(std::min<int64_t>(BLOCK, T - from));
    const BestPieces x{{memory->typed_data() + worker * size}, R, H};
    Best best[BLOCK];
    for (int i = 0; i < rows; ++i)
      best[i] = {int(R), reinterpret_cast<int64_t*>(x.kept) + i * Best::room_of(R)};
    const int64_t end = causal ? std::min(S, from + rows) : S;
    for (int64_t first = 0; first < end; first += BLOCK) {
      const int keys = int(std::min<int64_t>(BLOCK, end - first));
      turn(k.typed_data() + ((b * S + first) * K + n / (N / K)) * H, K * H, keys, H, 1.0f, x.k_t);
      product(rows, BLOCK, H, {q.typed_data() + ((b * T + from) * N + n) * H, N * H, 1}, x.k_t, BLOCK, x.scores, BLOCK, false);
      for (int i = 0; i < rows; ++i) {
        float* scores = x.scores + i * BLOCK;
        if (valid.element_count())
          for (int j = 0; j < keys; ++j) scores[j] = valid.typed_data()[b * S + first + j] ? scores[j] : -std::numeric_limits<float>::infinity();
        best[i].add(scores, causal ? int(std::min<int64_t>(keys, from + i + 1 - first)) : keys, int32_t(first));
      }
    }
    for (int i = 0; i < rows; ++i) {
      best[i].sort();
      int32_t* to = index->typed_data() + ((b * N + n) * T + from + i) * R;
      for (int r = 0; r < R; ++r) to[r] = r < best[i].n ? key_of(best[i].kept[r]) : -1;
    }
  });
  return ffi::Error::Success();
}

auto bind() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Indices>().Arg<Bits>().Arg<Bits>().Arg<Floats>();
}

}  // namespace

extern "C" int64_t attn_zoo_gathered_forward_floats(int64_t keys, int64_t R) { return floats_of<ForwardPieces>(keys, R); }
extern "C" int64_t attn_zoo_gathered_backward_floats(int64_t keys, int64_t R) { return floats_of<BackwardPieces>(keys, R); }
extern "C" int64_t attn_zoo_best_keys_floats(int64_t R, int64_t H) { return floats_of<BestPieces>(R, H); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_gathered_forward, forward, bind().Ret<Floats>().Ret<Floats>().Ret<Floats>().Attr<float>("scale"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    attn_zoo_gathered_backward, backward,
    bind().Arg<Floats>().Arg<Floats>().Arg<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>().Attr<float>("scale"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_best_keys, best_keys,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Bits>().Ret<ffi::Buffer<ffi::S32>>().Ret<Floats>().Attr<bool>("causal"));
