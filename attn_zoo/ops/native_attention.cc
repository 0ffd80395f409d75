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
  int64_t count(int64_t c) const { return full_start[c + 1] - full_start[c] + part_start[c + 1] - part_start[c]; }  // of query block c
};

struct Shape {
  int64_t B, T, S, N, K;
  int H;
  float scale;
  const int32_t* first_block;  // of each split of the query blocks of a (sequence, key head), and their end
  int64_t splits;
  int64_t query_row() const { return N * H; }
  int64_t key_row() const { return K * H; }
  int64_t first(int64_t b, int64_t head) const { return (b * S * K + head) * H; }  // of keys, values and their gradients
  int64_t blocks() const { return (T + BLOCK - 1) / BLOCK; }
  bool alone() const { return N == K && splits == blocks(); }  // each task has one block of queries
};

Shape shape_of(const Floats& q, const Floats& k, float scale, const Indices& first_block) {
  const auto of_q = q.dimensions(), of_k = k.dimensions();
  return {of_q[0], of_q[1], of_k[1], of_q[2], of_k[2], int(of_q[3]), scale, first_block.typed_data(), int64_t(first_block.element_count()) - 1};
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

// Keys or values of a head: a copy with its rows side by side, for the blocks of queries that come back to it; a lone block, which comes once, has them
// where they stand.
Rows gathered(const Shape& s, const Floats& from, int64_t b, int64_t head, Room& room) {
  const Rows there{from.typed_data() + s.first(b, head), s.key_row()};
  if (s.alone()) return there;
  float* copy = room.take(s.S * s.H);
  copy_rows(there.x, there.row, copy, s.H, s.S, s.H);
  return {copy, s.H};
}

// Their gradient: the sum of what each block of queries adds, side by side too, for `spread` to put where it belongs; a lone block writes it there, and what
// it leaves out is zero.
struct Gradient {
  float* x;
  int64_t row;
};

Gradient gradient(const Shape& s, Results& to, int64_t b, int64_t head, bool left_out, Room& room) {
  const Gradient sum = s.alone() ? Gradient{to->typed_data() + s.first(b, head), s.key_row()} : Gradient{room.take(s.S * s.H), s.H};
  if (left_out || !s.alone())
    for (int64_t j = 0; j < s.S; ++j) std::fill_n(sum.x + j * sum.row, s.H, 0.0f);
  return sum;
}

void spread(const Shape& s, Gradient sum, Results& to, int64_t b, int64_t head) {
  if (!s.alone()) copy_rows(sum.x, sum.row, to->typed_data() + s.first(b, head), s.key_row(), s.S, s.H);
}

// Floats of working memory: k, v, and in a forward pass q_t, o_t, scores, maxima and sums; in a backward pass dk, dv, q_t, do_t, dq_t, q, do, weights,
// their gradients, and three numbers a query.
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

// Runs task(b, key head, split, room) for each part of the query blocks of a (sequence, key head).
template <class Task>
void over_tasks(ffi::ThreadPool& pool, const Shape& s, Results& memory, Task task) {
  const int64_t workers = memory->dimensions()[0], size = memory->dimensions()[1];
  parallel(pool, s.B * s.K * s.splits, workers, [&](int64_t n, int64_t worker) {
    task(n / s.splits / s.K, n / s.splits % s.K, n % s.splits, Room{memory->typed_data() + worker * size});
  });
}

// Has the cache fetch rows that are read soon: they are far apart in memory, which no hardware foresees.
void fetch(const float* x, int64_t row, int64_t rows, int H) {
  for (int64_t i = 0; i < rows; ++i)
    for (int h = 0; h < H; h += 16) __builtin_prefetch(x + i * row + h, 0, 2);
}

// body(query block, queries) for the query blocks of a task.
template <class Body>
void over_queries(const Shape& s, int64_t b, int64_t head, int64_t split, Body body) {
  for (int64_t g = 0; g < s.N / s.K; ++g)
    for (int64_t c = s.first_block[split]; c < s.first_block[split + 1]; ++c)
      body(c, Queries{b, head * (s.N / s.K) + g, c * BLOCK, int(std::min<int64_t>(BLOCK, s.T - c * BLOCK))});
}

ffi::Error forward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, ffi::Buffer<ffi::PRED> valid, Floats added, Floats by_distance, Indices full_start,
                   Indices full_block, Indices part_start, Indices part_block, Indices part_tile, ffi::Buffer<ffi::U8> bits, Indices first_block, Results o,
                   Results lse, Results memory, float scale) {
  const Shape s = shape_of(q, k, scale, first_block);
  const Blocks blocks{full_start.typed_data(), full_block.typed_data(), part_start.typed_data(),
                      part_block.typed_data(), part_tile.typed_data(),  bits.typed_data()};

  over_tasks(pool, s, memory, [&](int64_t b, int64_t head, int64_t split, Room room) {
    const Rows keys = gathered(s, k, b, head, room), values = gathered(s, v, b, head, room);
    float *q_t = room.take(s.H * BLOCK), *p = room.take(BLOCK * BLOCK);
    const Softmax softmax{s.H, room.take(s.H * BLOCK), room.take(BLOCK), room.take(BLOCK)};
    over_queries(s, b, head, split, [&](int64_t c, Queries rows) {
      const int64_t row = (rows.b * s.T + rows.first) * s.N + rows.head;
      turn(q.typed_data() + row * s.H, s.query_row(), rows.rows, s.H, s.scale * LOG2E, q_t);
      const int64_t ahead = std::min<int64_t>(BLOCK, s.T - rows.first - rows.rows), to_next = BLOCK * s.N * s.H;
      fetch(q.typed_data() + row * s.H + to_next, s.query_row(), ahead, s.H);
      fetch(o->typed_data() + row * s.H, s.query_row(), rows.rows, s.H);
      softmax.begin();
      over_blocks(blocks, c, s.S, [&](int64_t j0, int count, const uint8_t* bits) {
        product(count, BLOCK, s.H, {keys.x + j0 * keys.row, keys.row, 1}, q_t, BLOCK, p, BLOCK, false);
        finish(s, rows, valid, added, by_distance, j0, count, bits, p);
        softmax.add(p, count, {values.x + j0 * values.row, values.row});
      });
      for (int i = 0; i < rows.rows; ++i) {
        lse->typed_data()[row + i * s.N] = logarithm(softmax.top[i], softmax.total[i]);
        softmax.total[i] = inverse(softmax.total[i]);
      }
      turn_back(softmax.o_t, rows.rows, s.H, softmax.total, o->typed_data() + row * s.H, s.query_row());
    });
  });
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, ffi::Buffer<ffi::PRED> valid, Floats added, Floats by_distance, Indices full_start,
                    Indices full_block, Indices part_start, Indices part_block, Indices part_tile, ffi::Buffer<ffi::U8> bits, Indices first_block, Floats o,
                    Floats lse, Floats d_o, Floats d_lse, Results dq, Results dk, Results dv, Results d_by_distance, Results memory, float scale) {
  const Shape s = shape_of(q, k, scale, first_block);
  const Blocks blocks{full_start.typed_data(), full_block.typed_data(), part_start.typed_data(),
                      part_block.typed_data(), part_tile.typed_data(),  bits.typed_data()};

  const bool modified = by_distance.element_count();
  const int64_t width = modified ? by_distance.dimensions()[1] : 0, G = s.N / s.K;
  over_tasks(pool, s, memory, [&](int64_t b, int64_t head, int64_t split, Room room) {
    const Rows keys = gathered(s, k, b, head, room), values = gathered(s, v, b, head, room);
    const bool left_out = blocks.count(split) < (s.S + BLOCK - 1) / BLOCK;  // by a lone block: that of its split
    const Gradient d_keys = gradient(s, dk, split * s.B + b, head, left_out, room), d_values = gradient(s, dv, split * s.B + b, head, left_out, room);
    const int64_t size = s.H * BLOCK;
    float *q_t = room.take(size), *do_t = room.take(size), *dq_t = room.take(size), *q_c = room.take(size), *do_c = room.take(size);
    float *p = room.take(BLOCK * BLOCK), *ds = room.take(BLOCK * BLOCK), *top = room.take(BLOCK), *delta = room.take(BLOCK), *ones = room.take(BLOCK);
    float* d_tables = d_by_distance->typed_data() + ((split * s.B + b) * s.N + head * G) * width;
    std::fill(d_tables, d_tables + G * width, 0.0f);
    over_queries(s, b, head, split, [&](int64_t c, Queries rows) {
      const int64_t row = (rows.b * s.T + rows.first) * s.N + rows.head;
      const float *from_q = q.typed_data() + row * s.H, *from_do = d_o.typed_data() + row * s.H, *from_o = o.typed_data() + row * s.H;
      turn(from_q, s.query_row(), rows.rows, s.H, s.scale * LOG2E, q_t);
      turn(from_do, s.query_row(), rows.rows, s.H, 1.0f, do_t);
      copy_rows(from_q, s.query_row(), q_c, s.H, rows.rows, s.H);
      copy_rows(from_do, s.query_row(), do_c, s.H, rows.rows, s.H);
      const int64_t ahead = std::min<int64_t>(BLOCK, s.T - rows.first - rows.rows), to_next = BLOCK * s.N * s.H;
      for (const float* x : {from_q, from_do, from_o}) fetch(x + to_next, s.query_row(), ahead, s.H);
      fetch(dq->typed_data() + row * s.H, s.query_row(), rows.rows, s.H);
      std::fill(dq_t, dq_t + size, 0.0f);
      for (int i = 0; i < BLOCK; ++i) {
        const float lse_i = i < rows.rows ? lse.typed_data()[row + i * s.N] : -std::numeric_limits<float>::infinity();
        top[i] = top_of(lse_i);
        delta[i] = top[i] != -HIDDEN ? dot(from_do + i * s.query_row(), from_o + i * s.query_row(), s.H) - d_lse.typed_data()[row + i * s.N] : 0.0f;
        ones[i] = 1.0f;
      }
      over_blocks(blocks, c, s.S, [&](int64_t j0, int count, const uint8_t* bits) {
        const Left k_j{keys.x + j0 * keys.row, keys.row, 1}, v_j{values.x + j0 * values.row, values.row, 1};
        product(count, BLOCK, s.H, k_j, q_t, BLOCK, p, BLOCK, false);
        finish(s, rows, valid, added, by_distance, j0, count, bits, p);
        product(count, BLOCK, s.H, v_j, do_t, BLOCK, ds, BLOCK, false);
        weigh_back(p, ds, count, top, delta, s.scale);
        if (modified) {
          float* d_table = d_by_distance->typed_data() + (split * s.B + rows.b) * s.N * width + place(s, rows, width, j0);
          for (int j = 0; j < count; ++j)
            for (int i = 0; i < BLOCK; i += LANES) store(d_table - j + i, load(d_table - j + i) + load(ds + j * BLOCK + i) / s.scale);
        }
        product(count, s.H, rows.rows, {p, BLOCK, 1}, do_c, s.H, d_values.x + j0 * d_values.row, d_values.row, !s.alone());
        product(count, s.H, rows.rows, {ds, BLOCK, 1}, q_c, s.H, d_keys.x + j0 * d_keys.row, d_keys.row, !s.alone());
        product(s.H, BLOCK, count, {k_j.a, 1, k_j.row}, ds, BLOCK, dq_t, BLOCK, true);
      });
      turn_back(dq_t, rows.rows, s.H, ones, dq->typed_data() + row * s.H, s.query_row());
    });
    spread(s, d_keys, dk, split * s.B + b, head);
    spread(s, d_values, dv, split * s.B + b, head);
  });
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
      .Arg<ffi::Buffer<ffi::U8>>()
      .Arg<Indices>();
}

}  // namespace

extern "C" int64_t attn_zoo_attention_forward_floats(int64_t S, int64_t H) { return forward_floats(S, H); }
extern "C" int64_t attn_zoo_attention_backward_floats(int64_t S, int64_t H) { return backward_floats(S, H); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_attention_forward, forward,
                              bind().Ret<Floats>().Ret<Floats>().Ret<Floats>().Attr<float>("scale"));
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
                                  .Attr<float>("scale"));
