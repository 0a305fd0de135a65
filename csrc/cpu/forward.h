// Forward of lora_linear and dequantize. Compiled once per level.
//
// Many rows: C = Yᵀ [n-block, M] accumulates A = decoded panel [n-block, k-chunk] (its natural order) times
// B = Xᵀ, packed once per superblock of rows; the low-rank term is one more step with A = s·lora_B, B = Zᵀ.
// A few rows: one dot product per output with the decode in registers.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "panel.h"

namespace peft_fast::PEFT_FAST_LEVEL {

using torch::stable::parallel_for;

constexpr int64_t kFewRows = 4;          // up to here no panel is formed
constexpr int64_t kOutBlock = 48;        // rows of a forward panel
constexpr int64_t kMaxRows = 512;        // of a superblock
constexpr int64_t kMaxPacked = 4 << 20;  // floats of a packed superblock
constexpr int64_t kPad = 16;             // keeps rows of scratch off the same cache sets
constexpr int64_t kRankBlock = 2 * kTileRows;

// Rows of a superblock: even parts of M whose packed copy, `width` floats a row, stays within bounds.
inline int64_t superblock(int64_t M, int64_t width) {
  const int64_t most = min(kMaxRows, round_up(kMaxPacked / width + 1, kTileCols));
  return round_up(blocks(M, blocks(M, most)), kTileCols);
}

// Items of `work` moves each that one thread should take at least: below that, waking another thread costs
// more than it saves.
inline int64_t grain(int64_t work) {
  return blocks(1 << 16, work + 1);
}

// The work of decoding `values` and multiplying each with a vector of `rows`.
inline int64_t panel_work(int64_t values, int64_t rows) {
  return values * (1 + rows / kLanes);
}

// Hands out parts of one scratch allocation, each a multiple of 16 floats.
class Carver {
 public:
  explicit Carver(float* data) : data_(data) {}
  float* take(int64_t floats) {
    float* part = data_;
    data_ += round_up(floats, 16);
    return part;
  }

 private:
  float* data_;
};

// Tokens [m0, m0 + rows) of x [M, K], columns [k0, k0 + n), in fp32 (and dropped out, where `dropped`),
// transposed to tile [n][width]; staging [width][n] is scratch.
inline void pack_transposed(const Forward& f, bool dropped, int64_t m0, int64_t rows, int64_t width,
                            int64_t k0, int64_t n, float* staging, float* tile) {
  const int64_t K = f.weight.K;
  for (int64_t m = 0; m < rows; ++m) {
    to_float(f.x, (m0 + m) * K + k0, n, staging + m * n);
    if (dropped) drop(f.dropout, K, m0 + m, k0, n, staging + m * n);
  }
  std::memset(staging + rows * n, 0, (width - rows) * n * sizeof(float));
  transpose(staging, n, width, n, tile, width);
}

// Zᵀ into z_packed (depth R), and z [M, R], for tokens [m0, m0 + rows); x_packed is Xᵀ (depth K).
inline void low_rank_input(const Forward& f, int64_t m0, int64_t rows, PackedB x_packed, PackedB z_packed) {
  const int64_t K = f.weight.K, R = f.R, rank_blocks = blocks(R, kRankBlock);
  parallel_for(0, blocks(rows, kTileCols) * rank_blocks, grain(kTileCols * K),
               [&](int64_t begin, int64_t end) {
                 Carver local(local_scratch(kRankBlock * kPanelRow + 2 * kTileCols * kSteps));
                 float* const a = local.take(kRankBlock * kPanelRow);
                 float* const staging = local.take(kTileCols * kSteps);
                 float* const dropped = local.take(kTileCols * kSteps);
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t j = item / rank_blocks * kTileCols, r0 = item % rank_blocks * kRankBlock;
                   const int64_t width = x_packed.width(j), ranks = min(kRankBlock, R - r0),
                                 tokens = min(kTileCols, rows - j);
                   const MatrixC c{z_packed.row(j, r0), width};
                   for (int64_t k0 = 0; k0 < K; k0 += kSteps) {
                     const int64_t n = min(kSteps, K - k0);
                     for (int64_t r = 0; r < ranks; ++r)
                       to_float(f.lora_A, (r0 + r) * K + k0, n, a + r * kPanelRow);
                     PackedB b{x_packed.row(j, k0), n, width};
                     if (f.dropout.mask != nullptr) {
                       pack_transposed(f, true, m0 + j, tokens, width, k0, n, staging, dropped);
                       b.data = dropped;
                     }
                     gemm(ranks, n, {a, kPanelRow, 1}, b, 0, c, k0 > 0);
                   }
                   float* z = f.z + (m0 + j) * R + r0;
                   for (int64_t m = 0; m < tokens; ++m)
                     for (int64_t r = 0; r < ranks; ++r) z[m * R + r] = c.data[r * width + m];
                 }
               });
}

// y [rows, n-block] from yt [n-block][yt_row] with the bias added; staging [kTileCols][kOutBlock].
inline void store_transposed(const Forward& f, int64_t m0, int64_t rows, int64_t n0, int64_t n,
                             const float* yt, int64_t yt_row, const float* bias, float* staging) {
  for (int64_t m = 0; m < rows; m += kTileCols) {
    const int64_t tokens = min(kTileCols, rows - m);
    transpose(yt + m, yt_row, n, tokens, staging, kOutBlock);
    for (int64_t t = 0; t < tokens; ++t) {
      float* row = staging + t * kOutBlock;
      if (bias != nullptr)
        for (int64_t i = 0; i < n; ++i) row[i] += bias[i];
      from_float(row, n, f.y, (m0 + m + t) * f.weight.N + n0);
    }
  }
}

// Tokens [m0, m0 + rows) of y and z.
inline void forward_superblock(const Forward& f, int64_t m0, int64_t rows) {
  const int64_t N = f.weight.N, K = f.weight.K, R = f.R, chunks = blocks(K, kSteps);
  Carver shared(shared_scratch(PackedB::size(K, rows) + PackedB::size(R, rows)));
  const PackedB x_packed{shared.take(PackedB::size(K, rows)), K, rows};
  const PackedB z_packed{shared.take(PackedB::size(R, rows)), R, rows};
  parallel_for(0, blocks(rows, kTileCols) * chunks, grain(4 * kTileCols * kSteps),
               [&](int64_t begin, int64_t end) {
                 float* const staging = local_scratch(kTileCols * kSteps);
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t j = item / chunks * kTileCols, k0 = item % chunks * kSteps;
                   pack_transposed(f, false, m0 + j, min(kTileCols, rows - j), x_packed.width(j), k0,
                                   min(kSteps, K - k0), staging, x_packed.row(j, k0));
                 }
               });
  if (R > 0) low_rank_input(f, m0, rows, x_packed, z_packed);

  parallel_for(
      0, blocks(N, kOutBlock), grain(panel_work(kOutBlock * K, rows)), [&](int64_t begin, int64_t end) {
        const int64_t yt_row = round_up(rows, kLanes) + kPad;
        Carver local(local_scratch(kOutBlock * (kPanelRow + yt_row + round_up(R, 16) + kTileCols + 1)));
        float* const panel = local.take(kOutBlock * kPanelRow);
        float* const lora_B = local.take(kOutBlock * R);
        float* const staging = local.take(kOutBlock * kTileCols);
        float* const bias = f.bias.data != nullptr ? local.take(kOutBlock) : nullptr;
        const MatrixC yt{local.take(kOutBlock * yt_row), yt_row};
        for (int64_t item = begin; item < end; ++item) {
          const int64_t n0 = item * kOutBlock, n = min(kOutBlock, N - n0);
          for (int64_t k0 = 0; k0 < K; k0 += kSteps) {
            const int64_t depth = min(kSteps, K - k0);
            const int64_t next = k0 + kSteps < K ? n0 * K + k0 + kSteps : (n0 + kOutBlock) * K;
            for (int64_t i = 0; i < n; ++i) {
              prefetch(f.weight, next + i * K, kSteps);
              decode(f.weight, (n0 + i) * K + k0, depth, panel + i * kPanelRow);
            }
            gemm(n, depth, {panel, kPanelRow, 1}, x_packed, k0, yt, k0 > 0);
          }
          if (R > 0) {
            to_float(f.lora_B, n0 * R, n * R, lora_B, f.scaling);
            gemm(n, R, {lora_B, R, 1}, z_packed, 0, yt, true);
          }
          if (bias != nullptr) to_float(f.bias, n0, n, bias);
          store_transposed(f, m0, rows, n0, n, yt.data, yt_row, bias, staging);
        }
      });
}

// out[m] = x[m] · w for M rows x [M][x_row] and one row w [n].
template <int M>
inline void dot_rows(const float* x, int64_t x_row, const float* w, int64_t n, float* out) {
  V acc[M] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int m = 0; m < M; ++m) acc[m] = fma(load(w + i), load(x + m * x_row + i), acc[m]);
  for (int m = 0; m < M; ++m) {
    out[m] = sum(acc[m]);
    for (int64_t j = i; j < n; ++j) out[m] += w[j] * x[m * x_row + j];
  }
}

// out[m] = x[m] · Ŵ[row] for M rows x [M][K], decoding in registers; K is a multiple of kTileCols.
template <int M>
inline void dot_packed_row(const UnitDecoder& unit, const float* x, int64_t K, int64_t row, float* out) {
  V acc[M] = {};
  float scale = unit.first_scale(row * K);
  for (int64_t k = 0; k < K; k += kTileCols) {
    V first, second;
    unit.codes(row * K + k, first, second);
    unit.next_scale(row * K + k, scale);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const float* xm = x + m * K + k;
      acc[m] = fma(fma(second, load(xm + kLanes), first * load(xm)), splat(scale), acc[m]);
    }
  }
  for (int m = 0; m < M; ++m) out[m] = sum(acc[m]);
}

// y and z for M = 1 .. kFewRows tokens.
template <int M>
inline void forward_few_rows(const Forward& f) {
  const int64_t N = f.weight.N, K = f.weight.K, R = f.R;
  const bool has_dropout = f.dropout.mask != nullptr;
  Carver shared(shared_scratch(2 * round_up(M * K, 16)));
  float* const x = shared.take(M * K);
  float* const dropped = has_dropout ? shared.take(M * K) : x;
  to_float(f.x, 0, M * K, x);
  if (has_dropout) {
    std::memcpy(dropped, x, M * K * sizeof(float));
    for (int m = 0; m < M; ++m) drop(f.dropout, K, m, 0, K, dropped + m * K);
  }
  parallel_for(0, R, grain(M * K), [&](int64_t begin, int64_t end) {
    float* const row = local_scratch(K);
    for (int64_t r = begin; r < end; ++r) {
      float z[M];
      to_float(f.lora_A, r * K, K, row);
      dot_rows<M>(dropped, K, row, K, z);
      for (int m = 0; m < M; ++m) f.z[m * R + r] = z[m];
    }
  });
  const bool in_registers = !is_dense(f.weight) && K % kTileCols == 0;
  parallel_for(0, blocks(N, kOutBlock), grain(kOutBlock * K), [&](int64_t begin, int64_t end) {
    Carver local(local_scratch(round_up(K, 16) + round_up(R, 16) + (M + 1) * kOutBlock));
    float* const row = local.take(K);
    float* const lora_B = local.take(R);
    float* const bias = local.take(kOutBlock);
    float* const y = local.take(M * kOutBlock);
    const UnitDecoder unit(f.weight.four_bit);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n0 = item * kOutBlock, n = min(kOutBlock, N - n0);
      std::memset(bias, 0, kOutBlock * sizeof(float));
      if (f.bias.data != nullptr) to_float(f.bias, n0, n, bias);
      for (int64_t i = 0; i < n; ++i) {
        float base[M], low_rank[M];
        if (in_registers) {
          dot_packed_row<M>(unit, x, K, n0 + i, base);
        } else {
          decode(f.weight, (n0 + i) * K, K, row);
          dot_rows<M>(x, K, row, K, base);
        }
        to_float(f.lora_B, (n0 + i) * R, R, lora_B, f.scaling);
        dot_rows<M>(f.z, R, lora_B, R, low_rank);
        for (int m = 0; m < M; ++m) y[m * kOutBlock + i] = base[m] + low_rank[m] + bias[i];
      }
      for (int m = 0; m < M; ++m) from_float(y + m * kOutBlock, n, f.y, m * N + n0);
    }
  });
}

// y [M, N] and z [M, R] of `f`; see Forward.
inline void forward(const Forward& f) {
  switch (f.M) {
    case 0:
      return;
    case 1:
      return forward_few_rows<1>(f);
    case 2:
      return forward_few_rows<2>(f);
    case 3:
      return forward_few_rows<3>(f);
    case 4:
      return forward_few_rows<4>(f);
    default:
      const int64_t rows = superblock(f.M, f.weight.K);
      for (int64_t m0 = 0; m0 < f.M; m0 += rows) forward_superblock(f, m0, min(rows, f.M - m0));
  }
}

// out [N, K] = the weight, each value rounded once to the dtype of `out`.
inline void dequantize(const Weight& w, Result out) {
  constexpr int64_t kStretch = 4096;
  const int64_t numel = w.N * w.K;
  parallel_for(0, blocks(numel, kStretch), grain(kStretch), [&](int64_t begin, int64_t end) {
    float* const values = local_scratch(kStretch);
    for (int64_t i = begin * kStretch; i < min(end * kStretch, numel); i += kStretch) {
      const int64_t n = min(kStretch, numel - i);
      decode(w, i, n, values);
      from_float(values, n, out, i);
    }
  });
}

}  // namespace peft_fast::PEFT_FAST_LEVEL
