// Y and Z of up to eight tokens on a packed weight, in two launches:
//
//   Z = drop(X)·Aᵀ                                    a block for each rank
//   Y = out_scale ⊙ (X·Ŵᵀ + s·Z·Bᵀ) + bias            a warp for four rows of Ŵ, or some warps for a part of
//   K each
//
// Ŵ is code · absmax in fp32: lanes add x · code over eight weights, which lie in one block, and then
// multiply by its absmax. Everything is summed in fp32, in an order that the shape alone decides, and rounded
// once.

#include "launch.h"
#include "pair_table.h"

namespace peft_fast::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kLanes;
constexpr int kRows = 4;                // rows of Ŵ that a warp takes at a time: they share the loads of X
constexpr int kStrip = 8 * kLanes;      // weights that a warp reads from a row at once
constexpr int64_t kEnoughWarps = 4096;  // about 32 for each of an H100's multiprocessors

// How many of those are on their way at a time, as registers allow.
template <int M>
constexpr int kStrips = M == 1 ? 4 : 1;
template <int M>
constexpr int kStep = kStrips<M> * kStrip;

struct DownShared {
  float sums[kWarps][kMostRows];
};

template <DType D, bool kAligned>
__global__ void __launch_bounds__(kThreads) down_kernel(Forward f) {
  PEFT_FAST_SHARED(DownShared, s);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t K = f.weight.K, r = blockIdx.x;
  float sums[kMostRows] = {};
  if constexpr (kAligned) {
    for (int64_t k = threadIdx.x * 8; k < K; k += kThreads * 8) {
      float a[8], x[kMostRows][8] = {};
      int keep[kMostRows];
#pragma unroll
      for (int m = 0; m < kMostRows; ++m) {
        if (m < f.M) load8<D>(f.x.data, m * K + k, x[m]);
        keep[m] = m < f.M && f.dropout.mask != nullptr ? f.dropout.mask[(m * K + k) / 8] : 0xFF;
      }
      load8(f.lora_A, r * K + k, a);
#pragma unroll
      for (int m = 0; m < kMostRows; ++m) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[m] = fmaf(keep[m] >> j & 1 ? x[m][j] : 0.0f, a[j], sums[m]);
      }
    }
  } else {
    for (int64_t k = threadIdx.x; k < K; k += kThreads) {
      const float a = load(f.lora_A, r * K + k);
#pragma unroll
      for (int m = 0; m < kMostRows; ++m) {
        if (m >= f.M) break;
        if (kept(f.dropout, m, k, K)) sums[m] = fmaf(load<D>(f.x.data, m * K + k), a, sums[m]);
      }
    }
  }
  const float sum = sum_over_lanes(sums, lane);
  if (lane % (kLanes / kMostRows) == 0) s.sums[warp][lane / (kLanes / kMostRows)] = sum;
  __syncthreads();
  if (threadIdx.x < f.M) {
    float z = 0.0f;
    for (int w = 0; w < kWarps; ++w) z += s.sums[w][threadIdx.x];
    f.z[threadIdx.x * f.R + r] = z * f.dropout.scale;
  }
}

// s·Z·Bᵀ as further terms of the sums over the lanes, for Rows rows from `row` and up to M tokens.
template <int Rows, int M>
PEFT_FAST_DEVICE void add_low_rank(const Forward& f, int64_t row, int lane, float (&sums)[Rows * M]) {
  for (int64_t r = lane; r < f.R; r += kLanes) {
    float z[M], b[Rows];
#pragma unroll
    for (int m = 0; m < M; ++m) z[m] = m < f.M ? f.z[m * f.R + r] : 0.0f;
    load_strided(f.lora_B, row * f.R + r, f.R, f.weight.N - row, b);
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
#pragma unroll
      for (int m = 0; m < M; ++m) sums[i * M + m] = fmaf(z[m], f.scaling * b[i], sums[i * M + m]);
    }
  }
}

PEFT_FAST_DEVICE void store_output(const Forward& f, int64_t m, int64_t n, float value) {
  if (f.out_scale != nullptr) value = value * f.out_scale[n];
  if (f.bias.data != nullptr) value = value + load(f.bias, n);
  store(f.y, m * f.weight.N + n, value);
}

template <int M>
struct ForwardShared {
  PairTable table;
  float sums[kWarps][kRows * M];
};

// A block takes kWarps / split groups of kRows rows. The weight is small and K a multiple of 32, so that
// eight weights from a multiple of eight are whole bytes of one block, and 32 from a multiple of 32 have one
// scale.
template <DType D, int M>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(Forward f, int split) {
  PEFT_FAST_SHARED(ForwardShared<M>, s);
  const FourBit& w = f.weight.four_bit;
  const int64_t N = f.weight.N;
  const int K = static_cast<int>(f.weight.K), tokens = static_cast<int>(f.M);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int groups = kWarps / split, part = warp % split, stride = split * kStep<M>;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * groups + warp / split) * kRows;

  // Rows past the end are read as the last one, and their sums dropped.
  const int64_t from = (row < N ? row : N - 1) * K;
  const int last = static_cast<int>(row < N - kRows ? kRows : row < N ? N - row : 1) - 1;
  const auto down = [&](int i) { return (i < last ? i : last) * K; };
  const uint32_t* bytes[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    bytes[i] = reinterpret_cast<const uint32_t*>(w.packed) + (from + down(i) + part * kStep<M>) / 8 + lane;
  }

  // Lane l has the scales of the 32 weights that begin at first + 32 l, of the next step where registers
  // allow.
  constexpr bool kAhead = M == 1;
  float scales[kRows] = {};
  const auto read_scales = [&](int first) {
    const int at = first + lane * 32;
    if (at >= K || lane * 32 >= kStep<M>) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) scales[i] = scale_at(w, from + down(i) + at);
  };

  // The first bytes are under way while the table is filled, and later ones while their elders are used.
  const float2 entry = entry_of(w.code);
  uint32_t words[kRows][kStrips<M>];
#pragma unroll
  for (int t = 0; t < kStrips<M>; ++t) {
    const bool inside = part * kStep<M> + t * kStrip + lane * 8 < K;
#pragma unroll
    for (int i = 0; i < kRows; ++i) words[i][t] = inside ? bytes[i][t * kLanes] : 0;
  }
  if constexpr (kAhead) read_scales(part * kStep<M>);
  fill(s.table, entry);
  __syncthreads();

  const Copy copy = copy_of(s.table, lane);
  float sums[kRows * M] = {};
  for (int first = part * kStep<M>; first < K; first += stride) {
    if constexpr (!kAhead) read_scales(first);
#pragma unroll
    for (int i = 0; i < kRows; ++i) bytes[i] += stride / 8;
#pragma unroll
    for (int t = 0; t < kStrips<M>; ++t) {
      const int k = first + t * kStrip + lane * 8;
      const bool inside = k + stride < K;
      float codes[kRows][8], scale[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        look_up(copy, words[i][t], codes[i]);
        scale[i] = shuffle(scales[i], t * (kStrip / 32) + lane / 4);
        words[i][t] = inside ? bytes[i][t * kLanes] : 0;
      }
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if (m >= tokens || k >= K) break;
        float x[8];
        load8<D>(f.x.data, m * K + k, x);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          float dot = 0.0f;
#pragma unroll
          for (int j = 0; j < 8; ++j) dot = fmaf(x[j], codes[i][j], dot);
          sums[i * M + m] = fmaf(dot, scale[i], sums[i * M + m]);
        }
      }
    }
    if constexpr (kAhead) read_scales(first + stride);
  }
  if (part == 0) add_low_rank<kRows, M>(f, row, lane, sums);

  constexpr int kEach = kRows * M, kHolders = kLanes / kEach;
  const float sum = sum_over_lanes(sums, lane);
  if (lane % kHolders == 0) s.sums[warp][lane / kHolders] = sum;
  __syncthreads();
  const int group = threadIdx.x / kEach, i = threadIdx.x % kEach / M, m = threadIdx.x % M;
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * groups + group) * kRows + i;
  if (group < groups && n < N && m < f.M) {
    float y = 0.0f;
    for (int p = 0; p < split; ++p) y += s.sums[group * split + p][threadIdx.x % kEach];
    store_output(f, m, n, y);
  }
}

// Any K and any alignment: a row of Ŵ for a warp, an element at a time for a lane.
__global__ void __launch_bounds__(kThreads) forward_any_kernel(Forward f) {
  const int64_t N = f.weight.N, K = f.weight.K;
  const int lane = threadIdx.x % kLanes;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  float sums[kMostRows] = {};
  if (n < N) {
    for (int64_t k = lane; k < K; k += kLanes) {
      const float weight = decode_element(f.weight.four_bit, n * K + k);
#pragma unroll
      for (int m = 0; m < kMostRows; ++m) {
        if (m >= f.M) break;
        sums[m] = fmaf(load(f.x, m * K + k), weight, sums[m]);
      }
    }
    add_low_rank<1, kMostRows>(f, n, lane, sums);
  }
  const float sum = sum_over_lanes(sums, lane);
  const int m = lane / (kLanes / kMostRows);
  if (lane % (kLanes / kMostRows) == 0 && n < N && m < f.M) store_output(f, m, n, sum);
}

}  // namespace

const char* forward(const Forward& f, cudaStream_t stream) {
  if (f.M == 0) return nullptr;
  const int64_t N = f.weight.N, K = f.weight.K;
  const bool by_eight = K % 8 == 0 && aligned(f.x.data, 16) && aligned(f.lora_A.data, 16);
  const bool fast =
      K % 32 == 0 && is_small(f.weight) && aligned(f.x.data, 16) && aligned(f.weight.four_bit.packed, 4);
  const char* const error = with_dtype(f.x.dtype, [&](auto dtype) {
    constexpr DType D = decltype(dtype)::value;
    return launch(by_eight ? down_kernel<D, true> : down_kernel<D, false>, f.R, kThreads, stream, f);
  });
  if (error != nullptr) return error;
  if (!fast) return launch(forward_any_kernel, ceil_div(N, kWarps), kThreads, stream, f);
  return with_dtype(f.x.dtype, [&](auto dtype) {
    return with_rows(f.M, [&](auto rows) {
      constexpr DType D = decltype(dtype)::value;
      constexpr int M = decltype(rows)::value;
      int split = 1;
      while (split < kWarps && 2 * split <= ceil_div(K, kStep<M>) &&
             ceil_div(N, kRows) * split < kEnoughWarps) {
        split *= 2;
      }
      return launch(forward_kernel<D, M>, ceil_div(N, kWarps / split * kRows), kThreads, stream, f, split);
    });
  });
}

}  // namespace peft_fast::cuda
