// The decode of a packed base weight in vectors, by format. Compiled once per level.
#pragma once

#include "vector.h"

namespace peft_fast::PEFT_FAST_LEVEL {

inline bool is_dense(const Weight& w) {
  return w.dense.data != nullptr;
}

// Small functions of inner loops, which GCC would rather call, saving every vector register around the call.
#define PEFT_FAST_INLINE __attribute__((always_inline)) inline

// A packed weight is decoded in groups: kTileCols elements of one block. A decoder says how: `block` gives
// what the elements of the block of element i have in common, `values` the exact fp32 values of the group
// that begins at i; where cells are pairs, `pair_block`, `along` and `across` the same as bf16. Blocks may
// end within a row where `starts_block`.

// 4 bits: groups begin at multiples of kTileCols, so that they lie in one block and start at a byte.
class FourBitDecoder {
 public:
  explicit FourBitDecoder(const Weight& w) : w_(w.four_bit), code_(load_table(w_.code)) {}

  // The exact values that the nibbles of the block stand for.
  using Block = Table;
  PEFT_FAST_INLINE bool starts_block(int64_t i) const {
    return (i & ((int64_t{1} << w_.block_shift) - 1)) == 0;
  }
  PEFT_FAST_INLINE Block block(int64_t i) const {
    return scale_table(code_, block_scale(w_, i >> w_.block_shift));
  }
  PEFT_FAST_INLINE void values(int64_t i, const Block& block, V& first, V& second) const {
    lookup(bytes(i), block, first, second);
  }
#ifdef PEFT_FAST_PAIRS
  using PairBlock = PairTable;
  PEFT_FAST_INLINE PairBlock pair_block(int64_t i) const {
    const Table values = block(i);
    return load_pair_table(values, values);
  }
  PEFT_FAST_INLINE PairBlock pair_block(int64_t upper, int64_t lower) const {
    return load_pair_table(block(upper), block(lower));
  }
  PEFT_FAST_INLINE V along(int64_t i, const PairBlock& block) const { return lookup_along(bytes(i), block); }
  PEFT_FAST_INLINE void across(int64_t upper, int64_t lower, const PairBlock& block, V& first,
                               V& second) const {
    lookup_across(bytes(upper), bytes(lower), block, first, second);
  }
#endif

 private:
  PEFT_FAST_INLINE const uint8_t* bytes(int64_t i) const { return w_.packed + (i >> 1); }

  const FourBit w_;
  const Table code_;
};

// 8 bits, of type `Byte`: a row is one block, groups begin anywhere in it.
template <class Byte>
class EightBitDecoder {
 public:
  explicit EightBitDecoder(const Weight& w) : w_(w.eight_bit), K_(w.K) {}

  using Block = V;  // the scale
  PEFT_FAST_INLINE bool starts_block(int64_t) const { return false; }
  PEFT_FAST_INLINE Block block(int64_t i) const { return splat(row_scale(w_, i / K_)); }
  PEFT_FAST_INLINE void values(int64_t i, Block scale, V& first, V& second) const {
    first = Byte::load(w_.bytes + i) * scale;
    second = Byte::load(w_.bytes + i + kLanes) * scale;
  }
#ifdef PEFT_FAST_PAIRS
  struct PairBlock {
    V upper, lower;
  };
  PEFT_FAST_INLINE PairBlock pair_block(int64_t i) const { return {block(i), V{}}; }
  PEFT_FAST_INLINE PairBlock pair_block(int64_t upper, int64_t lower) const {
    return {block(upper), block(lower)};
  }
  PEFT_FAST_INLINE V along(int64_t i, const PairBlock& scale) const {
    V first, second;
    values(i, scale.upper, first, second);
    return pairs_along(first, second);
  }
  PEFT_FAST_INLINE void across(int64_t upper, int64_t lower, const PairBlock& scale, V& first,
                               V& second) const {
    V upper_values[2], lower_values[2];
    values(upper, scale.upper, upper_values[0], upper_values[1]);
    values(lower, scale.lower, lower_values[0], lower_values[1]);
    first = pairs_across(upper_values[0], lower_values[0]);
    second = pairs_across(upper_values[1], lower_values[1]);
  }
#endif

 private:
  const EightBit w_;
  const int64_t K_;
};

// The values of kLanes bytes.
struct Int8 {
  static PEFT_FAST_INLINE V load(const uint8_t* bytes) {
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    typedef int16_t Shorts __attribute__((vector_size(kLanes * 2)));
    typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));
    // In steps that are one instruction each.
    const Shorts shorts = __builtin_convertvector(load_bits<Bytes>(bytes), Shorts);
    return __builtin_convertvector(__builtin_convertvector(shorts, Integers), V);
  }
};
// As numbers of half precision of 2^-8 the size, which takes denormals in any mode of the processor.
struct E4m3 {
  static PEFT_FAST_INLINE V load(const uint8_t* bytes) {
    typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
    const Bits16 bits = __builtin_convertvector(load_bits<Bytes>(bytes), Bits16), magnitude = bits & 127;
    const Bits16 nan = (Bits16)(magnitude == 127) & 0x7C00;
    const Bits16 half = (bits & 128) << 8 | magnitude << 7 | nan;
    return half_to_float((decltype(float_to_half(V{})))half) * 256.0f;
  }
};

inline bool is_eight_bit(const Weight& w) {
  return w.eight_bit.bytes != nullptr;
}

// Calls f with the decoder of a packed weight. A new one is a class like those above and a case here.
template <class F>
inline void with_decoder(const Weight& w, F f) {
  if (!is_eight_bit(w)) return f(FourBitDecoder(w));
  if (w.eight_bit.integers) return f(EightBitDecoder<Int8>(w));
  f(EightBitDecoder<E4m3>(w));
}

}  // namespace peft_fast::PEFT_FAST_LEVEL
