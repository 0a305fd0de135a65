// AVX-512: sixteen fp32 lanes, and the sixteen-entry code table in one register.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace peft_fast::PEFT_FAST_LEVEL {

using V = __m512;
constexpr int kLanes = 16;
constexpr int kTileRows = 12;  // 12 x 2 accumulators, 2 vectors of B, 1 broadcast of A: 27 of 32 registers

inline V fma(V a, V b, V c) {
  return _mm512_fmadd_ps(a, b, c);
}
// Forms with a full mask: the unmasked intrinsics read an undefined register, and GCC warns of it.
constexpr __mmask16 kAll = 0xFFFF;
inline V half_to_float(__m256i bits) {
  return _mm512_maskz_cvtph_ps(kAll, bits);
}
inline __m256i float_to_half(V v) {
  return _mm512_maskz_cvtps_ph(kAll, v, _MM_FROUND_TO_NEAREST_INT);
}

// The sixteen values of a 4-bit format, ready for lookups.
using Table = __m512;
inline Table load_table(const float* code) {
  return _mm512_loadu_ps(code);
}
inline Table scale_table(Table table, float scale) {
  return table * scale;
}

// Looks up the 32 nibbles of bytes[16], in element order.
inline void lookup(const uint8_t* bytes, Table table, V& first, V& second) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  const __m128i high = _mm_srli_epi16(low, 4);
  // vpermps reads the low four bits of an index and ignores the rest.
  const __m512i first_index = _mm512_maskz_cvtepu8_epi32(kAll, _mm_unpacklo_epi8(high, low));
  const __m512i second_index = _mm512_maskz_cvtepu8_epi32(kAll, _mm_unpackhi_epi8(high, low));
  first = _mm512_maskz_permutexvar_ps(kAll, first_index, table);
  second = _mm512_maskz_permutexvar_ps(kAll, second_index, table);
}

}  // namespace peft_fast::PEFT_FAST_LEVEL
