// Up to four tokens: every weight is decoded in registers and used for each of them; no panel. Compiled once
// per level.
#pragma once

#include "low_rank.h"

namespace peft_fast::PEFT_FAST_LEVEL {

constexpr int64_t kFewOut = 48;        // outputs of one forward item
constexpr int64_t kColumnsAhead = 32;  // columns from one that is read to the one that is asked for

// out[j][m] = x[m] · w[j] for M rows x [M][x_row] and J rows w [J][w_row] of n values.
template <int M, int J>
inline void dot_rows(const float* x, int64_t x_row, const float* w, int64_t w_row, int64_t n,
                     float (*out)[M]) {
  V acc[J][M] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      const V wj = load(w + j * w_row + i);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) acc[j][m] = fma(wj, load(x + m * x_row + i), acc[j][m]);
    }
  for (int j = 0; j < J; ++j)
    for (int m = 0; m < M; ++m) {
      out[j][m] = sum(acc[j][m]);
      for (int64_t k = i; k < n; ++k) out[j][m] += w[j * w_row + k] * x[m * x_row + k];
    }
}

// out[r][m] = x[m] · Ŵ[row + r] for M rows x [M][K], decoding in registers; K is a multiple of kTileCols.
// Several rows at a time share the loads of x.
template <int M, int Rows, class Decoder>
inline void dot_packed_rows(const Decoder& decoder, const float* x, int64_t K, int64_t row, float (*out)[M]) {
  V acc[Rows][M] = {};
  typename Decoder::Block block[Rows] = {};
  for (int64_t k = 0; k < K; k += kTileCols) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const int64_t i = (row + r) * K + k;
      if (k == 0 || decoder.starts_block(i)) block[r] = decoder.block(i);
      V first, second;
      decoder.values(i, block[r], first, second);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const float* xm = x + m * K + k;
        acc[r][m] = fma(second, load(xm + kLanes), fma(first, load(xm), acc[r][m]));
      }
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int m = 0; m < M; ++m) out[r][m] = sum(acc[r][m]);
}

// base[i][m] = x[m] · w[:, n0 + i] for n rows of a weight that is stored as w [K, N]; each is summed over
// kSteps columns in order, then over those sums.
template <int M>
inline void dot_columns(const Weight& w, const float* x, int64_t n0, int64_t n, float (*base)[M]) {
  constexpr int J = 3, kWidth = J * kLanes;
  const int64_t N = w.N, K = w.K;
  std::memset(base, 0, n * sizeof(*base));
  visit(w.dense.dtype, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    const E* const data = static_cast<const E*>(w.dense.data);
    for (int64_t k0 = 0; k0 < K; k0 += kSteps)
      for (int64_t i = 0; i < n; i += kWidth) {
        const int64_t count = min(kWidth, n - i);
        V acc[M][J] = {};
        E padded[kWidth] = {};
        for (int64_t k = k0; k < min(k0 + kSteps, K); ++k) {
          const int64_t begin = k * N + n0 + i;
          prefetch<2>(w.dense, begin + kColumnsAhead * N, kWidth, N * K);
          const E* run = data + begin;
          if (count < kWidth) run = static_cast<E*>(std::memcpy(padded, run, count * sizeof(E)));
#pragma GCC unroll 3
          for (int j = 0; j < J; ++j) {
            const V wj = load(run + j * kLanes);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) acc[m][j] = fma(wj, splat(x[m * K + k]), acc[m][j]);
          }
        }
        float sums[M][kWidth];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
          for (int j = 0; j < J; ++j) store(sums[m] + j * kLanes, acc[m][j]);
        for (int64_t c = 0; c < count; ++c)
          for (int m = 0; m < M; ++m) base[i + c][m] += sums[m][c];
      }
  });
}

// base[i][m] = x[m] · Ŵ[n0 + i] for n <= kFewOut rows of the weight; row is scratch [K].
template <int M>
inline void few_outputs(const Weight& w, const float* x, int64_t n0, int64_t n, float* row,
                        float (*base)[M]) {
  constexpr int kRows = 2;
  const int64_t K = w.K;
  if (w.transposed) return dot_columns<M>(w, x, n0, n, base);
  if (is_dense(w) || K % kTileCols != 0) {
    for (int64_t i = 0; i < n; ++i) {
      decode(w, (n0 + i) * K, K, row);
      dot_rows<M, 1>(x, K, row, K, K, base + i);
    }
    return;
  }
  with_decoder(w, [&](const auto& decoder) {
    int64_t i = 0;
    for (; i + kRows <= n; i += kRows) dot_packed_rows<M, kRows>(decoder, x, K, n0 + i, base + i);
    for (; i < n; ++i) dot_packed_rows<M, 1>(decoder, x, K, n0 + i, base + i);
  });
}

// y and z of M tokens.
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
      dot_rows<M, 1>(dropped, K, row, K, K, &z);
      for (int m = 0; m < M; ++m) f.z[m * R + r] = z[m];
    }
  });
  parallel_for(0, blocks(N, kFewOut), grain(kFewOut * K), [&](int64_t begin, int64_t end) {
    Carver local(local_scratch(Carver::total({K, R, kFewOut, M * kFewOut})));
    float* const row = local.take(K);
    float* const lora_B = local.take(R);
    float* const bias = local.take(kFewOut);
    float* const y = local.take(M * kFewOut);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n0 = item * kFewOut, n = min(kFewOut, N - n0);
      std::memset(bias, 0, kFewOut * sizeof(float));
      if (f.bias.data != nullptr) to_float(f.bias, n0, n, bias);
      float base[kFewOut][M];
      few_outputs<M>(f.weight, x, n0, n, row, base);
      for (int64_t i = 0; i < n; ++i) {
        float low_rank[M];
        to_float(f.lora_B, (n0 + i) * R, R, lora_B, f.scaling);
        dot_rows<M, 1>(f.z, R, lora_B, R, R, &low_rank);
        const float scale = f.out_scale != nullptr ? f.out_scale[n0 + i] : 1.0f;
        for (int m = 0; m < M; ++m) y[m * kFewOut + i] = (base[i][m] + low_rank[m]) * scale + bias[i];
      }
      for (int m = 0; m < M; ++m) from_float(y + m * kFewOut, n, f.y, m * N + n0);
    }
  });
}

// Calls f with M as a compile-time constant, 1 .. kMostFewRows.
template <class F>
inline void with_few_rows(int64_t M, F f) {
  switch (M) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    default:
      return f(std::integral_constant<int, 4>());
  }
}

}  // namespace peft_fast::PEFT_FAST_LEVEL
