// The second and third look at a pair, written once over a vector type: whole sketches, then the rows themselves.
// No standard containers or algorithms here: their instantiations would be shared between levels.
#pragma once

#include <cmath>
#include <cstdint>

#include "near_pairs/near_pairs.h"
#include "simd/floats.h"
#include "simd/tail.h"

namespace {

using amg::BFloat;
using amg::Byte;
using amg::DType;
using amg::Half;
using amg::kHead;
using amg::kPairBias;
using amg::kPairGroups;
using amg::kPairLanes;
using amg::kSketch;
using amg::NearPairs;
using amg::PairScan;

constexpr float kPairRounding = 1e-5f;  // relative: more than the fp32 roundings of the bounds below
constexpr std::int64_t kBlock = 256;    // elements between two looks at whether a pair is already too far apart

// A left row with head products d is within reach of this row only if left_scale·factor·(d − bias) + bound ≥ its head².
struct RowBound {
  float factor, bound;
  std::int32_t bias;
};

// ‖â − b̂‖ ≤ ‖a − b‖ + both rounding errors; of the heads as of whole sketches.
inline float sketch_limit(const PairScan& s, std::int64_t row) {
  const double limit = s.reach + s.left_error + s.errors[row];
  return static_cast<float>(limit * limit * (1 + 1e-6));
}

inline RowBound row_bound(const PairScan& s, std::int64_t row) {
  const std::int8_t* code = s.codes + row * kSketch;
  std::int32_t sum = 0, squares = 0;
  for (std::int64_t i = 0; i < kHead; ++i) sum += code[i], squares += code[i] * code[i];
  const float scale = s.scales[row], head = scale * scale * static_cast<float>(squares);
  const float slack = kPairRounding * (head + s.largest_head);
  return {2 * scale, sketch_limit(s, row) - head + slack, kPairBias * sum};
}

inline bool sketches_within(const PairScan& s, std::int64_t left, std::int64_t right) {
  const std::int8_t *a = s.left_codes + left * kSketch, *b = s.codes + right * kSketch;
  std::int32_t dot = 0, squares = 0;
  for (std::int64_t i = 0; i < kSketch; ++i) dot += a[i] * b[i], squares += b[i] * b[i];
  const float scale = s.scales[right], square = scale * scale * static_cast<float>(squares) + s.left_squares[left];
  return square - 2 * s.left_scales[left] * scale * static_cast<float>(dot) <= sketch_limit(s, right) + kPairRounding * square;
}

template <class V, class T>
bool rows_within(const T* a, const T* b, std::int64_t dimension, float limit) {
  float total = 0;
  for (std::int64_t begin = 0; begin < dimension; begin += kBlock) {
    const std::int64_t end = begin + kBlock < dimension ? begin + kBlock : dimension;
    typename V::Reg squares = V::zero();
    for (std::int64_t i = begin; i < end; i += V::width) {
      const auto difference = V::sub(load_some<V>(a + i, dimension - i), load_some<V>(b + i, dimension - i));
      squares = V::fma(difference, difference, squares);
    }
    total += V::reduce(squares);
    if (total > limit) return false;
  }
  return true;
}

template <class V>
float dot_closeness(const void* a, const void* b, DType dtype, std::int64_t dimension) {
  double sums[kExactLanes] = {}, total = 0;
  float left[kExactLanes], right[kExactLanes];
  for (std::int64_t i = 0; i < dimension; i += kExactLanes) {
    load_floats<V>(a, dtype, i, dimension, left);
    load_floats<V>(b, dtype, i, dimension, right);
    for (int lane = 0; lane < kExactLanes; ++lane) sums[lane] += static_cast<double>(left[lane]) * static_cast<double>(right[lane]);
  }
  for (const double sum : sums) total += sum;
  return static_cast<float>(total);
}

// −√mean((a − b)²) of bytes on [0, 1], or −infinity as soon as the sum of squares exceeds `limit`.
inline float byte_closeness(const std::uint8_t* a, const std::uint8_t* b, std::int64_t dimension, double limit) {
  std::int64_t total = 0;
  for (std::int64_t begin = 0; begin < dimension; begin += kBlock) {
    const std::int64_t end = begin + kBlock < dimension ? begin + kBlock : dimension;
    std::int32_t squares = 0;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int32_t difference = static_cast<std::int32_t>(a[i]) - b[i];
      squares += difference * difference;
    }
    total += squares;
    if (static_cast<double>(total) > limit) return -INFINITY;
  }
  return static_cast<float>(-std::sqrt(static_cast<double>(total) / (65025.0 * static_cast<double>(dimension))));
}

template <class V, class T>
float float_closeness(const PairScan& s, std::int64_t left, std::int64_t right) {
  const T* a = static_cast<const T*>(s.rows) + left * s.dimension;
  const T* b = static_cast<const T*>(s.others) + right * s.dimension;
  const float limit = static_cast<float>(s.reach * s.reach) * (1 + static_cast<float>(s.dimension + 8) * 6e-8f);
  return rows_within<V>(a, b, s.dimension, limit) ? dot_closeness<V>(a, b, s.dtype, s.dimension) : -INFINITY;
}

template <class V>
float closeness(const PairScan& s, std::int64_t left, std::int64_t right) {
  switch (s.dtype) {
    case DType::f16: return float_closeness<V, Half>(s, left, right);
    case DType::bf16: return float_closeness<V, BFloat>(s, left, right);
    case DType::f32: return float_closeness<V, float>(s, left, right);
    default: break;
  }
  const auto* a = static_cast<const std::uint8_t*>(s.rows) + left * s.dimension;
  const auto* b = static_cast<const std::uint8_t*>(s.others) + right * s.dimension;
  return byte_closeness(a, b, s.dimension, 65025.0 * s.reach * s.reach);
}

// A pair whose heads are within reach.
template <class V>
[[gnu::noinline]] void consider(const PairScan& s, std::int64_t left, std::int64_t right, NearPairs& pairs) {
  if (left >= s.lefts || (s.earlier && right >= left) || !sketches_within(s, left, right)) return;
  const float close = closeness<V>(s, left, right);
  if (close >= s.least) amg::found(pairs, left, right, close);
}

}  // namespace
