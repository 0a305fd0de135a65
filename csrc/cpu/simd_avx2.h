// AVX2 with FMA and F16C: eight fp32 lanes, and the code table in two registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace peft_fast::PEFT_FAST_LEVEL {

using V = __m256;
constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // 6 x 2 accumulators, 2 vectors of B, 1 broadcast of A: 15 of 16 registers

inline V fma(V a, V b, V c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline V half_to_float(__m128i bits) {
  return _mm256_cvtph_ps(bits);
}
inline __m128i float_to_half(V v) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}

// The sixteen values of a 4-bit format, ready for lookups.
struct Table {
  __m256 low, high;
};
inline Table load_table(const float* code) {
  return {_mm256_loadu_ps(code), _mm256_loadu_ps(code + 8)};
}
inline Table scale_table(Table table, float scale) {
  return {table.low * scale, table.high * scale};
}

inline V lookup_eight(__m128i nibbles, Table table) {
  const __m256i index = _mm256_cvtepu8_epi32(nibbles);
  const __m256 low = _mm256_permutevar8x32_ps(table.low, index);
  const __m256 high = _mm256_permutevar8x32_ps(table.high, index);
  // Bit 3 of the index, moved to the sign, chooses the half; vpermps reads the low three bits.
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

// Looks up the 16 nibbles of bytes[8], in element order.
inline void lookup(const uint8_t* bytes, Table table, V& first, V& second) {
  const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  const __m128i nibbles = _mm_unpacklo_epi8(_mm_srli_epi16(low, 4), low);
  first = lookup_eight(nibbles, table);
  second = lookup_eight(_mm_srli_si128(nibbles, 8), table);
}

}  // namespace peft_fast::PEFT_FAST_LEVEL
