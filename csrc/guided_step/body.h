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
using amg::SampleScales;

// Pointers into one sample's block.
template <class T>
struct BlockPointers {
  const T *sample, *eps_uncond, *eps_cond, *eps_neighbour, *noise;
  const void* similarity_grad;
  std::int64_t grad_bytes;  // of one element
  T *prev_sample, *x0_hat;
};

template <class T>
const T* at(const void* base, std::int64_t offset) {
  return base == nullptr ? nullptr : static_cast<const T*>(base) + offset;
}

template <class V, class T>
typename V::Reg load_grad(const BlockPointers<T>& p, DType grad_dtype, std::int64_t offset, std::int64_t count) {
  if (grad_dtype == DType::f32) return load_some<V>(static_cast<const float*>(p.similarity_grad) + offset, count);
  return load_some<V>(static_cast<const T*>(p.similarity_grad) + offset, count);
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
template <class T>
void prefetch_open_start(const BlockPointers<T>& p, std::int64_t size) {
  const std::int64_t bytes = size * sizeof(T) < kAhead ? size * sizeof(T) : kAhead;
  for (std::int64_t at = 0; at < bytes; at += kLine) {
    if (p.eps_neighbour != nullptr) prefetch(p.eps_neighbour, at);
    if (p.similarity_grad != nullptr) prefetch(p.similarity_grad, at);
  }
}

template <class V, class T, bool Open>
AMG_INLINE inline void prefetch_inputs(const BlockPointers<T>& p, std::int64_t offset, std::int64_t size) {
  if constexpr (V::width > 1) {
    prefetch(p.sample + offset, kAhead);
    prefetch(p.eps_uncond + offset, kAhead);
    prefetch(p.eps_cond + offset, kAhead);
    if constexpr (Open) {
      if (size - offset <= kAhead / static_cast<std::int64_t>(sizeof(T))) return;
      if (p.eps_neighbour != nullptr) prefetch(p.eps_neighbour + offset, kAhead);
      if (p.similarity_grad != nullptr) prefetch(p.similarity_grad, offset * p.grad_bytes + kAhead);
    }
  }
}

template <class V, bool Stream, class T>
AMG_INLINE inline void write_some(T* target, std::int64_t count, typename V::Reg value) {
  if constexpr (Stream) return V::stream(target, value);
  store_some<V>(target, count, value);
}

template <class V, class T, bool Open, bool Step, bool Stream>
inline void step_elements(const BlockPointers<T>& p, const SampleScales& s, DType grad_dtype, std::int64_t offset,
                          std::int64_t count, Accumulators<V>& sums) {
  const auto x_t = load_some<V>(p.sample + offset, count);
  const auto eps_u = load_some<V>(p.eps_uncond + offset, count);
  const auto delta = V::sub(load_some<V>(p.eps_cond + offset, count), eps_u);
  auto eps_guided = V::fma(V::set(s.guidance), delta, eps_u);
  if constexpr (Open) {
    if (p.eps_neighbour != nullptr) {
      const auto caption = V::sub(load_some<V>(p.eps_neighbour + offset, count), eps_u);
      eps_guided = V::fma(V::set(-s.caption), caption, eps_guided);
    }
    if (p.similarity_grad != nullptr)
      eps_guided = V::fma(V::set(s.push), load_grad<V>(p, grad_dtype, offset, count), eps_guided);
  }
  sums.delta = V::fma(delta, delta, sums.delta);
  sums.cross = V::fma(eps_u, delta, sums.cross);
  sums.uncond = V::fma(eps_u, eps_u, sums.uncond);
  const auto clean = V::fma(V::set(-s.root), eps_guided, x_t);
  write_some<V, Stream>(p.x0_hat + offset, count, V::mul(clean, V::set(s.inv_root_alpha)));
  if constexpr (Step) {
    auto prev = V::fma(V::set(s.k_eps), eps_guided, V::mul(V::set(s.k_sample), x_t));
    if (p.noise != nullptr) prev = V::fma(V::set(s.k_noise), load_some<V>(p.noise + offset, count), prev);
    write_some<V, Stream>(p.prev_sample + offset, count, prev);
    const auto moved = V::sub(prev, x_t);
    sums.step = V::fma(moved, moved, sums.step);
  }
}

template <class V, class T, bool Open, bool Step, bool Stream>
void run_block(const BlockPointers<T>& p, const SampleScales& s, DType grad_dtype, std::int64_t size, double* partial) {
  partial[0] = partial[1] = partial[2] = partial[3] = 0;
  if constexpr (Open) prefetch_open_start(p, size);
  for (std::int64_t start = 0; start < size; start += kRun * V::width) {
    const std::int64_t stop = size - start < kRun * V::width ? size : start + kRun * V::width;
    Accumulators<V> run;
    std::int64_t offset = start;
    for (; offset + V::width <= stop; offset += V::width) {
      prefetch_inputs<V, T, Open>(p, offset, size);
      step_elements<V, T, Open, Step, Stream>(p, s, grad_dtype, offset, V::width, run);
    }
    if (offset < stop) step_elements<V, T, Open, Step, Stream>(p, s, grad_dtype, offset, stop - offset, run);
    partial[0] += V::sum(run.delta);
    partial[1] += V::sum(run.cross);
    partial[2] += V::sum(run.uncond);
    partial[3] += V::sum(run.step);
  }
  if constexpr (Stream) V::fence();
}

template <class V, class T, bool Stream>
void run_kind(const GuidedStepArgs& a, const BlockPointers<T>& p, const SampleScales& s, std::int64_t size, double* partial) {
  if (a.prev_sample == nullptr) return run_block<V, T, false, false, Stream>(p, s, a.grad_dtype, size, partial);
  if (s.open) return run_block<V, T, true, true, Stream>(p, s, a.grad_dtype, size, partial);
  run_block<V, T, false, true, Stream>(p, s, a.grad_dtype, size, partial);
}

template <class V, class T>
void typed_block(const GuidedStepArgs& a, const SampleScales& s, std::int64_t offset, std::int64_t size, double* partial) {
  BlockPointers<T> p{at<T>(a.sample, offset), at<T>(a.eps_uncond, offset), at<T>(a.eps_cond, offset),
                     at<T>(a.eps_neighbour, offset), at<T>(a.noise, offset), nullptr, sizeof(T),
                     const_cast<T*>(at<T>(a.prev_sample, offset)), const_cast<T*>(at<T>(a.x0_hat, offset))};
  if (a.grad_dtype == DType::f32) p.grad_bytes = sizeof(float);
  if (a.similarity_grad != nullptr) p.similarity_grad = at<char>(a.similarity_grad, offset * p.grad_bytes);
  if constexpr (std::is_same_v<T, float>)
    if (a.stream) return run_kind<V, T, true>(a, p, s, size, partial);
  run_kind<V, T, false>(a, p, s, size, partial);
}

template <class V>
void any_block(const GuidedStepArgs& a, const SampleScales& s, std::int64_t sample_index, std::int64_t begin,
               std::int64_t end, double* partial) {
  const std::int64_t offset = sample_index * a.size + begin;
  switch (a.dtype) {
    case DType::f16: return typed_block<V, Half>(a, s, offset, end - begin, partial);
    case DType::bf16: return typed_block<V, BFloat>(a, s, offset, end - begin, partial);
    default: return typed_block<V, float>(a, s, offset, end - begin, partial);
  }
}

}  // namespace
