// Screening on the rows themselves, exact scores and encoding, written once over a vector type.
// No standard containers or algorithms here: their instantiations would be shared between levels.
#pragma once

#include <cmath>
#include <cstdint>

#include "search/offer.h"
#include "simd/floats.h"
#include "simd/tail.h"
#include "top1_cosine/top1_cosine.h"

namespace {

using amg::BFloat;
using amg::CosineKernels;
using amg::CosineScan;
using amg::DType;
using amg::Half;
using amg::Screen;

constexpr float kUnit = 5.9604645e-8f;  // 2^-24, the relative error of one fp32 rounding
constexpr float kSmallest = 1.2e-38f;   // the most that one square or product loses to underflow

// Scores of R rows against Q queries. |score − exact| ≤ (dimension·2^-24 + slack)·‖r‖ for a unit query.
template <class V, class T, int R, int Q>
void row_tile(const CosineScan& s, std::int64_t first_row, std::int64_t first_query, const Screen& screen) {
  typename V::Reg dots[Q][R], squares[R];
  for (int r = 0; r < R; ++r) squares[r] = V::zero();
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < R; ++r) dots[q][r] = V::zero();
  const T* rows = static_cast<const T*>(s.rows) + first_row * s.dimension;
  const float* queries = s.unit + first_query * s.padded;
  for (std::int64_t i = 0; i < s.dimension; i += V::width) {
    typename V::Reg row[R];
    for (int r = 0; r < R; ++r) {
      row[r] = load_some<V>(rows + r * s.dimension + i, s.dimension - i);
      squares[r] = V::fma(row[r], row[r], squares[r]);
    }
    for (int q = 0; q < Q; ++q) {
      const auto query = V::load(queries + q * s.padded + i);
      for (int r = 0; r < R; ++r) dots[q][r] = V::fma(query, row[r], dots[q][r]);
    }
  }
  const float relative = (s.dimension + 8) * kUnit + amg::kRoundingSlack;
  for (int r = 0; r < R; ++r) {
    const float slack = relative * std::sqrt(V::reduce(squares[r]) + s.dimension * kSmallest);
    for (int q = 0; q < Q; ++q)
      screen_score(screen, first_query + q, first_row + r, V::reduce(dots[q][r]), slack);
  }
}

template <class V, class T, int R>
void rows_against_all(const CosineScan& s, std::int64_t row, const Screen& screen) {
  std::int64_t query = 0;
  for (; query + 4 <= s.queries; query += 4) row_tile<V, T, R, 4>(s, row, query, screen);
  for (; query < s.queries; ++query) row_tile<V, T, R, 1>(s, row, query, screen);
}

template <class V, class T>
void scan_typed_rows(const CosineScan& s, std::int64_t begin, std::int64_t end, const Screen& screen) {
  std::int64_t row = begin;
  for (; row + V::row_tile <= end; row += V::row_tile) rows_against_all<V, T, V::row_tile>(s, row, screen);
  for (; row < end; ++row) rows_against_all<V, T, 1>(s, row, screen);
}

template <class V>
void scan_rows(const CosineScan& s, std::int64_t begin, std::int64_t end, const Screen& screen) {
  switch (s.dtype) {
    case DType::f16: return scan_typed_rows<V, Half>(s, begin, end, screen);
    case DType::bf16: return scan_typed_rows<V, BFloat>(s, begin, end, screen);
    default: return scan_typed_rows<V, float>(s, begin, end, screen);
  }
}

template <class V>
double exact_dot(const double* query, const void* row, DType dtype, std::int64_t dimension) {
  double sums[kExactLanes] = {};
  float values[kExactLanes];
  std::int64_t i = 0;
  for (; i + kExactLanes <= dimension; i += kExactLanes) {
    load_floats<V>(row, dtype, i, dimension, values);
    for (int lane = 0; lane < kExactLanes; ++lane) sums[lane] += query[i + lane] * static_cast<double>(values[lane]);
  }
  if (i < dimension) load_floats<V>(row, dtype, i, dimension, values);
  for (int lane = 0; i + lane < dimension; ++lane) sums[lane] += query[i + lane] * static_cast<double>(values[lane]);
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

// The float not below value·(1 + 1e-9): an upper bound that the rounding of the sum cannot break.
inline float round_up(double value) {
  const float rounded = static_cast<float>(value * (1 + 1e-9));
  return rounded > 0 ? std::nextafterf(rounded, INFINITY) : rounded;
}

template <class V>
bool encode_row(const void* row, DType dtype, std::int64_t dimension, std::int8_t* code, float* scale, float* error) {
  constexpr double kCodeMax = 127, kRound = 6755399441055744.0;  // 1.5·2^52: adding it rounds to an integer
  float values[kExactLanes];
  double largest = 0, square = 0;
  for (std::int64_t i = 0; i < dimension; i += kExactLanes) {
    load_floats<V>(row, dtype, i, dimension, values);
    for (const float value : values) {
      const double magnitude = std::fabs(static_cast<double>(value));
      if (!(magnitude <= 3.5e38)) return false;
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  *scale = static_cast<float>(largest / kCodeMax);
  const double step = *scale, divisor = *scale > 0 ? step : 1.0;
  for (std::int64_t i = 0; i < dimension; i += kExactLanes) {
    load_floats<V>(row, dtype, i, dimension, values);
    for (std::int64_t lane = 0; lane < kExactLanes && i + lane < dimension; ++lane) {
      double rounded = (values[lane] / divisor + kRound) - kRound;
      rounded = rounded > kCodeMax ? kCodeMax : rounded < -kCodeMax ? -kCodeMax : rounded;
      code[i + lane] = static_cast<std::int8_t>(rounded);
      const double lost = values[lane] - rounded * step;
      square += lost * lost;
    }
  }
  *error = round_up(std::sqrt(square));
  return true;
}

template <class V>
CosineKernels make_kernels(amg::ScanFunction scan_codes) {
  return {scan_rows<V>, scan_codes, exact_dot<V>, encode_row<V>, nullptr, nullptr};
}

// Shared end of the code kernels: bounds of one row's score from its integer dot product with query q.
struct RowBounds {
  float scale, error, norm;  // norm ≥ ‖r̂‖
};

inline RowBounds row_bounds(const CosineScan& s, std::int64_t row, std::int64_t code_squares) {
  const float norm = s.scales[row] * std::sqrt(static_cast<float>(code_squares)) * (1 + 1e-6f);
  return {s.scales[row], s.errors[row] * (1 + 1e-6f) + 1e-30f, norm};
}

inline void offer_code(const CosineScan& s, const RowBounds& b, std::int64_t query, std::int64_t row, std::int32_t dot,
                       const Screen& screen) {
  const float score = static_cast<float>(dot) * (b.scale * s.query_scales[query]);
  screen_score(screen, query, row, score, b.error + b.norm * s.query_errors[query]);
}

}  // namespace
