// The pseudo-inverse of small matrices by iteration, forward and backward, for CPUs, as calls that XLA makes (its foreign function interface). See native_inverse.py.
//
// Of Z <- Z (13 I - X (15 I - X (7 I - X))) / 4, X = A Z, all is kept transposed: W = Z', Y = X' = W A'. With Q1 = 7 I - Y, Q2 = 15 I - Y Q1 and
// Q3 = (13 I - Y Q2) / 4 it is W <- Q3 W, a product of rows by rows. The gradients G by Z, not W, are then so too: nothing here is turned.

#include "native.h"

namespace {

struct Sizes {
  int64_t matrices;
  int M, N;  // A is [M, N]; both are multiples of LANES
  int64_t size() const { return int64_t(M) * N; }
};

Sizes sizes_of(const Floats& start) {
  const auto of = start.dimensions();
  return {of[0], int(of[1]), int(of[2])};
}

struct Pieces {
  Room room;
  int64_t M, N;
  float *Y = room.take(M * M), *Q1 = room.take(M * M), *Q2 = room.take(M * M), *Q3 = room.take(M * M);  // Y with the opposite sign
  float *F = room.take(M * M), *dX = room.take(M * M), *G = room.take(M * N), *next_G = room.take(M * N);  // the gradients alone
};

// Q = the whole number times I + Y Q', or + Y where there is no Q'.
void polynomial(int M, float number, const float* Y, const float* of, float* Q) {
  std::fill(Q, Q + M * M, 0.0f);
  if (of)
    product(M, M, M, {Y, M, 1}, of, M, Q, M, false);
  else
    std::copy(Y, Y + M * M, Q);
  for (int i = 0; i < M; ++i) Q[i * M + i] += number;
}

// Y and the three polynomials of it, from a transposed Z.
void polynomials(const Sizes& s, const float* A_t, const float* W, const Pieces& x) {
  product(s.M, s.M, s.N, {W, s.N, 1}, A_t, s.M, x.Y, s.M, false);
  multiply(x.Y, s.M * s.M, -1.0f);
  polynomial(s.M, 7.0f, x.Y, nullptr, x.Q1);
  polynomial(s.M, 15.0f, x.Y, x.Q1, x.Q2);
  polynomial(s.M, 13.0f, x.Y, x.Q2, x.Q3);
  multiply(x.Q3, s.M * s.M, 0.25f);
}

template <class Body>
void over_matrices(ffi::ThreadPool& pool, const Sizes& s, Results& memory, Body body) {
  const int64_t size = memory->dimensions()[1];
  parallel(pool, s.matrices, memory->dimensions()[0],
           [&](int64_t at, int64_t worker) { body(at, Pieces{{memory->typed_data() + worker * size}, s.M, s.N}); });
}

// What every iteration comes to, [iterations, matrices, M, N].
ffi::Error forward(ffi::ThreadPool pool, Floats A_t, Floats start, Results iterates, Results memory) {
  const Sizes s = sizes_of(start);
  const int64_t iterations = iterates->dimensions()[0];
  over_matrices(pool, s, memory, [&](int64_t at, const Pieces& x) {
    const float* W = start.typed_data() + at * s.size();
    for (int64_t i = 0; i < iterations; ++i) {
      float* next = iterates->typed_data() + (i * s.matrices + at) * s.size();
      polynomials(s, A_t.typed_data() + at * s.size(), W, x);
      product(s.M, s.N, s.M, {x.Q3, s.M, 1}, W, s.N, next, s.N, false);
      W = next;
    }
  });
  return ffi::Error::Success();
}

// From the gradient by the last Z, [matrices, N, M], those by A and, of Z's shape, by the first Z.
ffi::Error backward(ffi::ThreadPool pool, Floats A_t, Floats start, Floats iterates, Floats dZ, Results dA, Results d_start, Results memory) {
  const Sizes s = sizes_of(start);
  over_matrices(pool, s, memory, [&](int64_t at, Pieces x) {
    const int M = s.M, N = s.N;
    const float* A_t_of = A_t.typed_data() + at * s.size();
    float* dA_of = dA->typed_data() + at * s.size();
    std::fill(dA_of, dA_of + s.size(), 0.0f);
    std::copy(dZ.typed_data() + at * s.size(), dZ.typed_data() + (at + 1) * s.size(), x.G);
    for (int64_t i = iterates.dimensions()[0] - 1; i >= 0; --i) {
      const float* W = i ? iterates.typed_data() + ((i - 1) * s.matrices + at) * s.size() : start.typed_data() + at * s.size();
      polynomials(s, A_t_of, W, x);
      product(M, M, N, {W, N, 1}, x.G, M, x.F, M, false);
      multiply(x.F, M * M, -0.25f);
      product(M, M, M, {x.F, M, 1}, x.Q2, M, x.dX, M, false);
      product(M, M, M, {x.Y, M, 1}, x.F, M, x.Q2, M, false);  // Q2 has been read
      product(M, M, M, {x.Q2, M, 1}, x.Q1, M, x.dX, M, true);
      product(M, M, M, {x.Y, M, 1}, x.Q2, M, x.dX, M, true);
      product(N, M, M, {x.G, M, 1}, x.Q3, M, x.next_G, M, false);
      product(N, M, M, {A_t_of, M, 1}, x.dX, M, x.next_G, M, true);
      product(M, N, M, {x.dX, M, 1}, W, N, dA_of, N, true);
      std::swap(x.G, x.next_G);
    }
    std::copy(x.G, x.G + s.size(), d_start->typed_data() + at * s.size());
  });
  return ffi::Error::Success();
}

auto bind() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>(); }

}  // namespace

extern "C" int64_t attn_zoo_inverse_forward_floats(int64_t M, int64_t N) { return floats_of<Pieces>(M, N); }
extern "C" int64_t attn_zoo_inverse_backward_floats(int64_t M, int64_t N) { return floats_of<Pieces>(M, N); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_inverse_forward, forward, bind().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(attn_zoo_inverse_backward, backward, bind().Arg<Floats>().Arg<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>());
