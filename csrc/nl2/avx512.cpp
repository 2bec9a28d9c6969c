#include "simd/avx512.h"

#include "nl2/body.h"

namespace {

constexpr int kBytes = 64;

inline __m512i load_bytes(const std::uint8_t* source, std::int64_t left) {
  const __mmask64 mask = left >= kBytes ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
  return _mm512_maskz_loadu_epi8(mask, source);
}

inline std::int64_t lane_sum(__m512i v) {
  const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(v));
  const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1));
  return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
}

struct ByteSums {
  std::int64_t sum, square;
};

// Σr and Σr² = Σr(r − 128) + 128·Σr, the factor r − 128 being r with its top bit flipped, read as signed.
inline ByteSums byte_sums(const DistanceScan& s, std::int64_t row) {
  const std::uint8_t* bytes = static_cast<const std::uint8_t*>(s.rows) + row * s.pixels;
  const __m512i flip = _mm512_set1_epi8(-128), ones = _mm512_set1_epi8(1);
  std::int64_t total = 0, products = 0;
  for_segments(s.pixels, [&](std::int64_t from, std::int64_t to) {
    __m512i sum = _mm512_setzero_si512(), product = sum;
    for (std::int64_t i = from; i < to; i += kBytes) {
      const __m512i value = load_bytes(bytes + i, s.pixels - i);
      sum = _mm512_dpbusd_epi32(sum, value, ones);
      product = _mm512_dpbusd_epi32(product, value, _mm512_xor_si512(value, flip));
    }
    total += lane_sum(sum);
    products += lane_sum(product);
  });
  return {total, products + 128 * total};
}

template <int R, int Q>
void byte_tile(const DistanceScan& s, const ByteSums* sums, std::int64_t first_row, std::int64_t first_query,
               const Screen& screen) {
  std::int64_t dots[Q][R] = {};
  const std::uint8_t* rows = static_cast<const std::uint8_t*>(s.rows) + first_row * s.pixels;
  const std::int8_t* queries = s.query_signed + first_query * s.padded;
  for_segments(s.pixels, [&](std::int64_t from, std::int64_t to) {
    __m512i products[Q][R];
    for (int q = 0; q < Q; ++q)
      for (int r = 0; r < R; ++r) products[q][r] = _mm512_setzero_si512();
    for (std::int64_t i = from; i < to; i += kBytes) {
      __m512i row[R];
      for (int r = 0; r < R; ++r) row[r] = load_bytes(rows + r * s.pixels + i, s.pixels - i);
      for (int q = 0; q < Q; ++q) {
        const __m512i query = _mm512_loadu_si512(queries + q * s.padded + i);
        for (int r = 0; r < R; ++r) products[q][r] = _mm512_dpbusd_epi32(products[q][r], row[r], query);
      }
    }
    for (int q = 0; q < Q; ++q)
      for (int r = 0; r < R; ++r) dots[q][r] += lane_sum(products[q][r]);
  });
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < R; ++r)
      offer_bytes(s, first_query + q, first_row + r, dots[q][r] + 128 * sums[r].sum, sums[r].square, screen);
}

template <int R>
void bytes_to_all(const DistanceScan& s, std::int64_t row, const Screen& screen) {
  ByteSums sums[R];
  for (int r = 0; r < R; ++r) sums[r] = byte_sums(s, row + r);
  std::int64_t query = 0;
  for (; query + 6 <= s.queries; query += 6) byte_tile<R, 6>(s, sums, row, query, screen);
  for (; query + 2 <= s.queries; query += 2) byte_tile<R, 2>(s, sums, row, query, screen);
  for (; query < s.queries; ++query) byte_tile<R, 1>(s, sums, row, query, screen);
}

void scan_bytes(const DistanceScan& s, std::int64_t begin, std::int64_t end, const Screen& screen) {
  std::int64_t row = begin;
  for (; row + 4 <= end; row += 4) bytes_to_all<4>(s, row, screen);
  for (; row < end; ++row) bytes_to_all<1>(s, row, screen);
}

}  // namespace

namespace amg::avx512 {

DistanceKernels distance_kernels() { return make_kernels<Avx512Vec>(scan_bytes); }

}  // namespace amg::avx512
