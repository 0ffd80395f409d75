// The delta rule in chunks, forward and backward, for CPUs, as calls that XLA makes (its foreign function interface). See native_delta.py.
//
// With S the state before a chunk, its corrections u solve (I + A) U = diag(beta) (V - K S), A_ij = beta_i k_i'k_j for j < i; then
// o_i = S'q_i + sum_{j <= i} (q_i'k_j) u_j, and the state after it is S + K'U (ops.delta). The system is solved row by row.

#include "native.h"

namespace {

struct Rule {
  int64_t B, T, N, K;
  int R, H;
  const float *q, *k, *v, *beta;
  Rows q_of(Chunk c, int64_t n) const { return {q + (c.at * N + n) * R, N * R}; }
  Rows k_of(Chunk c, int64_t head) const { return {k + (c.at * K + head) * R, K * R}; }
  Rows v_of(Chunk c, int64_t head) const { return {v + (c.at * K + head) * H, K * H}; }
  float beta_of(Chunk c, int64_t head, int i) const { return beta[(c.at + i) * K + head]; }
};

Rule rule_of(const Floats& q, const Floats& k, const Floats& v, const Floats& beta) {
  const auto of_q = q.dimensions(), of_v = v.dimensions();
  return {of_q[0], of_q[1], of_q[2], of_v[2], int(of_q[3]), int(of_v[3]), q.typed_data(), k.typed_data(), v.typed_data(), beta.typed_data()};
}

struct ForwardPieces {
  Room room;
  int64_t R, H;
  float *S = room.take(R * H), *k_t = room.take(R * BLOCK), *overlap = room.take(BLOCK * BLOCK), *weights = room.take(BLOCK * BLOCK);
};

struct BackwardPieces {
  Room room;
  int64_t R, H;
  float *S_t = room.take(H * R);  // the state of the past, transposed
  float *U = room.take(R * H), *U_t = room.take(H * R), *end_of_states = room.next;  // gradients by the state, of the future
  float *k_t = room.take(R * BLOCK), *u_t = room.take(H * BLOCK), *overlap = room.take(BLOCK * BLOCK);
  float *p = room.take(BLOCK * BLOCK), *dp = room.take(BLOCK * BLOCK);
  float *y = room.take(BLOCK * H), *yS = room.take(BLOCK * R);
};

// Rows of U, which hold the right side, become the solution of (I + A) U = that; minus_a is -A.
void solve(int rows, const float* minus_a, int H, float* U, int64_t row) {
  for (int first = 0; first < rows; first += ROWS) {
    product(std::min(ROWS, rows - first), H, first, {minus_a + first * BLOCK, BLOCK, 1}, U, row, U + first * row, row, true);
    for (int i = first + 1; i < std::min(first + ROWS, rows); ++i)
      product(1, H, i - first, {minus_a + i * BLOCK + first, BLOCK, 1}, U + first * row, row, U + i * row, row, true);
  }
}

// The same of (I + A)'.
void solve_transposed(int rows, const float* minus_a, int H, float* U, int64_t row) {
  for (int first = (rows - 1) / ROWS * ROWS; first >= 0; first -= ROWS) {
    const int end = std::min(first + ROWS, rows);
    product(end - first, H, rows - end, {minus_a + end * BLOCK + first, 1, BLOCK}, U + end * row, row, U + first * row, row, true);
    for (int i = end - 2; i >= first; --i)
      product(1, H, end - 1 - i, {minus_a + (i + 1) * BLOCK + i, 1, BLOCK}, U + (i + 1) * row, row, U + i * row, row, true);
  }
}

// overlap = -A, of the keys k and, transposed, k_t.
void overlaps(const Rule& s, Chunk c, int64_t head, const float* k_t, float* overlap) {
  const Rows k_c = s.k_of(c, head);
  product(c.rows, BLOCK, s.R, {k_c.x, k_c.row, 1}, k_t, BLOCK, overlap, BLOCK, false);
  see_the_past(c.rows, 1, overlap);
  for (int i = 0; i < c.rows; ++i) multiply(overlap + i * BLOCK, BLOCK, -s.beta_of(c, head, i));
}

ffi::Error forward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Floats beta, Results o, Results u, Results memory) {
  const Rule s = rule_of(q, k, v, beta);
  const int64_t size = memory->dimensions()[1], G = s.N / s.K;
  parallel(pool, s.B * s.K, memory->dimensions()[0], [&](int64_t task, int64_t worker) {
    const int64_t b = task / s.K, head = task % s.K;
    const ForwardPieces x{{memory->typed_data() + worker * size}, s.R, s.H};
    std::fill(x.S, x.k_t, 0.0f);
    forwards(b, s.T, [&](Chunk c) {
      const Rows k_c = s.k_of(c, head), v_c = s.v_of(c, head);
      float* u_c = u->typed_data() + (c.at * s.K + head) * s.H;
      turn(k_c.x, k_c.row, c.rows, s.R, 1.0f, x.k_t);
      overlaps(s, c, head, x.k_t, x.overlap);
      product(c.rows, s.H, s.R, {k_c.x, k_c.row, 1}, x.S, s.H, u_c, v_c.row, false);
      for (int i = 0; i < c.rows; ++i)
        for (int h = 0; h < s.H; h += LANES)
          store(u_c + i * v_c.row + h, s.beta_of(c, head, i) * (load(v_c.x + i * v_c.row + h) - load(u_c + i * v_c.row + h)));
      solve(c.rows, x.overlap, s.H, u_c, v_c.row);
      for (int64_t n = head * G; n < (head + 1) * G; ++n) {
        const Rows q_c = s.q_of(c, n);
        float* o_c = o->typed_data() + (c.at * s.N + n) * s.H;
        product(c.rows, s.H, s.R, {q_c.x, q_c.row, 1}, x.S, s.H, o_c, s.N * s.H, false);
        product(c.rows, BLOCK, s.R, {q_c.x, q_c.row, 1}, x.k_t, BLOCK, x.weights, BLOCK, false);
        see_the_past(c.rows, 0, x.weights);
        product(c.rows, s.H, c.rows, {x.weights, BLOCK, 1}, u_c, v_c.row, o_c, s.N * s.H, true);
      }
      product(s.R, s.H, c.rows, {k_c.x, 1, k_c.row}, u_c, v_c.row, x.S, s.H, true);
    });
  });
  return ffi::Error::Success();
}

// From the last chunk to the first, all that needs the future: y, the gradients by the right sides of the systems, kept in dv; then from the first to the last
// what needs S.
ffi::Error backward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Floats beta, Floats u, Floats d_o, Results dq, Results dk, Results dv, Results dbeta,
                    Results memory) {
  const Rule s = rule_of(q, k, v, beta);
  const int64_t size = memory->dimensions()[1], G = s.N / s.K, k_row = s.K * s.R, v_row = s.K * s.H, o_row = s.N * s.H;
  parallel(pool, s.B * s.K, memory->dimensions()[0], [&](int64_t task, int64_t worker) {
    const int64_t b = task / s.K, head = task % s.K;
    const BackwardPieces x{{memory->typed_data() + worker * size}, s.R, s.H};
    std::fill(x.S_t, x.end_of_states, 0.0f);
    const auto u_of = [&](Chunk c) { return u.typed_data() + (c.at * s.K + head) * s.H; };
    const auto do_of = [&](Chunk c, int64_t n) { return d_o.typed_data() + (c.at * s.N + n) * s.H; };
    const auto dk_of = [&](Chunk c) { return dk->typed_data() + (c.at * s.K + head) * s.R; };
    const auto dv_of = [&](Chunk c) { return dv->typed_data() + (c.at * s.K + head) * s.H; };
    const auto dbeta_of = [&](Chunk c, int i) { return dbeta->typed_data() + (c.at + i) * s.K + head; };
    // The gradients by the products q_i'k_j, from u_t: do_i'u_j where j <= i.
    const auto weigh = [&](Chunk c, int64_t n) {
      product(c.rows, BLOCK, s.H, {do_of(c, n), o_row, 1}, x.u_t, BLOCK, x.dp, BLOCK, false);
      see_the_past(c.rows, 0, x.dp);
    };

    backwards(b, s.T, [&](Chunk c) {
      const Rows k_c = s.k_of(c, head);
      const float* u_c = u_of(c);
      float *dk_c = dk_of(c), *y_c = dv_of(c);
      turn(k_c.x, k_row, c.rows, s.R, 1.0f, x.k_t);
      turn(u_c, v_row, c.rows, s.H, 1.0f, x.u_t);
      overlaps(s, c, head, x.k_t, x.overlap);
      product(c.rows, s.H, s.R, {k_c.x, k_row, 1}, x.U, s.H, y_c, v_row, false);
      product(c.rows, s.R, s.H, {u_c, v_row, 1}, x.U_t, s.R, dk_c, k_row, false);
      for (int64_t n = head * G; n < (head + 1) * G; ++n) {
        const Rows q_c = s.q_of(c, n);
        product(c.rows, BLOCK, s.R, {q_c.x, q_c.row, 1}, x.k_t, BLOCK, x.p, BLOCK, false);
        see_the_past(c.rows, 0, x.p);
        weigh(c, n);
        product(c.rows, s.H, c.rows, {x.p, 1, BLOCK}, do_of(c, n), o_row, y_c, v_row, true);
        product(c.rows, s.R, c.rows, {x.dp, 1, BLOCK}, q_c.x, q_c.row, dk_c, k_row, true);
        product(s.R, s.H, c.rows, {q_c.x, 1, q_c.row}, do_of(c, n), o_row, x.U, s.H, true);
        product(s.H, s.R, c.rows, {do_of(c, n), 1, o_row}, q_c.x, q_c.row, x.U_t, s.R, true);
      }
      solve_transposed(c.rows, x.overlap, s.H, y_c, v_row);
      // By -A_ij = -beta_i k_i'k_j it is y_i'u_j: here times k_i'k_j for dbeta, and times -beta_i for dk.
      product(c.rows, BLOCK, s.H, {y_c, v_row, 1}, x.u_t, BLOCK, x.dp, BLOCK, false);
      see_the_past(c.rows, 1, x.dp);
      product(c.rows, BLOCK, s.R, {k_c.x, k_row, 1}, x.k_t, BLOCK, x.p, BLOCK, false);
      for (int i = 0; i < c.rows; ++i) {
        const float beta_i = s.beta_of(c, head, i);
        *dbeta_of(c, i) = -dot(x.dp + i * BLOCK, x.p + i * BLOCK, BLOCK);
        multiply(x.dp + i * BLOCK, BLOCK, -beta_i);
        for (int h = 0; h < s.H; h += LANES) store(x.y + i * s.H + h, -beta_i * load(y_c + i * v_row + h));
      }
      product(c.rows, s.R, c.rows, {x.dp, BLOCK, 1}, k_c.x, k_row, dk_c, k_row, true);
      product(c.rows, s.R, c.rows, {x.dp, 1, BLOCK}, k_c.x, k_row, dk_c, k_row, true);
      product(s.R, s.H, c.rows, {k_c.x, 1, k_row}, x.y, s.H, x.U, s.H, true);
      product(s.H, s.R, c.rows, {x.y, 1, s.H}, k_c.x, k_row, x.U_t, s.R, true);
    });

    forwards(b, s.T, [&](Chunk c) {
      const Rows k_c = s.k_of(c, head), v_c = s.v_of(c, head);
      const float* u_c = u_of(c);
      float *dk_c = dk_of(c), *y_c = dv_of(c);
      turn(u_c, v_row, c.rows, s.H, 1.0f, x.u_t);
      for (int64_t n = head * G; n < (head + 1) * G; ++n) {
        float* dq_c = dq->typed_data() + (c.at * s.N + n) * s.R;
        weigh(c, n);
        product(c.rows, s.R, s.H, {do_of(c, n), o_row, 1}, x.S_t, s.R, dq_c, s.N * s.R, false);
        product(c.rows, s.R, c.rows, {x.dp, BLOCK, 1}, k_c.x, k_row, dq_c, s.N * s.R, true);
      }
      product(c.rows, s.R, s.H, {y_c, v_row, 1}, x.S_t, s.R, x.yS, s.R, false);
      for (int i = 0; i < c.rows; ++i) {
        const float beta_i = s.beta_of(c, head, i);
        *dbeta_of(c, i) += dot(y_c + i * v_row, v_c.x + i * v_row, s.H) - dot(k_c.x + i * k_row, x.yS + i * s.R, s.R);
        for (int r = 0; r < s.R; r += LANES) store(dk_c + i * k_row + r, load(dk_c + i * k_row + r) - beta_i * load(x.yS + i * s.R + r));
        multiply(y_c + i * v_row, s.H, beta_i);
      }
      product(s.H, s.R, c.rows, {u_c, 1, v_row}, k_c.x, k_row, x.S_t, s.R, true);
    });
  });
  return ffi::Error::Success();
}

auto bind() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>(); }

}  // namespace

extern "C" int64_t attn_zoo_delta_forward_floats(int64_t R, int64_t H) { return floats_of<ForwardPieces>(R, H); }
extern "C" int64_t attn_zoo_delta_backward_floats(int64_t R, int64_t H) { return floats_of<BackwardPieces>(R, H); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_delta_forward, forward, bind().Ret<Floats>().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_delta_backward, backward,
                              bind().Arg<Floats>().Arg<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>());
