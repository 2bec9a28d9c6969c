// Loads and stores of the last few elements, padded with zeros to a full vector.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

template <class V, class T>
typename V::Reg load_some(const T* source, std::int64_t count) {
  if (count >= V::width) return V::load(source);
  T padded[V::width] = {};
  std::memcpy(padded, source, count * sizeof(T));
  return V::load(padded);
}

template <class V, class T>
void store_some(T* target, std::int64_t count, typename V::Reg value) {
  if (count >= V::width) return V::store(target, value);
  T padded[V::width];
  V::store(padded, value);
  std::memcpy(target, padded, count * sizeof(T));
}

}  // namespace
