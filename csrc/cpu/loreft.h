// The CPU kernels of loreft as the bindings see them: plain pointers, already checked.
//
// Shapes: M tokens, m selected ones, d features, r rows of the basis, q of the projection.
#pragma once

#include "operands.h"

namespace peft_fast {

enum class Activation { kLinear, kRelu, kGelu, kTanh, kSilu, kSigmoid };

// z = H_s · projectionᵀ + [bias; 0] in the selected rows H_s of H, and
// u = act(z) (q = r), act(z[:, :r]) − z[:, r:] (q = 2r), act(bias) in every row (q = 0);  e = u · basis.
// Selected rows become H_s + drop(e), or drop(H_s + e) where drop_state.
struct Edit {
  int64_t M, m, d, q, r;
  bool whole;               // every row is selected, m = M
  const int64_t* rows;      // [m] unless whole: unique, below M; a negative one is skipped
  const float* projection;  // [q, d]
  const float* bias;        // [r], or null for zeros
  const float* basis;       // [r, d]
  Dropout dropout;          // of [m, d]
  bool drop_state;
  Activation act;
};

struct Loreft {
  Edit edit;
  Operand h;         // [M, d]
  Operand residual;  // [M, d], of the dtype of h: H = h + residual, rounded once; null data for H = h
  Result out;        // [M, d], of the dtype of h
  float* z;          // [m, q]
  Result kept;       // H_s [m, d], of the dtype of h
};

// With dE = drop(grad_s):  dU = dE · basisᵀ,  dZ = [dU ⊙ act'(z[:, :r]); −dU],
// dH_s = (drop_state ? dE : grad_s) + dZ · projection, grad in the other rows,
// d_projection = dZᵀ · H_s,  d_bias = Σ dU ⊙ act',  d_basis = uᵀ · dE.
struct LoreftBackward {
  Edit edit;
  Operand grad;         // [M, d]
  Operand kept;         // [m, d], of the dtype of grad
  const float* z;       // [m, q]
  Result dh;            // [M, d], of the dtype of grad
  float* d_projection;  // [q, d], or null
  float* d_bias;        // [r], or null
  float* d_basis;       // [r, d], or null
};

// u[0:n] = act(z[0:n]).
void activate(Activation act, const float* z, int64_t n, float* u);
// du[0:n] = du[0:n] ⊙ act'(z[0:n]).
void activate_backward(Activation act, const float* z, int64_t n, float* du);

}  // namespace peft_fast
