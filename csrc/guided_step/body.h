// The block loop, written once over a vector type. Included by one source per instruction set; everything
// is in an anonymous namespace so that no level's code is linked into another's.
#pragma once

#include <type_traits>

#include "guided_step.h"
#include "simd/tail.h"
#include "simd/unroll.h"

namespace {

using amg::BFloat;
using amg::DType;
using amg::GuidedStepArgs;
using amg::Half;
using amg::SamplePlan;

// What is known when the loop is compiled. Open: a term of the gate acts. Step: with the update. Wide: 42 coefficients
// or an output_scale. Stream: outputs are written past the caches.
template <bool Open, bool Step, bool Stream, bool Wide, int States>
struct Form {
  static constexpr bool open = Open, step = Step, stream = Stream, wide = Wide;
  static constexpr int states = States;
};

// Pointers into one sample's block: T as stored, N as the network computes. What is not read or written is null.
template <class T, class N>
struct BlockPointers {
  const T *sample, *noise;
  const N *uncond, *cond, *neighbour;
  const void* gradient;
  std::int64_t grad_bytes;  // of one element
  T *prev_sample, *x0_hat;
  float* state[amg::kMaxStates];
};

template <class T>
T* at(const void* base, std::int64_t offset) {
  return base == nullptr ? nullptr : static_cast<T*>(const_cast<void*>(base)) + offset;
}

template <class V, class T, class N>
typename V::Reg load_grad(const BlockPointers<T, N>& p, DType grad_dtype, std::int64_t offset, std::int64_t count) {
  if (grad_dtype == DType::f32) return load_some<V>(static_cast<const float*>(p.gradient) + offset, count);
  return load_some<V>(static_cast<const N*>(p.gradient) + offset, count);
}

template <class V>
struct Accumulators {
  typename V::Reg delta = V::zero(), cross = V::zero(), uncond = V::zero(), step = V::zero();
};

constexpr std::int64_t kRun = 32;  // vectors summed in fp32 before double takes over: short sums lose less

constexpr std::int64_t kAhead = 2048;  // bytes by which inputs are asked for early: each stream starts anew at every page
constexpr std::int64_t kLine = 64;

AMG_INLINE inline void prefetch(const void* source, std::int64_t bytes) {
  __builtin_prefetch(static_cast<const char*>(source) + bytes);
}

// What only open samples read is not asked for beyond the block: the next sample may be closed.
template <class T, class N>
void prefetch_open_start(const BlockPointers<T, N>& p, std::int64_t size) {
  const std::int64_t bytes = size * sizeof(N) < kAhead ? size * sizeof(N) : kAhead;
  for (std::int64_t at = 0; at < bytes; at += kLine) {
    if (p.neighbour != nullptr) prefetch(p.neighbour, at);
    if (p.gradient != nullptr) prefetch(p.gradient, at);
  }
}

template <class V, class F, class T, class N>
AMG_INLINE inline void prefetch_inputs(const BlockPointers<T, N>& p, std::int64_t offset, std::int64_t size) {
  if constexpr (V::width > 1) {
    prefetch(p.sample + offset, kAhead);
    prefetch(p.uncond + offset, kAhead);
    prefetch(p.cond + offset, kAhead);
    for (int i = 0; i < F::states; ++i) prefetch(p.state[i] + offset, kAhead);
    if constexpr (F::open) {
      if (size - offset <= kAhead / static_cast<std::int64_t>(sizeof(N))) return;
      if (p.neighbour != nullptr) prefetch(p.neighbour + offset, kAhead);
      if (p.gradient != nullptr) prefetch(p.gradient, offset * p.grad_bytes + kAhead);
    }
  }
}

template <class V, bool Stream, class T>
AMG_INLINE inline void write_some(T* target, std::int64_t offset, std::int64_t count, typename V::Reg value) {
  if (target == nullptr) return;
  if constexpr (Stream) return V::stream(target + offset, value);
  store_some<V>(target + offset, count, value);
}

// The terms of an open gate on top of plain guidance.
template <class V, class T, class N>
AMG_INLINE inline typename V::Reg add_terms(const BlockPointers<T, N>& p, const SamplePlan& s, DType grad_dtype,
                                            std::int64_t offset, std::int64_t count, typename V::Reg m_uncond,
                                            typename V::Reg output) {
  if (p.neighbour != nullptr) {
    const auto caption = V::sub(load_some<V>(p.neighbour + offset, count), m_uncond);
    output = V::fma(V::set(-s.caption), caption, output);
  }
  if (p.gradient != nullptr) output = V::fma(V::set(s.push), load_grad<V>(p, grad_dtype, offset, count), output);
  return output;
}

// The scheduler's history: adds it to prev_sample and puts the next one in its place.
template <class V, class F, class T, class N>
AMG_INLINE inline typename V::Reg advance_states(const BlockPointers<T, N>& p, const SamplePlan& s, std::int64_t offset,
                                                 std::int64_t count, const typename V::Reg (&inputs)[amg::kStepInputs],
                                                 typename V::Reg prev) {
  typename V::Reg before[F::states + 1];
  unroll<F::states>([&](auto j) AMG_INLINE {
    before[j.value] = s.state[j.value] ? load_some<V>(p.state[j.value] + offset, count) : V::zero();
    prev = V::fma(V::set(s.h[j.value]), before[j.value], prev);
  });
  unroll<F::states>([&](auto i) AMG_INLINE {
    const auto& of = s.B[i.value];
    auto after = V::mul(V::set(of[amg::kSample]), inputs[amg::kSample]);
    after = V::fma(V::set(of[amg::kOutput]), inputs[amg::kOutput], after);
    after = V::fma(V::set(of[amg::kClipped]), inputs[amg::kClipped], after);
    if (p.noise != nullptr) after = V::fma(V::set(of[amg::kNoise]), inputs[amg::kNoise], after);
    unroll<F::states>([&](auto j) AMG_INLINE { after = V::fma(V::set(s.A[i.value][j.value]), before[j.value], after); });
    store_some<V>(p.state[i.value] + offset, count, after);
  });
  return prev;
}

template <class V, class F, class T, class N>
AMG_INLINE inline void write_update(const BlockPointers<T, N>& p, const SamplePlan& s, std::int64_t offset,
                                    std::int64_t count, typename V::Reg x_t, typename V::Reg output,
                                    typename V::Reg x0_hat, Accumulators<V>& sums) {
  auto prev = V::fma(V::set(s.k_eps), output, V::mul(V::set(s.k_sample), x_t));
  auto noise = V::zero();
  if (p.noise != nullptr) {
    noise = load_some<V>(p.noise + offset, count);
    prev = V::fma(V::set(s.k_noise), noise, prev);
  }
  auto before = x_t, after = prev;
  if constexpr (F::wide) {
    const auto clipped = V::clamp(x0_hat, V::set(-s.clip), V::set(s.clip));
    prev = V::fma(V::set(s.k_clipped), clipped, prev);
    if constexpr (F::states > 0) prev = advance_states<V, F>(p, s, offset, count, {x_t, output, clipped, noise}, prev);
    before = V::mul(V::set(s.scale), x_t);
    after = V::mul(V::set(s.next_scale), prev);
  }
  write_some<V, F::stream>(p.prev_sample, offset, count, prev);
  const auto moved = V::sub(after, before);
  sums.step = V::fma(moved, moved, sums.step);
}

template <class V, class F, class T, class N>
AMG_INLINE inline void step_elements(const BlockPointers<T, N>& p, const SamplePlan& s, DType grad_dtype,
                                     std::int64_t offset, std::int64_t count, Accumulators<V>& sums) {
  const auto x_t = load_some<V>(p.sample + offset, count);
  const auto m_uncond = load_some<V>(p.uncond + offset, count);
  const auto of_cond = V::sub(load_some<V>(p.cond + offset, count), m_uncond);
  auto eps_u = m_uncond, delta = of_cond, scaled = m_uncond;
  if constexpr (F::wide) {
    scaled = V::mul(V::set(s.output_scale), m_uncond);
    eps_u = V::fma(V::set(s.e_output), m_uncond, V::mul(V::set(s.e_sample), x_t));
    delta = V::mul(V::set(s.e_output), of_cond);
  }
  auto output = V::fma(V::set(s.guidance), of_cond, scaled);
  if constexpr (F::open) output = add_terms<V>(p, s, grad_dtype, offset, count, m_uncond, output);
  sums.delta = V::fma(delta, delta, sums.delta);
  sums.cross = V::fma(eps_u, delta, sums.cross);
  sums.uncond = V::fma(eps_u, eps_u, sums.uncond);
  typename V::Reg x0_hat;
  if constexpr (F::wide) x0_hat = V::fma(V::set(s.a), x_t, V::mul(V::set(s.b), output));
  else x0_hat = V::mul(V::fma(V::set(-s.root), output, x_t), V::set(s.inv_root_alpha));
  write_some<V, F::stream>(p.x0_hat, offset, count, x0_hat);
  if constexpr (F::step) write_update<V, F>(p, s, offset, count, x_t, output, x0_hat, sums);
}

template <class V, class F, class T, class N>
void run_block(const BlockPointers<T, N>& p, const SamplePlan& s, DType grad_dtype, std::int64_t size, double* partial) {
  partial[0] = partial[1] = partial[2] = partial[3] = 0;
  if constexpr (F::open) prefetch_open_start(p, size);
  for (std::int64_t start = 0; start < size; start += kRun * V::width) {
    const std::int64_t stop = size - start < kRun * V::width ? size : start + kRun * V::width;
    Accumulators<V> run;
    std::int64_t offset = start;
    for (; offset + V::width <= stop; offset += V::width) {
      prefetch_inputs<V, F>(p, offset, size);
      step_elements<V, F>(p, s, grad_dtype, offset, V::width, run);
    }
    if (offset < stop) step_elements<V, F>(p, s, grad_dtype, offset, stop - offset, run);
    partial[0] += V::sum(run.delta);
    partial[1] += V::sum(run.cross);
    partial[2] += V::sum(run.uncond);
    partial[3] += V::sum(run.step);
  }
  if constexpr (F::stream) V::fence();
}

template <class V, bool Stream, bool Wide, int States, class T, class N>
void run_form(const GuidedStepArgs& a, const BlockPointers<T, N>& p, const SamplePlan& s, std::int64_t size, double* partial) {
  const bool open = p.neighbour != nullptr || p.gradient != nullptr;
  if (a.prev_sample == nullptr) {
    if (open) return run_block<V, Form<true, false, Stream, Wide, 0>>(p, s, a.grad_dtype, size, partial);
    return run_block<V, Form<false, false, Stream, Wide, 0>>(p, s, a.grad_dtype, size, partial);
  }
  if (open) return run_block<V, Form<true, true, Stream, Wide, States>>(p, s, a.grad_dtype, size, partial);
  run_block<V, Form<false, true, Stream, Wide, States>>(p, s, a.grad_dtype, size, partial);
}

template <class V, bool Stream, class T, class N>
void run_width(const GuidedStepArgs& a, const BlockPointers<T, N>& p, const SamplePlan& s, std::int64_t size, double* partial) {
  if (a.narrow()) return run_form<V, Stream, false, 0>(a, p, s, size, partial);
  switch (a.states) {
    case 0: return run_form<V, Stream, true, 0>(a, p, s, size, partial);
    case 1: return run_form<V, Stream, true, 1>(a, p, s, size, partial);
    case 2: return run_form<V, Stream, true, 2>(a, p, s, size, partial);
    default: return run_form<V, Stream, true, 3>(a, p, s, size, partial);
  }
}

template <class V, class T, class N>
void typed_block(const GuidedStepArgs& a, const SamplePlan& s, std::int64_t sample_index, std::int64_t begin,
                 std::int64_t size, double* partial) {
  const std::int64_t own = sample_index * a.size + begin;
  const auto of_network = [&](int tensor) { return s.row[tensor] < 0 ? nullptr : a.network[tensor]; };
  const auto offset = [&](int tensor) { return s.row[tensor] * a.size + begin; };
  const N* cond = at<const N>(a.network[amg::kCond], offset(amg::kCond));
  const N* uncond = at<const N>(of_network(amg::kUncond), offset(amg::kUncond));
  BlockPointers<T, N> p{at<const T>(a.sample, own), at<const T>(s.noise ? a.noise : nullptr, own),
                        uncond == nullptr ? cond : uncond, cond,
                        at<const N>(of_network(amg::kNeighbour), offset(amg::kNeighbour)), nullptr, sizeof(N),
                        at<T>(a.prev_sample, own), at<T>(a.x0_hat, own), {}};
  if (a.grad_dtype == DType::f32) p.grad_bytes = sizeof(float);
  p.gradient = at<const char>(of_network(amg::kGradient), offset(amg::kGradient) * p.grad_bytes);
  for (int i = 0; i < a.states; ++i) p.state[i] = a.state + (i * a.batch) * a.size + own;
  if constexpr (std::is_same_v<T, float> && std::is_same_v<N, float>)
    if (a.stream) return run_width<V, true>(a, p, s, size, partial);
  run_width<V, false>(a, p, s, size, partial);
}

template <class V>
void any_block(const GuidedStepArgs& a, const SamplePlan& s, std::int64_t sample_index, std::int64_t begin,
               std::int64_t end, double* partial) {
  const std::int64_t size = end - begin;
  if (a.dtype == DType::f16) return typed_block<V, Half, Half>(a, s, sample_index, begin, size, partial);
  if (a.dtype == DType::bf16) return typed_block<V, BFloat, BFloat>(a, s, sample_index, begin, size, partial);
  switch (a.network_dtype) {
    case DType::f16: return typed_block<V, float, Half>(a, s, sample_index, begin, size, partial);
    case DType::bf16: return typed_block<V, float, BFloat>(a, s, sample_index, begin, size, partial);
    default: return typed_block<V, float, float>(a, s, sample_index, begin, size, partial);
  }
}

}  // namespace
