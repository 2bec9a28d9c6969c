// Rows of any element type as floats, a few at a time, for the exact scores.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "simd/tail.h"

namespace {

constexpr int kExactLanes = 16;  // partial sums of an exact score, the same at every level

// Elements [begin, begin + kExactLanes) of a row as floats, zero beyond its end; bytes as r/255 in fp32, which is
// what an image loader makes of them, so that an image is at distance 0 from its own bytes.
template <class V>
void load_floats(const void* row, amg::DType dtype, std::int64_t begin, std::int64_t size, float* values) {
  const std::int64_t here = size - begin;
  if (dtype == amg::DType::u8) {
    const std::uint8_t* bytes = static_cast<const std::uint8_t*>(row) + begin;
    for (int i = 0; i < kExactLanes; ++i) values[i] = i < here ? bytes[i] / 255.0f : 0.0f;
    return;
  }
  for (int i = 0; i < kExactLanes; i += V::width) {
    const std::int64_t at = begin + i, left = size - at;
    typename V::Reg value = V::zero();
    if (left > 0 && dtype == amg::DType::f16) value = load_some<V>(static_cast<const amg::Half*>(row) + at, left);
    if (left > 0 && dtype == amg::DType::bf16) value = load_some<V>(static_cast<const amg::BFloat*>(row) + at, left);
    if (left > 0 && dtype == amg::DType::f32) value = load_some<V>(static_cast<const float*>(row) + at, left);
    V::store(values + i, value);
  }
}

}  // namespace
