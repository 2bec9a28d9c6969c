#include "simd/avx2.h"

#include "top1_cosine/panels.h"

namespace {

constexpr int kBytes = 32;

inline std::int32_t lane_sum(__m256i v) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

inline __m256i load_codes(const std::int8_t* source, std::int64_t left) {
  if (left >= kBytes) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  alignas(32) std::int8_t padded[kBytes] = {};
  std::memcpy(padded, source, left);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(padded));
}

// |row| as unsigned times query with row's sign: pairs reach 2·127², below the saturation of int16.
inline __m256i add_products(__m256i sum, __m256i magnitude, __m256i signs, __m256i query) {
  const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(query, signs));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

template <int R, int Q>
void code_tile(const CosineScan& s, std::int64_t first_row, std::int64_t first_query, const Screen& screen) {
  __m256i dots[Q][R], squares[R];
  for (int r = 0; r < R; ++r) squares[r] = _mm256_setzero_si256();
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < R; ++r) dots[q][r] = _mm256_setzero_si256();
  const std::int8_t* codes = s.codes + first_row * s.dimension;
  const std::int8_t* queries = s.query_codes + first_query * s.padded;
  for (std::int64_t i = 0; i < s.dimension; i += kBytes) {
    __m256i row[R], magnitude[R];
    for (int r = 0; r < R; ++r) {
      row[r] = load_codes(codes + r * s.dimension + i, s.dimension - i);
      magnitude[r] = _mm256_abs_epi8(row[r]);
      squares[r] = add_products(squares[r], magnitude[r], row[r], row[r]);
    }
    for (int q = 0; q < Q; ++q) {
      const __m256i query = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(queries + q * s.padded + i));
      for (int r = 0; r < R; ++r) dots[q][r] = add_products(dots[q][r], magnitude[r], row[r], query);
    }
  }
  for (int r = 0; r < R; ++r) {
    const RowBounds bounds = row_bounds(s, first_row + r, lane_sum(squares[r]));
    for (int q = 0; q < Q; ++q)
      offer_code(s, bounds, first_query + q, first_row + r, lane_sum(dots[q][r]), screen);
  }
}

template <int R>
void codes_against_all(const CosineScan& s, std::int64_t row, const Screen& screen) {
  std::int64_t query = 0;
  for (; query + 4 <= s.queries; query += 4) code_tile<R, 4>(s, row, query, screen);
  for (; query < s.queries; ++query) code_tile<R, 1>(s, row, query, screen);
}

void scan_codes(const CosineScan& s, std::int64_t begin, std::int64_t end, const Screen& screen) {
  std::int64_t row = begin;
  for (; row + 2 <= end; row += 2) codes_against_all<2>(s, row, screen);
  for (; row < end; ++row) codes_against_all<1>(s, row, screen);
}

struct Avx2Lines {
  struct Sum {
    __m256i low, high;  // rows 0 to 7, 8 to 15
  };
  static constexpr int tile = 4, groups = 1;
  static Sum zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Sum load(const std::int8_t* codes) {
    const __m256i* source = reinterpret_cast<const __m256i*>(codes);
    return {_mm256_loadu_si256(source), _mm256_loadu_si256(source + 1)};
  }
  static void square(Sum& sum, const Sum& line) {
    sum.low = add_products(sum.low, _mm256_abs_epi8(line.low), line.low, line.low);
    sum.high = add_products(sum.high, _mm256_abs_epi8(line.high), line.high, line.high);
  }
  static void add(Sum& sum, const Sum& line, std::int32_t word) {
    const __m256i query = _mm256_set1_epi32(word);
    sum.low = add_products(sum.low, _mm256_abs_epi8(line.low), line.low, query);
    sum.high = add_products(sum.high, _mm256_abs_epi8(line.high), line.high, query);
  }
  static void store(std::int32_t* out, const Sum& sum, std::int32_t) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), sum.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + 1, sum.high);
  }
};

}  // namespace

namespace amg::avx2 {

CosineKernels cosine_kernels() { return with_panels<Avx2Vec, Avx2Lines>(make_kernels<Avx2Vec>(scan_codes)); }

}  // namespace amg::avx2
