// One element at a time; the form every CPU runs, and the one the vector levels are tested against.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dtype.h"

namespace {

inline float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t exponent = (half >> 10) & 0x1fu, mantissa = half & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    return sign != 0 ? -magnitude : magnitude;
  }
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Rounds to nearest, ties to even.
inline std::uint16_t float_to_half(float value) {
  const std::uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffffu;
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {                        // below 2^-14: the spacing is 2^-24
    const float scaled = bits_to_float(magnitude) * 16777216.0f;
    return sign | static_cast<std::uint16_t>(std::nearbyint(scaled));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | static_cast<std::uint16_t>((rounded - 0x38000000u) >> 13);
}

inline std::uint16_t float_to_bfloat(float value) {
  const std::uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

struct ScalarVec {
  using Reg = float;
  static constexpr int width = 1;
  static constexpr int row_tile = 1;  // rows whose sums fit the registers beside four queries
  static Reg zero() { return 0.0f; }
  static Reg set(float value) { return value; }
  static Reg load(const float* p) { return *p; }
  static Reg load(const amg::Half* p) { return half_to_float(p->bits); }
  static Reg load(const amg::BFloat* p) { return bits_to_float(static_cast<std::uint32_t>(p->bits) << 16); }
  static Reg load(const amg::Byte* p) { return p->value / 255.0f; }
  static void store(float* p, Reg v) { *p = v; }
  static void stream(float* p, Reg v) { *p = v; }
  static void fence() {}
  static void store(amg::Half* p, Reg v) { p->bits = float_to_half(v); }
  static void store(amg::BFloat* p, Reg v) { p->bits = float_to_bfloat(v); }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg clamp(Reg v, Reg low, Reg high) { return v < low ? low : v > high ? high : v; }  // a NaN stays one
  static Reg sqrt(Reg v) { return std::sqrt(v); }
  static Reg convert(const std::int32_t* p) { return static_cast<float>(*p); }
  static unsigned not_below(Reg a, Reg b) { return !(a < b); }
  static float reduce(Reg v) { return v; }
  static double sum(Reg v) { return v; }
};

}  // namespace
