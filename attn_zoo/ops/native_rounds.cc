// Attention among positions that meet in rounds of sorting, forward and backward, and the buckets they are sorted by, for CPUs, as calls that XLA makes (its
// foreign function interface). See native_rounds.py.
//
// In each round queries, keys and values of a head are brought into its order. A block of 64 queries then meets keys of one stretch, and tiles are those of
// native_attention.cc. A pair that met in an earlier round is hidden; what queries have come to is carried from round to round.

#include "native.h"

namespace {

typedef uint32_t Unsigned __attribute__((vector_size(4 * LANES)));

int64_t whole(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

struct Rounds {
  int64_t B, T, N, K, R;
  int H;
  int64_t window;
  bool causal, itself;
  float scale;
  const int32_t *order, *place;  // [R, B, K, T]
  const bool* valid;

  int64_t G() const { return N / K; }
  int64_t query_row() const { return N * H; }
  int64_t key_row() const { return K * H; }
  int64_t of_round(int64_t r, int64_t b, int64_t head) const { return ((r * B + b) * K + head) * T; }
  int64_t query(int64_t b, int64_t n) const { return (b * T * N + n) * H; }
  int64_t key(int64_t b, int64_t head) const { return (b * T * K + head) * H; }
};

Rounds rounds_of(Floats& q, Floats& k, Indices& order, Indices& place, ffi::Buffer<ffi::PRED>& valid, int64_t window, bool causal, bool itself, float scale) {
  const auto of_q = q.dimensions();
  return {of_q[0], of_q[1], of_q[2], k.dimensions()[2], order.dimensions()[0], int(of_q[3]), window, causal, itself, scale, order.typed_data(), place.typed_data(),
          valid.element_count() ? valid.typed_data() : nullptr};
}

// body(row i there, row i in order) for rows of a head in a round's order; those a few further on are fetched meanwhile, for they are far apart.
template <class There, class Body>
void in_order(There there, int64_t there_row, const int32_t* order, int64_t rows, int H, Body body) {
  constexpr int64_t AHEAD = 8;
  for (int64_t i = 0; i < rows; ++i) {
    for (int h = 0; i + AHEAD < rows && h < H; h += 16) __builtin_prefetch(there + order[i + AHEAD] * there_row + h);
    body(there + order[i] * there_row, i * H);
  }
}

void gather(const float* from, int64_t row, const int32_t* order, int64_t rows, int H, float* to) {
  in_order(from, row, order, rows, H, [&](const float* there, int64_t here) { std::memcpy(to + here, there, sizeof(float) * H); });
}

void scatter(const float* from, const int32_t* order, int64_t rows, int H, float* to, int64_t row) {
  in_order(to, row, order, rows, H, [&](float* there, int64_t here) { std::memcpy(there, from + here, sizeof(float) * H); });
}

void scatter_sum(const float* from, const int32_t* order, int64_t rows, int H, float* to, int64_t row) {
  in_order(to, row, order, rows, H, [&](float* there, int64_t here) {
    for (int h = 0; h < H; h += LANES) store(there + h, load(there + h) + load(from + here + h));
  });
}

void clear(float* x, int64_t row, int64_t rows, int H) {
  for (int64_t i = 0; i < rows; ++i) std::fill_n(x + i * row, H, 0.0f);
}

// A round of one head: which position stands where in its order, and the places that those have in it and in the rounds before it.
struct Round {
  int64_t number, length;  // of this round, and of an array of places
  int32_t *position, *places;

  void read(const Rounds& s, int64_t b, int64_t head, int64_t r) {
    number = r;
    std::copy_n(s.order + s.of_round(r, b, head), s.T, position);
    for (int64_t n = 0; n <= r; ++n)
      for (int64_t t = 0; t < s.T; ++t) places[n * length + t] = s.place[s.of_round(n, b, head) + position[t]];
  }

  // Hides pairs of the queries and keys from these two on that do not see each other, or did in an earlier round.
  void hide(const Rounds& s, int64_t b, int64_t first_query, int64_t first_key, int keys, float* scores) const {
    const auto integers = [](const int32_t* x) { return reinterpret_cast<Integers>(load(reinterpret_cast<const float*>(x))); };
    for (int i = 0; i < BLOCK; i += LANES) {
      const Integers query = integers(position + first_query + i);
      for (int j = 0; j < keys; ++j) {
        const int32_t key = position[first_key + j];
        const auto met = [&](int64_t n) {
          const int32_t* place = places + n * length;
          return reinterpret_cast<Unsigned>(integers(place + first_query + i) - place[first_key + j]) <= 1u;
        };
        Integers seen = met(number);
        for (int64_t n = 0; n < number; ++n) seen &= ~met(n);
        if (s.causal) seen &= query >= key;
        if (!s.itself) seen &= query != key;
        if (s.valid && !s.valid[b * s.T + key]) seen = Integers{};
        store(scores + j * BLOCK + i, seen ? load(scores + j * BLOCK + i) : all(HIDDEN));
      }
    }
  }
};

// body(first key, how many) for all the keys that 64 queries, or fewer, from this one on may meet.
template <class Body>
void over_keys(const Rounds& s, int64_t first, int rows, Body body) {
  const int64_t end = std::min(s.T, ((first + rows - 1) / s.window + 1) * s.window);
  for (int64_t j = std::max<int64_t>(0, first / s.window - 1) * s.window; j < end; j += BLOCK) body(j, int(std::min<int64_t>(BLOCK, end - j)));
}

// The working memory of one worker; `keys` is T H.
struct Pieces {
  Room room;
  int64_t T, H, R, G, keys = T * H, tile = H * BLOCK;
  float *top = room.take(G * T), *sum = room.take(G * T), *k = room.take(keys), *v = room.take(keys);  // sum: the total of the weights, or delta
  float *position = room.take(whole(T)), *places = room.take(R * whole(T));
  float *q_t = room.take(tile), *o_t = room.take(tile), *rows = room.take(tile), *p = room.take(BLOCK * BLOCK);
  float *top_i = room.take(BLOCK), *sum_i = room.take(BLOCK), *ones = room.take(BLOCK);
  float *dk = room.next, *dv = dk, *do_t = dk, *do_i = dk, *ds = dk;

  void take_gradients() {
    dk = room.take(keys), dv = room.take(keys), do_t = room.take(tile), do_i = room.take(tile), ds = room.take(BLOCK * BLOCK);
  }
};

int64_t floats(int64_t T, int64_t H, int64_t R, int64_t G, bool gradients) {
  static float nothing;
  Pieces x{{&nothing}, T, H, R, G};
  if (gradients) x.take_gradients();
  return x.room.next - &nothing;
}

// Runs body(b, key head, pieces of memory) for every key head of every sequence.
template <class Body>
void over_heads(ffi::ThreadPool& pool, const Rounds& s, Results& memory, Body body) {
  const int64_t size = memory->dimensions()[1];
  parallel(pool, s.B * s.K, memory->dimensions()[0], [&](int64_t task, int64_t worker) {
    Pieces x{{memory->typed_data() + worker * size}, s.T, s.H, s.R, s.G()};
    std::fill_n(x.position, (s.R + 1) * whole(s.T), 0.0f);  // beyond T too, where tiles end
    std::fill_n(x.ones, BLOCK, 1.0f);
    body(task / s.K, task % s.K, x);
  });
}

// body(round, first query, how many) for the blocks of queries of each round, whose keys and values stand in x; after(round) after them.
template <class Body, class After>
void over_rounds(const Rounds& s, Floats& k, Floats& v, int64_t b, int64_t head, const Pieces& x, Body body, After after) {
  Round round{0, whole(s.T), reinterpret_cast<int32_t*>(x.position), reinterpret_cast<int32_t*>(x.places)};
  for (int64_t r = 0; r < s.R; ++r) {
    round.read(s, b, head, r);
    gather(k.typed_data() + s.key(b, head), s.key_row(), round.position, s.T, s.H, x.k);
    gather(v.typed_data() + s.key(b, head), s.key_row(), round.position, s.T, s.H, x.v);
    for (int64_t first = 0; first < s.T; first += BLOCK) body(round, first, int(std::min<int64_t>(BLOCK, s.T - first)));
    after(round);
  }
}

ffi::Error forward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Indices order, Indices place, ffi::Buffer<ffi::PRED> valid, Results o, Results lse,
                   Results memory, int64_t window, bool causal, bool itself, float scale) {
  const Rounds s = rounds_of(q, k, order, place, valid, window, causal, itself, scale);
  over_heads(pool, s, memory, [&](int64_t b, int64_t head, const Pieces& x) {
    const Softmax softmax{s.H, x.o_t, x.top_i, x.sum_i};
    std::fill_n(x.top, s.G() * s.T, HIDDEN / 2);
    std::fill_n(x.sum, s.G() * s.T, 0.0f);
    for (int64_t g = 0; g < s.G(); ++g) clear(o->typed_data() + s.query(b, head * s.G() + g), s.query_row(), s.T, s.H);
    const auto attend = [&](const Round& round, int64_t first, int rows) {
      const int32_t* position = round.position + first;
      for (int64_t g = 0; g < s.G(); ++g) {
        const int64_t at = s.query(b, head * s.G() + g);
        float *o_g = o->typed_data() + at, *top = x.top + g * s.T, *sum = x.sum + g * s.T;
        gather(q.typed_data() + at, s.query_row(), position, rows, s.H, x.rows);
        turn(x.rows, s.H, rows, s.H, s.scale * LOG2E, x.q_t);
        gather(o_g, s.query_row(), position, rows, s.H, x.rows);
        turn(x.rows, s.H, rows, s.H, 1.0f, x.o_t);
        for (int i = 0; i < BLOCK; ++i) {
          x.top_i[i] = i < rows ? top[position[i]] : HIDDEN / 2;
          x.sum_i[i] = i < rows ? sum[position[i]] : 0.0f;
        }
        over_keys(s, first, rows, [&](int64_t j, int keys) {
          product(keys, BLOCK, s.H, {x.k + j * s.H, s.H, 1}, x.q_t, BLOCK, x.p, BLOCK, false);
          round.hide(s, b, first, j, keys, x.p);
          softmax.add(x.p, keys, {x.v + j * s.H, s.H});
        });
        for (int i = 0; i < rows; ++i) top[position[i]] = x.top_i[i], sum[position[i]] = x.sum_i[i];
        turn_back(x.o_t, rows, s.H, x.ones, x.rows, s.H);
        scatter(x.rows, position, rows, s.H, o_g, s.query_row());
      }
    };
    over_rounds(s, k, v, b, head, x, attend, [](const Round&) {});
    for (int64_t g = 0; g < s.G(); ++g)
      for (int64_t t = 0; t < s.T; ++t) {
        const int64_t n = head * s.G() + g;
        lse->typed_data()[(b * s.T + t) * s.N + n] = logarithm(x.top[g * s.T + t], x.sum[g * s.T + t]);
        multiply(o->typed_data() + s.query(b, n) + t * s.query_row(), s.H, inverse(x.sum[g * s.T + t]));
      }
  });
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Indices order, Indices place, ffi::Buffer<ffi::PRED> valid, Floats o, Floats lse,
                    Floats d_o, Floats d_lse, Results dq, Results dk, Results dv, Results memory, int64_t window, bool causal, bool itself, float scale) {
  const Rounds s = rounds_of(q, k, order, place, valid, window, causal, itself, scale);
  over_heads(pool, s, memory, [&](int64_t b, int64_t head, Pieces& x) {
    x.take_gradients();
    float *dk_head = dk->typed_data() + s.key(b, head), *dv_head = dv->typed_data() + s.key(b, head);
    clear(dk_head, s.key_row(), s.T, s.H);
    clear(dv_head, s.key_row(), s.T, s.H);
    std::fill_n(x.dk, s.T * s.H, 0.0f);
    std::fill_n(x.dv, s.T * s.H, 0.0f);
    for (int64_t g = 0; g < s.G(); ++g) {
      const int64_t n = head * s.G() + g, at = s.query(b, n);
      clear(dq->typed_data() + at, s.query_row(), s.T, s.H);
      for (int64_t t = 0; t < s.T; ++t) {
        const int64_t of_lse = (b * s.T + t) * s.N + n, row = at + t * s.query_row();
        const float top = x.top[g * s.T + t] = top_of(lse.typed_data()[of_lse]);
        x.sum[g * s.T + t] = top != -HIDDEN ? dot(d_o.typed_data() + row, o.typed_data() + row, s.H) - d_lse.typed_data()[of_lse] : 0.0f;
      }
    }
    const auto attend = [&](const Round& round, int64_t first, int rows) {
      const int32_t* position = round.position + first;
      for (int64_t g = 0; g < s.G(); ++g) {
        const int64_t at = s.query(b, head * s.G() + g);
        gather(q.typed_data() + at, s.query_row(), position, rows, s.H, x.rows);
        gather(d_o.typed_data() + at, s.query_row(), position, rows, s.H, x.do_i);
        turn(x.rows, s.H, rows, s.H, s.scale * LOG2E, x.q_t);
        turn(x.do_i, s.H, rows, s.H, 1.0f, x.do_t);
        for (int i = 0; i < BLOCK; ++i) {
          x.top_i[i] = i < rows ? x.top[g * s.T + position[i]] : -HIDDEN;
          x.sum_i[i] = i < rows ? x.sum[g * s.T + position[i]] : 0.0f;
        }
        float* dq_t = x.o_t;
        std::fill_n(dq_t, s.H * BLOCK, 0.0f);
        over_keys(s, first, rows, [&](int64_t j, int keys) {
          const float *k_j = x.k + j * s.H, *v_j = x.v + j * s.H;
          product(keys, BLOCK, s.H, {k_j, s.H, 1}, x.q_t, BLOCK, x.p, BLOCK, false);
          round.hide(s, b, first, j, keys, x.p);
          product(keys, BLOCK, s.H, {v_j, s.H, 1}, x.do_t, BLOCK, x.ds, BLOCK, false);
          weigh_back(x.p, x.ds, keys, x.top_i, x.sum_i, s.scale);
          product(keys, s.H, rows, {x.p, BLOCK, 1}, x.do_i, s.H, x.dv + j * s.H, s.H, true);
          product(keys, s.H, rows, {x.ds, BLOCK, 1}, x.rows, s.H, x.dk + j * s.H, s.H, true);
          product(s.H, BLOCK, keys, {k_j, 1, s.H}, x.ds, BLOCK, dq_t, BLOCK, true);
        });
        turn_back(dq_t, rows, s.H, x.ones, x.rows, s.H);
        scatter_sum(x.rows, position, rows, s.H, dq->typed_data() + at, s.query_row());
      }
    };
    over_rounds(s, k, v, b, head, x, attend, [&](const Round& round) {
      scatter_sum(x.dk, round.position, s.T, s.H, dk_head, s.key_row());
      scatter_sum(x.dv, round.position, s.T, s.H, dv_head, s.key_row());
      std::fill_n(x.dk, s.T * s.H, 0.0f);
      std::fill_n(x.dv, s.T * s.H, 0.0f);
    });
  });
  return ffi::Error::Success();
}

struct HashPieces {
  Room room;
  int64_t H, directions;
  float *k_t = room.take(H * BLOCK), *rotated = room.take(directions * BLOCK);
};

// The bucket of each position in each round: which of the rotated coordinates and, after them, their opposites is largest, for one or two groups of
// coordinates. k [B, T, K, whole vectors], rotations [R, K, H, first + second].
ffi::Error buckets(ffi::ThreadPool pool, Floats k, Floats rotations, ffi::ResultBuffer<ffi::S32> bucket, Results memory, int64_t first, int64_t second) {
  const auto of_k = k.dimensions(), of_rotations = rotations.dimensions();
  const int64_t B = of_k[0], T = of_k[1], K = of_k[2], row = K * of_k[3], R = of_rotations[0], H = of_rotations[2], C = of_rotations[3];
  const int64_t blocks = whole(T) / BLOCK, size = memory->dimensions()[1];
  parallel(pool, B * K * blocks, memory->dimensions()[0], [&](int64_t task, int64_t worker) {
    const int64_t b = task / blocks / K, head = task / blocks % K, t = task % blocks * BLOCK;
    const int rows = int(std::min<int64_t>(BLOCK, T - t));
    const HashPieces x{{memory->typed_data() + worker * size}, of_k[3], std::max(first, second)};
    turn(k.typed_data() + (b * T + t) * row + head * of_k[3], row, rows, int(of_k[3]), 1.0f, x.k_t);
    for (int64_t r = 0; r < R; ++r) {
      const float* directions = rotations.typed_data() + (r * K + head) * H * C;
      int32_t found[BLOCK] = {};
      const auto add_nearest = [&](const float* directions, int count, int step) {
        product(count, BLOCK, int(H), {directions, 1, C}, x.k_t, BLOCK, x.rotated, BLOCK, false);
        for (int i = 0; i < BLOCK; i += LANES) {
          Vector most = load(x.rotated + i);
          Integers at{};
          const auto compare = [&](Vector value, int number) {
            const Integers better = value > most;
            most = better ? value : most;
            at = better ? number - Integers{} : at;
          };
          for (int c = 1; c < count; ++c) compare(load(x.rotated + c * BLOCK + i), c);
          for (int c = 0; c < count; ++c) compare(-load(x.rotated + c * BLOCK + i), count + c);
          for (int lane = 0; lane < LANES; ++lane) found[i + lane] += step * at[lane];
        }
      };
      add_nearest(directions, int(first), 1);
      if (second) add_nearest(directions + first, int(second), int(2 * first));
      std::copy_n(found, rows, bucket->typed_data() + ((r * B + b) * K + head) * T + t);
    }
  });
  return ffi::Error::Success();
}

auto bind() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Indices>().Arg<Indices>().Arg<ffi::Buffer<ffi::PRED>>();
}

template <class Binding>
auto with_attributes(Binding binding) {
  return std::move(binding).template Attr<int64_t>("window").template Attr<bool>("causal").template Attr<bool>("itself").template Attr<float>("scale");
}

}  // namespace

extern "C" int64_t attn_zoo_rounds_forward_floats(int64_t T, int64_t H, int64_t R, int64_t G) { return floats(T, H, R, G, false); }
extern "C" int64_t attn_zoo_rounds_backward_floats(int64_t T, int64_t H, int64_t R, int64_t G) { return floats(T, H, R, G, true); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_rounds_forward, forward, with_attributes(bind().Ret<Floats>().Ret<Floats>().Ret<Floats>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_rounds_backward, backward,
                              with_attributes(bind().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>()));

extern "C" int64_t attn_zoo_buckets_floats(int64_t H, int64_t directions) { return floats_of<HashPieces>(H, directions); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_buckets, buckets,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Ret<ffi::Buffer<ffi::S32>>().Ret<Floats>().Attr<int64_t>("first").Attr<int64_t>("second"));
