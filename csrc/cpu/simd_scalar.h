// Any CPU: four lanes of the compiler's generic vectors, table lookups one by one.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace peft_fast::PEFT_FAST_LEVEL {

typedef float V __attribute__((vector_size(16)));
typedef uint16_t HalfBits __attribute__((vector_size(8)));
constexpr int kLanes = 4;
constexpr int kTileRows = 6;

inline V fma(V a, V b, V c) {
  return a * b + c;
}

inline V half_to_float(HalfBits bits) {
  V v;
  for (int i = 0; i < kLanes; ++i) v[i] = c10::detail::fp16_ieee_to_fp32_value(bits[i]);
  return v;
}

inline HalfBits float_to_half(V v) {
  HalfBits bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = c10::detail::fp16_ieee_from_fp32_value(v[i]);
  return bits;
}

// The sixteen values of a 4-bit format, ready for lookups.
struct Table {
  float values[16];
};
inline Table load_table(const float* code) {
  Table table;
  for (int i = 0; i < 16; ++i) table.values[i] = code[i];
  return table;
}
inline Table scale_table(Table table, float scale) {
  for (float& value : table.values) value *= scale;
  return table;
}

// Looks up the 8 nibbles of bytes[4], in element order.
inline void lookup(const uint8_t* bytes, const Table& table, V& first, V& second) {
  first = V{table.values[bytes[0] >> 4], table.values[bytes[0] & 15], table.values[bytes[1] >> 4],
            table.values[bytes[1] & 15]};
  second = V{table.values[bytes[2] >> 4], table.values[bytes[2] & 15], table.values[bytes[3] >> 4],
             table.values[bytes[3] & 15]};
}

}  // namespace peft_fast::PEFT_FAST_LEVEL
