// The passes of loreft. Compiled once per level.
//
// One pass over the rows copies those that are not selected and edits the others, staged in fp32, kEdited at
// a time: dot products with the rows of one thin operand, then a product with the other one. The backward
// adds a pass over the columns, each item owning a stripe of the gradients of both thin operands.
#pragma once

#include "few_rows.h"

namespace peft_fast::PEFT_FAST_LEVEL {

constexpr int64_t kEdited = 8;               // selected rows that are staged at once
constexpr int kDots = kLanes == 16 ? 4 : 2;  // rows of a thin operand that share the loads of the staged ones
constexpr int64_t kDotSteps = 64;            // vectors of a dot product that are summed at once
constexpr int64_t kStretch = 512;            // columns of staged rows that stay in L1 together
constexpr int64_t kStripe = 128;             // columns of an item of the second pass of the backward
constexpr int64_t kSums = 64;                // rows that are summed at once into d_bias
constexpr int64_t kShare = 1 << 14, kShares = 256;  // work of a share of the rows, and most shares

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

// dst[begin:begin+n] = src[from:from+n] of the same dtype.
inline void copy_values(Operand src, int64_t from, int64_t n, Result dst, int64_t begin) {
  const int64_t bytes = bytes_of(src.dtype);
  std::memcpy(static_cast<char*>(dst.data) + begin * bytes, static_cast<const char*>(src.data) + from * bytes,
              n * bytes);
}

// dst[begin:begin+n] = x[from:from+n] + y[from:from+n], all of one dtype, rounded once.
inline void add_values(Operand x, Operand y, int64_t from, int64_t n, Result dst, int64_t begin) {
  visit(dst.dtype, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    const E* const a = static_cast<const E*>(x.data) + from;
    const E* const b = static_cast<const E*>(y.data) + from;
    E* const out = static_cast<E*>(dst.data) + begin;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, load(a + i) + load(b + i));
    if (i < n) {
      E tails[2][kLanes] = {};
      std::memcpy(tails[0], a + i, (n - i) * sizeof(E));
      std::memcpy(tails[1], b + i, (n - i) * sizeof(E));
      store(tails[0], load(tails[0]) + load(tails[1]));
      std::memcpy(out + i, tails[0], (n - i) * sizeof(E));
    }
  });
}

// The row of H that entry i of the selection names, negative where it is to be skipped.
inline int64_t row_of_entry(const Edit& e, int64_t i) {
  return e.whole ? i : e.rows[i];
}

// Floats of a staged row: whole register tiles.
inline int64_t staged_row(const Edit& e) {
  return round_up(e.d, kTileCols) + kPad;
}

// Calls copy(first, count) for each run of rows that are not selected, and edit(first, count) for each up to
// kEdited entries of the selection. Threads share both evenly. `selected` is scratch of M bytes.
template <class Copy, class EditRows>
inline void visit_rows(const Edit& e, uint8_t* selected, Copy copy, EditRows edit) {
  const int64_t copied = e.whole ? 0 : e.M, groups = blocks(e.m, kEdited);
  std::fill_n(selected, copied, uint8_t{0});
  for (int64_t i = 0; i < e.m && !e.whole; ++i)
    if (e.rows[i] >= 0) selected[e.rows[i]] = 1;
  const int64_t work = copied * e.d / 4 + e.m * e.d * (1 + (e.q + e.r) / kLanes);
  const int64_t shares = min(kShares, work / kShare + 1);
  parallel_for(0, shares, grain(work / shares), [&](int64_t begin, int64_t end) {
    for (int64_t i = copied * begin / shares, last = copied * end / shares; i < last; ++i) {
      const void* const hit = std::memchr(selected + i, 1, last - i);
      const int64_t stop = hit != nullptr ? static_cast<const uint8_t*>(hit) - selected : last;
      if (stop > i) copy(i, stop - i);
      i = stop;
    }
    for (int64_t g = groups * begin / shares; g < groups * end / shares; ++g)
      edit(g * kEdited, min(kEdited, e.m - g * kEdited));
  });
}

// w [n, d] as the right factor of a product.
inline PackedB pack_thin(const float* w, int64_t n, int64_t d, float* data) {
  const PackedB packed{data, n, d};
  parallel_for(0, n, grain(d), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) pack_values(packed, p, w + p * d);
  });
  return packed;
}

// out[t][j] = x[t] · w[j] for `count` staged rows and n rows of w [n, d], summed over kDotSteps vectors in
// order, then over those sums.
inline void thin_products(const float* x, int64_t x_row, int64_t count, const float* w, int64_t n, int64_t d,
                          float* out, int64_t out_row) {
  constexpr int64_t kColumns = kDotSteps * kLanes;
  for (int64_t t = 0; t < count; t += kMostFewRows, x += kMostFewRows * x_row, out += kMostFewRows * out_row)
    with_few_rows(min(kMostFewRows, count - t), [&](auto rows) {
      constexpr int M = rows();
      for (int64_t k = 0; k < d; k += kColumns) {
        const auto add = [&](auto step, int64_t j) {
          constexpr int J = step();
          float dots[J][M];
          dot_rows<M, J>(x + k, x_row, w + j * d + k, d, min(kColumns, d - k), dots);
          for (int m = 0; m < M; ++m)
            for (int i = 0; i < J; ++i) {
              float& sum = out[m * out_row + j + i];
              sum = k > 0 ? sum + dots[i][m] : dots[i][m];
            }
        };
        int64_t j = 0;
        for (; j + kDots <= n; j += kDots) add(std::integral_constant<int, kDots>(), j);
        for (; j < n; ++j) add(std::integral_constant<int, 1>(), j);
      }
    });
}

// x += left · w in `count` staged rows, and then store(k, n), for one stretch of columns [k, k + n) after
// another.
template <class Store>
inline void add_products(int64_t count, MatrixA left, PackedB w, MatrixC x, Store store) {
  for (int64_t k = 0; k < w.cols; k += kStretch) {
    const PackedB part{w.row(k, 0), w.depth, min(kStretch, w.cols - k)};
    gemm<Single>(count, w.depth, left, part, 0, {x.data + k, x.row}, true);
    store(k, part.cols);
  }
}

// What the activation is applied to in the row of `z`.
inline const float* preactivation(const Edit& e, const float* z) {
  return e.q > 0 ? z : e.bias;
}

// u of the row of `z`.
inline void subspace_edit(const Edit& e, const float* z, float* u) {
  activate(e.act, preactivation(e, z), e.r, u);
  for (int64_t k = e.r; k < e.q; ++k) u[k - e.r] -= z[k];
}

// ----------------------------------------------------------------------------------------------- forward

// out[begin:begin+n] = H[from:from+n].
inline void store_states(const Loreft& f, int64_t from, int64_t n, Result out, int64_t begin) {
  if (f.residual.data != nullptr)
    add_values(f.h, f.residual, from, n, out, begin);
  else
    copy_values(f.h, from, n, out, begin);
}

// x[0:d] = the row of H that entry i names, zero if none; kept alike.
inline void stage_entry(const Loreft& f, int64_t i, float* x) {
  const int64_t d = f.edit.d, row = row_of_entry(f.edit, i), bytes = bytes_of(f.h.dtype);
  if (f.kept.data == nullptr) return to_float(f.h, row * d, d, x);
  if (row < 0)
    std::memset(static_cast<char*>(f.kept.data) + i * d * bytes, 0, d * bytes);
  else
    store_states(f, row * d, d, f.kept, i * d);
  to_float({f.kept.data, f.kept.dtype}, i * d, d, x);
}

// The results of entries [first, first + count).
inline void edit_entries(const Loreft& f, PackedB basis, int64_t first, int64_t count) {
  const Edit& e = f.edit;
  const int64_t d = e.d, x_row = staged_row(e), z_row = round_up(e.q, 16), u_row = round_up(e.r, 16);
  const bool apart = e.dropout.mask != nullptr && !e.drop_state;
  Carver local(local_scratch(kEdited * (2 * x_row + z_row + u_row)));
  float* const x = local.take(kEdited * x_row);
  float* const other = local.take(kEdited * x_row);
  float* const z = local.take(kEdited * z_row);
  float* const u = local.take(kEdited * u_row);
  for (int64_t t = 0; t < count; ++t) stage_entry(f, first + t, x + t * x_row);
  thin_products(x, x_row, count, e.projection, e.q, d, z, z_row);
  for (int64_t t = 0; t < count; ++t) {
    float* const zt = z + t * z_row;
    if (row_of_entry(e, first + t) < 0) {
      std::memset(zt, 0, e.q * sizeof(float));
    } else if (e.bias != nullptr && e.q > 0) {
      for (int64_t k = 0; k < e.r; ++k) zt[k] += e.bias[k];
    }
    std::memcpy(f.z + (first + t) * e.q, zt, e.q * sizeof(float));
    subspace_edit(e, zt, u + t * u_row);
  }
  const MatrixC target{apart ? other : x, x_row};
  if (apart) std::memset(other, 0, count * x_row * sizeof(float));
  add_products(count, {u, u_row, 1}, basis, target, [&](int64_t k, int64_t n) {
    for (int64_t t = 0; t < count; ++t) {
      const int64_t row = row_of_entry(e, first + t);
      float* const values = target.data + t * x_row + k;
      if (row < 0) continue;
      if (e.dropout.mask != nullptr) drop(e.dropout, d, first + t, k, n, values);
      for (int64_t i = 0; i < n && apart; ++i) values[i] += x[t * x_row + k + i];
      from_float(values, n, f.out, row * d + k);
    }
  });
}

// out, z and kept of `f`; see Loreft.
inline void loreft(const Loreft& f) {
  const Edit& e = f.edit;
  Carver shared(shared_scratch(Carver::total({blocks(e.M, 4), PackedB::size(e.r, e.d)})));
  uint8_t* const selected = reinterpret_cast<uint8_t*>(shared.take(blocks(e.M, 4)));
  const PackedB basis = pack_thin(e.basis, e.r, e.d, shared.take(PackedB::size(e.r, e.d)));
  visit_rows(
      e, selected,
      [&](int64_t first, int64_t count) { store_states(f, first * e.d, count * e.d, f.out, first * e.d); },
      [&](int64_t first, int64_t count) { edit_entries(f, basis, first, count); });
}

// ---------------------------------------------------------------------------------------------- backward

// What the first pass leaves for the second: u and dz of every entry, zero in skipped ones.
struct Subspace {
  int64_t u_row, dz_row;
  float* u;   // [m][u_row]
  float* dz;  // [m][dz_row], at least r columns: what d_bias sums is first
};

// row[0:n] = columns begin.. of grad in entry i, dropped out if asked for.
inline void stage_grad(const LoreftBackward& b, int64_t i, int64_t begin, int64_t n, bool dropped,
                       float* row) {
  const int64_t source = row_of_entry(b.edit, i);
  if (source < 0) {
    std::memset(row, 0, n * sizeof(float));
    return;
  }
  to_float(b.grad, source * b.edit.d + begin, n, row);
  if (dropped && b.edit.dropout.mask != nullptr) drop(b.edit.dropout, b.edit.d, i, begin, n, row);
}

// u, dz and the rows of dh of entries [first, first + count).
inline void edit_gradients(const LoreftBackward& b, const Subspace& s, PackedB projection, int64_t first,
                           int64_t count) {
  const Edit& e = b.edit;
  const int64_t d = e.d, x_row = staged_row(e), du_row = round_up(e.r, 16);
  const bool apart = e.dropout.mask != nullptr && !e.drop_state && b.dh.data != nullptr;
  Carver local(local_scratch(kEdited * (2 * x_row + du_row)));
  float* const d_edit = local.take(kEdited * x_row);
  float* const dh = apart ? local.take(kEdited * x_row) : d_edit;
  float* const du = local.take(kEdited * du_row);
  for (int64_t t = 0; t < count; ++t) {
    stage_grad(b, first + t, 0, d, true, d_edit + t * x_row);
    if (apart) stage_grad(b, first + t, 0, d, false, dh + t * x_row);
  }
  thin_products(d_edit, x_row, count, e.basis, e.r, d, du, du_row);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t i = first + t;
    const float* const z = b.z + i * e.q;
    float* const u = s.u + i * s.u_row;
    float* const dz = s.dz + i * s.dz_row;
    std::memset(dz, 0, s.dz_row * sizeof(float));
    std::memset(u, 0, s.u_row * sizeof(float));
    if (row_of_entry(e, i) < 0) continue;
    subspace_edit(e, z, u);
    for (int64_t k = e.r; k < e.q; ++k) dz[k] = -du[t * du_row + k - e.r];
    std::memcpy(dz, du + t * du_row, e.r * sizeof(float));
    activate_backward(e.act, preactivation(e, z), e.r, dz);
  }
  if (b.dh.data == nullptr) return;
  add_products(count, {s.dz + first * s.dz_row, s.dz_row, 1}, projection, {dh, x_row},
               [&](int64_t k, int64_t n) {
                 for (int64_t t = 0; t < count; ++t) {
                   const int64_t row = row_of_entry(e, first + t);
                   if (row >= 0) from_float(dh + t * x_row + k, n, b.dh, row * d + k);
                 }
               });
}

// d_bias [r]: sums of kSums rows in order, and of those sums.
inline void sum_bias(const LoreftBackward& b, const Subspace& s) {
  for (int64_t k = 0; k < b.edit.r; k += kLanes) {
    V total = {};
    for (int64_t i0 = 0; i0 < b.edit.m; i0 += kSums) {
      V part = {};
      for (int64_t i = i0; i < min(i0 + kSums, b.edit.m); ++i) part += load(s.dz + i * s.dz_row + k);
      total += part;
    }
    std::memcpy(b.d_bias + k, &total, min(kLanes, b.edit.r - k) * sizeof(float));
  }
}

// Columns [k0, k0 + cols) of d_projection and d_basis; scratch [kSteps + 1 + max(q, r)][kStripe].
inline void stripe_gradients(const LoreftBackward& b, const Subspace& s, int64_t k0, int64_t cols,
                             float* scratch) {
  const Edit& e = b.edit;
  const MatrixC sums{scratch + (kSteps + 1) * kStripe, kStripe};
  const auto gradient = [&](float* out, int64_t n, MatrixA left, auto stage) {
    if (out == nullptr) return;
    std::memset(sums.data, 0, n * kStripe * sizeof(float));
    multiply_rows(n, left, e.m, cols, scratch, sums, false, stage);
    for (int64_t j = 0; j < n; ++j)
      std::memcpy(out + j * e.d + k0, sums.data + j * kStripe, cols * sizeof(float));
  };
  gradient(b.d_projection, e.q, {s.dz, 1, s.dz_row}, [&](int64_t i, float* row) {
    prefetch(b.kept, (i + kAhead) * e.d + k0, cols, e.m * e.d);
    to_float(b.kept, i * e.d + k0, cols, row);
  });
  gradient(b.d_basis, e.r, {s.u, 1, s.u_row}, [&](int64_t i, float* row) {
    const int64_t next = i + kAhead < e.m ? row_of_entry(e, i + kAhead) : -1;
    if (next >= 0) prefetch(b.grad, next * e.d + k0, cols, e.M * e.d);
    stage_grad(b, i, k0, cols, true, row);
  });
}

// The wanted gradients; see LoreftBackward.
inline void loreft_backward(const LoreftBackward& b) {
  const Edit& e = b.edit;
  const int64_t packed = b.dh.data != nullptr ? PackedB::size(e.q, e.d) : 0;
  Subspace s{round_up(e.r, 16), round_up(e.q > e.r ? e.q : e.r, 16), nullptr, nullptr};
  Carver shared(shared_scratch(Carver::total({blocks(e.M, 4), packed, e.m * s.u_row, e.m * s.dz_row})));
  uint8_t* const selected = reinterpret_cast<uint8_t*>(shared.take(blocks(e.M, 4)));
  float* const packed_data = shared.take(packed);
  s.u = shared.take(e.m * s.u_row);
  s.dz = shared.take(e.m * s.dz_row);
  const PackedB projection = pack_thin(e.projection, packed > 0 ? e.q : 0, e.d, packed_data);
  visit_rows(
      e, selected,
      [&](int64_t first, int64_t count) {
        if (b.dh.data != nullptr) copy_values(b.grad, first * e.d, count * e.d, b.dh, first * e.d);
      },
      [&](int64_t first, int64_t count) { edit_gradients(b, s, projection, first, count); });
  if (b.d_bias != nullptr) sum_bias(b, s);
  if (b.d_projection == nullptr && b.d_basis == nullptr) return;
  const int64_t work = e.m * kStripe * (2 + (e.q + e.r) / kLanes);
  parallel_for(0, blocks(e.d, kStripe), grain(work), [&](int64_t begin, int64_t end) {
    float* const scratch = local_scratch((kSteps + 1 + s.dz_row) * kStripe);
    for (int64_t k0 = begin * kStripe; k0 < min(end * kStripe, e.d); k0 += kStripe)
      stripe_gradients(b, s, k0, min(kStripe, e.d - k0), scratch);
  });
}

}  // namespace peft_fast::PEFT_FAST_LEVEL
