// C[I, J] += A[I, P] · B[P, J] as outer products, and the packed layout of B. Compiled once per level.
//
// Operands are made of 32-bit cells along the reduction: one fp32 value, or two adjacent bf16 values where
// the level multiplies such pairs. Sums are fp32. Both kinds are moved and counted as floats; only the
// product looks into a cell.
#pragma once

#include "vector.h"

namespace peft_fast::PEFT_FAST_LEVEL {

// One fp32 value a cell.
struct Single {
  static constexpr int kValues = 1;
  static V multiply_add(V a, V b, V sum) { return fma(a, b, sum); }
  static V multiply_add(const float* a, V b, V sum) { return fma(splat(*a), b, sum); }
};

#ifdef PEFT_FAST_PAIRS
// Two bf16 values a cell, the first in the low half.
struct Pair {
  static constexpr int kValues = 2;
  static V multiply_add(V a, V b, V sum) { return dot_pairs(a, b, sum); }
  static V multiply_add(const float* a, V b, V sum) { return dot_pairs(a, b, sum); }
};
#endif

// Columns of a register tile, and the values that one table lookup decodes.
constexpr int kTileCols = 2 * kLanes;
// Cells of one accumulation, and the row length of a panel of A that holds them; the odd line keeps rows off
// the same cache sets.
constexpr int kSteps = 256;
constexpr int kPanelRow = kSteps + 16;

// Element (i, p) is data[i * row + p * step].
struct MatrixA {
  const float* data;
  int64_t row, step;
};

// Column tiles one after another: tile t is [depth cells][width] with width kTileCols, or kLanes when a last
// tile of few columns fits one vector. Columns past `cols` are padding.
struct PackedB {
  float* data;
  int64_t depth, cols;

  int64_t width(int64_t j) const { return cols - j > kLanes ? kTileCols : kLanes; }
  // Row p of the tile that starts at column j (a multiple of kTileCols).
  float* row(int64_t j, int64_t p) const { return data + j * depth + p * width(j); }
  // Cells to reserve for it: whole cache lines, as scratch is handed out.
  static int64_t size(int64_t depth, int64_t cols) { return round_up(depth * round_up(cols, kTileCols), 16); }
};

// Element (i, j) is data[i * row + j]; row is at least round_up(cols of B, kLanes).
struct MatrixC {
  float* data;
  int64_t row;
};

// Fills row p of `b`: fill(j, n, out) writes the n values of columns j.. to out; the padding becomes zero.
template <class Fill>
inline void pack_row(const PackedB& b, int64_t p, Fill fill) {
  for (int64_t j = 0; j < b.cols; j += kTileCols) {
    float* out = b.row(j, p);
    const int64_t n = min(kTileCols, b.cols - j);
    fill(j, n, out);
    for (int64_t i = n; i < b.width(j); ++i) out[i] = 0.0f;
  }
}

// Fills row p of `b` with values[0:b.cols].
inline void pack_values(const PackedB& b, int64_t p, const float* values) {
  pack_row(b, p, [&](int64_t j, int64_t n, float* out) {
    if (n == kTileCols)
      std::memcpy(out, values + j, kTileCols * sizeof(float));
    else
      std::memcpy(out, values + j, n * sizeof(float));
  });
}

// One register tile: I rows, J vectors, P steps from zero, then stored or added to C. `Row` is a.row where it
// is known to the compiler (twelve row addresses need no registers then), else 0. At each step two lines are
// asked for that come later: of the rows of A that follow, and of `next_b`. They may be far away still.
template <class Cell, int I, int J, int Row>
inline void tile(MatrixA matrix, const float* b, const float* next_b, int64_t P, float* c, int64_t c_row,
                 bool accumulate) {
  const int64_t a_row = Row != 0 ? Row : matrix.row, a_step = Row != 0 ? 1 : matrix.step;
  const float* a = matrix.data;
  V acc[I][J] = {};
  for (int64_t p = 0; p < P; ++p, a += a_step, b += J * kLanes) {
    if constexpr (Row != 0) {
      __builtin_prefetch(matrix.data + I * Row + p * 16);
      __builtin_prefetch(next_b + p * 16);
    }
    V bv[J];
#pragma GCC unroll 2
    for (int j = 0; j < J; ++j) bv[j] = load(b + j * kLanes);
#pragma GCC unroll 24
    for (int i = 0; i < I; ++i) {
      if constexpr (J == 1) {
        acc[i][0] = Cell::multiply_add(a + i * a_row, bv[0], acc[i][0]);
      } else {
        const V av = splat(a[i * a_row]);
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) acc[i][j] = Cell::multiply_add(av, bv[j], acc[i][j]);
      }
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < J; ++j) {
      float* out = c + i * c_row + j * kLanes;
      store(out, accumulate ? load(out) + acc[i][j] : acc[i][j]);
    }
}

template <class Cell, int I, int J>
inline void tile_column(int64_t rows, int64_t P, MatrixA a, const float* b, const float* next_b, MatrixC c,
                        bool accumulate) {
  for (int64_t t = 0; rows >= I; ++t, rows -= I, a.data += I * a.row, c.data += I * c.row) {
    const float* const ahead = next_b + min(t, J) * P * 16;  // J lines a step make a tile of B
    if (a.row == kPanelRow && a.step == 1)
      tile<Cell, I, J, kPanelRow>(a, b, ahead, P, c.data, c.row, accumulate);
    else
      tile<Cell, I, J, 0>(a, b, ahead, P, c.data, c.row, accumulate);
  }
  if constexpr (I > 1) {
    constexpr int kNext = I > kTileRows ? kTileRows : I > 8 ? 8 : I > 4 ? 4 : I / 2;
    if (rows > 0) tile_column<Cell, kNext, J>(rows, P, a, b, next_b, c, accumulate);
  }
}

// c[0:rows, 0:b.cols] (+)= a[0:rows, 0:P] · b[p0:p0+P]. Each element is summed over p in order, from zero.
template <class Cell>
inline void gemm(int64_t rows, int64_t P, MatrixA a, PackedB b, int64_t p0, MatrixC c, bool accumulate) {
  for (int64_t j = 0; j < b.cols; j += kTileCols) {
    const float* const bj = b.row(j, p0);
    const float* const next_b = j + kTileCols < b.cols ? b.row(j + kTileCols, p0) : bj;
    const MatrixC cj{c.data + j, c.row};
    if (b.width(j) == kTileCols)
      tile_column<Cell, kTileRows, 2>(rows, P, a, bj, next_b, cj, accumulate);
    else
      tile_column<Cell, 2 * kTileRows, 1>(rows, P, a, bj, next_b, cj, accumulate);
  }
}

}  // namespace peft_fast::PEFT_FAST_LEVEL
