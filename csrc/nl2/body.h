// Screening of floating rows and exact distances, written once over a vector type; the byte kernels' common end.
// No standard containers or algorithms here: their instantiations would be shared between levels.
#pragma once

#include <cmath>
#include <cstdint>

#include "nl2/nl2.h"
#include "search/offer.h"
#include "simd/floats.h"
#include "simd/tail.h"

namespace {

using amg::BFloat;
using amg::DistanceKernels;
using amg::DistanceScan;
using amg::DType;
using amg::Half;
using amg::Screen;

constexpr float kUnit = 5.9604645e-8f;    // 2^-24, the relative error of one fp32 rounding
constexpr float kUnderflow = 2.2e-19f;    // √ of twice fp32's smallest normal: what a distance loses where squares underflow

inline void offer_distance(const DistanceScan& s, std::int64_t query, std::int64_t row, float mean_square,
                           float relative, const Screen& screen) {
  const float distance = std::sqrt(mean_square);
  screen_score(screen, query, row, -distance, s.query_lost[query] + relative * distance + kUnderflow);
}

// Direct differences of R rows and Q queries; their fp32 sum loses at most pixels·2^-24 of itself.
template <class V, class T, int R, int Q>
void distance_tile(const DistanceScan& s, std::int64_t first_row, std::int64_t first_query, const Screen& screen) {
  typename V::Reg squares[Q][R];
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < R; ++r) squares[q][r] = V::zero();
  const T* rows = static_cast<const T*>(s.rows) + first_row * s.pixels;
  const float* queries = s.query_pixels + first_query * s.padded;
  for (std::int64_t i = 0; i < s.pixels; i += V::width) {
    typename V::Reg row[R];
    for (int r = 0; r < R; ++r) row[r] = load_some<V>(rows + r * s.pixels + i, s.pixels - i);
    for (int q = 0; q < Q; ++q) {
      const auto query = V::load(queries + q * s.padded + i);
      for (int r = 0; r < R; ++r) {
        const auto difference = V::sub(query, row[r]);
        squares[q][r] = V::fma(difference, difference, squares[q][r]);
      }
    }
  }
  const float relative = (s.pixels + 8) * kUnit + amg::kDistanceSlack;
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < R; ++r)
      offer_distance(s, first_query + q, first_row + r, V::reduce(squares[q][r]) / s.pixels, relative, screen);
}

template <class V, class T, int R>
void distances_to_all(const DistanceScan& s, std::int64_t row, const Screen& screen) {
  std::int64_t query = 0;
  for (; query + 4 <= s.queries; query += 4) distance_tile<V, T, R, 4>(s, row, query, screen);
  for (; query < s.queries; ++query) distance_tile<V, T, R, 1>(s, row, query, screen);
}

template <class V, class T>
void scan_typed_floats(const DistanceScan& s, std::int64_t begin, std::int64_t end, const Screen& screen) {
  std::int64_t row = begin;
  for (; row + V::row_tile <= end; row += V::row_tile) distances_to_all<V, T, V::row_tile>(s, row, screen);
  for (; row < end; ++row) distances_to_all<V, T, 1>(s, row, screen);
}

template <class V>
void scan_floats(const DistanceScan& s, std::int64_t begin, std::int64_t end, const Screen& screen) {
  switch (s.dtype) {
    case DType::f16: return scan_typed_floats<V, Half>(s, begin, end, screen);
    case DType::bf16: return scan_typed_floats<V, BFloat>(s, begin, end, screen);
    default: return scan_typed_floats<V, float>(s, begin, end, screen);
  }
}

template <class V>
double exact_distance(const double* query, const void* row, DType dtype, std::int64_t pixels) {
  double sums[kExactLanes] = {};
  float values[kExactLanes];
  std::int64_t i = 0;
  for (; i + kExactLanes <= pixels; i += kExactLanes) {
    load_floats<V>(row, dtype, i, pixels, values);
    for (int lane = 0; lane < kExactLanes; ++lane) {
      const double difference = values[lane] - query[i + lane];
      sums[lane] += difference * difference;
    }
  }
  if (i < pixels) load_floats<V>(row, dtype, i, pixels, values);
  for (int lane = 0; i + lane < pixels; ++lane) {
    const double difference = values[lane] - query[i + lane];
    sums[lane] += difference * difference;
  }
  double total = 0;
  for (const double sum : sums) total += sum;
  return std::sqrt(total / static_cast<double>(pixels));
}

// ‖q̂ − r‖² = Σq̂² − 2·Σq̂r + Σr² in exact integers: what is lost is only the query's own rounding.
inline void offer_bytes(const DistanceScan& s, std::int64_t query, std::int64_t row, std::int64_t dot,
                        std::int64_t row_square, const Screen& screen) {
  const float square = static_cast<float>(s.query_squares[query] - 2 * dot + row_square);
  offer_distance(s, query, row, square / (65025.0f * s.pixels), amg::kDistanceSlack, screen);
}

// Visits [0, pixels) in segments whose products int32 can sum.
template <class Visit>
inline void for_segments(std::int64_t pixels, Visit visit) {
  for (std::int64_t begin = 0; begin < pixels; begin += amg::kSegment)
    visit(begin, pixels - begin < amg::kSegment ? pixels : begin + amg::kSegment);
}

template <class V>
DistanceKernels make_kernels(amg::DistanceScanFunction scan_bytes) {
  return {scan_bytes, scan_floats<V>, exact_distance<V>};
}

}  // namespace
