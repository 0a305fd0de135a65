// How an op is carried out for a shape: one row of measured choices for each level, in strategy.cpp.
#pragma once

#include <cstdint>

namespace peft_fast {

enum class Level { kScalar, kAvx2, kAvx512, kAvx512Bf16 };

constexpr int64_t kMostFewRows = 4;
constexpr int64_t kWidestBlock = 256;

struct Strategy {
  // Up to so many tokens the forward forms no panel: each weight is decoded in registers, and used for every
  // token. The second one where a panel would hold pairs of bf16, which are multiplied at twice the rate.
  int64_t few_rows, few_rows_of_pairs;
  // Rows of the weight in a forward panel; the panel and its results stay in L2.
  int64_t out_block;
  // Columns of the weight in a dX panel, for a weight of up to `narrow` columns and for wider ones. Narrow
  // panels leave a small weight enough of them to share evenly; wide ones read the packed rows in longer
  // runs.
  int64_t narrow, narrow_block, wide_block;
  // Tokens that one decoded panel serves.
  int64_t superblock;
};

// The row of a level. The environment variable PEFT_FAST_CPU_STRATEGY, the seven numbers in their order,
// replaces every row, to measure others: bench/cpu_strategies.py.
const Strategy& strategy(Level level);

}  // namespace peft_fast
