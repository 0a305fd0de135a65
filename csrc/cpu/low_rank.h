// The thin products of the low-rank branch, Z = drop(X) · lora_Aᵀ and dZ = dY · lora_B, as parts over groups
// of columns of the wide operand: one pass over it serves everything that it is needed for, and threads share
// its columns. The groups depend on the width and the rank alone, so the bits depend neither on threads nor
// on the other rows. Compiled once per level.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "panel.h"
#include "strategy.h"

namespace peft_fast::PEFT_FAST_LEVEL {

using torch::stable::parallel_for;

constexpr int64_t kMaxPacked = 4 << 20;  // cells of a packed superblock
constexpr int64_t kPad = 16;             // keeps rows of scratch off the same cache sets
constexpr int64_t kThin = 64;            // columns that are staged at once
constexpr int64_t kTokens = 96;          // tokens that are staged at once
constexpr int64_t kAhead = 16;           // tokens from one that is staged to the one that is asked for

// How this level carries an op out.
inline const Strategy& how() {
  return strategy(PEFT_FAST_LEVEL_ID);
}

// Rows of a superblock: even parts of M whose packed copy, `width` cells a row, stays within bounds.
inline int64_t superblock(int64_t M, int64_t width) {
  const int64_t most = min(how().superblock, round_up(kMaxPacked / width + 1, kTileCols));
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
  // Floats to reserve for parts of these sizes.
  static int64_t total(std::initializer_list<int64_t> sizes) {
    int64_t sum = 0;
    for (const int64_t size : sizes) sum += round_up(size, 16);
    return sum;
  }
  float* take(int64_t floats) {
    float* part = data_;
    data_ += round_up(floats, 16);
    return part;
  }

 private:
  float* data_;
};

// c[0:n, 0:cols] (+)= a · rows, with `depth` rows in fp32: stage(p, row) writes row p. Each element is summed
// over kSteps rows in order, then over those sums. scratch [kSteps + 1][round_up(cols, kTileCols)].
template <class Stage>
inline void multiply_rows(int64_t n, MatrixA a, int64_t depth, int64_t cols, float* scratch, MatrixC c,
                          bool accumulate, Stage stage) {
  float* const row = scratch + kSteps * round_up(cols, kTileCols);
  for (int64_t p0 = 0; p0 < depth; p0 += kSteps) {
    const PackedB packed{scratch, min(kSteps, depth - p0), cols};
    for (int64_t p = 0; p < packed.depth; ++p) {
      stage(p0 + p, row);
      pack_values(packed, p, row);
    }
    gemm<Single>(n, packed.depth, {a.data + p0 * a.step, a.row, a.step}, packed, 0, c, accumulate || p0 > 0);
  }
}

// The columns of a wide operand in groups of whole staging blocks, and the partial products of each group:
// part g is [rows][row].
struct Groups {
  int64_t width, count, rows, row;
  float* parts;

  Groups(int64_t width, int64_t R, int64_t rows)
      : width(width), rows(rows), row(round_up(R, kLanes)), parts(nullptr) {
    const int64_t most = min(16, 4096 / (row + 1) + 1);
    count = min(blocks(width, kThin), most);
  }
  int64_t size() const { return count * rows * row; }
  // First column of group g.
  int64_t begin(int64_t g) const { return min(width, blocks(width, kThin) * g / count * kThin); }
  // Part g of rows from m on.
  MatrixC part(int64_t g, int64_t m) const { return {parts + (g * rows + m) * row, row}; }
  // out[0:row] = factor * the sum of the parts of row m.
  void sum(int64_t m, float factor, float* out) const {
    for (int64_t r = 0; r < row; r += kLanes) {
      V total = load(part(0, m).data + r);
      for (int64_t g = 1; g < count; ++g) total += load(part(g, m).data + r);
      store(out + r, total * factor);
    }
  }
};

}  // namespace peft_fast::PEFT_FAST_LEVEL
