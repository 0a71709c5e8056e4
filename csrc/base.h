// Base: the update of the underlying optimizer, from param, grad and moments to the next param.
#pragma once

#include <cmath>

#include "vector.h"

namespace robustft {

// A step receives a table with one row for each parameter group. The fields are the columns of the table.
#define ROBUSTFT_ADAMW_HYPER(X) \
  X(lr) X(beta1) X(beta2) X(eps) X(weight_decay) X(amsgrad) ROBUSTFT_METHOD_HYPER(X) ROBUSTFT_FLAGS(X)
#define ROBUSTFT_SGD_HYPER(X) \
  X(lr) X(momentum) X(dampening) X(weight_decay) X(nesterov) ROBUSTFT_METHOD_HYPER(X) ROBUSTFT_FLAGS(X)
#define ROBUSTFT_NO_STEP_HYPER(X) X(lr) ROBUSTFT_METHOD_HYPER(X) ROBUSTFT_FLAGS(X)
#define ROBUSTFT_METHOD_HYPER(X) X(strength) X(radius) X(k) X(radius_lr) X(radius_beta1) X(radius_beta2)
#define ROBUSTFT_FLAGS(X) X(maximize) X(anchored) X(stochastic_rounding) X(master_weights)
#define ROBUSTFT_FIELD(name) double name;

struct AdamWHyper {
  ROBUSTFT_ADAMW_HYPER(ROBUSTFT_FIELD)
};

struct SGDHyper {
  ROBUSTFT_SGD_HYPER(ROBUSTFT_FIELD)
};

struct NoStepHyper {
  ROBUSTFT_NO_STEP_HYPER(ROBUSTFT_FIELD)
};
#undef ROBUSTFT_FIELD

// What turns a gradient, multiplied by `scale`, into that of what the step minimizes.
template <class Hyper>
ROBUSTFT_ANYWHERE double sign_of(const Hyper& h, double scale) {
  return (h.maximize ? -1 : 1) / scale;
}

// beta^t by squaring, as on a GPU, so that both have the same bits.
ROBUSTFT_ANYWHERE inline double power(double beta, double t) {
  double result = 1;
  for (int64_t n = int64_t(t); n > 0; n /= 2, beta *= beta)
    if (n % 2) result *= beta;
  return result;
}

namespace {

// theta~ = theta (1 - lr wd) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
template <class T>
struct AdamW {
  static constexpr bool kMoves = true;
  static constexpr int kStates = 3;  // the last may be absent
  T sign, decay, blend, beta2, beta2_rest, step_size, root_scale, eps;

  ROBUSTFT_ANYWHERE AdamW(const AdamWHyper& h, double t, double sign)
      : sign(T(sign)),
        decay(T(1 - h.lr * h.weight_decay)),
        blend(T(h.beta1 > 0.5 ? 1 - h.beta1 : -h.beta1)),
        beta2(T(h.beta2)),
        beta2_rest(T(1 - h.beta2)),
        step_size(T(h.lr / (1 - power(h.beta1, t)))),
        root_scale(T(1 / std::sqrt(1 - power(h.beta2, t)))),
        eps(T(h.eps)) {}

  ROBUSTFT_INLINE Vec<T> operator()(Vec<T> param, Vec<T> grad, Vec<T>* state, bool amsgrad) const {
    const Vec<T> g = sign * grad;
    // beta1 m + (1 - beta1) g, from the end with the larger weight: exactly g when beta1 is 0.
    const Vec<T> m = (blend > 0 ? state[0] : g) + blend * (g - state[0]);
    const Vec<T> v = beta2 * state[1] + beta2_rest * g * g;
    state[0] = m, state[1] = v;
    if (amsgrad) state[2] = (v > state[2]) | (v != v) ? v : state[2];  // as torch.maximum: nan wins
    return decay * param - step_size * (m / (root<T>(amsgrad ? state[2] : v) * root_scale + eps));
  }
};

// b = momentum b + (1 - dampening)(g + wd theta), but b = g + wd theta at its first step.
// theta~ = theta - lr b, or theta - lr (g + wd theta + momentum b) with nesterov.
template <class T>
struct SGD {
  static constexpr bool kMoves = true;
  static constexpr int kStates = 1;  // may be absent
  T sign, lr, weight_decay, keep, take, buffer_weight, grad_weight;

  ROBUSTFT_ANYWHERE SGD(const SGDHyper& h, double t, double sign)
      : sign(T(sign)),
        lr(T(h.lr)),
        weight_decay(T(h.weight_decay)),
        keep(T(t > 1 ? h.momentum : 0)),
        take(T(t > 1 && h.momentum ? 1 - h.dampening : 1)),
        buffer_weight(T(h.nesterov ? h.momentum : 1)),
        grad_weight(T(h.nesterov ? 1 : 0)) {}

  ROBUSTFT_INLINE Vec<T> operator()(Vec<T> param, Vec<T> grad, Vec<T>* state, bool momentum) const {
    const Vec<T> g = sign * grad + weight_decay * param;
    if (!momentum) return param - lr * g;
    state[0] = keep * state[0] + take * g;
    return param - lr * (grad_weight * g + buffer_weight * state[0]);
  }
};

// g + penalty, for a base that will multiply it by `scale`.
template <class T>
ROBUSTFT_INLINE Vec<T> penalized(T scale, T linear, T sign, Vec<T> d, Vec<T> grad) {
  const Vec<T> zero = {}, toward = zero + sign / scale;
  return grad + linear / scale * d + (d > 0 ? toward : d < 0 ? -toward : zero);
}

// theta~ = theta. Serves the sweeps that only pull, or only measure.
template <class T>
struct NoStep {
  static constexpr bool kMoves = false;
  static constexpr int kStates = 0;
  T sign;

  ROBUSTFT_ANYWHERE NoStep(const NoStepHyper&, double, double sign) : sign(T(sign)) {}

  ROBUSTFT_INLINE Vec<T> operator()(Vec<T> param, Vec<T>, Vec<T>*, bool) const { return param; }
};

}  // namespace
}  // namespace robustft
