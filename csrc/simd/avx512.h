// Sixteen fp32 lanes (AVX-512 F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "dtype.h"

namespace {

struct Avx512Vec {
  using Reg = __m512;
  static constexpr int width = 16;
  static constexpr int row_tile = 4;  // rows whose sums fit the registers beside four queries
  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set(float value) { return _mm512_set1_ps(value); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load(const amg::Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Reg load(const amg::BFloat* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static Reg load(const amg::Byte* p) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_div_ps(_mm512_cvtepi32_ps(wide), _mm512_set1_ps(255.0f));
  }
  static void store(float* p, Reg v) { _mm512_storeu_ps(p, v); }
  static void stream(float* p, Reg v) { _mm512_stream_ps(p, v); }  // past the caches; p a multiple of 64 bytes
  static void fence() { _mm_sfence(); }                            // after streams, before others may read
  static void store(amg::Half* p, Reg v) {
    const __m256i halves = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
  }
  static void store(amg::BFloat* p, Reg v) {
    const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __m512i nan = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const __m512i chosen = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(chosen));
  }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg sqrt(Reg v) { return _mm512_sqrt_ps(v); }
  static Reg convert(const std::int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
  // A bit for each lane that is not below: NaN is not.
  static unsigned not_below(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
  // A NaN stays one: the second operand is what these return for it.
  static Reg clamp(Reg v, Reg low, Reg high) { return _mm512_min_ps(high, _mm512_max_ps(low, v)); }
  static float reduce(Reg v) { return _mm512_reduce_add_ps(v); }
  static double sum(Reg v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  }
};

// sum += the four products of each lane's unsigned and signed bytes. By name and not by the intrinsic, around which
// GCC 12 copies or spills every sum once an iteration.
inline void add_products(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

constexpr int kBytes = 64;  // of a vector

// The bytes of a vector that are there when `left` are.
inline __mmask64 first_bytes(std::int64_t left) {
  return left >= kBytes ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
}

// The four lane sums of a, b, c, d.
inline __m128i lane_sums(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

}  // namespace
