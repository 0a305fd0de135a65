// Backward of lora_linear. Compiled once per level.
//
// For each superblock of tokens, one pass over dY gives its packed copy, dB, dbias and dZ, each item owning a
// group of columns; one pass over the columns of x gives dX and dA. No reduction crosses items, but for the
// parts of dZ, which are summed in order.
//
// dX: C = dX [M, k-block] accumulates A = dY' [M, n-chunk] times B = decoded panel [n-chunk, k-block] (its
// natural order); the low-rank term is one more step with A = dZ, B = lora_A.
#pragma once

#include "forward.h"

namespace peft_fast::PEFT_FAST_LEVEL {

constexpr int64_t kSummed = 12;      // tokens whose sum is taken before it is added to that of others
constexpr int64_t kTokenBlock = 24;  // tokens whose low-rank part of dX is dropped out at once

inline int64_t in_block(int64_t K) {
  return K <= how().narrow ? how().narrow_block : how().wide_block;
}

// One backward: the wanted gradients, and scratch that lasts from one superblock to the next.
struct Gradients {
  const Backward& b;
  const bool x, A, B;
  const int64_t a_row, r_row;
  float* d_A;  // [R][a_row] where wanted
  float* d_B;  // [N][r_row] where wanted

  explicit Gradients(const Backward& b)
      : b(b),
        x(b.dx.data != nullptr),
        A(b.d_A.data != nullptr && b.R > 0),
        B(b.d_B.data != nullptr && b.R > 0),
        a_row(round_up(b.weight.K, kTileCols) + kPad),
        r_row(round_up(b.R, kLanes)),
        d_A(nullptr),
        d_B(nullptr) {}
  bool dz() const { return b.R > 0 && (x || A); }
};

// The parts of a superblock: tokens [m0, m0 + rows).
struct Tokens {
  int64_t m0, rows;
  float* dz;          // [rows][r_row]
  float* grad_cells;  // dY' in chunks of kSteps cells: chunk c is [rows][kPanelRow]

  // Cell i of row m, of those that follow in its chunk.
  float* cells(int64_t m, int64_t i) const {
    return grad_cells + (i / kSteps * rows + m) * kPanelRow + i % kSteps;
  }
};

// out[0:n] (+)= sums[0:n].
inline void add_sums(const float* sums, int64_t n, bool accumulate, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = accumulate ? out[i] + sums[i] : sums[i];
}

// dY' in fp32 to out [count][row]: tokens from m of the superblock on, columns [n0, n0 + n). On the way, what
// they add to dbias and d_out_scale, in sums of kSummed.
inline void stage_grad(const Gradients& wanted, const Tokens& tokens, int64_t m, int64_t count, int64_t n0,
                       int64_t n, float* out, int64_t row) {
  const Backward& b = wanted.b;
  const int64_t first = tokens.m0 + m;
  const float* const scale = b.out_scale != nullptr ? b.out_scale + n0 : nullptr;
  float bias_sums[kThin] = {}, scale_sums[kThin] = {}, bias[kThin] = {}, y[kThin];
  if (b.bias.data != nullptr) to_float(b.bias, n0, n, bias);
  for (int64_t begin = 0; begin < count; begin += kSummed) {
    float bias_part[kThin] = {}, scale_part[kThin] = {};
    for (int64_t t = begin; t < min(begin + kSummed, count); ++t) {
      const int64_t N = b.weight.N, at = (first + t) * N + n0;
      float* const grad = out + t * row;
      prefetch(b.grad, at + kAhead * N, n, b.M * N);
      to_float(b.grad, at, n, grad);
      if (b.dbias != nullptr) add_sums(grad, n, true, bias_part);
      if (b.d_out_scale != nullptr) {
        prefetch(b.y, at + kAhead * N, n, b.M * N);
        to_float(b.y, at, n, y);
        for (int64_t i = 0; i < n; ++i) scale_part[i] += grad[i] * (y[i] - bias[i]);
      }
      if (scale != nullptr)
        for (int64_t i = 0; i < n; ++i) grad[i] *= scale[i];
    }
    add_sums(bias_part, n, true, bias_sums);
    add_sums(scale_part, n, true, scale_sums);
  }
  if (b.dbias != nullptr) add_sums(bias_sums, n, first > 0, b.dbias + n0);
  if (b.d_out_scale != nullptr) {
    for (int64_t i = 0; i < n; ++i) scale_sums[i] /= scale[i];
    add_sums(scale_sums, n, first > 0, b.d_out_scale + n0);
  }
}

// One pass over dY: dY' as cells, dB, dbias and d_out_scale, and dZ in parts; z_packed is z (depth rows).
template <class Cell>
inline void read_grad(const Gradients& wanted, const Tokens& tokens, PackedB z_packed, const Groups& dz) {
  const Backward& b = wanted.b;
  const int64_t N = b.weight.N, R = b.R, rows = tokens.rows, r_row = wanted.r_row;
  const int64_t work = rows * N / dz.count * (4 + 2 * R / kLanes);
  parallel_for(0, dz.count, grain(work), [&](int64_t begin, int64_t end) {
    Carver local(local_scratch(kTokens * (kThin + kPad) + PackedB::size(kThin, R)));
    float* const staging = local.take(kTokens * (kThin + kPad));
    float* const b_data = local.take(PackedB::size(kThin, R));
    for (int64_t g = begin; g < end; ++g)
      for (int64_t n0 = dz.begin(g); n0 < dz.begin(g + 1); n0 += kThin) {
        const int64_t n = min(kThin, N - n0);
        const PackedB lora_B{b_data, n, R};
        for (int64_t p = 0; p < n && wanted.dz(); ++p)
          pack_row(lora_B, p, [&](int64_t j, int64_t count, float* out) {
            to_float(b.lora_B, (n0 + p) * R + j, count, out);
          });
        for (int64_t m = 0; m < rows; m += kTokens) {
          const int64_t count = min(kTokens, rows - m);
          float* const cells = wanted.x ? tokens.cells(m, n0 / Cell::kValues) : nullptr;
          const bool as_cells = Cell::kValues == 1 && cells != nullptr;
          float* const grad = as_cells ? cells : staging;
          const int64_t row = as_cells ? kPanelRow : kThin + kPad;
          stage_grad(wanted, tokens, m, count, n0, n, grad, row);
          for (int64_t t = 0; t < count && cells != nullptr && !as_cells; ++t)
            to_cells(Cell(), {grad + t * row, DType::kFloat32}, 0, n, cells + t * kPanelRow);
          if (wanted.dz()) gemm<Single>(count, n, {grad, row, 1}, lora_B, 0, dz.part(g, m), n0 > dz.begin(g));
          if (wanted.B)
            gemm<Single>(n, count, {grad, 1, row}, z_packed, m, {wanted.d_B + n0 * r_row, r_row},
                         tokens.m0 + m > 0);
        }
      }
  });
}

// tokens.dz = scaling * the sum of its parts.
inline void finish_dz(const Gradients& wanted, const Tokens& tokens, const Groups& dz) {
  parallel_for(0, tokens.rows, grain(dz.row * dz.count / kLanes), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) dz.sum(m, wanted.b.scaling, tokens.dz + m * dz.row);
  });
}

// d_A[:, k0:k0+cols] += dZᵀ · drop(x); scratch [kSteps + 1][in_block].
inline void add_grad_A(const Gradients& wanted, const Tokens& tokens, int64_t k0, int64_t cols,
                       float* scratch) {
  const Backward& b = wanted.b;
  const int64_t K = b.weight.K;
  multiply_rows(b.R, {tokens.dz, 1, wanted.r_row}, tokens.rows, cols, scratch,
                {wanted.d_A + k0, wanted.a_row}, tokens.m0 > 0, [&](int64_t m, float* row) {
                  const int64_t token = tokens.m0 + m;
                  prefetch(b.x, (token + kAhead) * K + k0, cols, b.M * K);
                  to_float(b.x, token * K + k0, cols, row);
                  if (b.dropout.mask != nullptr) drop(b.dropout, K, token, k0, cols, row);
                });
}

// base [rows][base.row] = dY · Ŵ[:, k0:k0+cols]; scratch [kSteps][in_block].
template <class Cell>
inline void grad_x_panels(const Gradients& wanted, const Tokens& tokens, int64_t k0, int64_t cols,
                          float* scratch, MatrixC base) {
  constexpr int64_t chunk = kSteps * Cell::kValues;
  const Weight& w = wanted.b.weight;
  for (int64_t n0 = 0; n0 < w.N; n0 += chunk) {
    const int64_t n = min(chunk, w.N - n0);
    const PackedB panel{scratch, blocks(n, Cell::kValues), cols};
    const int64_t next = n0 + chunk < w.N ? (n0 + chunk) * w.K + k0 : k0 + in_block(w.K);
    pack_across(Cell(), w, {n0, n, k0, cols, next}, panel);
    const MatrixA grad{tokens.cells(0, n0 / Cell::kValues), kPanelRow, 1};
    gemm<Cell>(tokens.rows, panel.depth, grad, panel, 0, base, n0 > 0);
  }
}

// dx[:, k0:k0+cols] = base + drop(dZ · lora_A). base [rows][base.row] is overwritten; scratch holds lora_A
// packed and [kTokenBlock][base.row].
inline void store_grad_x(const Gradients& wanted, const Tokens& tokens, int64_t k0, int64_t cols,
                         float* scratch, MatrixC base) {
  const Backward& b = wanted.b;
  const int64_t K = b.weight.K, R = b.R, r_row = wanted.r_row;
  const PackedB lora_A{scratch, R, cols};
  for (int64_t r = 0; r < R; ++r)
    pack_row(lora_A, r,
             [&](int64_t j, int64_t n, float* out) { to_float(b.lora_A, r * K + k0 + j, n, out); });
  if (R > 0 && b.dropout.mask == nullptr)
    gemm<Single>(tokens.rows, R, {tokens.dz, r_row, 1}, lora_A, 0, base, true);
  float* const low_rank = scratch + PackedB::size(R, cols);
  for (int64_t m = 0; m < tokens.rows && R > 0 && b.dropout.mask != nullptr; m += kTokenBlock) {
    const int64_t count = min(kTokenBlock, tokens.rows - m);
    gemm<Single>(count, R, {tokens.dz + m * r_row, r_row, 1}, lora_A, 0, {low_rank, base.row}, false);
    for (int64_t t = 0; t < count; ++t) {
      float* const term = low_rank + t * base.row;
      float* const row = base.data + (m + t) * base.row;
      drop(b.dropout, K, tokens.m0 + m + t, k0, cols, term);
      for (int64_t k = 0; k < cols; ++k) row[k] += term[k];
    }
  }
  for (int64_t m = 0; m < tokens.rows; ++m)
    from_float(base.data + m * base.row, cols, b.dx, (tokens.m0 + m) * K + k0);
}

// dx and d_A, by blocks of columns.
template <class Cell>
inline void read_columns(const Gradients& wanted, const Tokens& tokens) {
  const int64_t N = wanted.b.weight.N, K = wanted.b.weight.K, R = wanted.b.R, width = in_block(K);
  const int64_t base_row = width + kPad;
  parallel_for(0, blocks(K, width), grain(panel_work(width * N, tokens.rows)),
               [&](int64_t begin, int64_t end) {
                 Carver local(local_scratch(width * (kSteps + 1) + PackedB::size(R, width) +
                                            (tokens.rows + kTokenBlock) * base_row));
                 float* const scratch = local.take(width * (kSteps + 1));
                 float* const low_rank = local.take(PackedB::size(R, width) + kTokenBlock * base_row);
                 const MatrixC base{local.take(tokens.rows * base_row), base_row};
                 for (int64_t k0 = begin * width; k0 < min(end * width, K); k0 += width) {
                   const int64_t cols = min(width, K - k0);
                   if (wanted.A) add_grad_A(wanted, tokens, k0, cols, scratch);
                   if (!wanted.x) continue;
                   grad_x_panels<Cell>(wanted, tokens, k0, cols, scratch, base);
                   store_grad_x(wanted, tokens, k0, cols, low_rank, base);
                 }
               });
}

// d_A and d_B in their own dtypes.
inline void store_factors(const Gradients& wanted) {
  const Backward& b = wanted.b;
  const int64_t K = b.weight.K, N = b.weight.N, R = b.R;
  for (int64_t r = 0; r < R && wanted.A; ++r) from_float(wanted.d_A + r * wanted.a_row, K, b.d_A, r * K);
  for (int64_t n = 0; n < N && wanted.B; ++n) {
    float* const row = wanted.d_B + n * wanted.r_row;
    for (int64_t r = 0; r < R; ++r) row[r] *= b.scaling;
    from_float(row, R, b.d_B, n * R);
  }
}

template <class Cell>
inline void backward_as(const Backward& b) {
  const int64_t N = b.weight.N, R = b.R, most = superblock(b.M, blocks(N, Cell::kValues));
  Gradients wanted(b);
  const int64_t cells_size = wanted.x ? blocks(N, kSteps * Cell::kValues) * kPanelRow * most : 0;
  const int64_t z_size = PackedB::size(most, R), dz_size = most * wanted.r_row;
  const int64_t A_size = wanted.A ? R * wanted.a_row : 0, B_size = wanted.B ? N * wanted.r_row : 0;
  Groups dz(N, R, most);
  Carver shared(shared_scratch(Carver::total({A_size, B_size, dz_size, cells_size, z_size, dz.size()})));
  wanted.d_A = shared.take(A_size);
  wanted.d_B = shared.take(B_size);
  Tokens tokens{0, 0, shared.take(dz_size), shared.take(cells_size)};
  float* const z_data = shared.take(z_size);
  dz.parts = shared.take(dz.size());
  for (; tokens.m0 < b.M; tokens.m0 += most) {
    dz.rows = tokens.rows = min(most, b.M - tokens.m0);
    const PackedB z_packed{z_data, tokens.rows, R};
    for (int64_t m = 0; m < tokens.rows && wanted.B; ++m) pack_values(z_packed, m, b.z + (tokens.m0 + m) * R);
    read_grad<Cell>(wanted, tokens, z_packed, dz);
    if (wanted.dz()) finish_dz(wanted, tokens, dz);
    if (wanted.x || wanted.A) read_columns<Cell>(wanted, tokens);
  }
  store_factors(wanted);
}

// Sums over no tokens.
inline void zero_gradients(const Backward& b) {
  const auto zero = [](Result result, int64_t n) {
    if (result.data == nullptr) return;
    visit(result.dtype, [&](auto* type) { std::memset(result.data, 0, n * sizeof(*type)); });
  };
  zero(b.d_A, b.R * b.weight.K);
  zero(b.d_B, b.weight.N * b.R);
  zero({b.dbias, DType::kFloat32}, b.weight.N);
  zero({b.d_out_scale, DType::kFloat32}, b.weight.N);
}

// The wanted gradients; see Backward.
inline void backward(const Backward& b) {
  if (b.M == 0) return zero_gradients(b);
#ifdef PEFT_FAST_PAIRS
  if (b.x.dtype == DType::kBFloat16 && b.grad.dtype == DType::kBFloat16) return backward_as<Pair>(b);
#endif
  backward_as<Single>(b);
}

}  // namespace peft_fast::PEFT_FAST_LEVEL
