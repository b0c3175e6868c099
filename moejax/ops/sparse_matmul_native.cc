// Products with chosen blocks of rows, float32, for CPUs: see sparse_matmul.py for the equations.
//
// Decoding is bound by what is read from memory. Every chosen block is read once, in order, straight
// from where it lies; one that is named several times in a row is read once, too, and rows that all
// of x multiplies by 0 are not read at all (a union's list is filled up with both). Work is cut into pieces that do not depend on the number of threads, so the
// sums are the same bits on any machine with the same instructions.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kRows = 16;   // rows of a piece of the product with x [B, D]
constexpr int64_t kPieces = 16; // sums of the product with x [B, K, P] that are added at the end

// Runs run(0) ... run(pieces - 1) on XLA's threads. The caller takes pieces too, so it finishes even
// where every other thread waits for a call of its own.
template <typename Run>
void InParallel(ffi::ThreadPool& pool, int64_t pieces, Run run) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto work = [state, pieces, run] {
    for (int64_t i = state->next++; i < pieces; i = state->next++) {
      run(i);
      state->done++;
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), pieces) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  while (state->done < pieces) std::this_thread::yield();
}

const float* Row(const float* w, const int32_t* chosen, int64_t row, int64_t blocks, int64_t rows,
                 int64_t size) {
  const int64_t block = std::clamp<int64_t>(chosen[row / rows], 0, blocks - 1);
  return w + (block * rows + row % rows) * size;
}

float Dot(const float* __restrict a, const float* __restrict b, int64_t size) {
  float sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

void AddRow(float* __restrict out, const float* __restrict row, float times, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] += times * row[i];
}

void AddFourRows(float* __restrict out, const float* __restrict rows, const float* times,
                 int64_t size) {
  const float t0 = times[0], t1 = times[1], t2 = times[2], t3 = times[3];
  const float *r1 = rows + size, *r2 = rows + 2 * size, *r3 = rows + 3 * size;
  for (int64_t i = 0; i < size; ++i) {
    out[i] += t0 * rows[i] + t1 * r1[i] + t2 * r2[i] + t3 * r3[i];
  }
}

using Floats = ffi::Buffer<ffi::F32>;
using Indices = ffi::Buffer<ffi::S32>;
using Result = ffi::ResultBuffer<ffi::F32>;

bool AllZero(const float* times, int64_t rows, int64_t batch, int64_t stride) {
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < rows; ++i) {
      if (times[b * stride + i] != 0) return false;
    }
  }
  return true;
}

// x [B, D], w [M, P, D], chosen [K] -> [B, K, P]
ffi::Error Into(ffi::ThreadPool pool, Floats x, Floats w, Indices chosen, Result out) {
  const int64_t batch = x.dimensions()[0], size = x.dimensions()[1];
  const int64_t blocks = w.dimensions()[0], rows = w.dimensions()[1];
  const int64_t count = chosen.dimensions()[0], all = count * rows;
  const float *px = x.typed_data(), *pw = w.typed_data();
  const int32_t* pc = chosen.typed_data();
  float* po = out->typed_data();
  InParallel(pool, (all + kRows - 1) / kRows, [=](int64_t piece) {
    const int64_t end = std::min(all, (piece + 1) * kRows);
    for (int64_t row = piece * kRows; row < end; ++row) {
      const int64_t block = row / rows;
      if (block > 0 && pc[block] == pc[block - 1]) continue;  // the first of them writes all
      const float* from = Row(pw, pc, row, blocks, rows, size);
      for (int64_t b = 0; b < batch; ++b) {
        const float sum = Dot(px + b * size, from, size);
        float* to = po + b * all + row;
        *to = sum;
        for (int64_t k = block + 1; k < count && pc[k] == pc[block]; ++k) *(to += rows) = sum;
      }
    }
  });
  return ffi::Error::Success();
}

// x [B, K, P], w [M, P, D], chosen [K] -> [B, D]
ffi::Error OutOf(ffi::ThreadPool pool, Floats x, Floats w, Indices chosen, Result out) {
  const int64_t batch = x.dimensions()[0], all = x.dimensions()[1] * x.dimensions()[2];
  const int64_t blocks = w.dimensions()[0], rows = w.dimensions()[1], size = w.dimensions()[2];
  const float *px = x.typed_data(), *pw = w.typed_data();
  const int32_t* pc = chosen.typed_data();
  const int64_t step = ((all + kPieces - 1) / kPieces + 3) / 4 * 4;
  const int64_t pieces = step == 0 ? 0 : (all + step - 1) / step, whole = batch * size;
  std::vector<float> sums(pieces * whole, 0.0f);
  float* ps = sums.data();
  InParallel(pool, pieces, [=](int64_t piece) {
    float* sum = ps + piece * whole;
    const int64_t end = std::min(all, (piece + 1) * step);
    for (int64_t row = piece * step; row < end;) {
      const float* from = Row(pw, pc, row, blocks, rows, size);
      const bool four = row + 4 <= end && row % rows + 4 <= rows;
      const bool nothing = AllZero(px + row, four ? 4 : 1, batch, all);
      for (int64_t b = 0; b < (nothing ? 0 : batch); ++b) {
        const float* times = px + b * all + row;
        if (four) {
          AddFourRows(sum + b * size, from, times, size);
        } else {
          AddRow(sum + b * size, from, *times, size);
        }
      }
      row += four ? 4 : 1;
    }
  });
  float* po = out->typed_data();
  std::fill(po, po + whole, 0.0f);
  for (int64_t piece = 0; piece < pieces; ++piece) AddRow(po, ps + piece * whole, 1.0f, whole);
  return ffi::Error::Success();
}

}  // namespace

#define SIGNATURE                                                                      \
  ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Indices>().Ret<Floats>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoejaxSparseInto, Into, SIGNATURE);
XLA_FFI_DEFINE_HANDLER_SYMBOL(MoejaxSparseOutOf, OutOf, SIGNATURE);
