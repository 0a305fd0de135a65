// The gradients for one to eight tokens on a packed weight, in two launches, with G' = dY ⊙ out_scale:
//
//   1  partial sums of G'·Ŵ over N, and beside them, read once: dB = s·G'ᵀ·Z, dbias = Σ dY,
//      d_out_scale = Σ dY ⊙ (Y − bias) / out_scale and partial sums of dZ = s·G'·B
//   2  dX = G'·Ŵ + drop(dZ·A) and dA = dZᵀ·drop(X)
//
// Few tokens: their sums need no other thread. Partial sums are fp32, added in a fixed order; no atomics.
#include <algorithm>

#include "launch.h"
#include "pair_table.h"

namespace peft_fast::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kLanes;
constexpr int kStrip = 8 * kLanes;      // columns of a block: eight a lane
constexpr int kScales = kStrip / 32;    // of a row: no block is shorter than 32
constexpr int64_t kEnoughBlocks = 512;  // about four for each of an H100's multiprocessors
constexpr int kMostSplits = 64, kMostChunks = 16, kLeastRows = 64;  // the last of either

// Rows of Ŵ whose scales and gradients lie in shared memory at a time: for a warp, whose words are under way
// at once, as many as registers allow.
template <int M>
constexpr int kTile = (M == 1 ? 8 : 4) * kWarps;

constexpr int kColumns = 128,
              kRanks = 64;  // of a block of the second launch, and the ranks it takes at a time

template <int M>
struct BackwardShared {
  PairTable table;
  float scales[kTile<M>][kScales];
  float grad[M][kTile<M>];
  float sums[kWarps * kStrip];
};

// `grad` as an element of column n of G'.
PEFT_FAST_DEVICE float scaled(const Backward& b, int64_t n, float grad) {
  return b.out_scale != nullptr ? grad * b.out_scale[n] : grad;
}

// dB, dbias, d_out_scale and the partial sums of dZ of the rows [begin, end) of the weight.
PEFT_FAST_DEVICE void thin_chunk(const Backward& b, int64_t begin, int64_t end, float* d_z, float* shared) {
  const int64_t N = b.weight.N, R = b.R;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  if (b.dbias != nullptr || b.d_out_scale != nullptr) {
    for (int64_t n = begin + threadIdx.x; n < end; n += kThreads) {
      const float bias = b.bias.data != nullptr ? load(b.bias, n) : 0.0f;
      float sum = 0.0f, weighted = 0.0f;
      for (int64_t m = 0; m < b.M; ++m) {
        const float g = load(b.grad, m * N + n);
        sum += g;
        if (b.d_out_scale != nullptr) weighted = fmaf(g, load(b.y, m * N + n) - bias, weighted);
      }
      if (b.dbias != nullptr) b.dbias[n] = sum;
      if (b.d_out_scale != nullptr) b.d_out_scale[n] = weighted / b.out_scale[n];
    }
  }
  if (b.d_B.data == nullptr && d_z == nullptr) return;
  for (int64_t first = 0; first < R; first += kLanes) {
    const int64_t r = first + lane;
    float z[kMostRows] = {}, dz[kMostRows] = {};
#pragma unroll
    for (int m = 0; m < kMostRows; ++m) {
      if (m < b.M && r < R && b.d_B.data != nullptr) z[m] = b.z[m * R + r];
    }
    for (int64_t n = begin + warp; n < end; n += kWarps) {
      const float factor = scaled(b, n, b.scaling);
      const float weight = d_z != nullptr && r < R ? load(b.lora_B, n * R + r) : 0.0f;
      float sum = 0.0f;
#pragma unroll
      for (int m = 0; m < kMostRows; ++m) {
        if (m >= b.M) break;
        const float g = factor * load(b.grad, m * N + n);
        dz[m] = fmaf(g, weight, dz[m]);
        sum = fmaf(g, z[m], sum);
      }
      if (b.d_B.data != nullptr && r < R) store(b.d_B, n * R + r, sum);
    }
    if (d_z == nullptr) continue;
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kMostRows; ++m) shared[(warp * kMostRows + m) * kLanes + lane] = dz[m];
    __syncthreads();
    const int m = warp;  // as many warps as tokens at most
    if (m < b.M && r < R) {
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) sum += shared[(w * kMostRows + m) * kLanes + lane];
      d_z[m * R + r] = sum;
    }
  }
}

// Eight warps take every eighth row of [begin, end) each; their sum is a strip of partial sum `split` of dX.
template <int M>
PEFT_FAST_DEVICE void dx_strip(const Backward& b, const Partials& p, int column, int split, int64_t begin,
                               int64_t end, BackwardShared<M>& s) {
  const FourBit& w = b.weight.four_bit;
  const int64_t N = b.weight.N;
  const int K = static_cast<int>(b.weight.K), tokens = static_cast<int>(b.M);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, k = column + lane * 8;
  constexpr int kEach = kTile<M> / kWarps;
  float sums[M][8] = {};
  for (int64_t tile = begin; tile < end; tile += kTile<M>) {
    const int rows = static_cast<int>(end - tile < kTile<M> ? end - tile : kTile<M>);
    const uint32_t* const bytes = reinterpret_cast<const uint32_t*>(w.packed) + (tile * K + k) / 8;
    uint32_t words[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int row = j * kWarps + warp;
      words[j] = row < rows && k < K ? bytes[row * (K / 8)] : 0;
    }
    if (tile == begin) fill(s.table, w.code);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < kTile<M> * kScales; i += kThreads) {
      const int row = i / kScales, at = column + i % kScales * 32;
      s.scales[row][i % kScales] = row < rows && at < K ? scale_at(w, (tile + row) * K + at) : 0.0f;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < M * kTile<M>; i += kThreads) {
      const int m = i / kTile<M>, row = i % kTile<M>;
      s.grad[m][row] =
          m < tokens && row < rows ? scaled(b, tile + row, load(b.grad, m * N + tile + row)) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int row = j * kWarps + warp;
      float codes[8];
      look_up(s.table, lane, words[j], codes);
      const float scale = s.scales[row][lane / 4];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if (m >= tokens) break;
        const float g = s.grad[m][row] * scale;
#pragma unroll
        for (int c = 0; c < 8; ++c) sums[m][c] = fmaf(g, codes[c], sums[m][c]);
      }
    }
  }
  float* const d_x = p.dx + static_cast<int64_t>(split) * tokens * K;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    if (m >= tokens) break;
    __syncthreads();
#pragma unroll
    for (int c = 0; c < 8; ++c) s.sums[warp * kStrip + c * kLanes + lane] = sums[m][c];
    __syncthreads();
    const int at = column + static_cast<int>(threadIdx.x);
    if (at < K) {
      float sum = 0.0f;
      for (int i = 0; i < kWarps; ++i) sum += s.sums[i * kStrip + threadIdx.x % 8 * kLanes + threadIdx.x / 8];
      d_x[static_cast<int64_t>(m) * K + at] = sum;
    }
  }
}

// As `dx_strip` for any K and any alignment: a column a thread.
PEFT_FAST_DEVICE void dx_strip_any(const Backward& b, int64_t column, int64_t begin, int64_t end,
                                   float* d_x) {
  const int64_t N = b.weight.N, K = b.weight.K, k = column + threadIdx.x;
  if (k >= K) return;
  float sums[kMostRows] = {};
  for (int64_t n = begin; n < end; ++n) {
    const float weight = decode_element(b.weight.four_bit, n * K + k);
#pragma unroll
    for (int m = 0; m < kMostRows; ++m) {
      if (m >= b.M) break;
      sums[m] = fmaf(scaled(b, n, load(b.grad, m * N + n)), weight, sums[m]);
    }
  }
#pragma unroll
  for (int m = 0; m < kMostRows; ++m) {
    if (m >= b.M) break;
    d_x[m * K + k] = sums[m];
  }
}

// The first `strips * splits` blocks sum dX, the others the thin results.
template <int M, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(Backward b, Partials p, int strips) {
  PEFT_FAST_SHARED(BackwardShared<M>, s);
  const int64_t N = b.weight.N;
  const int wide = strips * p.splits;
  if (static_cast<int>(blockIdx.x) >= wide) {
    const int64_t chunk = blockIdx.x - wide, rows = (N + p.chunks - 1) / p.chunks, begin = chunk * rows;
    float* const d_z = p.d_z == nullptr ? nullptr : p.d_z + chunk * b.M * b.R;
    thin_chunk(b, begin, begin + rows < N ? begin + rows : N, d_z, s.sums);
    return;
  }
  const int split = static_cast<int>(blockIdx.x) / strips;
  const int64_t column = static_cast<int64_t>(static_cast<int>(blockIdx.x) % strips) * kStrip;
  const int64_t parts = (N + kLeastRows - 1) / kLeastRows;
  const int64_t begin = split * parts / p.splits * kLeastRows;
  const int64_t end = (split + 1) * parts / p.splits * kLeastRows;
  if constexpr (kAligned) {
    dx_strip<M>(b, p, static_cast<int>(column), split, begin, end < N ? end : N, s);
  } else {
    dx_strip_any(b, column, begin, end < N ? end : N, p.dx + split * b.M * b.weight.K);
  }
}

struct FinishShared {
  float dz[kMostRows][kRanks];
};

// A column of dX and of dA for a thread.
__global__ void __launch_bounds__(kColumns) finish_kernel(Backward b, Partials p) {
  PEFT_FAST_SHARED(FinishShared, s);
  const int64_t K = b.weight.K, R = b.R, k = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  float x[kMostRows] = {}, low_rank[kMostRows] = {};
  bool keep[kMostRows] = {};
#pragma unroll
  for (int m = 0; m < kMostRows; ++m) {
    if (m >= b.M || k >= K) break;
    keep[m] = kept(b.dropout, m, k, K);
    if (keep[m] && b.d_A.data != nullptr) x[m] = load(b.x, m * K + k) * b.dropout.scale;
  }
  for (int64_t first = 0; first < R; first += kRanks) {
    const int ranks = static_cast<int>(R - first < kRanks ? R - first : kRanks);
    __syncthreads();
    for (int i = threadIdx.x; i < kMostRows * kRanks; i += kColumns) {
      const int64_t m = i / kRanks, r = first + i % kRanks;
      float sum = 0.0f;
      if (m < b.M && r < R) {
        for (int64_t c = 0; c < p.chunks; ++c) sum += p.d_z[(c * b.M + m) * R + r];
      }
      s.dz[m][i % kRanks] = sum;
    }
    __syncthreads();
    if (k >= K) continue;
    for (int r = 0; r < ranks; ++r) {
      const float a = b.dx.data != nullptr ? load(b.lora_A, (first + r) * K + k) : 0.0f;
      float sum = 0.0f;
#pragma unroll
      for (int m = 0; m < kMostRows; ++m) {
        low_rank[m] = fmaf(s.dz[m][r], a, low_rank[m]);
        sum = fmaf(s.dz[m][r], x[m], sum);
      }
      if (b.d_A.data != nullptr) store(b.d_A, (first + r) * K + k, sum);
    }
  }
  if (b.dx.data == nullptr || k >= K) return;
#pragma unroll
  for (int m = 0; m < kMostRows; ++m) {
    if (m >= b.M) break;
    float sum = 0.0f;
    for (int64_t i = 0; i < p.splits; ++i) sum += p.dx[(i * b.M + m) * K + k];
    if (keep[m]) sum = fmaf(low_rank[m], b.dropout.scale, sum);
    store(b.dx, m * K + k, sum);
  }
}

bool is_thin(const Backward& b) {
  return needs_dz(b) || (b.R > 0 && b.d_B.data != nullptr) || b.dbias != nullptr || b.d_out_scale != nullptr;
}

}  // namespace

bool needs_dz(const Backward& b) {
  return b.R > 0 && (b.d_A.data != nullptr || b.dx.data != nullptr);
}

Partials partials(const Backward& b) {
  const int64_t strips = ceil_div(b.weight.K, kStrip), parts = ceil_div(b.weight.N, kLeastRows);
  const int64_t splits =
      std::min({parts, std::max<int64_t>(1, kEnoughBlocks / strips), int64_t{kMostSplits}});
  return {b.dx.data != nullptr ? static_cast<int>(splits) : 0,
          is_thin(b) ? static_cast<int>(std::min<int64_t>(parts, kMostChunks)) : 0, nullptr, nullptr};
}

const char* backward(const Backward& b, const Partials& p, cudaStream_t stream) {
  const int64_t K = b.weight.K, strips = ceil_div(K, kStrip);
  const bool fast = K % 32 == 0 && is_small(b.weight) && aligned(b.weight.four_bit.packed, 4);
  const int64_t blocks = strips * p.splits + p.chunks;
  const char* const error = with_rows(b.M, [&](auto rows) {
    constexpr int M = decltype(rows)::value;
    const auto kernel = fast ? backward_kernel<M, true> : backward_kernel<1, false>;
    return launch(kernel, blocks, kThreads, stream, b, p, static_cast<int>(strips));
  });
  const bool finish = b.dx.data != nullptr || (b.R > 0 && b.d_A.data != nullptr);
  if (error != nullptr || !finish) return error;
  return launch(finish_kernel, ceil_div(K, kColumns), kColumns, stream, b, p);
}

}  // namespace peft_fast::cuda
