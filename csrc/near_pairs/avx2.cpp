// Lanes are left rows, packed by fours of elements: no horizontal sums, and the others are read once, as they lie.
#include "simd/avx2.h"
#include "simd/unroll.h"

#include "near_pairs/body.h"

namespace {

constexpr std::int64_t kWords = kHead / 4, kGroupBytes = kHead * kPairLanes;

inline __m256i load_bytes(const std::uint8_t* source) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
}

inline __m256i word(const std::int8_t* code, std::int64_t at) {
  std::int32_t four;
  std::memcpy(&four, code + 4 * at, sizeof four);
  return _mm256_set1_epi32(four);
}

// Bits of the lanes of a group that are within reach, from Σ (left + bias)·code.
inline unsigned lanes_within(const PairScan& s, const RowBound& bound, std::int64_t first, __m256i biased) {
  const __m256i dots = _mm256_sub_epi32(biased, _mm256_set1_epi32(bound.bias));
  const __m256 factor = _mm256_mul_ps(_mm256_loadu_ps(s.left_scales + first), _mm256_set1_ps(bound.factor));
  const __m256 score = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(dots), _mm256_set1_ps(bound.bound));
  return _mm256_movemask_ps(_mm256_cmp_ps(score, _mm256_loadu_ps(s.left_heads + first), _CMP_GE_OQ));
}

// R others against kPairGroups groups of left rows. Pairs of products reach 2·127·127, below the saturation of int16.
template <int R>
void tile(const PairScan& s, std::int64_t row, const RowBound* bounds, std::int64_t first, NearPairs& pairs) {
  constexpr int G = kPairGroups;
  __m256i dots[R][G];
  unroll<R>([&](auto r) AMG_INLINE { unroll<G>([&](auto g) AMG_INLINE { dots[r.value][g.value] = _mm256_setzero_si256(); }); });
  const std::uint8_t* packed = s.packed + first * kHead;
  const std::int8_t* codes = s.codes + row * kSketch;
  const __m256i ones = _mm256_set1_epi16(1);
  for (std::int64_t at = 0; at < kWords; ++at) {
    __m256i words[R];
    unroll<R>([&](auto r) AMG_INLINE { words[r.value] = word(codes + r.value * kSketch, at); });
    unroll<G>([&](auto g) AMG_INLINE {
      const __m256i left = load_bytes(packed + g.value * kGroupBytes + at * 4 * kPairLanes);
      unroll<R>([&](auto r) AMG_INLINE {
        const __m256i products = _mm256_madd_epi16(_mm256_maddubs_epi16(left, words[r.value]), ones);
        dots[r.value][g.value] = _mm256_add_epi32(dots[r.value][g.value], products);
      });
    });
  }
  unroll<R>([&](auto r) AMG_INLINE {
    unroll<G>([&](auto g) AMG_INLINE {
      const std::int64_t lane = first + g.value * kPairLanes;
      unsigned within = lanes_within(s, bounds[r.value], lane, dots[r.value][g.value]);
      for (; __builtin_expect(within != 0, false); within &= within - 1)
        consider<Avx2Vec>(s, lane + __builtin_ctz(within), row + r.value, pairs);
    });
  });
}

template <int R>
void rows_against_all(const PairScan& s, std::int64_t row, NearPairs& pairs) {
  RowBound bounds[R];
  for (int r = 0; r < R; ++r) bounds[r] = row_bound(s, row + r);
  for (std::int64_t first = 0; first < s.lanes; first += kPairGroups * kPairLanes) tile<R>(s, row, bounds, first, pairs);
}

void scan(const PairScan& s, std::int64_t begin, std::int64_t end, NearPairs& pairs) {
  std::int64_t row = begin;
  for (; row + 2 <= end; row += 2) rows_against_all<2>(s, row, pairs);
  for (; row < end; ++row) rows_against_all<1>(s, row, pairs);
}

}  // namespace

namespace amg::avx2 {

PairFunction pair_kernel() { return scan; }

}  // namespace amg::avx2
