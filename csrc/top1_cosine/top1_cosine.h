// Exact cosine search by screening with bounds; see kernels/top1_cosine/README.md.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace amg {

struct Screen;

constexpr std::int64_t kLanes = 16;        // queries side by side in the packed layout
constexpr std::int64_t kPadding = 64;      // query rows are padded with zeros to a multiple of this
constexpr std::int64_t kPackedFrom = 9;    // queries from which lanes hold queries instead of dimensions
constexpr double kMinNorm = 1e-150;        // the squares of a query below this lose digits, then vanish
constexpr float kRoundingSlack = 2e-6f;    // per unit of row norm: fp32 roundings of the score, and ties in fp32

// What the kernels screen: rows, or their int8 codes, against prepared queries.
struct CosineScan {
  const void* rows;  // [count, dimension] of dtype
  DType dtype;
  std::int64_t count, dimension;
  const std::int8_t* codes;  // [count, dimension], or null: screen on the rows
  const float* scales;       // [count]
  const float* errors;       // [count], ‖r − scale·code‖ ≤ error
  std::int64_t queries;
  std::int64_t padded;             // dimension, up to a multiple of kPadding
  const float* unit;               // [queries, padded], normalised
  const std::int8_t* query_codes;  // [queries, padded]
  const std::uint8_t* packed;      // [groups of kLanes queries][padded / 4][kLanes][4], codes + 128
  const float* query_scales;       // these four are padded to a multiple of kLanes
  const float* query_errors;       // slack per unit of ‖r̂‖: ‖q − q̂‖ and the rounding
  const float* query_reach;        // slack per unit of the row's scale, from ‖r̂‖ ≤ scale·128·√dimension
  const std::int32_t* query_sums;  // Σ codes
};

// Screens rows [begin, end), offering what may be among the best.
using ScanFunction = void (*)(const CosineScan&, std::int64_t begin, std::int64_t end, const Screen&);
// ⟨query, row⟩ in double, in an order that is the same at every level.
using DotFunction = double (*)(const double* query, const void* row, DType dtype, std::int64_t dimension);
// Writes code, scale and error of one row; false if the row is not finite.
using EncodeFunction = bool (*)(const void* row, DType dtype, std::int64_t dimension, std::int8_t* code, float* scale,
                                float* error);

struct CosineKernels {
  ScanFunction scan_rows, scan_codes;
  DotFunction dot;
  EncodeFunction encode;
};

namespace scalar { CosineKernels cosine_kernels(); }
namespace avx2 { CosineKernels cosine_kernels(); }
namespace avx512 { CosineKernels cosine_kernels(); }

// One search. All pointers are contiguous tensors; codes, scales and errors are null or given together.
struct CosineArgs {
  const double* queries;  // [batch, dimension]
  const void* rows;
  const std::int8_t* codes;
  const float* scales;
  const float* errors;
  float* similarity;  // [batch, k]
  std::int64_t* row;  // [batch, k]
  std::int64_t batch, count, dimension, k;
  DType dtype;
  int num_threads;
};

// Similarity NaN and row 0 for a query that is not finite or shorter than kMinNorm, or where a row makes a score NaN.
void topk_cosine(const CosineArgs& args);

// Encodes [count, dimension] rows; throws std::invalid_argument naming the first row that is not finite.
void encode_rows(const void* rows, DType dtype, std::int64_t count, std::int64_t dimension, std::int8_t* codes,
                 float* scales, float* errors, int num_threads);

}  // namespace amg
