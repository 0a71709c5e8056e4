// Spot: a step on a few neighbours.
#pragma once

#include "../measure.h"
#include "../pull.h"
#include "codes.cuh"

namespace robustft {
namespace {

template <class T>
struct RowTerms {
  Known<T> known;
  T linear, sign;     // of the penalty
  uint32_t key, moments_key;
  const Flags& flags;
};

// Makes the base step, then pulls by a known alpha or measures.
// kSide: how many neighbours it takes, from a place on. lane: of the first, among those of this thread. waiting: for
// moments that are codes.
template <class K, Measuring kMeasuring, int kSide, class Base, class T, class Sums>
__device__ __forceinline__ void step_spot(const Param& p, const Base& base, const RowTerms<T>& terms, int64_t place,
                                          int lane, Sums& sums, Waiting<K, Base::kStates>& waiting) {
  constexpr bool kRare = !K::kPlain;
  constexpr int kStates = Base::kStates - (K::kPlain && Base::kStates == 3);
  constexpr int kOptional = Base::kStates - 1;
  const bool measures = kMeasuring != Measuring::none && (K::kPlain || terms.flags.measures);
  const bool writes = Base::kMoves || !measures;
  const DType param_as = dtype_of<K::kParamAs>(p.param), grad_as = dtype_of<K::kGradAs>(p.grad);
  const DType anchor_as = dtype_of<K::kAnchorAs>(p.anchor), state_as = dtype_of<K::kStateAs>(p.state[0]);
  const bool all = kOptional >= 0 && kOptional < kStates && p.state[kOptional < 0 ? 0 : kOptional].data != nullptr;

  Image<T, kSide> params, grads, anchors, working, states[kStates ? kStates : 1];
  fetch<T, kSide>(params, p.param, param_as, place);
  if constexpr (Base::kMoves || kMeasuring != Measuring::none)
    kSide > 1 && terms.flags.grads_apart ? fetch_apart(grads, p.grad, grad_as, place)
                                         : fetch(grads, p.grad, grad_as, place);
  kSide > 1 && terms.flags.anchors_apart ? fetch_apart(anchors, p.anchor, anchor_as, place)
                                         : fetch(anchors, p.anchor, anchor_as, place);
  if constexpr (kRare) fetch<T, kSide>(working, p.working, p.working.dtype, place);
  float codes[kStates ? kStates : 1][kSide];
  if constexpr (K::kCoded) {
    if constexpr (kStates > 0) fetch_codes<true>(codes[0], p.state[0], place);
    if constexpr (kStates > 1) fetch_codes<false>(codes[1], p.state[1], place);
    if constexpr (kStates > 2) fetch_codes<false>(codes[2], p.state[2], place);
  } else {
#pragma unroll
    for (int k = 0; k < kStates; ++k) fetch<T, kSide>(states[k], p.state[k], state_as, place);
  }

  T next[kSide], moments[kStates ? kStates : 1][kSide], delta[kSide];
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
    asm volatile("" ::: "memory");
    T param = number<T>(params, param_as, j);
    if constexpr (kRare)
      if (p.working.data) param = reconciled(p.working.dtype, number<T>(working, p.working.dtype, j), param);
    const T anchor = number<T>(anchors, anchor_as, j), d = param - anchor;
    T grad = param;  // without a gradient, the sum of its products means nothing
    if constexpr (Base::kMoves || kMeasuring != Measuring::none)
      if (Base::kMoves || terms.flags.graded) grad = number<T>(grads, grad_as, j);
    T used = grad;
    if constexpr (kRare && Base::kMoves)
      if (terms.linear != 0 || terms.sign != 0) used = penalized<T>(base.sign, terms.linear, terms.sign, d, grad);
    T state[Base::kStates ? Base::kStates : 1] = {};
#pragma unroll
    for (int k = 0; k < kStates; ++k) state[k] = K::kCoded ? T(codes[k][j]) : number<T>(states[k], state_as, j);
    next[j] = base(param, used, state, all);
#pragma unroll
    for (int k = 0; k < kStates; ++k) moments[k][j] = state[k];
    if (!measures && terms.known.alpha != 1) next[j] = pulled<T>(terms.known.alpha, next[j], anchor);
    if constexpr (kRare)
      if (!measures && terms.known.hold != 0) next[j] = held<T>(terms.known.hold, param, next[j], anchor);
    if constexpr (sizeof(T) == 4) {
      if (kRare && p.dithered && writes) {
        next[j] = bf16_of(dithered(next[j], bits_at(terms.key, place + j) >> 16));
      } else {
        next[j] = nearest(param_as, next[j]);
      }
      if constexpr (kRare && !K::kCoded && kStates > 0)
        if (p.low_state && p.state[0].data) {
          const uint32_t bits = bits_at(terms.moments_key, place + j);
          moments[0][j] = bf16_of(dithered(moments[0][j], bits >> 16));
          if constexpr (kStates > 1) moments[1][j] = bf16_of(dithered(moments[1][j], bits & 0xffff));
        }
    }
    if constexpr (kMeasuring != Measuring::none) {
#pragma unroll
      for (int l = 0; l < K::kSide; ++l)  // accumulators are registers, which have no index that varies
        if (measures && l == (kSide == 1 ? lane : j)) sums.add(l, param, next[j], grad, d);
    }
    delta[j] = next[j] - anchor;
  }

  asm volatile("" ::: "memory");  // as in Round::each
  if (!writes) return;
  if constexpr (K::kCoded && kStates > 0) {
    waiting.template take<kSide>(moments, p.state, place, lane, terms.moments_key);
  } else {
#pragma unroll
    for (int k = 0; k < kStates; ++k)
      if (k < kOptional || all) put<T, kSide>(moments[k], p.state[k], state_as, place);
  }
  if constexpr (kRare) {
    if (measures && p.delta.data) put<T, kSide>(delta, p.delta, dtype_of<K::kParamAs>(p.delta), place);
    if (p.working.data) put<T, kSide>(next, p.working, p.working.dtype, place);
  }
  put<T, kSide>(next, p.param, param_as, place);
}

}  // namespace
}  // namespace robustft
