// AVX-512 with BF16: cells of two bf16 values, multiplied and added in one instruction.
#pragma once

#define PEFT_FAST_PAIRS

#include "simd_avx512.h"

namespace peft_fast::PEFT_FAST_LEVEL {

// sum + a.low * b.low + a.high * b.high, lane by lane.
inline V dot_pairs(V a, V b, V sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// The sixteen values of a table rounded to bf16, twice over: vpermw reads five bits of an index.
using PairTable = __m512i;
inline PairTable load_pair_table(Table table) {
  return _mm512_maskz_broadcast_i64x4(0xFF, (__m256i)_mm512_cvtneps_pbh(table));
}

// The 32 nibbles of bytes[16] in element order, with noise in the upper four bits of each byte.
inline void nibbles(const uint8_t* bytes, __m128i& first, __m128i& second) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  const __m128i high = _mm_srli_epi16(low, 4);
  first = _mm_unpacklo_epi8(high, low);
  second = _mm_unpackhi_epi8(high, low);
}

inline __m512i words(__m128i first, __m128i second) {
  return _mm512_cvtepu8_epi16(_mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1));
}

// Looks up the 32 nibbles of bytes[16]: sixteen cells of neighbours in a row.
inline V lookup_along(const uint8_t* bytes, PairTable table) {
  __m128i first, second;
  nibbles(bytes, first, second);
  return (V)_mm512_permutexvar_epi16(words(first, second), table);
}

// Looks up the 32 nibbles of each of two rows: cell j of (first, second) holds column j of the upper row,
// then of the lower row.
inline void lookup_across(const uint8_t* upper, PairTable upper_table, const uint8_t* lower,
                          PairTable lower_table, V& first, V& second) {
  const __m128i low_four = _mm_set1_epi8(0x0F), lower_bit = _mm_set1_epi8(0x20);
  __m128i u[2], l[2];
  nibbles(upper, u[0], u[1]);
  nibbles(lower, l[0], l[1]);
  V* const out[2] = {&first, &second};
  for (int half = 0; half < 2; ++half) {
    // vpermt2w reads six bits: bit 5 chooses the table.
    const __m128i from_upper = _mm_and_si128(u[half], low_four);
    const __m128i from_lower = _mm_or_si128(_mm_and_si128(l[half], low_four), lower_bit);
    const __m512i index =
        words(_mm_unpacklo_epi8(from_upper, from_lower), _mm_unpackhi_epi8(from_upper, from_lower));
    *out[half] = (V)_mm512_permutex2var_epi16(upper_table, index, lower_table);
  }
}

}  // namespace peft_fast::PEFT_FAST_LEVEL
