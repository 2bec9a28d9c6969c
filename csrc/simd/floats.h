// Rows of any element type as floats, a few at a time, for the exact scores.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "simd/tail.h"

namespace {

constexpr int kExactLanes = 16;  // partial sums of an exact score, the same at every level

template <class V, class T>
inline void load_typed_floats(const void* row, std::int64_t begin, std::int64_t size, float* values) {
  for (int i = 0; i < kExactLanes; i += V::width) {
    const std::int64_t at = begin + i, left = size - at;
    V::store(values + i, left > 0 ? load_some<V>(static_cast<const T*>(row) + at, left) : V::zero());
  }
}

// Elements [begin, begin + kExactLanes) of a row as floats, zero beyond its end.
template <class V>
inline void load_floats(const void* row, amg::DType dtype, std::int64_t begin, std::int64_t size, float* values) {
  switch (dtype) {
    case amg::DType::u8: return load_typed_floats<V, amg::Byte>(row, begin, size, values);
    case amg::DType::f16: return load_typed_floats<V, amg::Half>(row, begin, size, values);
    case amg::DType::bf16: return load_typed_floats<V, amg::BFloat>(row, begin, size, values);
    default: return load_typed_floats<V, float>(row, begin, size, values);
  }
}

}  // namespace
