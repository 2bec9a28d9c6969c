// Two layouts of the VNNI products: for few queries lanes hold dimensions, for many they hold queries, which
// needs no horizontal sums.
#include "simd/avx512.h"
#include "simd/unroll.h"

#include "top1_cosine/panels.h"

namespace {

inline __m512i load_codes(const std::int8_t* source, __mmask64 mask) { return _mm512_maskz_loadu_epi8(mask, source); }

// Codes are asked for this many bytes early, line after line: tiles jump from row to row, which hides the stream from
// the hardware prefetcher.
constexpr std::int64_t kAhead = 16384;

// Inlined always: GCC drops calls of a function that does nothing but this.
AMG_INLINE inline void prefetch(const std::int8_t* codes) {
  _mm_prefetch(reinterpret_cast<const char*>(codes), _MM_HINT_T0);
}

inline std::int32_t code_squares(const CosineScan& s, std::int64_t row) {
  __m512i sum = _mm512_setzero_si512(), squares = sum;
  const __m512i flip = _mm512_set1_epi8(-128), ones = _mm512_set1_epi8(1);
  for (std::int64_t i = 0; i < s.dimension; i += kBytes) {
    const __mmask64 mask = first_bytes(s.dimension - i);
    const __m512i code = load_codes(s.codes + row * s.dimension + i, mask);
    add_products(squares, _mm512_xor_si512(code, flip), code);
    add_products(sum, ones, code);
  }
  return _mm512_reduce_add_epi32(squares) - 128 * _mm512_reduce_add_epi32(sum);
}

// A row that passed the gate: only now is its norm worth computing.
[[gnu::noinline]] void offer_passed(const CosineScan& s, std::int64_t query, std::int64_t row, std::int32_t dot,
                                    const Screen& screen) {
  offer_code(s, row_bounds(s, row, code_squares(s, row)), query, row, dot, screen);
}

constexpr float kGate = 1 + 4e-6f;  // more than the roundings by which offer_code's bound may exceed the gate's

// Four rows' products with one query. The gate's bound takes query_reach, which needs no pass over the row.
inline void gate_rows(const CosineScan& s, std::int64_t row, std::int64_t query, __m128i biased, const Screen& screen) {
  const __m128i dots = _mm_sub_epi32(biased, _mm_set1_epi32(128 * s.query_sums[query]));
  const __m128 scale = _mm_loadu_ps(s.scales + row);
  const __m128 error = _mm_fmadd_ps(_mm_loadu_ps(s.errors + row), _mm_set1_ps(kGate), _mm_set1_ps(1e-30f));
  const __m128 score = _mm_mul_ps(_mm_cvtepi32_ps(dots), _mm_mul_ps(scale, _mm_set1_ps(s.query_scales[query])));
  const __m128 slack = _mm_fmadd_ps(scale, _mm_set1_ps(s.query_reach[query]), error);
  const __mmask8 passed = _mm_cmp_ps_mask(_mm_add_ps(score, slack), _mm_set1_ps(screen.floors[query]), _CMP_NLT_UQ);
  if (__builtin_expect(passed == 0, true)) return;
  alignas(16) std::int32_t values[4];
  _mm_store_si128(reinterpret_cast<__m128i*>(values), dots);
  for (int r = 0; r < 4; ++r)
    if ((passed >> r) & 1) offer_passed(s, query, row + r, values[r], screen);
}

// Four rows against Q queries, lanes along the dimension. The row is biased to unsigned by flipping its top bit.
template <int Q>
void code_tile(const CosineScan& s, std::int64_t row, std::int64_t first_query, const Screen& screen) {
  constexpr int R = 4;
  __m512i dots[Q][R];
  unroll<Q>([&](auto q) AMG_INLINE { unroll<R>([&](auto r) AMG_INLINE { dots[q.value][r.value] = _mm512_setzero_si512(); }); });
  const std::int8_t* codes = s.codes + row * s.dimension;
  const std::int8_t* queries = s.query_codes + first_query * s.padded;
  const __m512i flip = _mm512_set1_epi8(-128);
  for (std::int64_t i = 0; i < s.dimension; i += kBytes) {
    const __mmask64 mask = first_bytes(s.dimension - i);
    __m512i biased[R];
    unroll<R>([&](auto r) AMG_INLINE {
      prefetch(codes + kAhead + R * i + kBytes * r.value);
      biased[r.value] = _mm512_xor_si512(load_codes(codes + r.value * s.dimension + i, mask), flip);
    });
    unroll<Q>([&](auto q) AMG_INLINE {
      const __m512i query = _mm512_loadu_si512(queries + q.value * s.padded + i);
      unroll<R>([&](auto r) AMG_INLINE {
        add_products(dots[q.value][r.value], biased[r.value], query);
      });
    });
  }
  unroll<Q>([&](auto q) AMG_INLINE {
    const __m512i* of_query = dots[q.value];
    gate_rows(s, row, first_query + q.value, lane_sums(of_query[0], of_query[1], of_query[2], of_query[3]), screen);
  });
}

// A row left over from the tiles of four.
void code_row(const CosineScan& s, std::int64_t row, const Screen& screen) {
  const __m512i flip = _mm512_set1_epi8(-128);
  for (std::int64_t query = 0; query < s.queries; ++query) {
    __m512i dot = _mm512_setzero_si512();
    for (std::int64_t i = 0; i < s.dimension; i += kBytes) {
      const __mmask64 mask = first_bytes(s.dimension - i);
      const __m512i code = load_codes(s.codes + row * s.dimension + i, mask);
      const __m512i query_code = _mm512_loadu_si512(s.query_codes + query * s.padded + i);
      add_products(dot, _mm512_xor_si512(code, flip), query_code);
    }
    offer_passed(s, query, row, _mm512_reduce_add_epi32(dot) - 128 * s.query_sums[query], screen);
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
inline void gate_lanes(const CosineScan& s, float row_scale, float row_error, std::int32_t code_sum, std::int64_t row,
                       std::int64_t query, __m512i biased, const Screen& screen) {
  const __m512i dots = _mm512_sub_epi32(biased, _mm512_set1_epi32(128 * code_sum));
  const __m512 scale = _mm512_set1_ps(row_scale);
  const __m512 score = _mm512_mul_ps(_mm512_cvtepi32_ps(dots), _mm512_mul_ps(scale, _mm512_loadu_ps(s.query_scales + query)));
  const __m512 slack = _mm512_fmadd_ps(scale, _mm512_loadu_ps(s.query_reach + query), _mm512_set1_ps(row_error));
  const __m512 floors = _mm512_loadu_ps(screen.floors + query);
  const unsigned passed = _mm512_cmp_ps_mask(_mm512_add_ps(score, slack), floors, _CMP_NLT_UQ);
  if (__builtin_expect(passed == 0, true)) return;
  alignas(64) std::int32_t values[amg::kLanes];
  _mm512_store_si512(values, dots);
  for (int lane = 0; lane < amg::kLanes; ++lane)
    if ((passed >> lane) & 1) offer_passed(s, query + lane, row, values[lane], screen);
}

// The four codes from `i` on as one integer, zeros beyond the row's end.
inline std::int32_t four_codes(const std::int8_t* code, std::int64_t left) {
  std::int32_t word = 0;
  std::memcpy(&word, code, left >= 4 ? 4 : left);
  return word;
}

// R rows against G groups of sixteen queries, lanes across queries.
template <int R, int G>
void packed_tile(const CosineScan& s, const std::int32_t* sums, std::int64_t first_row, std::int64_t first_group,
                 const Screen& screen) {
  __m512i dots[R][G];
  unroll<R>([&](auto r) AMG_INLINE { unroll<G>([&](auto g) AMG_INLINE { dots[r.value][g.value] = _mm512_setzero_si512(); }); });
  const std::int64_t group_bytes = s.padded * amg::kLanes;
  const std::uint8_t* packed = s.packed + first_group * group_bytes;
  const std::int8_t* codes = s.codes + first_row * s.dimension;
  const auto step = [&](std::int64_t i, std::int64_t left) AMG_INLINE {
    __m512i queries[G];
    unroll<G>([&](auto g) AMG_INLINE {
      queries[g.value] = _mm512_loadu_si512(packed + g.value * group_bytes + i * amg::kLanes);
    });
    unroll<R>([&](auto r) AMG_INLINE {
      const __m512i word = _mm512_set1_epi32(four_codes(codes + r.value * s.dimension + i, left));
      unroll<G>([&](auto g) AMG_INLINE {
        add_products(dots[r.value][g.value], queries[g.value], word);
      });
    });
  };
  const std::int64_t whole = s.dimension / 4 * 4;
  for (std::int64_t i = 0; i < whole; i += 4) step(i, 4);
  if (whole < s.dimension) step(whole, s.dimension - whole);
  unroll<R>([&](auto r) AMG_INLINE {
    const std::int64_t row = first_row + r.value;
    const float scale = s.scales[row], error = s.errors[row] * kGate + 1e-30f;
    unroll<G>([&](auto g) AMG_INLINE {
      gate_lanes(s, scale, error, sums[r.value], row, (first_group + g.value) * amg::kLanes, dots[r.value][g.value], screen);
    });
  });
}

constexpr std::int64_t kChunk = 24;  // rows that stay in the nearest cache while every group of queries passes

// Σ codes of each row of a chunk, four rows at a time.
void chunk_sums(const CosineScan& s, std::int64_t begin, std::int64_t end, std::int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (std::int64_t row = begin; row < end; row += 4) {
    __m512i sum[4];
    unroll<4>([&](auto r) AMG_INLINE { sum[r.value] = _mm512_setzero_si512(); });
    const std::int64_t last = end - 1 - row;
    for (std::int64_t i = 0; i < s.dimension; i += kBytes) {
      const __mmask64 mask = first_bytes(s.dimension - i);
      unroll<4>([&](auto r) AMG_INLINE {
        const std::int64_t at = row + (r.value < last ? r.value : last);
        add_products(sum[r.value], ones, load_codes(s.codes + at * s.dimension + i, mask));
      });
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + (row - begin)), lane_sums(sum[0], sum[1], sum[2], sum[3]));
  }
}

template <int R, int G>
void packed_chunk(const CosineScan& s, const std::int32_t* sums, std::int64_t begin, std::int64_t end, std::int64_t group,
                  const Screen& screen) {
  std::int64_t row = begin;
  for (; row + R <= end; row += R) {
    if (group == 0)
      for (std::int64_t i = 0; i < R * s.dimension; i += kBytes) prefetch(s.codes + (row + kChunk) * s.dimension + i);
    packed_tile<R, G>(s, sums + (row - begin), row, group, screen);
  }
  for (; row < end; ++row) packed_tile<1, G>(s, sums + (row - begin), row, group, screen);
}

void scan_many(const CosineScan& s, std::int64_t begin, std::int64_t end, const Screen& screen) {
  const std::int64_t groups = (s.queries + amg::kLanes - 1) / amg::kLanes;
  std::int32_t sums[kChunk];
  for (std::int64_t start = begin; start < end; start += kChunk) {
    const std::int64_t stop = end - start < kChunk ? end : start + kChunk;
    chunk_sums(s, start, stop, sums);
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

// Sums are of codes made unsigned by 128: `bias` is 128 times the sum of the query's.
struct Avx512Lines {
  using Sum = __m512i;
  static constexpr int tile = 8, groups = 2;
  static Sum zero() { return _mm512_setzero_si512(); }
  static __m512i load(const std::int8_t* codes) { return _mm512_loadu_si512(codes); }
  static void square(Sum& sum, __m512i line) {
    const __m512i magnitude = _mm512_abs_epi8(line);
    add_products(sum, magnitude, magnitude);
  }
  static void add(Sum& sum, __m512i line, std::int32_t word) {
    add_products(sum, _mm512_xor_si512(line, _mm512_set1_epi8(-128)), _mm512_set1_epi32(word));
  }
  static void store(std::int32_t* out, Sum sum, std::int32_t bias) {
    _mm512_storeu_si512(out, _mm512_sub_epi32(sum, _mm512_set1_epi32(bias)));
  }
};

}  // namespace

namespace amg::avx512 {

CosineKernels cosine_kernels() { return with_panels<Avx512Vec, Avx512Lines>(make_kernels<Avx512Vec>(scan_codes)); }

}  // namespace amg::avx512
