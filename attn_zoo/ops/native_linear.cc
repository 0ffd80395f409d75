// The sums of linearized attention, forward and backward, for CPUs, as calls that XLA makes (its foreign function interface). See native_linear.py.
//
// With weights a_ij = q_i'k_j, times 2^(L_i - L_j) where they fade, o_i = sum_j a_ij v_j and norm_i = sum_j a_ij. Over all keys j these are two products with
// the state S = sum_j k_j v_j'. Causal ones go chunk by chunk: products with the state of the past, and those with the pairs within.
// q and k are features, as given, or made of what is given, a chunk at a time, whenever they are needed.

#include "native.h"

namespace {

// Positive random features exp(w'x - |x|^2 / 2) of x times `scale`, of queries over their largest. Choromanski et al. 2021, lemma 1.
struct Directions {
  int R, whole_R, width;  // the first R of whole_R are features, the others zeros
  const float *w, *w_t;   // [whole_R, width] and transposed; null where features are given
  float scale, largest;   // the largest exponent of a key's feature

  void make(Rows x, int rows, bool queries, const bool* valid, float* phi) const {
    product(rows, whole_R, width, {x.x, x.row, 1}, w_t, whole_R, phi, whole_R, false);
    for (int i = 0; i < rows; ++i) {
      float* phi_i = phi + i * whole_R;
      if (valid && !valid[i]) {
        std::fill(phi_i, phi_i + whole_R, 0.0f);
        continue;
      }
      float offset = 0.5f * scale * scale * dot(x.x + i * x.row, x.x + i * x.row, width);
      if (queries) {  // what is common to all features cancels
        Vector most = scale * load(phi_i);
        for (int r = 0; r < whole_R; r += LANES) most = larger(most, scale * load(phi_i + r));
        offset = most[0];
        for (int lane = 1; lane < LANES; ++lane) offset = most[lane] > offset ? most[lane] : offset;
      }
      for (int r = 0; r < whole_R; r += LANES) store(phi_i + r, exp2(LOG2E * smaller(scale * load(phi_i + r) - offset, all(largest))));
      std::fill(phi_i + R, phi_i + whole_R, 0.0f);
    }
  }

  // Gradients dx from those of the features, which are spoiled.
  void back(Rows x, int rows, bool queries, const float* phi, float* dphi, float* dx, int64_t dx_row) const {
    const Vector most = exp2(all(LOG2E * largest));
    for (int64_t n = 0; n < int64_t{rows} * whole_R; n += LANES) {
      const Vector of_exponent = load(phi + n) * load(dphi + n);
      store(dphi + n, queries ? of_exponent : load(phi + n) >= most ? Vector{} : of_exponent);
    }
    product(rows, width, whole_R, {dphi, whole_R, 1}, w, width, dx, dx_row, false);
    for (int i = 0; i < rows; ++i) {
      const float sum = total(dphi + i * whole_R, whole_R);
      for (int h = 0; h < width; h += LANES)
        store(dx + i * dx_row + h, scale * load(dx + i * dx_row + h) - scale * scale * sum * load(x.x + i * x.row + h));
    }
  }
};

struct Sums {
  int64_t B, T, S, N, K;
  int R, H, width;  // of features, values, and what stands in q and k
  bool causal;
  const float *q, *k, *v, *log_decay;
  const bool* valid;
  Directions directions;

  Rows given_q(Chunk c, int64_t n) const { return {q + (c.at * N + n) * width, N * width}; }
  Rows given_k(Chunk c, int64_t head) const { return {k + (c.at * K + head) * width, K * width}; }
  Rows q_of(Chunk c, int64_t n, float* room) const { return features(given_q(c, n), c, true, room); }
  Rows k_of(Chunk c, int64_t head, float* room) const { return features(given_k(c, head), c, false, room); }
  Rows v_of(Chunk c, int64_t head) const { return {v + (c.at * K + head) * H, K * H}; }

  Rows features(Rows x, Chunk c, bool queries, float* room) const {
    if (!directions.w) return x;
    directions.make(x, c.rows, queries, valid && !queries ? valid + c.at : nullptr, room);
    return {room, R};
  }
};

// Numbers that may be missing, as an empty array.
template <class Buffer>
auto given(Buffer& x) {
  return x.element_count() ? x.typed_data() : nullptr;
}

Sums sums_of(Floats& q, Floats& k, Floats& v, Floats& log_decay, ffi::Buffer<ffi::PRED>& valid, Floats& w, Floats& w_t, bool causal, int64_t features,
             float scale, float largest) {
  const auto of_q = q.dimensions(), of_v = v.dimensions();
  const int width = int(of_q[3]), R = w.element_count() ? int(w.dimensions()[0]) : width;
  return {of_q[0], of_q[1], of_v[1], of_q[2], of_v[2], R, int(of_v[3]), width, causal, q.typed_data(), k.typed_data(), v.typed_data(), given(log_decay),
          given(valid), {int(features), R, width, given(w), given(w_t), scale, largest}};
}

// What fading does to one chunk of one key head: L, the logarithm to base 2 of what is left of the past up to each position, and its powers.
struct Fading {
  float L[BLOCK], since_start[BLOCK], till_end[BLOCK], all;
  Fading(const Sums& s, Chunk c, int64_t head) {
    float sum = 0;
    for (int i = 0; i < BLOCK; ++i) {
      if (s.log_decay && i < c.rows) sum += s.log_decay[(c.at + i) * s.K + head] * LOG2E;
      L[i] = sum;
    }
    for (int i = 0; i < BLOCK; i += LANES) {
      store(since_start + i, exp2(load(L + i)));
      store(till_end + i, exp2(sum - load(L + i)));
    }
    all = since_start[BLOCK - 1];
  }
};

// Rows times factors, in `to`; as they are where nothing fades.
Rows faded(const Sums& s, Rows from, int rows, int width, const float* factor, float* to) {
  if (!s.log_decay) return from;
  for (int i = 0; i < rows; ++i)
    for (int n = 0; n < width; n += LANES) store(to + i * width + n, factor[i] * load(from.x + i * from.row + n));
  return {to, width};
}

// Of weights [queries, keys] of a chunk, those of keys after the query become zero, and the others fade.
void see_the_past(const Sums& s, const Fading& fading, int rows, float* weights) {
  see_the_past(rows, 0, weights);
  if (!s.log_decay) return;
  for (int i = 0; i < rows; ++i)  // the exponents of pairs that are not seen are positive, and could overflow
    for (int j = 0; j <= i; j += LANES) {
      const Vector power = exp2(smaller(fading.L[i] - load(fading.L + j), Vector{}));
      store(weights + i * BLOCK + j, power * load(weights + i * BLOCK + j));
    }
}

struct ForwardPieces {
  Room room;
  int64_t R, H;
  float *S = room.take(R * H), *z = room.take(R), *end_of_state = room.next;  // sums of k v', and of k
  float *k_t = room.take(R * BLOCK), *weights = room.take(BLOCK * BLOCK);
  float *q = room.take(BLOCK * R), *k = room.take(BLOCK * R), *faded = room.take(BLOCK * R);
};

struct BackwardPieces {
  Room room;
  int64_t R, H;
  float *S_t = room.take(R * H), *z = room.take(R), *end_of_past = room.next;  // sums of v k', and of k
  float *U = room.take(R * H), *u = room.take(R), *end_of_future = room.next;  // of q do', and of q dnorm
  float *d_t = room.take(R * BLOCK), *k_t = room.take(R * BLOCK), *v_t = room.take(H * BLOCK), *p = room.take(BLOCK * BLOCK), *dp = room.take(BLOCK * BLOCK);
  float *q = room.take(BLOCK * R), *k = room.take(BLOCK * R), *d_features = room.take(BLOCK * R);
  float *faded = room.take(BLOCK * R), *faded_do = room.take(BLOCK * H), *dnorm = room.take(BLOCK);
};

const struct Ones {
  float x[BLOCK];
  Ones() { std::fill(x, x + BLOCK, 1.0f); }
} ones;

// C[:] += sum over k of the rows B[k][:].
void add_total(int K, Rows B, int N, float* C) { product(1, N, K, {ones.x, 0, 1}, B.x, B.row, C, N, true); }

// Runs body(b, key head, pieces of memory) for every key head of every sequence.
template <class Pieces, class Body>
void over_heads(ffi::ThreadPool& pool, const Sums& s, Results& memory, Body body) {
  const int64_t size = memory->dimensions()[1];
  parallel(pool, s.B * s.K, memory->dimensions()[0], [&](int64_t task, int64_t worker) {
    body(task / s.K, task % s.K, Pieces{{memory->typed_data() + worker * size}, s.R, s.H});
  });
}

ffi::Error forward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Floats log_decay, ffi::Buffer<ffi::PRED> valid, Floats w, Floats w_t, Results o,
                   Results norm, Results memory, bool causal, int64_t features, float scale, float largest) {
  const Sums s = sums_of(q, k, v, log_decay, valid, w, w_t, causal, features, scale, largest);
  const int64_t G = s.N / s.K, o_row = s.N * s.H;
  over_heads<ForwardPieces>(pool, s, memory, [&](int64_t b, int64_t head, const ForwardPieces& x) {
    std::fill(x.S, x.end_of_state, 0.0f);
    const auto absorb = [&](Chunk c, const Fading& fading, Rows k_c) {
      const Rows k_left = faded(s, k_c, c.rows, s.R, fading.till_end, x.faded), v_c = s.v_of(c, head);
      if (s.log_decay) multiply(x.S, x.end_of_state - x.S, fading.all);
      product(s.R, s.H, c.rows, {k_left.x, 1, k_left.row}, v_c.x, v_c.row, x.S, s.H, true);
      add_total(c.rows, k_left, s.R, x.z);
    };
    if (!causal) forwards(b, s.S, [&](Chunk c) { absorb(c, Fading(s, c, head), s.k_of(c, head, x.k)); });

    forwards(b, s.T, [&](Chunk c) {
      const Fading fading(s, c, head);
      const Rows k_c = causal ? s.k_of(c, head, x.k) : Rows{}, v_c = causal ? s.v_of(c, head) : Rows{};
      if (causal) turn(k_c.x, k_c.row, c.rows, s.R, 1.0f, x.k_t);
      for (int64_t n = head * G; n < (head + 1) * G; ++n) {
        const Rows q_c = s.q_of(c, n, x.q), q_left = faded(s, q_c, c.rows, s.R, fading.since_start, x.faded);
        float *o_c = o->typed_data() + (c.at * s.N + n) * s.H, *norm_c = norm->typed_data() + c.at * s.N + n;
        product(c.rows, s.H, s.R, {q_left.x, q_left.row, 1}, x.S, s.H, o_c, o_row, false);
        for (int i = 0; i < c.rows; ++i) norm_c[i * s.N] = dot(q_left.x + i * q_left.row, x.z, s.R);
        if (!causal) continue;
        product(c.rows, BLOCK, s.R, {q_c.x, q_c.row, 1}, x.k_t, BLOCK, x.weights, BLOCK, false);
        see_the_past(s, fading, c.rows, x.weights);
        product(c.rows, s.H, c.rows, {x.weights, BLOCK, 1}, v_c.x, v_c.row, o_c, o_row, true);
        for (int i = 0; i < c.rows; ++i) norm_c[i * s.N] += total(x.weights + i * BLOCK, BLOCK);
      }
      if (causal) absorb(c, fading, k_c);
    });
  });
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Floats log_decay, ffi::Buffer<ffi::PRED> valid, Floats w, Floats w_t, Floats d_o,
                    Floats d_norm, Results dq, Results dk, Results dv, Results memory, bool causal, int64_t features, float scale, float largest) {
  const Sums s = sums_of(q, k, v, log_decay, valid, w, w_t, causal, features, scale, largest);
  const int64_t G = s.N / s.K;
  over_heads<BackwardPieces>(pool, s, memory, [&](int64_t b, int64_t head, const BackwardPieces& x) {
    std::fill(x.S_t, x.end_of_future, 0.0f);
    const auto do_of = [&](Chunk c, int64_t n) { return Rows{d_o.typed_data() + (c.at * s.N + n) * s.H, s.N * s.H}; };
    const auto read_dnorm = [&](Chunk c, int64_t n) {
      for (int i = 0; i < c.rows; ++i) x.dnorm[i] = d_norm.typed_data()[(c.at + i) * s.N + n];
    };
    // The gradients by the products q_i'k_j of a chunk: do_i'v_j + dnorm_i where j <= i, and what it faded.
    const auto weigh = [&](Chunk c, const Fading& fading, Rows do_c) {
      product(c.rows, BLOCK, s.H, {do_c.x, do_c.row, 1}, x.v_t, BLOCK, x.dp, BLOCK, false);
      for (int i = 0; i < c.rows; ++i)
        for (int j = 0; j < BLOCK; j += LANES) store(x.dp + i * BLOCK + j, load(x.dp + i * BLOCK + j) + x.dnorm[i]);
      see_the_past(s, fading, c.rows, x.dp);
    };
    // Where gradients by the features of a chunk are summed: where they are wanted, or in x.d_features, to go on from there.
    struct Target {
      float* x;
      int64_t row;
    };
    const auto target = [&](float* wanted, int64_t row) { return s.directions.w ? Target{x.d_features, s.R} : Target{wanted, row}; };

    // Gradients of queries come from the keys of their past, those of keys and values from the queries of their future.
    const auto absorb_keys = [&](Chunk c, const Fading& fading, Rows k_c) {
      const Rows k_left = faded(s, k_c, c.rows, s.R, fading.till_end, x.faded), v_c = s.v_of(c, head);
      if (s.log_decay) multiply(x.S_t, x.end_of_past - x.S_t, fading.all);
      product(s.H, s.R, c.rows, {v_c.x, 1, v_c.row}, k_left.x, k_left.row, x.S_t, s.R, true);
      add_total(c.rows, k_left, s.R, x.z);
    };
    const auto absorb_query = [&](Chunk c, const Fading& fading, Rows q_c, Rows do_c) {
      const Rows q_left = faded(s, q_c, c.rows, s.R, fading.since_start, x.faded);
      product(s.R, s.H, c.rows, {q_left.x, 1, q_left.row}, do_c.x, do_c.row, x.U, s.H, true);
      product(1, s.R, c.rows, {x.dnorm, 0, 1}, q_left.x, q_left.row, x.u, s.R, true);
    };

    // Gradients of queries.
    if (!causal) forwards(b, s.S, [&](Chunk c) { absorb_keys(c, Fading(s, c, head), s.k_of(c, head, x.k)); });
    forwards(b, s.T, [&](Chunk c) {
      const Fading fading(s, c, head);
      const Rows k_c = causal ? s.k_of(c, head, x.k) : Rows{};
      if (causal) turn(s.v_of(c, head).x, s.v_of(c, head).row, c.rows, s.H, 1.0f, x.v_t);
      for (int64_t n = head * G; n < (head + 1) * G; ++n) {
        const Rows do_c = do_of(c, n), do_left = faded(s, do_c, c.rows, s.H, fading.since_start, x.faded_do), given = s.given_q(c, n), q_c = s.q_of(c, n, x.q);
        float* dq_c = dq->typed_data() + (c.at * s.N + n) * s.width;
        const Target d = target(dq_c, given.row);
        read_dnorm(c, n);
        product(c.rows, s.R, s.H, {do_left.x, do_left.row, 1}, x.S_t, s.R, d.x, d.row, false);
        for (int i = 0; i < c.rows; ++i) {
          const float factor = x.dnorm[i] * fading.since_start[i];
          for (int r = 0; r < s.R; r += LANES) store(d.x + i * d.row + r, load(d.x + i * d.row + r) + factor * load(x.z + r));
        }
        if (causal) {
          weigh(c, fading, do_c);
          product(c.rows, s.R, c.rows, {x.dp, BLOCK, 1}, k_c.x, k_c.row, d.x, d.row, true);
        } else {
          absorb_query(c, fading, q_c, do_c);
        }
        if (s.directions.w) s.directions.back(given, c.rows, true, q_c.x, d.x, dq_c, given.row);
      }
      if (causal) absorb_keys(c, fading, k_c);
    });

    // Gradients of keys and values.
    backwards(b, s.S, [&](Chunk c) {
      const Fading fading(s, c, head);
      const Rows given = s.given_k(c, head), k_c = s.k_of(c, head, x.k), v_c = s.v_of(c, head);
      const Rows k_left = faded(s, k_c, c.rows, s.R, fading.till_end, x.faded);
      float *dk_c = dk->typed_data() + (c.at * s.K + head) * s.width, *dv_c = dv->typed_data() + (c.at * s.K + head) * s.H;
      const Target d = target(dk_c, given.row);
      product(c.rows, s.H, s.R, {k_left.x, k_left.row, 1}, x.U, s.H, dv_c, v_c.row, false);
      turn(v_c.x, v_c.row, c.rows, s.H, 1.0f, x.v_t);
      product(s.R, BLOCK, s.H, {x.U, s.H, 1}, x.v_t, BLOCK, x.d_t, BLOCK, false);
      for (int r = 0; r < s.R; ++r)
        for (int j = 0; j < BLOCK; j += LANES) store(x.d_t + r * BLOCK + j, load(x.d_t + r * BLOCK + j) + x.u[r]);
      turn_back(x.d_t, c.rows, s.R, fading.till_end, d.x, d.row);
      if (causal) {
        turn(k_c.x, k_c.row, c.rows, s.R, 1.0f, x.k_t);
        if (s.log_decay) multiply(x.U, x.end_of_future - x.U, fading.all);
        for (int64_t n = head * G; n < (head + 1) * G; ++n) {
          const Rows q_c = s.q_of(c, n, x.q), do_c = do_of(c, n);
          product(c.rows, BLOCK, s.R, {q_c.x, q_c.row, 1}, x.k_t, BLOCK, x.p, BLOCK, false);
          see_the_past(s, fading, c.rows, x.p);
          read_dnorm(c, n);
          weigh(c, fading, do_c);
          product(c.rows, s.H, c.rows, {x.p, 1, BLOCK}, do_c.x, do_c.row, dv_c, v_c.row, true);
          product(c.rows, s.R, c.rows, {x.dp, 1, BLOCK}, q_c.x, q_c.row, d.x, d.row, true);
          absorb_query(c, fading, q_c, do_c);
        }
      }
      if (s.directions.w) s.directions.back(given, c.rows, false, k_c.x, d.x, dk_c, given.row);
    });
  });
  return ffi::Error::Success();
}

auto bind() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<ffi::Buffer<ffi::PRED>>()
      .Arg<Floats>()
      .Arg<Floats>();
}

template <class Binding>
auto with_attributes(Binding binding) {
  return std::move(binding).template Attr<bool>("causal").template Attr<int64_t>("features").template Attr<float>("scale").template Attr<float>("largest");
}

}  // namespace

extern "C" int64_t attn_zoo_linear_forward_floats(int64_t R, int64_t H) { return floats_of<ForwardPieces>(R, H); }
extern "C" int64_t attn_zoo_linear_backward_floats(int64_t R, int64_t H) { return floats_of<BackwardPieces>(R, H); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_linear_forward, forward, with_attributes(bind().Ret<Floats>().Ret<Floats>().Ret<Floats>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_linear_backward, backward,
                              with_attributes(bind().Arg<Floats>().Arg<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>()));
