// The update of one weight and the scalars behind it: the only C++ statement of the formula, for CPU and CUDA, bitwise
// childtune_kernels/ops/reference/. Operations are IEEE, each rounded once, in the order written here; both compilers
// run with contraction off (-ffp-contract=off, -fmad=false).
#pragma once

#include <cmath>

#include "philox.h"

namespace childtune {

// One row of the float64 `hyper` table: HYPER_COLUMNS of childtune_kernels/ops/update.py.
struct Hyper {
  double lr, beta1, beta2, eps, weight_decay, reserve_p;
  double sign;           // +1 to minimise, -1 to maximise
  double hf_dialect;     // 0 torch, 1 hf
  double max_grad_norm;  // inf: no clipping
  double decay_outside;  // not 0: weights outside the mask words decay
};
constexpr int kHyperColumns = sizeof(Hyper) / sizeof(double);

// What one parameter's update needs at one step.
struct Scalars {
  float grad_multiplier, inv_p;
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float eps, step_size, inv_sqrt_correction2;
  float shrink_before, shrink_after;
  uint32_t t;          // the step being taken, from 1
  uint32_t last_kept;  // the largest word of the stream that F keeps
};

// By squaring: multiplications only, so every implementation agrees to the bit.
CHILDTUNE_INLINE double integer_power(double base, uint32_t exponent) {
  double power = 1.0;
  for (; exponent != 0; exponent >>= 1) {
    if (exponent & 1) power *= base;
    base *= base;
  }
  return power;
}

// The step that a counter stands before. It stays at the last one that the mask stream has, rather than begin again.
CHILDTUNE_INLINE uint32_t next_step(double counter) {
  return counter < 4294967295.0 ? static_cast<uint32_t>(counter) + 1 : 4294967295u;
}

// A rule of updates: its overloads of set_step_size and update_weight are its formula.
struct AdamW {
  static constexpr int kRow = 0;  // in tables that have a row a rule
  static constexpr int kMoments = 2;
};

// Corrects for moments that began at 0.
CHILDTUNE_INLINE void set_step_size(
    AdamW, Scalars& s, double rate, double correction1, double sqrt_correction2, bool hf) {
  const double step_size = rate / correction1;
  s.step_size = static_cast<float>(hf ? step_size * sqrt_correction2 : step_size);
  s.inv_sqrt_correction2 = static_cast<float>(hf ? 1.0 : 1.0 / sqrt_correction2);
}

// In fp64, rounded to fp32 once. Pointers may be null: `lr` replaces the table's, `grad_scale` divides the gradients,
// `grad_norm` is the global norm of the gradients as stored, still scaled.
template <typename Rule>
CHILDTUNE_INLINE Scalars derive_scalars(
    uint32_t t, const Hyper& h, const float* lr, const float* grad_scale, const float* grad_norm) {
  const bool hf = h.hf_dialect != 0;
  const double rate = lr ? static_cast<double>(*lr) : h.lr;
  const double scale = grad_scale ? static_cast<double>(*grad_scale) : 1.0;
  double clip = 1.0;
  if (grad_norm) {
    clip = h.max_grad_norm / (static_cast<double>(*grad_norm) / scale + 1e-6);
    if (clip >= 1.0) clip = 1.0;  // a NaN norm stays NaN, as in clip_grad_norm_
  }
  const double correction1 = 1.0 - integer_power(h.beta1, t);
  const double sqrt_correction2 = sqrt(1.0 - integer_power(h.beta2, t));
  const double shrink = 0.0 - rate * h.weight_decay;  // +0 where there is no decay: w + 0 * w is w, signed zeros too

  Scalars s;
  s.grad_multiplier = static_cast<float>(h.sign * clip / scale);
  s.inv_p = static_cast<float>(1.0 / h.reserve_p);
  s.beta1 = static_cast<float>(h.beta1);
  s.one_minus_beta1 = static_cast<float>(1.0 - h.beta1);
  s.beta2 = static_cast<float>(h.beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - h.beta2);
  s.eps = static_cast<float>(h.eps);
  set_step_size(Rule{}, s, rate, correction1, sqrt_correction2, hf);
  s.shrink_before = static_cast<float>(hf ? 0.0 : shrink);
  s.shrink_after = static_cast<float>(hf ? shrink : 0.0);
  s.t = t;
  s.last_kept = last_kept_word(h.reserve_p);
  return s;
}

// Eq. 4: F's gradient, already unscaled, clipped and signed.
CHILDTUNE_INLINE float reserve_gradient(float grad, uint32_t word, const Scalars& s) {
  return word <= s.last_kept ? grad * s.inv_p : 0.0f;
}

CHILDTUNE_INLINE void update_weight(
    AdamW, float grad, float& param, float& exp_avg, float& exp_avg_sq, const Scalars& s) {
  const float m = s.beta1 * exp_avg + s.one_minus_beta1 * grad;              // Alg. 1, line 8
  const float v = s.beta2 * exp_avg_sq + s.one_minus_beta2 * (grad * grad);  // Alg. 1, line 9
  float w = param + s.shrink_before * param;                                 // decoupled decay, torch dialect
  w = w - s.step_size * (m / (sqrtf(v) * s.inv_sqrt_correction2 + s.eps));   // Alg. 1, lines 10-12
  param = w + s.shrink_after * w;                                            // decoupled decay, hf dialect
  exp_avg = m;
  exp_avg_sq = v;
}

// What decay_outside does outside the child.
CHILDTUNE_INLINE float decay_weight(float param, const Scalars& s) {
  const float w = param + s.shrink_before * param;
  return w + s.shrink_after * w;
}

// One term of Eq. 10.
CHILDTUNE_INLINE float add_square(float sum, float grad, float scale) { return sum + (grad * grad) * scale; }

}  // namespace childtune
