// Softmax attention over listed blocks of 64 queries by 64 keys, forward and backward, for CPUs, as calls that XLA makes (its foreign function interface).
// See native_attention.py for the shapes.
//
// Tiles are held transposed, [keys or channels, queries], a vector being that many queries: then keys and values are read where they stand, one number at a
// time for all lanes, and the softmax of a query needs no sum across lanes.

#include "native.h"

namespace {

// Which blocks: those of a BlockMask, and for each partial one the number of its tile of bits, [tile, key, query / 8].
struct Blocks {
  const int32_t *full_start, *full_block, *part_start, *part_block, *part_tile;
  const uint8_t* bits;
};

struct Shape {
  int64_t B, T, S, N, K;
  int H;
  float scale;
  int64_t splits;  // of the query blocks of a (sequence, key head)
  int64_t query_row() const { return N * H; }
  int64_t key_row() const { return K * H; }
};

Shape shape_of(const Floats& q, const Floats& k, float scale, int64_t splits) {
  const auto of_q = q.dimensions(), of_k = k.dimensions();
  return {of_q[0], of_q[1], of_k[1], of_q[2], of_k[2], int(of_q[3]), scale, splits};
}

// body(first key, keys, rows of bits or null) for each block of query block c.
template <class Body>
void over_blocks(const Blocks& blocks, int64_t c, int64_t S, Body body) {
  for (int32_t n = blocks.full_start[c]; n < blocks.full_start[c + 1]; ++n) body(int64_t{blocks.full_block[n]} * BLOCK, BLOCK, nullptr);
  for (int32_t n = blocks.part_start[c]; n < blocks.part_start[c + 1]; ++n) {
    const int64_t j0 = int64_t{blocks.part_block[n]} * BLOCK;
    body(j0, int(std::min<int64_t>(BLOCK, S - j0)), blocks.bits + int64_t{blocks.part_tile[n]} * BLOCK * (BLOCK / 8));
  }
}

// Hidden scores of a tile [keys, queries].
void hide(float* scores, int keys, const uint8_t* bits, const bool* valid) {
  Integers bit;
  for (int lane = 0; lane < LANES; ++lane) bit[lane] = int32_t{1} << lane;
  for (int j = 0; j < keys; ++j) {
    uint64_t row = ~uint64_t{0};
    if (bits) std::memcpy(&row, bits + j * (BLOCK / 8), sizeof row);
    if (valid && !valid[j]) row = 0;
    if (row == ~uint64_t{0}) continue;
    for (int i = 0; i < BLOCK; i += LANES) {
      const Integers seen = (bit & (int32_t(row >> i) - Integers{})) != 0;
      store(scores + j * BLOCK + i, seen ? load(scores + j * BLOCK + i) : all(HIDDEN));
    }
  }
}

// scores[j][i] += added[i][j] LOG2E, of `rows` queries and `keys` keys.
void add_turned(const float* added, int64_t row, int rows, int keys, float* scores) {
  for (int j = 0; j < keys; j += LANES)
    for (int i = 0; i < BLOCK; i += LANES) {
      Vector x[LANES];
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) x[l] = i + l < rows ? LOG2E * load(added + (i + l) * row + j) : Vector{};
      transpose<1>(x, std::make_index_sequence<LANES>());
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l)
        if (j + l < keys) store(scores + (j + l) * BLOCK + i, load(scores + (j + l) * BLOCK + i) + x[l]);
    }
}

// The working memory of one worker: keys and values of one head, gathered, and room for what else a pass needs.
struct Scratch {
  float *k, *v, *rest;
};

void gather(const Shape& s, const Floats& k, const Floats& v, int64_t b, int64_t head, const Scratch& x) {
  const int64_t at = (b * s.S * s.K + head) * s.H;
  copy_rows(k.typed_data() + at, s.key_row(), x.k, s.H, s.S, s.H);
  copy_rows(v.typed_data() + at, s.key_row(), x.v, s.H, s.S, s.H);
}

// Floats of it: a forward pass has q_t, o_t, scores, maxima and sums besides; a backward pass dk, dv, q_t, do_t, dq_t, q, do, weights, their
// gradients, and three numbers a query.
int64_t forward_floats(int64_t S, int64_t H) { return 2 * S * H + (2 * H + BLOCK + 2) * BLOCK; }
int64_t backward_floats(int64_t S, int64_t H) { return 4 * S * H + (5 * H + 2 * BLOCK + 3) * BLOCK; }

struct Queries {
  int64_t b, head, first;
  int rows;
};

// Where key j0 and the first query stand in tables by distance, [head, 1 - S to T + BLOCK - 2]; further queries follow, further keys go before.
int64_t place(const Shape& s, Queries rows, int64_t width, int64_t j0) { return rows.head * width + rows.first - j0 + s.S - 1; }

// Scores of a tile from scaled products: what is added to them, by pair or by distance, and which are hidden. `valid`, `added` and `by_distance` may be
// empty; rows of `added` are whole vectors.
void finish(const Shape& s, Queries rows, ffi::Buffer<ffi::PRED>& valid, Floats& added, Floats& by_distance, int64_t j0, int keys, const uint8_t* bits,
            float* scores) {
  if (by_distance.element_count()) {
    const float* table = by_distance.typed_data() + place(s, rows, by_distance.dimensions()[1], j0);
    for (int j = 0; j < keys; ++j)
      for (int i = 0; i < BLOCK; i += LANES) store(scores + j * BLOCK + i, load(scores + j * BLOCK + i) + LOG2E * load(table - j + i));
  }
  if (added.element_count()) {
    const int64_t row = added.dimensions()[2];
    add_turned(added.typed_data() + (rows.b * s.T + rows.first) * row + j0, row, rows.rows, keys, scores);
  }
  const bool* valid_j = valid.element_count() ? valid.typed_data() + rows.b * s.S + j0 : nullptr;
  if (bits || valid_j) hide(scores, keys, bits, valid_j);
}

// Runs body(queries, key head) for the query blocks of each task, which is a (sequence, key head, split), after start(task) and before end(task).
template <class Start, class Body, class End>
void over_tasks(ffi::ThreadPool& pool, const Shape& s, Results& memory, Start start, Body body, End end) {
  const int64_t workers = memory->dimensions()[0], size = memory->dimensions()[1], blocks = (s.T + BLOCK - 1) / BLOCK;
  parallel(pool, s.B * s.K * s.splits, workers, [&](int64_t task, int64_t worker) {
    const int64_t split = task % s.splits, head = task / s.splits % s.K, b = task / s.splits / s.K;
    float* room = memory->typed_data() + worker * size;
    const Scratch scratch{room, room + s.S * s.H, room + 2 * s.S * s.H};
    start(scratch, b, head, split);
    for (int64_t g = 0; g < s.N / s.K; ++g)
      for (int64_t c = blocks * split / s.splits; c < blocks * (split + 1) / s.splits; ++c)
        body(scratch, c, Queries{b, head * (s.N / s.K) + g, c * BLOCK, int(std::min<int64_t>(BLOCK, s.T - c * BLOCK))}, split);
    end(scratch, b, head, split);
  });
}

ffi::Error forward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, ffi::Buffer<ffi::PRED> valid, Floats added, Floats by_distance, Indices full_start,
                   Indices full_block, Indices part_start, Indices part_block, Indices part_tile, ffi::Buffer<ffi::U8> bits, Results o, Results lse,
                   Results memory, float scale, int64_t splits) {
  const Shape s = shape_of(q, k, scale, splits);
  const Blocks blocks{full_start.typed_data(), full_block.typed_data(), part_start.typed_data(),
                      part_block.typed_data(), part_tile.typed_data(),  bits.typed_data()};

  const auto start = [&](const Scratch& x, int64_t b, int64_t head, int64_t split) { gather(s, k, v, b, head, x); };
  const auto block = [&](const Scratch& x, int64_t c, Queries rows, int64_t split) {
    float *q_t = x.rest, *o_t = q_t + s.H * BLOCK, *p = o_t + s.H * BLOCK, *top = p + BLOCK * BLOCK, *total = top + BLOCK;
    const int64_t row = (rows.b * s.T + rows.first) * s.N + rows.head;
    turn(q.typed_data() + row * s.H, s.query_row(), rows.rows, s.H, s.scale * LOG2E, q_t);
    std::fill(o_t, o_t + s.H * BLOCK, 0.0f);
    std::fill(top, top + BLOCK, HIDDEN / 2);  // so that hidden pairs get 2^(HIDDEN / 2) = 0 even in a row that sees nothing
    std::fill(total, total + BLOCK, 0.0f);
    over_blocks(blocks, c, s.S, [&](int64_t j0, int keys, const uint8_t* bits) {
      product(keys, BLOCK, s.H, {x.k + j0 * s.H, s.H, 1}, q_t, BLOCK, p, BLOCK, false);
      finish(s, rows, valid, added, by_distance, j0, keys, bits, p);
      for (int i = 0; i < BLOCK; i += LANES) {
        const Vector old = load(top + i);
        Vector now = old, sum{};
        for (int j = 0; j < keys; ++j) now = larger(now, load(p + j * BLOCK + i));
        for (int j = 0; j < keys; ++j) {
          const Vector weight = exp2(load(p + j * BLOCK + i) - now);
          store(p + j * BLOCK + i, weight);
          sum += weight;
        }
        const Vector shrink = exp2(old - now);
        store(top + i, now);
        store(total + i, load(total + i) * shrink + sum);
        for (int h = 0; h < s.H; ++h) store(o_t + h * BLOCK + i, load(o_t + h * BLOCK + i) * shrink);
      }
      product(s.H, BLOCK, keys, {x.v + j0 * s.H, 1, s.H}, p, BLOCK, o_t, BLOCK, true);
    });
    for (int i = 0; i < rows.rows; ++i) {
      const bool seen = total[i] != 0;
      lse->typed_data()[row + i * s.N] = seen ? top[i] / LOG2E + std::log(total[i]) : -std::numeric_limits<float>::infinity();
      total[i] = seen ? 1 / total[i] : 0;
    }
    turn_back(o_t, rows.rows, s.H, total, o->typed_data() + row * s.H, s.query_row());
  };
  over_tasks(pool, s, memory, start, block, [](auto&&...) {});
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, ffi::Buffer<ffi::PRED> valid, Floats added, Floats by_distance, Indices full_start,
                    Indices full_block, Indices part_start, Indices part_block, Indices part_tile, ffi::Buffer<ffi::U8> bits, Floats o, Floats lse, Floats d_o,
                    Floats d_lse, Results dq, Results dk, Results dv, Results d_by_distance, Results memory, float scale, int64_t splits) {
  const Shape s = shape_of(q, k, scale, splits);
  const Blocks blocks{full_start.typed_data(), full_block.typed_data(), part_start.typed_data(),
                      part_block.typed_data(), part_tile.typed_data(),  bits.typed_data()};

  const bool modified = by_distance.element_count();
  const int64_t width = modified ? by_distance.dimensions()[1] : 0, G = s.N / s.K;
  const auto start = [&](const Scratch& x, int64_t b, int64_t head, int64_t split) {
    gather(s, k, v, b, head, x);
    std::fill(x.rest, x.rest + 2 * s.S * s.H, 0.0f);
    float* d_tables = d_by_distance->typed_data() + ((split * s.B + b) * s.N + head * G) * width;
    std::fill(d_tables, d_tables + G * width, 0.0f);
  };
  const auto block = [&](const Scratch& x, int64_t c, Queries rows, int64_t split) {
    const int64_t size = s.H * BLOCK, row = (rows.b * s.T + rows.first) * s.N + rows.head;
    float *dk = x.rest, *dv = dk + s.S * s.H, *q_t = dv + s.S * s.H, *do_t = q_t + size, *dq_t = do_t + size, *q_c = dq_t + size;
    float *do_c = q_c + size, *p = do_c + size, *ds = p + BLOCK * BLOCK, *top = ds + BLOCK * BLOCK, *delta = top + BLOCK, *ones = delta + BLOCK;
    const float *from_q = q.typed_data() + row * s.H, *from_do = d_o.typed_data() + row * s.H, *from_o = o.typed_data() + row * s.H;
    turn(from_q, s.query_row(), rows.rows, s.H, s.scale * LOG2E, q_t);
    turn(from_do, s.query_row(), rows.rows, s.H, 1.0f, do_t);
    copy_rows(from_q, s.query_row(), q_c, s.H, rows.rows, s.H);
    copy_rows(from_do, s.query_row(), do_c, s.H, rows.rows, s.H);
    std::fill(dq_t, dq_t + size, 0.0f);
    for (int i = 0; i < BLOCK; ++i) {
      const float lse_i = i < rows.rows ? lse.typed_data()[row + i * s.N] : -std::numeric_limits<float>::infinity();
      const bool seen = lse_i != -std::numeric_limits<float>::infinity();
      top[i] = seen ? lse_i * LOG2E : -HIDDEN;  // 2^(score - top) is 0 where the row sees nothing
      // d lse / d score = p and d o / d score = p (v - o): both fold into one number a row.
      delta[i] = seen ? dot(from_do + i * s.query_row(), from_o + i * s.query_row(), s.H) - d_lse.typed_data()[row + i * s.N] : 0.0f;
      ones[i] = 1.0f;
    }
    over_blocks(blocks, c, s.S, [&](int64_t j0, int keys, const uint8_t* bits) {
      const float *k_j = x.k + j0 * s.H, *v_j = x.v + j0 * s.H;
      product(keys, BLOCK, s.H, {k_j, s.H, 1}, q_t, BLOCK, p, BLOCK, false);
      finish(s, rows, valid, added, by_distance, j0, keys, bits, p);
      product(keys, BLOCK, s.H, {v_j, s.H, 1}, do_t, BLOCK, ds, BLOCK, false);
      for (int j = 0; j < keys; ++j)
        for (int i = 0; i < BLOCK; i += LANES) {
          const Vector weight = exp2(load(p + j * BLOCK + i) - load(top + i));
          store(p + j * BLOCK + i, weight);
          store(ds + j * BLOCK + i, weight * (load(ds + j * BLOCK + i) - load(delta + i)) * s.scale);
        }
      if (modified) {
        float* d_table = d_by_distance->typed_data() + (split * s.B + rows.b) * s.N * width + place(s, rows, width, j0);
        for (int j = 0; j < keys; ++j)
          for (int i = 0; i < BLOCK; i += LANES) store(d_table - j + i, load(d_table - j + i) + load(ds + j * BLOCK + i) / s.scale);
      }
      product(keys, s.H, rows.rows, {p, BLOCK, 1}, do_c, s.H, dv + j0 * s.H, s.H, true);
      product(keys, s.H, rows.rows, {ds, BLOCK, 1}, q_c, s.H, dk + j0 * s.H, s.H, true);
      product(s.H, BLOCK, keys, {k_j, 1, s.H}, ds, BLOCK, dq_t, BLOCK, true);
    });
    turn_back(dq_t, rows.rows, s.H, ones, dq->typed_data() + row * s.H, s.query_row());
  };
  const auto end = [&](const Scratch& x, int64_t b, int64_t head, int64_t split) {
    const int64_t at = ((split * s.B + b) * s.S * s.K + head) * s.H;
    copy_rows(x.rest, s.H, dk->typed_data() + at, s.key_row(), s.S, s.H);
    copy_rows(x.rest + s.S * s.H, s.H, dv->typed_data() + at, s.key_row(), s.S, s.H);
  };
  over_tasks(pool, s, memory, start, block, end);
  return ffi::Error::Success();
}

auto bind() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<ffi::Buffer<ffi::PRED>>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<Indices>()
      .Arg<Indices>()
      .Arg<Indices>()
      .Arg<Indices>()
      .Arg<Indices>()
      .Arg<ffi::Buffer<ffi::U8>>();
}

}  // namespace

extern "C" int64_t attn_zoo_attention_forward_floats(int64_t S, int64_t H) { return forward_floats(S, H); }
extern "C" int64_t attn_zoo_attention_backward_floats(int64_t S, int64_t H) { return backward_floats(S, H); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_attention_forward, forward,
                              bind().Ret<Floats>().Ret<Floats>().Ret<Floats>().Attr<float>("scale").Attr<int64_t>("splits"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_attention_backward, backward,
                              bind()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("splits"));
