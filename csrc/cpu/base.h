// Base: the update of the underlying optimizer, from param, grad and moments to the next param.
#pragma once

#include <cmath>

#include "../chunk.h"

namespace robustft {

// One row of the table that a step receives for each parameter group; the fields are the table's columns.
#define ROBUSTFT_ADAMW_HYPER(X) \
  X(lr) X(beta1) X(beta2) X(eps) X(weight_decay) X(amsgrad) ROBUSTFT_METHOD_HYPER(X)
#define ROBUSTFT_SGD_HYPER(X) \
  X(lr) X(momentum) X(dampening) X(weight_decay) X(nesterov) ROBUSTFT_METHOD_HYPER(X)
#define ROBUSTFT_STILL_HYPER(X) X(lr) ROBUSTFT_METHOD_HYPER(X)
#define ROBUSTFT_METHOD_HYPER(X) \
  X(strength) X(radius) X(k) X(radius_lr) X(radius_beta1) X(radius_beta2) X(maximize) X(anchored) \
  X(stochastic_rounding) X(master_weights)
#define ROBUSTFT_FIELD(name) double name;

struct AdamWHyper {
  ROBUSTFT_ADAMW_HYPER(ROBUSTFT_FIELD)
};

struct SGDHyper {
  ROBUSTFT_SGD_HYPER(ROBUSTFT_FIELD)
};

struct StillHyper {
  ROBUSTFT_STILL_HYPER(ROBUSTFT_FIELD)
};
#undef ROBUSTFT_FIELD

namespace {

// theta~ = theta (1 - lr wd) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
template <class T>
struct AdamW {
  static constexpr bool kMoves = true;
  T sign, decay, beta1_rest, beta2, beta2_rest, step_size, root_scale, eps;

  AdamW(const AdamWHyper& h, double t, double sign)
      : sign(T(sign)),
        decay(T(1 - h.lr * h.weight_decay)),
        beta1_rest(T(1 - h.beta1)),
        beta2(T(h.beta2)),
        beta2_rest(T(1 - h.beta2)),
        step_size(T(h.lr / (1 - std::pow(h.beta1, t)))),
        root_scale(T(1 / std::sqrt(1 - std::pow(h.beta2, t)))),
        eps(T(h.eps)) {}

  template <bool kAmsgrad>
  ROBUSTFT_INLINE void run(int n, const T* param, const T* grad, T* exp_avg, T* exp_avg_sq, T* max_exp_avg_sq, T* next) const {
    const AdamW a = *this;  // by value: a loop over references does not vectorise
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const T g = a.sign * grad[i];
      const T m = exp_avg[i] + a.beta1_rest * (g - exp_avg[i]);
      const T v = a.beta2 * exp_avg_sq[i] + a.beta2_rest * g * g;
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
      T root = v;
      if constexpr (kAmsgrad) {
        const T old = max_exp_avg_sq[i];
        root = (v > old || v != v) ? v : old;  // as torch.maximum: nan wins
        max_exp_avg_sq[i] = root;
      }
      next[i] = a.decay * param[i] - a.step_size * (m / (std::sqrt(root) * a.root_scale + a.eps));
    }
  }

  ROBUSTFT_INLINE void operator()(int n, const T* param, const T* grad, T* exp_avg, T* exp_avg_sq, T* max_exp_avg_sq, T* next) const {
    if (max_exp_avg_sq)
      run<true>(n, param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, next);
    else
      run<false>(n, param, grad, exp_avg, exp_avg_sq, nullptr, next);
  }
};

// b = momentum b + (1 - dampening)(g + wd theta), b = g + wd theta at its first step; theta~ = theta - lr b,
// or theta - lr (g + wd theta + momentum b) with nesterov
template <class T>
struct SGD {
  static constexpr bool kMoves = true;
  T sign, lr, weight_decay, keep, take, buffer_weight, grad_weight;

  SGD(const SGDHyper& h, double t, double sign)
      : sign(T(sign)),
        lr(T(h.lr)),
        weight_decay(T(h.weight_decay)),
        keep(T(t > 1 ? h.momentum : 0)),
        take(T(t > 1 && h.momentum ? 1 - h.dampening : 1)),
        buffer_weight(T(h.nesterov ? h.momentum : 1)),
        grad_weight(T(h.nesterov ? 1 : 0)) {}

  template <bool kMomentum>
  ROBUSTFT_INLINE void run(int n, const T* param, const T* grad, T* momentum_buffer, T* next) const {
    const SGD s = *this;
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const T g = s.sign * grad[i] + s.weight_decay * param[i];
      T direction = g;
      if constexpr (kMomentum) {
        const T b = s.keep * momentum_buffer[i] + s.take * g;
        momentum_buffer[i] = b;
        direction = s.grad_weight * g + s.buffer_weight * b;
      }
      next[i] = param[i] - s.lr * direction;
    }
  }

  ROBUSTFT_INLINE void operator()(int n, const T* param, const T* grad, T* momentum_buffer, T*, T*, T* next) const {
    if (momentum_buffer)
      run<true>(n, param, grad, momentum_buffer, next);
    else
      run<false>(n, param, grad, nullptr, next);
  }
};

// g + penalty, for a base that will multiply it by `scale`.
template <class T>
ROBUSTFT_INLINE void penalize(int n, T scale, T linear, T sign, const T* param, const T* anchor, const T* grad, T* to) {
  linear /= scale, sign /= scale;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const T d = anchor ? param[i] - anchor[i] : param[i];
    to[i] = grad[i] + linear * d + (d > 0 ? sign : d < 0 ? -sign : 0);
  }
}

// theta~ = theta
template <class T>
struct Still {
  static constexpr bool kMoves = false;
  T sign;

  Still(const StillHyper&, double, double sign) : sign(T(sign)) {}

  ROBUSTFT_INLINE void operator()(int n, const T* param, const T*, T*, T*, T*, T* next) const {
    for (int i = 0; i < n; ++i) next[i] = param[i];
  }
};

}  // namespace
}  // namespace robustft
