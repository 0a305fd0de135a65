// AVX-512 with BF16: cells of two bf16 values, multiplied and added in one instruction.
#pragma once

#define PEFT_FAST_PAIRS

#include "simd_avx512.h"

namespace peft_fast::PEFT_FAST_LEVEL {

// sum + a.low * b.low + a.high * b.high, lane by lane.
inline V dot_pairs(V a, V b, V sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
// The same with one cell for every lane. GCC would load it on its own, one instruction for each product.
inline V dot_pairs(const float* a, V b, V sum) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*a));
  return sum;
}

// The sixteen values of two tables rounded to bf16, `low` first: an index of vpermw has five bits.
using PairTable = __m512i;
inline PairTable load_pair_table(Table low, Table high) {
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// The same of values instead of tables: cells of neighbours in a row, or of a row and the one below it.
inline V pairs_along(V first, V second) {
  return (V)_mm512_cvtne2ps_pbh(second, first);
}
inline V pairs_across(V upper, V lower) {
  // Cell j: value j of the upper row, then of the lower one, which follows sixteen values later.
  const __m512i order =
      _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008,
                       0x170007, 0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
  return (V)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(lower, upper));
}

// Sixteen cells, each byte of which is the byte of bytes[16] that `order` names, or zero.
inline __m512i spread(__m128i bytes, __m512i order) {
  return _mm512_shuffle_epi8(_mm512_maskz_broadcast_i32x4(kAll, bytes), order);
}

// Looks up the 32 nibbles of bytes[16]: sixteen cells of neighbours in a row. Both halves of `table` are the
// same.
inline V lookup_along(const uint8_t* bytes, PairTable table) {
  // Cell j: byte j twice, the first one shifted to its upper nibble. The noise left in bit 4 chooses a half.
  const __m512i order =
      _mm512_add_epi8(_mm512_set4_epi32((int)0x80038003, (int)0x80028002, (int)0x80018001, (int)0x80008000),
                      _mm512_set_epi64(0x000C000C000C000C, 0x000C000C000C000C, 0x0008000800080008,
                                       0x0008000800080008, 0x0004000400040004, 0x0004000400040004, 0, 0));
  const __m512i cells = spread(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)), order);
  return (V)_mm512_permutexvar_epi16(_mm512_srlv_epi16(cells, _mm512_set1_epi32(4)), table);
}

// Looks up the 32 nibbles of each of two rows: cell j of (first, second) holds column j of the upper row,
// then of the lower row. The halves of `table` are theirs.
inline void lookup_across(const uint8_t* upper, const uint8_t* lower, PairTable table, V& first, V& second) {
  const __m128i u = _mm_loadu_si128(reinterpret_cast<const __m128i*>(upper));
  const __m128i l = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lower));
  // Cells 2j and 2j + 1: byte j of the upper row, then of the lower one, which follows eight bytes later.
  const __m512i order =
      _mm512_add_epi8(_mm512_set4_epi32((int)0x80098001, (int)0x80098001, (int)0x80088000, (int)0x80088000),
                      _mm512_set_epi64(0x0006000600060006, 0x0006000600060006, 0x0004000400040004,
                                       0x0004000400040004, 0x0002000200020002, 0x0002000200020002, 0, 0));
  const __m512i shift = _mm512_set1_epi64(0x0000000000040004);
  const __m512i four_bits = _mm512_set1_epi16(0x0F), row_bit = _mm512_set1_epi32(0x100000);
  const auto look_up = [&](__m128i bytes) {
    const __m512i nibbles = _mm512_srlv_epi16(spread(bytes, order), shift);
    const __m512i index = _mm512_ternarylogic_epi32(nibbles, four_bits, row_bit, 0xEA);  // a & b | c
    return (V)_mm512_permutexvar_epi16(index, table);
  };
  first = look_up(_mm_unpacklo_epi64(u, l));
  second = look_up(_mm_unpackhi_epi64(u, l));
}

}  // namespace peft_fast::PEFT_FAST_LEVEL
