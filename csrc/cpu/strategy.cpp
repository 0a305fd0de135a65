// The table of strategies.
#include "strategy.h"

#include <cstdlib>
#include <sstream>
#include <string>

#include <torch/csrc/stable/ops.h>

namespace peft_fast {
namespace {

constexpr Strategy kStrategies[] = {
    // few_rows, few_rows_of_pairs, out_block, narrow, narrow_block, wide_block, superblock
    /* scalar     */ {4, 0, 48, 1024, 64, 128, 512},
    /* avx2       */ {4, 0, 48, 1024, 64, 128, 512},
    /* avx512     */ {4, 0, 48, 1024, 64, 128, 512},
    /* avx512bf16 */ {4, 3, 48, 1024, 64, 128, 512},
};

bool is_block(int64_t columns) {
  return columns >= 32 && columns <= kWidestBlock && columns % 32 == 0;
}

Strategy parse(const char* text) {
  std::istringstream in(text);
  Strategy s{};
  int64_t* const fields[] = {&s.few_rows,     &s.few_rows_of_pairs, &s.out_block, &s.narrow,
                             &s.narrow_block, &s.wide_block,        &s.superblock};
  for (int64_t* field : fields) in >> *field;
  STD_TORCH_CHECK(!in.fail() && (in >> std::ws).eof(),
                  "PEFT_FAST_CPU_STRATEGY: expected seven numbers separated by spaces, got ", text);
  STD_TORCH_CHECK(s.few_rows >= 0 && s.few_rows <= kMostFewRows && s.few_rows_of_pairs >= 0 &&
                      s.few_rows_of_pairs <= kMostFewRows,
                  "PEFT_FAST_CPU_STRATEGY: expected few_rows of 0 to ", kMostFewRows, ", got ", text);
  STD_TORCH_CHECK(s.out_block >= 1 && s.out_block <= 4096 && is_block(s.narrow_block) &&
                      is_block(s.wide_block) && s.superblock >= 32 && s.superblock <= 65536,
                  "PEFT_FAST_CPU_STRATEGY: expected an out_block of 1 to 4096, dX blocks of 32, 64, ... ",
                  kWidestBlock, " columns and a superblock of 32 to 65536 tokens, got ", text);
  return s;
}

}  // namespace

const Strategy& strategy(Level level) {
  static const char* const text = std::getenv("PEFT_FAST_CPU_STRATEGY");
  if (text == nullptr) return kStrategies[static_cast<int>(level)];
  static const Strategy chosen = parse(text);
  return chosen;
}

}  // namespace peft_fast
