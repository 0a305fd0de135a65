// The gradients for up to eight tokens on a packed weight, in two launches, with G' = dY ⊙ out_scale:
//
//   1  partial sums of G'·Ŵ over N, and beside them, read once: dB = s·G'ᵀ·Z, dbias = Σ dY,
//      d_out_scale = Σ dY ⊙ (Y − bias) / out_scale and partial sums of dZ = s·G'·B
//   2  dX = G'·Ŵ + drop(dZ·A) and dA = dZᵀ·drop(X)
//
// Partial sums are fp32, added in a fixed order; no atomics.
#include <algorithm>

#include "launch.h"
#include "pair_table.h"

namespace peft_fast::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kLanes;
constexpr int kStrip = 8 * kLanes;      // columns of a block: eight a lane
constexpr int kScales = kStrip / 32;    // of a row: no block is shorter than 32
constexpr int64_t kEnoughBlocks = 512;  // about four for each of an H100's multiprocessors
constexpr int kLeastRows = 64, kMostSplits = 64, kMostChunks = 32;  // a partial sum has, and there are
constexpr int kRanks = 64;                                          // that the second launch takes at a time

// Rows of Ŵ that a warp has under way at a time, every eighth of a tile: as many as registers allow.
template <int M>
constexpr int kEach = M == 1 ? 8 : 4;
template <int M>
constexpr int kTile = kEach<M> * kWarps;

struct BackwardShared {
  PairTable table;
  float grad[kMostRows][kLeastRows];
  float sums[kWarps * kStrip];
};

// `grad` as an element of column n of G'.
PEFT_FAST_DEVICE float scaled(const Backward& b, int64_t n, float grad) {
  return b.out_scale != nullptr ? grad * b.out_scale[n] : grad;
}

// dB, dbias, d_out_scale and the partial sums of dZ of the rows [begin, end) of the weight.
PEFT_FAST_DEVICE void thin_chunk(const Backward& b, int64_t begin, int64_t end, float* d_z,
                                 BackwardShared& s) {
  const int64_t N = b.weight.N, R = b.R;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  if (b.dbias != nullptr || b.d_out_scale != nullptr) {
    for (int64_t n = begin + threadIdx.x; n < end; n += kThreads) {
      float g[kMostRows], y[kMostRows] = {};
      load_strided(b.grad, n, N, b.M, g);
      if (b.d_out_scale != nullptr) load_strided(b.y, n, N, b.M, y);
      const float bias = b.bias.data != nullptr ? load(b.bias, n) : 0.0f;
      float sum = 0.0f, weighted = 0.0f;
      for (int m = 0; m < kMostRows && m < b.M; ++m) {
        sum += g[m];
        weighted = fmaf(g[m], y[m] - bias, weighted);
      }
      if (b.dbias != nullptr) b.dbias[n] = sum;
      if (b.d_out_scale != nullptr) b.d_out_scale[n] = weighted / b.out_scale[n];
    }
  }
  if (b.d_B.data == nullptr && d_z == nullptr) return;
  for (int64_t first = 0; first < R; first += kLanes) {
    const int64_t r = first + lane;
    float z[kMostRows], dz[kMostRows] = {};
#pragma unroll
    for (int m = 0; m < kMostRows; ++m) {
      z[m] = m < b.M && r < R && b.d_B.data != nullptr ? b.z[m * R + r] : 0.0f;
    }
    for (int64_t tile = begin; tile < end; tile += kLeastRows) {
      // Every load of a tile before any store, which might else be to the same memory.
      const int rows = static_cast<int>(end - tile < kLeastRows ? end - tile : kLeastRows);
      float weight[kLeastRows / kWarps] = {};
      if (d_z != nullptr && r < R) {
        const int own = (rows - warp + kWarps - 1) / kWarps;
        load_strided(b.lora_B, (tile + warp) * R + r, kWarps * R, own, weight);
      }
      __syncthreads();
      for (int i = threadIdx.x; i < kMostRows * kLeastRows; i += kThreads) {
        const int m = i / kLeastRows, row = i % kLeastRows;
        const bool inside = m < b.M && row < rows;
        s.grad[m][row] = inside ? scaled(b, tile + row, b.scaling) * load(b.grad, m * N + tile + row) : 0.0f;
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kLeastRows / kWarps; ++j) {
        const int row = j * kWarps + warp;
        if (row >= rows) break;
        float sum = 0.0f;
#pragma unroll
        for (int m = 0; m < kMostRows; ++m) {
          const float g = s.grad[m][row];
          dz[m] = fmaf(g, weight[j], dz[m]);
          sum = fmaf(g, z[m], sum);
        }
        if (b.d_B.data != nullptr && r < R) store(b.d_B, (tile + row) * R + r, sum);
      }
    }
    if (d_z == nullptr) continue;
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kMostRows; ++m) s.sums[(warp * kMostRows + m) * kLanes + lane] = dz[m];
    __syncthreads();
    const int m = warp;  // as many warps as tokens at most
    if (m < b.M && r < R) {
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) sum += s.sums[(w * kMostRows + m) * kLanes + lane];
      d_z[m * R + r] = sum;
    }
  }
}

// Eight warps take every eighth row of [begin, end) each; their sum is a strip of partial sum `split` of dX.
// What a warp needs of its next tile, words, scales and gradients, is under way while it adds up this one, in
// registers of its lanes: they wait for no other warp.
template <int M>
PEFT_FAST_DEVICE void dx_strip(const Backward& b, const Partials& p, int column, int split, int64_t begin,
                               int64_t end, BackwardShared& s) {
  const FourBit& w = b.weight.four_bit;
  const int64_t N = b.weight.N;
  const int K = static_cast<int>(b.weight.K), tokens = static_cast<int>(b.M);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, k = column + lane * 8;

  const float2 entry = entry_of(w.code);
  // Of rows j * kWarps after `row`, lane l has the word of its columns, of row q * 4 + l / 8 the scale of the
  // 32 columns l % 8, and of row l / M the gradient of token l % M.
  uint32_t words[kEach<M>];
  const auto* bytes = reinterpret_cast<const uint32_t*>(w.packed) + ((begin + warp) * K + k) / 8;
  const auto read_word = [&](int left, int j) {
    words[j] = j * kWarps < left && k < K ? bytes[j * kWarps * (K / 8)] : 0;
  };
  constexpr int kHeld = kEach<M> * kScales / kLanes;
  const auto read_scales = [&](int64_t row, float (&scales)[kHeld]) {
    const int at = column + lane % kScales * 32;
#pragma unroll
    for (int q = 0; q < kHeld; ++q) {
      const int64_t n = row + (q * (kLanes / kScales) + lane / kScales) * kWarps;
      scales[q] = n < end && at < K ? scale_at(w, n * K + at) : 0.0f;
    }
  };
  const auto read_grad = [&](int64_t row) {
    const int64_t n = row + lane / M * kWarps;
    const bool inside = lane < kEach<M> * M && lane % M < tokens && n < end;
    return inside ? scaled(b, n, load(b.grad, lane % M * N + n)) : 0.0f;
  };

  float scales[kHeld], sums[M][8] = {};
#pragma unroll
  for (int j = 0; j < kEach<M>; ++j) read_word(static_cast<int>(end - begin) - warp, j);
  read_scales(begin + warp, scales);
  float grad = read_grad(begin + warp);
  fill(s.table, entry);
  __syncthreads();
  const Copy copy = copy_of(s.table, lane);
  for (int64_t row = begin + warp; row < end; row += kTile<M>) {
    const int left = static_cast<int>(end - row) - kTile<M>;
    bytes += kTile<M> * (K / 8);
    float later_scales[kHeld];
    read_scales(row + kTile<M>, later_scales);
    const float later_grad = read_grad(row + kTile<M>);
#pragma unroll
    for (int j = 0; j < kEach<M>; ++j) {
      float codes[8];
      look_up(copy, words[j], codes);
      read_word(left, j);
      const int holder = j % (kLanes / kScales) * kScales + lane / (kLanes / kScales);
      const float scale = shuffle(scales[j / (kLanes / kScales)], holder);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if (m >= tokens) break;
        const float g = shuffle(grad, j * M + m) * scale;
#pragma unroll
        for (int c = 0; c < 8; ++c) sums[m][c] = fmaf(g, codes[c], sums[m][c]);
      }
    }
#pragma unroll
    for (int q = 0; q < kHeld; ++q) scales[q] = later_scales[q];
    grad = later_grad;
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

// The first `chunks` blocks make the thin results, which wait for memory most, the others sum dX.
template <int M, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(Backward b, Partials p, int strips) {
  PEFT_FAST_SHARED(BackwardShared, s);
  const int64_t N = b.weight.N;
  const int block = static_cast<int>(blockIdx.x) - p.chunks;
  if (block < 0) {
    const int64_t chunk = blockIdx.x, rows = (N + p.chunks - 1) / p.chunks, begin = chunk * rows;
    float* const d_z = p.d_z == nullptr ? nullptr : p.d_z + chunk * b.M * b.R;
    thin_chunk(b, begin, begin + rows < N ? begin + rows : N, d_z, s);
    return;
  }
  const int split = block / strips;
  const int64_t column = static_cast<int64_t>(block % strips) * kStrip;
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
  float x[kMostRows][kLanes];
  float dz[kMostRows][kRanks];
  float a[kRanks][kLanes];
};

// A lane has a column, a warp a token of dX and every eighth row of dA.
__global__ void __launch_bounds__(kThreads) finish_kernel(Backward b, Partials p) {
  PEFT_FAST_SHARED(FinishShared, s);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t K = b.weight.K, R = b.R, k = static_cast<int64_t>(blockIdx.x) * kLanes + lane;
  const bool inside = k < K, keep = inside && warp < b.M && kept(b.dropout, warp, k, K);
  const bool of_A = b.d_A.data != nullptr;
  s.x[warp][lane] = keep && of_A ? load(b.x, warp * K + k) * b.dropout.scale : 0.0f;
  float low_rank = 0.0f;
  for (int64_t first = 0; first < R; first += kRanks) {
    const int ranks = static_cast<int>(R - first < kRanks ? R - first : kRanks);
    float a[kRanks / kWarps] = {};
    if (inside && b.dx.data != nullptr) {
      load_strided(b.lora_A, (first + warp) * K + k, kWarps * K, (ranks - warp + kWarps - 1) / kWarps, a);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kMostRows * kRanks; i += kThreads) {
      const int m = i / kRanks, r = i % kRanks;
      float sum = 0.0f;
      if (m < b.M && r < ranks) {
        for (int64_t c = 0; c < p.chunks; ++c) sum += p.d_z[(c * b.M + m) * R + first + r];
      }
      s.dz[m][r] = sum;
    }
#pragma unroll
    for (int i = 0; i < kRanks / kWarps; ++i) s.a[warp + i * kWarps][lane] = a[i];
    __syncthreads();
    for (int r = 0; r < ranks; ++r) low_rank = fmaf(s.dz[warp][r], s.a[r][lane], low_rank);
    for (int r = warp; r < ranks && inside && of_A; r += kWarps) {
      float sum = 0.0f;
#pragma unroll
      for (int m = 0; m < kMostRows; ++m) sum = fmaf(s.dz[m][r], s.x[m][lane], sum);
      store(b.d_A, (first + r) * K + k, sum);
    }
  }
  if (b.dx.data == nullptr || !inside || warp >= b.M) return;
  float sum = 0.0f;
  for (int64_t i = 0; i < p.splits; ++i) sum += p.dx[(i * b.M + warp) * K + k];
  store(b.dx, warp * K + k, keep ? fmaf(low_rank, b.dropout.scale, sum) : sum);
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
  return launch(finish_kernel, ceil_div(K, kLanes), kThreads, stream, b, p);
}

}  // namespace peft_fast::cuda
