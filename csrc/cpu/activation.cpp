// The activations of loreft and their slopes, as torch computes them. They see a few values of each row, so
// no level has its own.
#include <cmath>

#include "loreft.h"

namespace peft_fast {
namespace {

constexpr float kInvSqrt2 = 0.70710678118654752f, kInvSqrt2Pi = 0.39894228040143268f;

float sigmoid(float z) {
  return 1.0f / (1.0f + std::exp(-z));
}

float normal_cdf(float z) {
  return 0.5f * (1.0f + std::erf(z * kInvSqrt2));
}

float value(Activation act, float z) {
  switch (act) {
    case Activation::kLinear:
      return z;
    case Activation::kRelu:
      return z <= 0.0f ? 0.0f : z;
    case Activation::kGelu:
      return z * normal_cdf(z);
    case Activation::kTanh:
      return std::tanh(z);
    case Activation::kSilu:
      return z / (1.0f + std::exp(-z));
    case Activation::kSigmoid:
      return sigmoid(z);
  }
  return z;
}

float slope(Activation act, float z) {
  switch (act) {
    case Activation::kLinear:
      return 1.0f;
    case Activation::kRelu:
      return z > 0.0f ? 1.0f : 0.0f;
    case Activation::kGelu:
      return normal_cdf(z) + z * kInvSqrt2Pi * std::exp(-0.5f * z * z);
    case Activation::kTanh: {
      const float tanh = std::tanh(z);
      return 1.0f - tanh * tanh;
    }
    case Activation::kSilu: {
      const float s = sigmoid(z);
      return s * (1.0f + z * (1.0f - s));
    }
    case Activation::kSigmoid: {
      const float s = sigmoid(z);
      return s * (1.0f - s);
    }
  }
  return 1.0f;
}

}  // namespace

void activate(Activation act, const float* z, int64_t n, float* u) {
  for (int64_t i = 0; i < n; ++i) u[i] = value(act, z[i]);
}

void activate_backward(Activation act, const float* z, int64_t n, float* du) {
  for (int64_t i = 0; i < n; ++i) du[i] *= slope(act, z[i]);
}

}  // namespace peft_fast
