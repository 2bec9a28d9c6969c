// Two layouts of the VNNI products: for few queries lanes hold dimensions, for many they hold queries, which
// needs no horizontal sums.
#include "simd/avx512.h"

#include "top1_cosine/body.h"

namespace {

constexpr int kBytes = 64;

inline __m512i load_codes(const std::int8_t* source, std::int64_t left) {
  const __mmask64 mask = left >= kBytes ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
  return _mm512_maskz_loadu_epi8(mask, source);
}

// The four lane sums of a, b, c, d.
inline __m128i lane_sums(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Bounds of four rows, one a lane.
struct RowBounds4 {
  __m128 scale, error, norm;
};

// squares hold Σ(c + 128)c and sums Σc: ‖code‖² = squares − 128·sums.
inline RowBounds4 row_bounds4(const CosineScan& s, std::int64_t row, __m128i squares, __m128i sums) {
  const __m128i code_squares = _mm_sub_epi32(squares, _mm_slli_epi32(sums, 7));
  const __m128 scale = _mm_loadu_ps(s.scales + row);
  const __m128 norm = _mm_mul_ps(_mm_mul_ps(scale, _mm_sqrt_ps(_mm_cvtepi32_ps(code_squares))), _mm_set1_ps(1 + 1e-6f));
  const __m128 error = _mm_fmadd_ps(_mm_loadu_ps(s.errors + row), _mm_set1_ps(1 + 1e-6f), _mm_set1_ps(1e-30f));
  return {scale, error, norm};
}

inline void offer_rows(const CosineScan& s, const RowBounds4& b, std::int64_t row, std::int64_t query, __m128i biased,
                       const Screen& screen) {
  const __m128i dots = _mm_sub_epi32(biased, _mm_set1_epi32(128 * s.query_sums[query]));
  const __m128 score = _mm_mul_ps(_mm_cvtepi32_ps(dots), _mm_mul_ps(b.scale, _mm_set1_ps(s.query_scales[query])));
  const __m128 slack = _mm_fmadd_ps(b.norm, _mm_set1_ps(s.query_errors[query]), b.error);
  __mmask8 possible = _mm_cmp_ps_mask(_mm_add_ps(score, slack), _mm_set1_ps(screen.floors[query]), _CMP_NLT_UQ);
  if (possible == 0) return;
  alignas(16) float scores[4], slacks[4];
  _mm_store_ps(scores, score);
  _mm_store_ps(slacks, slack);
  for (int r = 0; r < 4; ++r)
    if ((possible >> r) & 1) screen_score(screen, query, row + r, scores[r], slacks[r]);
}

// Four rows against Q queries, lanes along the dimension. The row is biased to unsigned by flipping its top bit.
template <int Q>
void code_tile(const CosineScan& s, std::int64_t row, std::int64_t first_query, const Screen& screen) {
  constexpr int R = 4;
  __m512i dots[Q][R], squares[R], sums[R];
  for (int r = 0; r < R; ++r) squares[r] = sums[r] = _mm512_setzero_si512();
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < R; ++r) dots[q][r] = _mm512_setzero_si512();
  const std::int8_t* codes = s.codes + row * s.dimension;
  const std::int8_t* queries = s.query_codes + first_query * s.padded;
  const __m512i flip = _mm512_set1_epi8(-128), ones = _mm512_set1_epi8(1);
  for (std::int64_t i = 0; i < s.dimension; i += kBytes) {
    __m512i biased[R];
    for (int r = 0; r < R; ++r) {
      const __m512i code = load_codes(codes + r * s.dimension + i, s.dimension - i);
      biased[r] = _mm512_xor_si512(code, flip);
      squares[r] = _mm512_dpbusd_epi32(squares[r], biased[r], code);
      sums[r] = _mm512_dpbusd_epi32(sums[r], ones, code);
    }
    for (int q = 0; q < Q; ++q) {
      const __m512i query = _mm512_loadu_si512(queries + q * s.padded + i);
      for (int r = 0; r < R; ++r) dots[q][r] = _mm512_dpbusd_epi32(dots[q][r], biased[r], query);
    }
  }
  const RowBounds4 bounds = row_bounds4(s, row, lane_sums(squares[0], squares[1], squares[2], squares[3]),
                                        lane_sums(sums[0], sums[1], sums[2], sums[3]));
  for (int q = 0; q < Q; ++q)
    offer_rows(s, bounds, row, first_query + q, lane_sums(dots[q][0], dots[q][1], dots[q][2], dots[q][3]), screen);
}

struct CodeSums {
  std::int32_t sum, squares;
};

inline CodeSums code_sums(const CosineScan& s, std::int64_t row) {
  __m512i sum = _mm512_setzero_si512(), squares = sum;
  const __m512i flip = _mm512_set1_epi8(-128), ones = _mm512_set1_epi8(1);
  for (std::int64_t i = 0; i < s.dimension; i += kBytes) {
    const __m512i code = load_codes(s.codes + row * s.dimension + i, s.dimension - i);
    squares = _mm512_dpbusd_epi32(squares, _mm512_xor_si512(code, flip), code);
    sum = _mm512_dpbusd_epi32(sum, ones, code);
  }
  const std::int32_t total = _mm512_reduce_add_epi32(sum);
  return {total, _mm512_reduce_add_epi32(squares) - 128 * total};
}

// A row left over from the tiles of four.
void code_row(const CosineScan& s, std::int64_t row, const Screen& screen) {
  const RowBounds bounds = row_bounds(s, row, code_sums(s, row).squares);
  const __m512i flip = _mm512_set1_epi8(-128);
  for (std::int64_t query = 0; query < s.queries; ++query) {
    __m512i dot = _mm512_setzero_si512();
    for (std::int64_t i = 0; i < s.dimension; i += kBytes) {
      const __m512i code = load_codes(s.codes + row * s.dimension + i, s.dimension - i);
      const __m512i query_code = _mm512_loadu_si512(s.query_codes + query * s.padded + i);
      dot = _mm512_dpbusd_epi32(dot, _mm512_xor_si512(code, flip), query_code);
    }
    offer_code(s, bounds, query, row, _mm512_reduce_add_epi32(dot) - 128 * s.query_sums[query], screen);
  }
}

void scan_few(const CosineScan& s, std::int64_t begin, std::int64_t end, const Screen& screen) {
  std::int64_t row = begin;
  for (; row + 4 <= end; row += 4) {
    std::int64_t query = 0;
    for (; query + 4 <= s.queries; query += 4) code_tile<4>(s, row, query, screen);
    for (; query + 2 <= s.queries; query += 2) code_tile<2>(s, row, query, screen);
    for (; query < s.queries; ++query) code_tile<1>(s, row, query, screen);
  }
  for (; row < end; ++row) code_row(s, row, screen);
}

// Sixteen queries' products with one row, from the packed layout's Σ(query + 128)·code.
inline void offer_lanes(const CosineScan& s, const RowBounds& b, std::int32_t code_sum, std::int64_t row,
                        std::int64_t query, __m512i biased, const Screen& screen) {
  const __m512i dots = _mm512_sub_epi32(biased, _mm512_set1_epi32(128 * code_sum));
  const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(b.scale), _mm512_loadu_ps(s.query_scales + query));
  const __m512 score = _mm512_mul_ps(_mm512_cvtepi32_ps(dots), scale);
  const __m512 slack = _mm512_fmadd_ps(_mm512_set1_ps(b.norm), _mm512_loadu_ps(s.query_errors + query), _mm512_set1_ps(b.error));
  unsigned possible = _mm512_cmp_ps_mask(_mm512_add_ps(score, slack), _mm512_loadu_ps(screen.floors + query), _CMP_NLT_UQ);
  if (possible == 0) return;
  alignas(64) float scores[amg::kLanes], slacks[amg::kLanes];
  _mm512_store_ps(scores, score);
  _mm512_store_ps(slacks, slack);
  for (int lane = 0; lane < amg::kLanes; ++lane)
    if ((possible >> lane) & 1) screen_score(screen, query + lane, row, scores[lane], slacks[lane]);
}

// The four codes from `i` on as one integer, zeros beyond the row's end.
inline std::int32_t four_codes(const std::int8_t* code, std::int64_t left) {
  std::int32_t word = 0;
  std::memcpy(&word, code, left >= 4 ? 4 : left);
  return word;
}

// R rows against G groups of sixteen queries, lanes across queries.
template <int R, int G>
void packed_tile(const CosineScan& s, const CodeSums* sums, std::int64_t first_row, std::int64_t first_group,
                 const Screen& screen) {
  __m512i dots[R][G];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) dots[r][g] = _mm512_setzero_si512();
  const std::int64_t group_bytes = s.padded * amg::kLanes;
  const std::uint8_t* packed = s.packed + first_group * group_bytes;
  const std::int8_t* codes = s.codes + first_row * s.dimension;
  const auto step = [&](std::int64_t i, std::int64_t left) __attribute__((always_inline)) {
    __m512i queries[G];
    for (int g = 0; g < G; ++g) queries[g] = _mm512_loadu_si512(packed + g * group_bytes + i * amg::kLanes);
    for (int r = 0; r < R; ++r) {
      const __m512i word = _mm512_set1_epi32(four_codes(codes + r * s.dimension + i, left));
      for (int g = 0; g < G; ++g) dots[r][g] = _mm512_dpbusd_epi32(dots[r][g], queries[g], word);
    }
  };
  const std::int64_t whole = s.dimension / 4 * 4;
  for (std::int64_t i = 0; i < whole; i += 4) step(i, 4);
  if (whole < s.dimension) step(whole, s.dimension - whole);
  for (int r = 0; r < R; ++r) {
    const RowBounds bounds = row_bounds(s, first_row + r, sums[r].squares);
    for (int g = 0; g < G; ++g)
      offer_lanes(s, bounds, sums[r].sum, first_row + r, (first_group + g) * amg::kLanes, dots[r][g], screen);
  }
}

constexpr std::int64_t kChunk = 48;  // rows that stay in the nearest cache while every group of queries passes

template <int R, int G>
void packed_chunk(const CosineScan& s, const CodeSums* sums, std::int64_t begin, std::int64_t end, std::int64_t group,
                  const Screen& screen) {
  std::int64_t row = begin;
  for (; row + R <= end; row += R) packed_tile<R, G>(s, sums + (row - begin), row, group, screen);
  for (; row < end; ++row) packed_tile<1, G>(s, sums + (row - begin), row, group, screen);
}

void scan_many(const CosineScan& s, std::int64_t begin, std::int64_t end, const Screen& screen) {
  const std::int64_t groups = (s.queries + amg::kLanes - 1) / amg::kLanes;
  CodeSums sums[kChunk];
  for (std::int64_t start = begin; start < end; start += kChunk) {
    const std::int64_t stop = end - start < kChunk ? end : start + kChunk;
    for (std::int64_t row = start; row < stop; ++row) sums[row - start] = code_sums(s, row);
    std::int64_t group = 0;
    for (; group + 4 <= groups; group += 4) packed_chunk<6, 4>(s, sums, start, stop, group, screen);
    if (groups - group == 3) packed_chunk<8, 3>(s, sums, start, stop, group, screen);
    if (groups - group == 2) packed_chunk<8, 2>(s, sums, start, stop, group, screen);
    if (groups - group == 1) packed_chunk<12, 1>(s, sums, start, stop, group, screen);
  }
}

void scan_codes(const CosineScan& s, std::int64_t begin, std::int64_t end, const Screen& screen) {
  if (s.queries < amg::kPackedFrom) return scan_few(s, begin, end, screen);
  scan_many(s, begin, end, screen);
}

}  // namespace

namespace amg::avx512 {

CosineKernels cosine_kernels() { return make_kernels<Avx512Vec>(scan_codes); }

}  // namespace amg::avx512
