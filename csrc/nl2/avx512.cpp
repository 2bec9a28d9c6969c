#include "simd/avx512.h"
#include "simd/unroll.h"

#include "nl2/body.h"

namespace {

inline __m512i load_bytes(const std::uint8_t* source, __mmask64 mask) { return _mm512_maskz_loadu_epi8(mask, source); }

struct ByteSums {
  std::int64_t sum, square;
};

constexpr std::int64_t kAhead = 4096;  // bytes by which rows are asked for early

// Σr and Σr² = Σr(r − 128) + 128·Σr, the factor r − 128 being r with its top bit flipped, read as signed.
inline ByteSums byte_sums(const DistanceScan& s, std::int64_t row) {
  const std::uint8_t* bytes = static_cast<const std::uint8_t*>(s.rows) + row * s.pixels;
  const __m512i flip = _mm512_set1_epi8(-128), ones = _mm512_set1_epi8(1);
  std::int64_t total = 0, products = 0;
  for_segments(s.pixels, [&](std::int64_t from, std::int64_t to) {
    __m512i sum = _mm512_setzero_si512(), product = sum;
    for (std::int64_t i = from; i < to; i += kBytes) {
      _mm_prefetch(reinterpret_cast<const char*>(bytes + i + kAhead), _MM_HINT_T0);
      const __m512i value = load_bytes(bytes + i, first_bytes(to - i));
      add_products(sum, value, ones);
      add_products(product, value, _mm512_xor_si512(value, flip));
    }
    total += _mm512_reduce_add_epi32(sum);
    products += _mm512_reduce_add_epi32(product);
  });
  return {total, products + 128 * total};
}

constexpr int kRows = 4;  // of a tile

// dots[query] += the products of one segment of four rows with Q queries, less 128. Its own function, so that the
// sums have all registers.
template <int Q>
[[gnu::noinline]] void add_segment(const std::uint8_t* const* rows, const std::int8_t* queries, std::int64_t padded,
                                   std::int64_t from, std::int64_t to, __m256i* dots) {
  __m512i sums[Q][kRows];
  unroll<Q>([&](auto q) AMG_INLINE {
    unroll<kRows>([&](auto r) AMG_INLINE { sums[q.value][r.value] = _mm512_setzero_si512(); });
  });
  for (std::int64_t i = from; i < to; i += kBytes) {
    const __mmask64 mask = first_bytes(to - i);
    __m512i row[kRows];
    unroll<kRows>([&](auto r) AMG_INLINE { row[r.value] = load_bytes(rows[r.value] + i, mask); });
    unroll<Q>([&](auto q) AMG_INLINE {
      const __m512i query = _mm512_loadu_si512(queries + q.value * padded + i);
      unroll<kRows>([&](auto r) AMG_INLINE { add_products(sums[q.value][r.value], row[r.value], query); });
    });
  }
  unroll<Q>([&](auto q) AMG_INLINE {
    const __m512i* of_query = sums[q.value];
    const __m128i four = lane_sums(of_query[0], of_query[1], of_query[2], of_query[3]);
    dots[q.value] = _mm256_add_epi64(dots[q.value], _mm256_cvtepi32_epi64(four));
  });
}

// Offers what the bound of offer_bytes, taken for four rows at once, lets through.
inline void gate_rows(const DistanceScan& s, std::int64_t query, std::int64_t row, std::int64_t count, __m256i dots,
                      const std::int64_t* squares, const Screen& screen) {
  const __m256i twice = _mm256_slli_epi64(dots, 1), row_squares = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(squares));
  const __m256i square = _mm256_sub_epi64(_mm256_add_epi64(_mm256_set1_epi64x(s.query_squares[query]), row_squares), twice);
  const __m128 distance = _mm_sqrt_ps(_mm_div_ps(_mm256_cvtepi64_ps(square), _mm_set1_ps(65025.0f * s.pixels)));
  const __m128 slack = _mm_fmadd_ps(_mm_set1_ps(amg::kDistanceSlack), distance, _mm_set1_ps(s.query_lost[query] + kUnderflow));
  const __mmask8 passed = _mm_cmp_ps_mask(_mm_sub_ps(slack, distance), _mm_set1_ps(screen.floors[query]), _CMP_NLT_UQ);
  if (__builtin_expect(passed == 0, true)) return;
  alignas(32) std::int64_t values[kRows];
  _mm256_store_si256(reinterpret_cast<__m256i*>(values), dots);
  for (int r = 0; r < count; ++r)
    if ((passed >> r) & 1) offer_bytes(s, query, row + r, values[r], squares[r], screen);
}

// Four rows, or the `count` that are left, against Q queries.
template <int Q>
void byte_tile(const DistanceScan& s, const ByteSums* sums, std::int64_t row, std::int64_t count, std::int64_t query,
               const Screen& screen) {
  const std::uint8_t* rows[kRows];
  std::int64_t squares[kRows];
  alignas(32) std::int64_t bias[kRows];
  for (int r = 0; r < kRows; ++r) {
    const std::int64_t at = r < count ? r : count - 1;
    rows[r] = static_cast<const std::uint8_t*>(s.rows) + (row + at) * s.pixels;
    squares[r] = sums[at].square;
    bias[r] = 128 * sums[at].sum;
  }
  __m256i dots[Q];
  for (int q = 0; q < Q; ++q) dots[q] = _mm256_load_si256(reinterpret_cast<const __m256i*>(bias));
  const std::int8_t* queries = s.query_signed + query * s.padded;
  for_segments(s.pixels, [&](std::int64_t from, std::int64_t to) { add_segment<Q>(rows, queries, s.padded, from, to, dots); });
  for (int q = 0; q < Q; ++q) gate_rows(s, query + q, row, count, dots[q], squares, screen);
}

constexpr std::int64_t kChunk = 32;  // rows that stay in the second cache while every group of queries passes

template <int Q>
void chunk_to_queries(const DistanceScan& s, const ByteSums* sums, std::int64_t begin, std::int64_t end,
                      std::int64_t query, const Screen& screen) {
  for (std::int64_t row = begin; row < end; row += kRows) {
    const std::int64_t count = end - row < kRows ? end - row : kRows;
    byte_tile<Q>(s, sums + (row - begin), row, count, query, screen);
  }
}

void scan_bytes(const DistanceScan& s, std::int64_t begin, std::int64_t end, const Screen& screen) {
  ByteSums sums[kChunk];
  for (std::int64_t start = begin; start < end; start += kChunk) {
    const std::int64_t stop = end - start < kChunk ? end : start + kChunk;
    for (std::int64_t row = start; row < stop; ++row) sums[row - start] = byte_sums(s, row);
    std::int64_t query = 0;
    for (; query + 6 <= s.queries; query += 6) chunk_to_queries<6>(s, sums, start, stop, query, screen);
    for (; query + 2 <= s.queries; query += 2) chunk_to_queries<2>(s, sums, start, stop, query, screen);
    for (; query < s.queries; ++query) chunk_to_queries<1>(s, sums, start, stop, query, screen);
  }
}

}  // namespace

namespace amg::avx512 {

DistanceKernels distance_kernels() { return make_kernels<Avx512Vec>(scan_bytes); }

}  // namespace amg::avx512
