#include "simd/avx2.h"

#include "nl2/body.h"

namespace {

constexpr int kBytes = 16;  // bytes widened to one vector of int16

inline __m256i load_bytes(const std::uint8_t* source, std::int64_t left) {
  if (left >= kBytes) return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  alignas(16) std::uint8_t padded[kBytes] = {};
  std::memcpy(padded, source, left);
  return _mm256_cvtepu8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(padded)));
}

// Lanes stay below 2^31 within a segment (2·255² a step); their sum needs 64 bits.
inline std::int64_t lane_sum(__m256i v) {
  alignas(32) std::int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
  std::int64_t total = 0;
  for (const std::int32_t lane : lanes) total += lane;
  return total;
}

// Q = 0 stands for the rows' own squares, written to dots[0].
template <int R, int Q>
void byte_dots(const DistanceScan& s, std::int64_t first_row, std::int64_t first_query, std::int64_t (*dots)[R]) {
  constexpr int columns = Q == 0 ? 1 : Q;
  const std::uint8_t* rows = static_cast<const std::uint8_t*>(s.rows) + first_row * s.pixels;
  const std::uint8_t* queries = s.query_bytes + first_query * s.padded;
  for_segments(s.pixels, [&](std::int64_t from, std::int64_t to) {
    __m256i sums[columns][R];
    for (int q = 0; q < columns; ++q)
      for (int r = 0; r < R; ++r) sums[q][r] = _mm256_setzero_si256();
    for (std::int64_t i = from; i < to; i += kBytes) {
      __m256i row[R];
      for (int r = 0; r < R; ++r) row[r] = load_bytes(rows + r * s.pixels + i, s.pixels - i);
      for (int q = 0; q < columns; ++q) {
        const __m256i query = Q == 0 ? row[0] : load_bytes(queries + q * s.padded + i, kBytes);
        for (int r = 0; r < R; ++r)
          sums[q][r] = _mm256_add_epi32(sums[q][r], _mm256_madd_epi16(row[r], Q == 0 ? row[r] : query));
      }
    }
    for (int q = 0; q < columns; ++q)
      for (int r = 0; r < R; ++r) dots[q][r] += lane_sum(sums[q][r]);
  });
}

template <int R, int Q>
void byte_tile(const DistanceScan& s, const std::int64_t* squares, std::int64_t row, std::int64_t query, const Screen& screen) {
  std::int64_t dots[Q][R] = {};
  byte_dots<R, Q>(s, row, query, dots);
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < R; ++r) offer_bytes(s, query + q, row + r, dots[q][r], squares[r], screen);
}

template <int R>
void bytes_to_all(const DistanceScan& s, std::int64_t row, const Screen& screen) {
  std::int64_t squares[1][R] = {};
  byte_dots<R, 0>(s, row, 0, squares);
  std::int64_t query = 0;
  for (; query + 4 <= s.queries; query += 4) byte_tile<R, 4>(s, squares[0], row, query, screen);
  for (; query < s.queries; ++query) byte_tile<R, 1>(s, squares[0], row, query, screen);
}

void scan_bytes(const DistanceScan& s, std::int64_t begin, std::int64_t end, const Screen& screen) {
  std::int64_t row = begin;
  for (; row + 2 <= end; row += 2) bytes_to_all<2>(s, row, screen);
  for (; row < end; ++row) bytes_to_all<1>(s, row, screen);
}

}  // namespace

namespace amg::avx2 {

DistanceKernels distance_kernels() { return make_kernels<Avx2Vec>(scan_bytes); }

}  // namespace amg::avx2
