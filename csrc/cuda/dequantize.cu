// The decoded weight in one launch, nested scales undone in the same pass, and where asked for merged and
// scaled before its one rounding:
//
//   out = out_scale ⊙ (Ŵ + s·B·A)     [N, K]
//
// B·A is summed in fp32 on the tensor cores, from operands rounded to TF32, which hold eleven bits, where the
// result is half precision, and from three such products, which hold 22, where it is fp32.
//
// A block takes 128 rows of 64 columns, a warp sixteen of them, and a lane, with g = lane / 4 and t = lane %
// 4, the columns 8t .. 8t + 7 of either half in the rows g and g + 8: the tensor cores leave such pairs of
// columns in it, if the columns of A are dealt out accordingly. Codes come from sixteen words of shared
// memory, in as many banks, so that any lookups of a warp are one access.

#include "launch.h"

namespace peft_fast::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kLanes;
constexpr int kBlockRows = 16 * kWarps, kBlockColumns = 64;
constexpr int kRanks = 64;      // of A in shared memory at a time
constexpr int kPitch = 64 + 8;  // of its rows, so that eight columns in four rows lie in 32 banks

template <bool kMerge>
struct WriteShared {
  float code[16];
  float a[kMerge ? kRanks * kPitch : 1];
};

// Where column c of a block's lies among those of A in shared memory: by half, pair, lane group and side.
PEFT_FAST_DEVICE int dealt(int c) {
  const int half = c / 32, t = c % 32 / 8, pair = c % 8 / 2, side = c % 2;
  return (half * 4 + pair) * 8 + t * 2 + side;
}

// What rounding leaves of a value, and nothing of an infinity.
PEFT_FAST_DEVICE float rest_of(float value, float rounded) {
  const float rest = value - rounded;
  return rest == rest ? rest : 0.0f;
}

// update[half][pair] [16, 8] += B [row .., ranks] · A [ranks, column ..]; one product of rounded operands, or
// where `exact` three, of what rounding leaves too.
PEFT_FAST_DEVICE void add_update(const Write& w, int64_t row, int64_t column, bool exact, float* shared_a,
                                 float (&update)[2][4][4]) {
  const int64_t N = w.weight.N, K = w.weight.K, R = w.R;
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  for (int64_t first = 0; first < R; first += kRanks) {
    const int ranks = static_cast<int>(R - first < kRanks ? (R - first + 7) / 8 * 8 : kRanks);
    __syncthreads();
    for (int i = threadIdx.x; i < ranks * kBlockColumns; i += kThreads) {
      const int64_t r = first + i / kBlockColumns, k = column + i % kBlockColumns;
      shared_a[i / kBlockColumns * kPitch + dealt(i % kBlockColumns)] =
          r < R && k < K ? load(w.lora_A, r * K + k) : 0.0f;
    }
    __syncthreads();
    for (int at = 0; at < ranks; at += 8) {
      float b[4], b_rest[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t n = row + g + i % 2 * 8, r = first + at + t + i / 2 * 4;
        const float value = n < N && r < R ? load(w.lora_B, n * R + r) : 0.0f;
        b[i] = round_to_tf32(value);
        b_rest[i] = round_to_tf32(rest_of(value, b[i]));
      }
#pragma unroll
      for (int tile = 0; tile < 8; ++tile) {
        const float* const from = shared_a + (at + t) * kPitch + tile * 8 + g;
        const float values[2] = {from[0], from[4 * kPitch]};
        float a[2], a_rest[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a[i] = round_to_tf32(values[i]);
          a_rest[i] = round_to_tf32(rest_of(values[i], a[i]));
        }
        float (&sums)[4] = update[tile / 4][tile % 4];
        if (exact) {
          multiply_tf32(sums, b_rest, a);
          multiply_tf32(sums, b, a_rest);
        }
        multiply_tf32(sums, b, a);
      }
    }
  }
}

template <bool kMerge, bool kAligned, class Store>
PEFT_FAST_DEVICE void write_block(const Write& w, bool exact, WriteShared<kMerge>& s, Store store_eight) {
  const FourBit& q = w.weight.four_bit;
  const int64_t N = w.weight.N, K = w.weight.K;
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  const auto columns = static_cast<unsigned>((K + kBlockColumns - 1) / kBlockColumns);
  const int64_t row = static_cast<int64_t>(blockIdx.x / columns) * kBlockRows + threadIdx.x / kLanes * 16;
  const int64_t column = static_cast<int64_t>(blockIdx.x % columns) * kBlockColumns;

  // Of the four eights of a lane.
  const int64_t begin = (row + g) * K + column + t * 8;
  const auto inside = [&](int i) { return row + g + i / 2 * 8 < N && column + i % 2 * 32 + t * 8 < K; };
  const auto element = [&](int i) { return begin + i / 2 * 8 * K + i % 2 * 32; };
  uint32_t words[4] = {};
  float scales[4] = {}, out_scales[2] = {};
  const auto read_scales = [&] {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (kAligned && inside(i)) scales[i] = block_scale(q, element(i) >> q.block_shift);
    }
  };
  // All loads come before the first store, which would hold later ones back; a merge has no registers for all
  // of them at once.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (kAligned && inside(i)) words[i] = word_at(q, element(i));
  }
  if constexpr (!kMerge) read_scales();
  if (threadIdx.x < 16) s.code[threadIdx.x] = q.code[threadIdx.x];
  __syncthreads();
  float update[2][4][4] = {};
  if constexpr (kMerge) {
    add_update(w, row, column, exact, s.a, update);
    read_scales();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t n = row + g + i * 8;
      out_scales[i] = w.out_scale != nullptr && n < N ? w.out_scale[n] : 1.0f;
    }
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t n = row + g + i / 2 * 8, first = column + i % 2 * 32 + t * 8;
    if (n >= N || first >= K) continue;
    float value[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int shift = j / 2 * 8 + (j % 2 == 0 ? 4 : 0);
      if constexpr (kAligned) {
        value[j] = s.code[words[i] >> shift & 0xF] * scales[i];
      } else {
        value[j] = first + j < K ? decode_element(q, n * K + first + j) : 0.0f;
      }
      if constexpr (kMerge) {
        // Adding nothing would still turn −0 to 0.
        if (w.R > 0) value[j] = value[j] + update[i % 2][j / 2][i / 2 * 2 + j % 2] * w.scaling;
        value[j] = value[j] * out_scales[i / 2];
      }
    }
    store_eight(n, first, value);
  }
}

template <DType D, bool kMerge>
__global__ void __launch_bounds__(kThreads, 2) write_kernel(Write w) {
  PEFT_FAST_SHARED(WriteShared<kMerge>, s);
  write_block<kMerge, true>(w, D == DType::kFloat32, s, [&](int64_t n, int64_t k, const float (&value)[8]) {
    store8<D>(w.out.data, n * w.weight.K + k, value);
  });
}

// Any K and any alignment.
__global__ void __launch_bounds__(kThreads) write_any_kernel(Write w) {
  PEFT_FAST_SHARED(WriteShared<true>, s);
  write_block<true, false>(w, w.out.dtype == DType::kFloat32, s,
                           [&](int64_t n, int64_t k, const float (&value)[8]) {
                             for (int j = 0; j < 8 && k + j < w.weight.K; ++j)
                               store(w.out, n * w.weight.K + k + j, value[j]);
                           });
}

}  // namespace

const char* write(const Write& w, cudaStream_t stream) {
  const int64_t N = w.weight.N, K = w.weight.K;
  const bool fast = K % 8 == 0 && aligned(w.weight.four_bit.packed, 4) && aligned(w.out.data, 16);
  const int64_t blocks = ceil_div(N, kBlockRows) * ceil_div(K, kBlockColumns);
  if (!fast) return launch(write_any_kernel, blocks, kThreads, stream, w);
  return with_dtype(w.out.dtype, [&](auto dtype) {
    constexpr DType D = decltype(dtype)::value;
    const bool merge = w.R > 0 || w.out_scale != nullptr;
    const auto kernel = merge ? write_kernel<D, true> : write_kernel<D, false>;
    return launch(kernel, blocks, kThreads, stream, w);
  });
}

}  // namespace peft_fast::cuda
