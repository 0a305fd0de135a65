// Up to four tokens: every weight is decoded in registers and used for each of them; no panel. Compiled once
// per level.
#pragma once

#include "low_rank.h"

namespace peft_fast::PEFT_FAST_LEVEL {

constexpr int64_t kFewOut = 48;   // outputs of one forward item
constexpr int64_t kStripe = 256;  // columns of one dX item

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
inline void dot_packed_row(const GroupDecoder& group, const float* x, int64_t K, int64_t row, float* out) {
  V acc[M] = {};
  float scale = 0.0f;
  for (int64_t k = 0; k < K; k += kTileCols) {
    const int64_t i = row * K + k;
    V first, second;
    group.codes(i, first, second);
    if (k == 0 || group.starts_block(i)) scale = group.scale(i);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const float* xm = x + m * K + k;
      acc[m] = fma(fma(second, load(xm + kLanes), first * load(xm)), splat(scale), acc[m]);
    }
  }
  for (int m = 0; m < M; ++m) out[m] = sum(acc[m]);
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
      dot_rows<M>(dropped, K, row, K, z);
      for (int m = 0; m < M; ++m) f.z[m * R + r] = z[m];
    }
  });
  const bool in_registers = !is_dense(f.weight) && K % kTileCols == 0;
  parallel_for(0, blocks(N, kFewOut), grain(kFewOut * K), [&](int64_t begin, int64_t end) {
    Carver local(local_scratch(round_up(K, 16) + round_up(R, 16) + (M + 1) * kFewOut));
    float* const row = local.take(K);
    float* const lora_B = local.take(R);
    float* const bias = local.take(kFewOut);
    float* const y = local.take(M * kFewOut);
    const GroupDecoder group(f.weight.four_bit);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n0 = item * kFewOut, n = min(kFewOut, N - n0);
      std::memset(bias, 0, kFewOut * sizeof(float));
      if (f.bias.data != nullptr) to_float(f.bias, n0, n, bias);
      for (int64_t i = 0; i < n; ++i) {
        float base[M], low_rank[M];
        if (in_registers) {
          dot_packed_row<M>(group, x, K, n0 + i, base);
        } else {
          decode(f.weight, (n0 + i) * K, K, row);
          dot_rows<M>(x, K, row, K, base);
        }
        to_float(f.lora_B, (n0 + i) * R, R, lora_B, f.scaling);
        dot_rows<M>(f.z, R, lora_B, R, low_rank);
        const float scale = f.out_scale != nullptr ? f.out_scale[n0 + i] : 1.0f;
        for (int m = 0; m < M; ++m) y[m * kFewOut + i] = (base[m] + low_rank[m]) * scale + bias[i];
      }
      for (int m = 0; m < M; ++m) from_float(y + m * kFewOut, n, f.y, m * N + n0);
    }
  });
}

// partial [M][kStripe] += g · Ŵ for rows [n0, n0 + n) of the weight, n at most 4, and columns [k0, k0 +
// cols); g is dY [M][N].
template <int M>
inline void add_rows(const Weight& w, const GroupDecoder* group, const float* g, int64_t n0, int64_t n,
                     int64_t k0, int64_t cols, float* decoded, float* partial) {
  const int64_t N = w.N, K = w.K;
  float scale[4];
  if (group == nullptr)
    for (int64_t i = 0; i < n; ++i) decode(w, (n0 + i) * K + k0, cols, decoded + i * kStripe);
  for (int64_t k = 0; k < cols; k += kTileCols) {
    V acc[M][2];
    for (int m = 0; m < M; ++m)
      for (int h = 0; h < 2; ++h) acc[m][h] = load(partial + m * kStripe + k + h * kLanes);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t element = (n0 + i) * K + k0 + k;
      V first, second;
      if (group != nullptr) {
        group->codes(element, first, second);
        if (k == 0 || group->starts_block(element)) scale[i] = group->scale(element);
      } else {
        first = load(decoded + i * kStripe + k);
        second = load(decoded + i * kStripe + k + kLanes);
        scale[i] = 1.0f;
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const V factor = splat(g[m * N + n0 + i] * scale[i]);
        acc[m][0] = fma(first, factor, acc[m][0]);
        acc[m][1] = fma(second, factor, acc[m][1]);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int h = 0; h < 2; ++h) store(partial + m * kStripe + k + h * kLanes, acc[m][h]);
  }
}

// dY · Ŵ of M tokens for columns [k0, k0 + cols) to out [M][kStripe], summed in parts of kSteps rows; g is dY
// [M][N], scratch [4 + M][kStripe].
template <int M>
inline void grad_x_few_rows(const Weight& w, const float* g, int64_t k0, int64_t cols, float* scratch,
                            float* out) {
  constexpr int64_t kRows = 4, kAhead = 16;
  float* const decoded = scratch;
  float* const partial = scratch + kRows * kStripe;
  const GroupDecoder decoder(w.four_bit);
  const GroupDecoder* group = !is_dense(w) && w.K % kTileCols == 0 ? &decoder : nullptr;
  std::memset(out, 0, M * kStripe * sizeof(float));
  for (int64_t begin = 0; begin < w.N; begin += kSteps) {
    std::memset(partial, 0, M * kStripe * sizeof(float));
    for (int64_t n0 = begin; n0 < min(w.N, begin + kSteps); n0 += kRows) {
      for (int64_t i = 0; i < kRows; ++i) prefetch(w, (n0 + kAhead + i) * w.K + k0, kStripe);
      add_rows<M>(w, group, g, n0, min(kRows, w.N - n0), k0, cols, decoded, partial);
    }
    for (int64_t i = 0; i < M * kStripe; ++i) out[i] += partial[i];
  }
}

// Calls f with M as a compile-time constant, 1 .. 4.
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
