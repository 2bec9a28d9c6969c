#include "simd/avx512.h"
#include "simd/unroll.h"

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

// step(i, left) for every vector of [from, to); `left` is a constant but for the last.
template <class Step>
AMG_INLINE inline void for_vectors(std::int64_t from, std::int64_t to, Step step) {
  std::int64_t i = from;
  for (; i + kBytes <= to; i += kBytes) step(i, std::int64_t{kBytes});
  if (i < to) step(i, to - i);
}

constexpr std::int64_t kAhead = 4096;  // bytes by which rows are asked for early

// Σr and Σr² = Σr(r − 128) + 128·Σr, the factor r − 128 being r with its top bit flipped, read as signed.
inline ByteSums byte_sums(const DistanceScan& s, std::int64_t row) {
  const std::uint8_t* bytes = static_cast<const std::uint8_t*>(s.rows) + row * s.pixels;
  const __m512i flip = _mm512_set1_epi8(-128), ones = _mm512_set1_epi8(1);
  std::int64_t total = 0, products = 0;
  for_segments(s.pixels, [&](std::int64_t from, std::int64_t to) AMG_INLINE {
    __m512i sum = _mm512_setzero_si512(), product = sum;
    for_vectors(from, to, [&](std::int64_t i, std::int64_t left) AMG_INLINE {
      _mm_prefetch(reinterpret_cast<const char*>(bytes + i + kAhead), _MM_HINT_T0);
      const __m512i value = load_bytes(bytes + i, left);
      sum = _mm512_dpbusd_epi32(sum, value, ones);
      product = _mm512_dpbusd_epi32(product, value, _mm512_xor_si512(value, flip));
    });
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
    unroll<Q>([&](auto q) AMG_INLINE {
      unroll<R>([&](auto r) AMG_INLINE { products[q.value][r.value] = _mm512_setzero_si512(); });
    });
    for_vectors(from, to, [&](std::int64_t i, std::int64_t left) AMG_INLINE {
      __m512i row[R];
      unroll<R>([&](auto r) AMG_INLINE { row[r.value] = load_bytes(rows + r.value * s.pixels + i, left); });
      unroll<Q>([&](auto q) AMG_INLINE {
        const __m512i query = _mm512_loadu_si512(queries + q.value * s.padded + i);
        unroll<R>([&](auto r) AMG_INLINE {
          products[q.value][r.value] = _mm512_dpbusd_epi32(products[q.value][r.value], row[r.value], query);
        });
      });
    });
    unroll<Q>([&](auto q) AMG_INLINE {
      unroll<R>([&](auto r) AMG_INLINE { dots[q.value][r.value] += lane_sum(products[q.value][r.value]); });
    });
  });
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < R; ++r)
      offer_bytes(s, first_query + q, first_row + r, dots[q][r] + 128 * sums[r].sum, sums[r].square, screen);
}

constexpr std::int64_t kChunk = 32;  // rows that stay in the second cache while every group of queries passes

template <int Q>
void chunk_to_queries(const DistanceScan& s, const ByteSums* sums, std::int64_t begin, std::int64_t end,
                      std::int64_t query, const Screen& screen) {
  std::int64_t row = begin;
  for (; row + 4 <= end; row += 4) byte_tile<4, Q>(s, sums + (row - begin), row, query, screen);
  for (; row < end; ++row) byte_tile<1, Q>(s, sums + (row - begin), row, query, screen);
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
