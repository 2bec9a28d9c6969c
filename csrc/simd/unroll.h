// Loops over register tiles, unrolled where the compiler may not: an array indexed by a loop variable that
// survives to the optimiser lives in memory, one indexed by constants in registers.
#pragma once

#include <utility>

#define AMG_INLINE __attribute__((always_inline))

namespace {

template <int Value>
struct Index {
  static constexpr int value = Value;
};

template <class Body, int... Values>
AMG_INLINE inline void unroll(Body&& body, std::integer_sequence<int, Values...>) {
  (body(Index<Values>{}), ...);
}

// body(Index<0>{}), …, body(Index<Count - 1>{}); body must be always_inline.
template <int Count, class Body>
AMG_INLINE inline void unroll(Body&& body) {
  unroll(body, std::make_integer_sequence<int, Count>{});
}

}  // namespace
