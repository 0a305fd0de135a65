// Backward of lora_linear: each gradient is partitioned over its own elements, so no reduction crosses
// threads. Compiled once per level.
//
// dX, many rows: C = dX [M, k-block] accumulates A = dY [M, n-chunk] times B = decoded panel [n-chunk,
// k-block] (its natural order); the low-rank term is one more step with A = dZ, B = lora_A.
#pragma once

#include "forward.h"

namespace peft_fast::PEFT_FAST_LEVEL {

constexpr int64_t kTokenBlock = 24;  // tokens of one dZ item
constexpr int64_t kGradBlock = 48;   // rows of one dB item
constexpr int64_t kStripe = 256;     // columns of a dX item when there are few rows

// Columns of a dX panel: narrower ones leave a small weight enough items to share evenly. The bits do not
// depend on it.
inline int64_t in_block(int64_t K) {
  return K <= 1024 ? 64 : 128;
}

// dz [M][dz_row] = scaling · dY · lora_B; b_packed is lora_B (depth N).
inline void grad_z(const Backward& b, PackedB b_packed, float* dz, int64_t dz_row) {
  const int64_t N = b.weight.N;
  parallel_for(0, blocks(b.M, kTokenBlock), grain(kTokenBlock * N), [&](int64_t begin, int64_t end) {
    float* const g = local_scratch(kTokenBlock * kPanelRow);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t m0 = item * kTokenBlock, rows = min(kTokenBlock, b.M - m0);
      for (int64_t n0 = 0; n0 < N; n0 += kSteps) {
        const int64_t n = min(kSteps, N - n0);
        for (int64_t m = 0; m < rows; ++m)
          to_float(b.grad, (m0 + m) * N + n0, n, g + m * kPanelRow, b.scaling);
        gemm(rows, n, {g, kPanelRow, 1}, b_packed, n0, {dz + m0 * dz_row, dz_row}, n0 > 0);
      }
    }
  });
}

// d_B [N, R] = scaling · dYᵀ · z and dbias [N] = Σ_m dY, whichever are wanted; z_packed is z (depth M).
inline void grad_B_and_bias(const Backward& b, PackedB z_packed) {
  const int64_t N = b.weight.N, R = b.R;
  const bool wants_B = b.d_B.data != nullptr && R > 0;
  parallel_for(0, blocks(N, kGradBlock), grain(kGradBlock * b.M * (R + 4)), [&](int64_t begin, int64_t end) {
    const int64_t c_row = round_up(R, kLanes);
    Carver local(local_scratch(kGradBlock * (kSteps + c_row)));
    float* const g = local.take(kGradBlock * kSteps);
    const MatrixC c{local.take(kGradBlock * c_row), c_row};
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n0 = item * kGradBlock, n = min(kGradBlock, N - n0);
      float dbias[kGradBlock] = {};
      std::memset(c.data, 0, kGradBlock * c_row * sizeof(float));
      for (int64_t m0 = 0; m0 < b.M; m0 += kSteps) {
        const int64_t rows = min(kSteps, b.M - m0);
        float partial[kGradBlock] = {};
        for (int64_t m = 0; m < rows; ++m) {
          float* row = g + m * kGradBlock;
          to_float(b.grad, (m0 + m) * N + n0, n, row);
          if (b.dbias != nullptr)
            for (int64_t i = 0; i < n; ++i) partial[i] += row[i];
        }
        for (int64_t i = 0; i < n; ++i) dbias[i] += partial[i];
        if (wants_B) gemm(n, rows, {g, 1, kGradBlock}, z_packed, m0, c, true);
      }
      if (b.dbias != nullptr) std::memcpy(b.dbias + n0, dbias, n * sizeof(float));
      if (!wants_B) continue;
      for (int64_t i = 0; i < n * c_row; ++i) c.data[i] *= b.scaling;
      for (int64_t i = 0; i < n; ++i) from_float(c.data + i * c_row, R, b.d_B, (n0 + i) * R);
    }
  });
}

// d_A [R, K] = dZᵀ · drop(x).
inline void grad_A(const Backward& b, const float* dz, int64_t dz_row) {
  const int64_t K = b.weight.K, R = b.R, width = in_block(K);
  parallel_for(0, blocks(K, width), grain(width * b.M * (R + 4)), [&](int64_t begin, int64_t end) {
    Carver local(local_scratch(width * (kSteps + R + 1)));
    float* const x = local.take(width * kSteps);
    float* const row = local.take(width);
    const MatrixC c{local.take(R * width), width};
    for (int64_t item = begin; item < end; ++item) {
      const int64_t k0 = item * width, k = min(width, K - k0);
      std::memset(c.data, 0, R * width * sizeof(float));
      for (int64_t m0 = 0; m0 < b.M; m0 += kSteps) {
        const int64_t rows = min(kSteps, b.M - m0);
        const PackedB x_packed{x, rows, k};
        for (int64_t m = 0; m < rows; ++m) {
          to_float(b.x, (m0 + m) * K + k0, k, row);
          if (b.dropout.mask != nullptr) drop(b.dropout, K, m0 + m, k0, k, row);
          pack_row(x_packed, m,
                   [&](int64_t j, int64_t n, float* out) { std::memcpy(out, row + j, n * sizeof(float)); });
        }
        gemm(R, rows, {dz + m0 * dz_row, 1, dz_row}, x_packed, 0, c, true);
      }
      for (int64_t r = 0; r < R; ++r) from_float(c.data + r * width, k, b.d_A, r * K + k0);
    }
  });
}

// lora_A[:, k0:k0+cols] in fp32, packed (depth R).
inline void pack_lora_A(const Backward& b, int64_t k0, PackedB a_packed) {
  for (int64_t r = 0; r < b.R; ++r)
    pack_row(a_packed, r,
             [&](int64_t j, int64_t n, float* out) { to_float(b.lora_A, r * b.weight.K + k0 + j, n, out); });
}

// dx[m0:m0+rows, k0:k0+cols] = base + drop(dZ · lora_A). base [rows][base.row] is overwritten; low_rank is
// scratch [kTokenBlock][base.row].
inline void store_grad_x(const Backward& b, int64_t m0, int64_t rows, int64_t k0, MatrixC base,
                         const float* dz, int64_t dz_row, PackedB a_packed, float* low_rank) {
  const int64_t K = b.weight.K, cols = a_packed.cols;
  for (int64_t i = 0; i < rows && b.R > 0; i += kTokenBlock) {
    const int64_t tokens = min(kTokenBlock, rows - i);
    gemm(tokens, b.R, {dz + (m0 + i) * dz_row, dz_row, 1}, a_packed, 0, {low_rank, base.row}, false);
    for (int64_t t = 0; t < tokens; ++t) {
      float* term = low_rank + t * base.row;
      float* row = base.data + (i + t) * base.row;
      if (b.dropout.mask != nullptr) drop(b.dropout, K, m0 + i + t, k0, cols, term);
      for (int64_t k = 0; k < cols; ++k) row[k] += term[k];
    }
  }
  for (int64_t i = 0; i < rows; ++i) from_float(base.data + i * base.row, cols, b.dx, (m0 + i) * K + k0);
}

// dx for tokens [m0, m0 + rows).
inline void grad_x_superblock(const Backward& b, int64_t m0, int64_t rows, const float* dz, int64_t dz_row,
                              float* g_packed) {
  const int64_t N = b.weight.N, K = b.weight.K, R = b.R, g_row = kPanelRow, width = in_block(K);
  // dY in chunks of columns: chunk c is [rows][g_row].
  parallel_for(0, blocks(N, kSteps), grain(kSteps * rows), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t n0 = chunk * kSteps, n = min(kSteps, N - n0);
      for (int64_t m = 0; m < rows; ++m)
        to_float(b.grad, (m0 + m) * N + n0, n, g_packed + (chunk * rows + m) * g_row);
    }
  });
  parallel_for(0, blocks(K, width), grain(panel_work(width * N, rows)), [&](int64_t begin, int64_t end) {
    const int64_t c_row = width + kPad;
    Carver local(local_scratch(width * (kSteps + R) + (rows + kTokenBlock) * c_row));
    float* const panel_data = local.take(width * kSteps);
    float* const a_data = local.take(width * R);
    float* const low_rank = local.take(kTokenBlock * c_row);
    const MatrixC c{local.take(rows * c_row), c_row};
    for (int64_t item = begin; item < end; ++item) {
      const int64_t k0 = item * width, cols = min(width, K - k0);
      for (int64_t n0 = 0; n0 < N; n0 += kSteps) {
        const PackedB panel{panel_data, min(kSteps, N - n0), cols};
        const int64_t next = n0 + kSteps < N ? (n0 + kSteps) * K + k0 : k0 + width;
        for (int64_t i = 0; i < panel.depth; ++i) {
          prefetch(b.weight, next + i * K, width);
          pack_decoded(b.weight, (n0 + i) * K + k0, panel, i);
        }
        const float* g = g_packed + n0 / kSteps * rows * g_row;
        gemm(rows, panel.depth, {g, g_row, 1}, panel, 0, c, n0 > 0);
      }
      const PackedB a_packed{a_data, R, cols};
      pack_lora_A(b, k0, a_packed);
      store_grad_x(b, m0, rows, k0, c, dz, dz_row, a_packed, low_rank);
    }
  });
}

// dx for M = 1 .. kFewRows tokens: the rows of Ŵ are added up in registers, four at a time; g is dY [M][N].
template <int M>
inline void grad_x_few_rows(const Backward& b, const float* dz, int64_t dz_row, const float* g) {
  constexpr int64_t kRows = 4, kAhead = 16, c_row = kStripe;
  const int64_t N = b.weight.N, K = b.weight.K, R = b.R;
  const bool in_registers = !is_dense(b.weight) && K % kTileCols == 0;
  parallel_for(0, blocks(K, kStripe), grain(kStripe * N), [&](int64_t begin, int64_t end) {
    Carver local(local_scratch(kStripe * (R + kRows + M + kTokenBlock)));
    float* const a_data = local.take(kStripe * R);
    float* const decoded = local.take(kStripe * kRows);
    float* const low_rank = local.take(kStripe * kTokenBlock);
    const MatrixC c{local.take(kStripe * M), c_row};
    const UnitDecoder unit(b.weight.four_bit);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t k0 = item * kStripe, cols = min(kStripe, K - k0);
      std::memset(c.data, 0, M * c_row * sizeof(float));
      for (int64_t n0 = 0; n0 < N; n0 += kRows) {
        const int64_t n = min(kRows, N - n0);
        for (int64_t i = 0; i < kRows; ++i) prefetch(b.weight, (n0 + kAhead + i) * K + k0, kStripe);
        if (!in_registers)
          for (int64_t i = 0; i < n; ++i) decode(b.weight, (n0 + i) * K + k0, cols, decoded + i * kStripe);
        float scale[kRows] = {1.0f, 1.0f, 1.0f, 1.0f};
        for (int64_t i = 0; i < n && in_registers; ++i) scale[i] = unit.first_scale((n0 + i) * K + k0);
        for (int64_t k = 0; k < cols; k += kTileCols) {
          V acc[M][2];
          for (int m = 0; m < M; ++m)
            for (int h = 0; h < 2; ++h) acc[m][h] = load(c.data + m * c_row + k + h * kLanes);
          for (int64_t i = 0; i < n; ++i) {
            V first, second;
            if (in_registers) {
              unit.codes((n0 + i) * K + k0 + k, first, second);
              unit.next_scale((n0 + i) * K + k0 + k, scale[i]);
            } else {
              first = load(decoded + i * kStripe + k);
              second = load(decoded + i * kStripe + k + kLanes);
            }
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
              const V factor = splat(g[m * N + n0 + i] * scale[i]);
              acc[m][0] = fma(first, factor, acc[m][0]);
              acc[m][1] = fma(second, factor, acc[m][1]);
            }
          }
          for (int m = 0; m < M; ++m)
            for (int h = 0; h < 2; ++h) store(c.data + m * c_row + k + h * kLanes, acc[m][h]);
        }
      }
      const PackedB a_packed{a_data, R, cols};
      pack_lora_A(b, k0, a_packed);
      store_grad_x(b, 0, M, k0, c, dz, dz_row, a_packed, low_rank);
    }
  });
}

// dx [M, K]; `scratch` holds the packed dY of a superblock, or dY itself when there are few rows.
inline void grad_x(const Backward& b, const float* dz, int64_t dz_row, int64_t superblock_rows,
                   float* scratch) {
  if (b.M <= kFewRows) to_float(b.grad, 0, b.M * b.weight.N, scratch);
  switch (b.M) {
    case 1:
      return grad_x_few_rows<1>(b, dz, dz_row, scratch);
    case 2:
      return grad_x_few_rows<2>(b, dz, dz_row, scratch);
    case 3:
      return grad_x_few_rows<3>(b, dz, dz_row, scratch);
    case 4:
      return grad_x_few_rows<4>(b, dz, dz_row, scratch);
    default:
      for (int64_t m0 = 0; m0 < b.M; m0 += superblock_rows)
        grad_x_superblock(b, m0, min(superblock_rows, b.M - m0), dz, dz_row, scratch);
  }
}

// The wanted gradients; see Backward.
inline void backward(const Backward& b) {
  const int64_t N = b.weight.N, R = b.R, M = b.M;
  const bool wants_x = b.dx.data != nullptr && M > 0;
  const bool wants_A = b.d_A.data != nullptr && R > 0;
  const bool wants_B = b.d_B.data != nullptr && R > 0;
  const int64_t dz_row = round_up(R, kLanes), rows = superblock(M > 0 ? M : 1, N);
  const int64_t packed_grad = wants_x ? blocks(N, kSteps) * kPanelRow * rows : 0;
  Carver shared(
      shared_scratch(PackedB::size(N, R) + round_up(M * dz_row, 16) + PackedB::size(M, R) + packed_grad));
  if (wants_B || b.dbias != nullptr) {
    const PackedB z_packed{shared.take(PackedB::size(M, R)), M, R};
    for (int64_t m = 0; m < M; ++m)
      pack_row(z_packed, m, [&](int64_t j, int64_t n, float* out) {
        std::memcpy(out, b.z + m * R + j, n * sizeof(float));
      });
    grad_B_and_bias(b, z_packed);
  }
  float* const dz = shared.take(M * dz_row);
  if (R > 0 && (wants_x || wants_A)) {
    const PackedB b_packed{shared.take(PackedB::size(N, R)), N, R};
    parallel_for(0, N, grain(4 * R), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        pack_row(b_packed, n,
                 [&](int64_t j, int64_t count, float* out) { to_float(b.lora_B, n * R + j, count, out); });
    });
    grad_z(b, b_packed, dz, dz_row);
  }
  if (wants_A) grad_A(b, dz, dz_row);
  if (wants_x) grad_x(b, dz, dz_row, rows, shared.take(packed_grad));
}

}  // namespace peft_fast::PEFT_FAST_LEVEL
