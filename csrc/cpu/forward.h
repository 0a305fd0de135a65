// Forward of lora_linear and dequantize. Compiled once per level.
//
// C = Yᵀ [n-block, M] accumulates A = decoded panel [n-block, k-chunk] (its natural order) times B = Xᵀ,
// packed once per superblock of tokens in the same pass that sums Z; the low-rank term is one more step with
// A = s·lora_B, B = Zᵀ.
#pragma once

#include "few_rows.h"

namespace peft_fast::PEFT_FAST_LEVEL {

constexpr int64_t kSpan = 2 * kTokens;  // tokens of one input item

// lora_A[:, k0:k0+n]ᵀ in fp32, packed (depth n, R columns); staging [kTileCols][kThin].
inline void pack_lora_A_transposed(const Forward& f, int64_t k0, int64_t n, PackedB packed, float* staging) {
  for (int64_t r = 0; r < f.R; r += kTileCols) {
    const int64_t ranks = min(kTileCols, f.R - r), width = packed.width(r);
    for (int64_t i = 0; i < ranks; ++i) to_float(f.lora_A, (r + i) * f.weight.K + k0, n, staging + i * kThin);
    std::memset(staging + ranks * kThin, 0, (width - ranks) * kThin * sizeof(float));
    transpose(staging, kThin, width, n, packed.row(r, 0), width);
  }
}

// One pass over x for tokens [m0, m0 + rows): Xᵀ as cells into x_packed, and Z in parts.
template <class Cell>
inline void read_input(const Forward& f, int64_t m0, int64_t rows, PackedB x_packed, const Groups& z) {
  constexpr int64_t row = kThin + kPad, cell_row = kThin / Cell::kValues + kPad;
  const int64_t K = f.weight.K, spans = blocks(rows, kSpan), work = kSpan * K / z.count * (4 + f.R / kLanes);
  parallel_for(0, z.count * spans, grain(work), [&](int64_t begin, int64_t end) {
    Carver local(local_scratch(kTokens * (row + cell_row) + kTileCols * kThin + PackedB::size(kThin, f.R)));
    float* const cells = local.take(kTokens * cell_row);
    // What Z is made of; as cells already, if they hold fp32 and nothing is dropped out.
    const bool as_cells = Cell::kValues == 1 && f.dropout.mask == nullptr;
    float* const x = as_cells ? cells : local.take(kTokens * row);
    float* const staging = local.take(kTileCols * kThin);
    float* const a_data = local.take(PackedB::size(kThin, f.R));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t g = item / spans, first = item % spans * kSpan, last = min(first + kSpan, rows);
      for (int64_t k0 = z.begin(g); k0 < z.begin(g + 1); k0 += kThin) {
        const int64_t n = min(kThin, K - k0), depth = blocks(n, Cell::kValues);
        const PackedB a_packed{a_data, n, f.R};
        pack_lora_A_transposed(f, k0, n, a_packed, staging);
        for (int64_t m = first; m < last; m += kTokens) {
          const int64_t tokens = min(kTokens, last - m);
          for (int64_t t = 0; t < tokens; ++t) {
            const int64_t at = (m0 + m + t) * K + k0;
            prefetch(f.x, at + kAhead * K, n, f.M * K);
            to_cells(Cell(), f.x, at, n, cells + t * cell_row);
          }
          std::memset(cells + tokens * cell_row, 0,
                      (round_up(tokens, kTileCols) - tokens) * cell_row * sizeof(float));
          for (int64_t j = m; j < m + tokens; j += kTileCols)
            transpose(cells + (j - m) * cell_row, cell_row, x_packed.width(j), depth,
                      x_packed.row(j, k0 / Cell::kValues), x_packed.width(j));
          if (f.R == 0) continue;
          for (int64_t t = 0; t < tokens && x != cells; ++t) {
            to_float(f.x, (m0 + m + t) * K + k0, n, x + t * row);
            if (f.dropout.mask != nullptr) drop(f.dropout, K, m0 + m + t, k0, n, x + t * row);
          }
          gemm<Single>(tokens, n, {x, row, 1}, a_packed, 0, z.part(g, m), k0 > z.begin(g));
        }
      }
    }
  });
}

// z [M, R] from its parts, and Zᵀ into z_packed (depth R), for tokens [m0, m0 + rows).
inline void finish_z(const Forward& f, int64_t m0, int64_t rows, const Groups& z, PackedB z_packed) {
  const int64_t R = f.R, work = kTileCols * z.row * z.count / kLanes;
  parallel_for(0, blocks(rows, kTileCols), grain(work), [&](int64_t begin, int64_t end) {
    float* const sums = local_scratch(kTileCols * z.row);
    for (int64_t j = begin * kTileCols; j < min(end * kTileCols, rows); j += kTileCols) {
      const int64_t tokens = min(kTileCols, rows - j), width = z_packed.width(j);
      for (int64_t t = 0; t < tokens; ++t) {
        z.sum(j + t, 1.0f, sums + t * z.row);
        std::memcpy(f.z + (m0 + j + t) * R, sums + t * z.row, R * sizeof(float));
      }
      std::memset(sums + tokens * z.row, 0, (width - tokens) * z.row * sizeof(float));
      transpose(sums, z.row, width, R, z_packed.row(j, 0), width);
    }
  });
}

// y [rows, n-block] from yt [n-block][yt_row], scaled, with the bias added; staging [kTileCols][out_block].
inline void store_transposed(const Forward& f, int64_t m0, int64_t rows, int64_t n0, int64_t n,
                             const float* yt, int64_t yt_row, const float* scale, const float* bias,
                             float* staging) {
  const int64_t row = how().out_block;
  for (int64_t m = 0; m < rows; m += kTileCols) {
    const int64_t tokens = min(kTileCols, rows - m);
    transpose(yt + m, yt_row, n, tokens, staging, row);
    for (int64_t t = 0; t < tokens; ++t) {
      float* values = staging + t * row;
      if (scale != nullptr)
        for (int64_t i = 0; i < n; ++i) values[i] *= scale[i];
      if (bias != nullptr)
        for (int64_t i = 0; i < n; ++i) values[i] += bias[i];
      from_float(values, n, f.y, (m0 + m + t) * f.weight.N + n0);
    }
  }
}

// y for tokens [m0, m0 + rows) from Xᵀ and Zᵀ.
template <class Cell>
inline void multiply_panels(const Forward& f, int64_t m0, int64_t rows, PackedB x_packed, PackedB z_packed) {
  constexpr int64_t chunk = kSteps * Cell::kValues;
  const int64_t out_block = how().out_block;
  const int64_t N = f.weight.N, K = f.weight.K, R = f.R;
  parallel_for(
      0, blocks(N, out_block), grain(panel_work(out_block * K, rows)), [&](int64_t begin, int64_t end) {
        const int64_t yt_row = round_up(rows, kLanes) + kPad;
        Carver local(local_scratch(out_block * (kPanelRow + yt_row + round_up(R, 16) + kTileCols + 1)));
        float* const panel = local.take(out_block * kPanelRow);
        float* const lora_B = local.take(out_block * R);
        float* const staging = local.take(out_block * kTileCols);
        float* const bias = f.bias.data != nullptr ? local.take(out_block) : nullptr;
        const MatrixC yt{local.take(out_block * yt_row), yt_row};
        for (int64_t item = begin; item < end; ++item) {
          const int64_t n0 = item * out_block, n = min(out_block, N - n0);
          for (int64_t k0 = 0; k0 < K; k0 += chunk) {
            const int64_t values = min(chunk, K - k0);
            const int64_t next = k0 + chunk < K ? n0 * K + k0 + chunk : (n0 + out_block) * K;
            decode_along(Cell(), f.weight, {n0, n, k0, values, next}, panel);
            gemm<Cell>(n, blocks(values, Cell::kValues), {panel, kPanelRow, 1}, x_packed, k0 / Cell::kValues,
                       yt, k0 > 0);
          }
          if (R > 0) {
            to_float(f.lora_B, n0 * R, n * R, lora_B, f.scaling);
            gemm<Single>(n, R, {lora_B, R, 1}, z_packed, 0, yt, true);
          }
          if (bias != nullptr) to_float(f.bias, n0, n, bias);
          const float* scale = f.out_scale != nullptr ? f.out_scale + n0 : nullptr;
          store_transposed(f, m0, rows, n0, n, yt.data, yt_row, scale, bias, staging);
        }
      });
}

template <class Cell>
inline void forward_panels(const Forward& f) {
  const int64_t R = f.R, depth = blocks(f.weight.K, Cell::kValues), most = superblock(f.M, depth);
  for (int64_t m0 = 0; m0 < f.M; m0 += most) {
    const int64_t rows = min(most, f.M - m0);
    Groups z(f.weight.K, R, rows);
    Carver shared(shared_scratch(PackedB::size(depth, rows) + PackedB::size(R, rows) + z.size()));
    const PackedB x_packed{shared.take(PackedB::size(depth, rows)), depth, rows};
    const PackedB z_packed{shared.take(PackedB::size(R, rows)), R, rows};
    z.parts = shared.take(z.size());
    read_input<Cell>(f, m0, rows, x_packed, z);
    if (R > 0) finish_z(f, m0, rows, z, z_packed);
    multiply_panels<Cell>(f, m0, rows, x_packed, z_packed);
  }
}

// y [M, N] and z [M, R] of `f`; see Forward.
inline void forward(const Forward& f) {
  if (f.M == 0) return;
#ifdef PEFT_FAST_PAIRS
  const bool pairs = f.x.dtype == DType::kBFloat16;
#else
  constexpr bool pairs = false;
#endif
  if (f.M <= (pairs ? how().few_rows_of_pairs : how().few_rows) && !f.batch_invariant)
    return with_few_rows(f.M, [&](auto M) { forward_few_rows<M()>(f); });
#ifdef PEFT_FAST_PAIRS
  if (pairs) return forward_panels<Pair>(f);
#endif
  forward_panels<Single>(f);
}

// out [N, K] = the weight, each value rounded once to the dtype of `out`.
inline void dequantize(const Weight& w, Result out) {
  constexpr int64_t kStretch = 4096;
  const int64_t numel = w.N * w.K;
  parallel_for(0, blocks(numel, kStretch), grain(kStretch), [&](int64_t begin, int64_t end) {
    float* const values = local_scratch(kStretch);
    for (int64_t i = begin * kStretch; i < min(end * kStretch, numel); i += kStretch) {
      const int64_t n = min(kStretch, numel - i);
      decode(w, i, n, values);
      from_float(values, n, out, i);
    }
  });
}

}  // namespace peft_fast::PEFT_FAST_LEVEL
